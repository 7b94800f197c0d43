//! Q4_0: blocks of 32 nibbles with one f16 scale, `w = d * (q - 8)`. Bytes: `d: f16, nibbles: [u8; 16]`.

use super::parts::{nibbles, pack_nibbles};
use super::{BlockFormat, Parts, f32_to_f16};
use crate::kernel::DType;

/// The format of `block_q4_0`.
pub struct Q4_0;

impl BlockFormat<32, 18> for Q4_0 {
    const DTYPE: DType = DType::Q4_0;

    fn take_apart(block: &[u8; 18]) -> Parts<32> {
        let [d0, d1, qs @ ..] = block;
        Parts { d: u16::from_le_bytes([*d0, *d1]), codes: nibbles(qs), ..Parts::ZERO }
    }

    fn put_together(parts: &Parts<32>) -> [u8; 18] {
        let mut block = [0; 18];
        let [d0, d1, qs @ ..] = &mut block;
        [*d0, *d1] = parts.d.to_le_bytes();
        *qs = pack_nibbles(&parts.codes);
        block
    }

    fn quantise(values: &[f32; 32]) -> Parts<32> {
        let (d, codes) = from_extreme(values, 8.0);
        Parts { d: f32_to_f16(d), codes, ..Parts::ZERO }
    }
}

/// Scale and codes of a type without minima as ggml chooses them: the value of largest magnitude, with its sign, gets code
/// 0, which is `-offset`.
pub(super) fn from_extreme(values: &[f32; 32], offset: f32) -> (f32, [u8; 32]) {
    let mut amax = 0.0f32;
    let mut extreme = 0.0f32;
    for &value in values {
        if amax < value.abs() {
            amax = value.abs();
            extreme = value;
        }
    }
    let d = extreme / -offset;
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    // Truncation after adding the offset and a half is the reference's rounding; the sum is at least 0.5.
    let last = 2.0 * offset - 1.0;
    (d, values.map(|value| ((value * id + (offset + 0.5)) as u8).min(last as u8)))
}
