//! Q8_0: blocks of 32 `i8` with one f16 scale, `w = d * q`. Bytes: `d: f16, q: [i8; 32]`.

use super::{BlockFormat, Parts, f32_to_f16};
use crate::kernel::DType;

/// The format of `block_q8_0`.
pub struct Q8_0;

impl BlockFormat<32, 34> for Q8_0 {
    const DTYPE: DType = DType::Q8_0;

    fn take_apart(block: &[u8; 34]) -> Parts<32> {
        let [d0, d1, codes @ ..] = block;
        Parts { d: u16::from_le_bytes([*d0, *d1]), codes: *codes, ..Parts::ZERO }
    }

    fn put_together(parts: &Parts<32>) -> [u8; 34] {
        let mut block = [0; 34];
        let [d0, d1, codes @ ..] = &mut block;
        [*d0, *d1] = parts.d.to_le_bytes();
        *codes = parts.codes;
        block
    }

    fn quantise(values: &[f32; 32]) -> Parts<32> {
        let amax = values.iter().fold(0.0f32, |amax, v| amax.max(v.abs()));
        let d = amax / 127.0;
        let id = if d != 0.0 { 1.0 / d } else { 0.0 };
        // Half away from zero, as C's roundf; |value * id| <= 127 up to rounding, so the cast keeps the value.
        let codes = values.map(|value| (libm::roundf(value * id) as i8).cast_unsigned());
        Parts { d: f32_to_f16(d), codes, ..Parts::ZERO }
    }
}
