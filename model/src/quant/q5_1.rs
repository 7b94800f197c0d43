//! Q5_1: blocks of 32 5-bit codes with an f16 scale and an f16 minimum, `w = d * q + m`.
//! Bytes: `d: f16, m: f16, fifth bits: u32, nibbles: [u8; 16]`.

use super::parts::{five_bits, pack_fifth_bits, pack_nibbles};
use super::q4_1::from_span;
use super::{BlockFormat, Parts, f32_to_f16};
use crate::kernel::DType;

/// The format of `block_q5_1`.
pub struct Q5_1;

impl BlockFormat<32, 24> for Q5_1 {
    const DTYPE: DType = DType::Q5_1;

    fn take_apart(block: &[u8; 24]) -> Parts<32> {
        let [d0, d1, m0, m1, h0, h1, h2, h3, qs @ ..] = block;
        let codes = five_bits(qs, [*h0, *h1, *h2, *h3]);
        Parts { d: u16::from_le_bytes([*d0, *d1]), m: u16::from_le_bytes([*m0, *m1]), codes, ..Parts::ZERO }
    }

    fn put_together(parts: &Parts<32>) -> [u8; 24] {
        let mut block = [0; 24];
        let [d0, d1, m0, m1, h0, h1, h2, h3, qs @ ..] = &mut block;
        [*d0, *d1] = parts.d.to_le_bytes();
        [*m0, *m1] = parts.m.to_le_bytes();
        [*h0, *h1, *h2, *h3] = pack_fifth_bits(&parts.codes);
        *qs = pack_nibbles(&parts.codes);
        block
    }

    fn quantise(values: &[f32; 32]) -> Parts<32> {
        let (d, m, codes) = from_span(values, 31);
        Parts { d: f32_to_f16(d), m: f32_to_f16(m), codes, ..Parts::ZERO }
    }
}
