//! Q5_0: blocks of 32 5-bit codes with one f16 scale, `w = d * (q - 16)`.
//! Bytes: `d: f16, fifth bits: u32, nibbles: [u8; 16]`.

use super::parts::{five_bits, pack_fifth_bits, pack_nibbles};
use super::q4_0::from_extreme;
use super::{BlockFormat, Parts, f32_to_f16};
use crate::kernel::DType;

/// The format of `block_q5_0`.
pub struct Q5_0;

impl BlockFormat<32, 22> for Q5_0 {
    const DTYPE: DType = DType::Q5_0;

    fn take_apart(block: &[u8; 22]) -> Parts<32> {
        let [d0, d1, h0, h1, h2, h3, qs @ ..] = block;
        let codes = five_bits(qs, [*h0, *h1, *h2, *h3]);
        Parts { d: u16::from_le_bytes([*d0, *d1]), codes, ..Parts::ZERO }
    }

    fn put_together(parts: &Parts<32>) -> [u8; 22] {
        let mut block = [0; 22];
        let [d0, d1, h0, h1, h2, h3, qs @ ..] = &mut block;
        [*d0, *d1] = parts.d.to_le_bytes();
        [*h0, *h1, *h2, *h3] = pack_fifth_bits(&parts.codes);
        *qs = pack_nibbles(&parts.codes);
        block
    }

    fn quantise(values: &[f32; 32]) -> Parts<32> {
        let (d, codes) = from_extreme(values, 16.0);
        Parts { d: f32_to_f16(d), codes, ..Parts::ZERO }
    }
}
