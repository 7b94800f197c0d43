//! Q4_1: blocks of 32 nibbles with an f16 scale and an f16 minimum, `w = d * q + m`.
//! Bytes: `d: f16, m: f16, nibbles: [u8; 16]`.

use super::parts::{nibbles, pack_nibbles};
use super::{BlockFormat, Parts, f32_to_f16};
use crate::kernel::DType;

/// The format of `block_q4_1`.
pub struct Q4_1;

impl BlockFormat<32, 20> for Q4_1 {
    const DTYPE: DType = DType::Q4_1;

    fn take_apart(block: &[u8; 20]) -> Parts<32> {
        let [d0, d1, m0, m1, qs @ ..] = block;
        let (d, m) = (u16::from_le_bytes([*d0, *d1]), u16::from_le_bytes([*m0, *m1]));
        Parts { d, m, codes: nibbles(qs), ..Parts::ZERO }
    }

    fn put_together(parts: &Parts<32>) -> [u8; 20] {
        let mut block = [0; 20];
        let [d0, d1, m0, m1, qs @ ..] = &mut block;
        [*d0, *d1] = parts.d.to_le_bytes();
        [*m0, *m1] = parts.m.to_le_bytes();
        *qs = pack_nibbles(&parts.codes);
        block
    }

    fn quantise(values: &[f32; 32]) -> Parts<32> {
        let (d, m, codes) = from_span(values, 15);
        Parts { d: f32_to_f16(d), m: f32_to_f16(m), codes, ..Parts::ZERO }
    }
}

/// Scale, minimum and codes of a type with minima as ggml chooses them: codes 0 and `last` are the least and the largest
/// value.
pub(super) fn from_span(values: &[f32; 32], last: u8) -> (f32, f32, [u8; 32]) {
    let mut min = f32::MAX;
    let mut max = -f32::MAX;
    for &value in values {
        if value < min {
            min = value;
        }
        if value > max {
            max = value;
        }
    }
    let d = (max - min) / f32::from(last);
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, min, values.map(|value| (((value - min) * id + 0.5) as u8).min(last)))
}
