//! Formats without blocks: F32, F16 and BF16, little-endian.

use super::Storage;

/// Exact value of an IEEE 754 binary16 given by its bits.
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// Bits of the binary16 nearest to `value` (ties to even; overflow gives infinity).
pub fn f32_to_f16(value: f32) -> u16 {
    half::f16::from_f32(value).to_bits()
}

/// Exact value of a bfloat16 given by its bits.
pub fn bf16_to_f32(bits: u16) -> f32 {
    half::bf16::from_bits(bits).to_f32()
}

/// Bits of the bfloat16 nearest to `value` (ties to even).
pub fn f32_to_bf16(value: f32) -> u16 {
    half::bf16::from_f32(value).to_bits()
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Storage<1, 4> for F32 {
    fn decode(block: &[u8; 4]) -> [f32; 1] {
        [f32::from_le_bytes(*block)]
    }
    fn encode([value]: &[f32; 1]) -> [u8; 4] {
        value.to_le_bytes()
    }
}

impl Storage<1, 2> for F16 {
    fn decode(block: &[u8; 2]) -> [f32; 1] {
        [f16_to_f32(u16::from_le_bytes(*block))]
    }
    fn encode([value]: &[f32; 1]) -> [u8; 2] {
        f32_to_f16(*value).to_le_bytes()
    }
}

impl Storage<1, 2> for Bf16 {
    fn decode(block: &[u8; 2]) -> [f32; 1] {
        [bf16_to_f32(u16::from_le_bytes(*block))]
    }
    fn encode([value]: &[f32; 1]) -> [u8; 2] {
        f32_to_bf16(*value).to_le_bytes()
    }
}
