//! Q8_0: blocks of 32 `i8` with one f16 scale, `w = d * q`. Bytes: `d: f16, q: [i8; 32]`.

use super::{BlockFormat, f16_to_f32, f32_to_f16};

pub(super) struct Q8_0;

impl BlockFormat<32, 34> for Q8_0 {
    fn decode(block: &[u8; 34]) -> [f32; 32] {
        let [d0, d1, qs @ ..] = block;
        let d = f16_to_f32(u16::from_le_bytes([*d0, *d1]));
        core::array::from_fn(|i| f32::from(qs[i].cast_signed()) * d)
    }

    fn encode(values: &[f32; 32]) -> [u8; 34] {
        let amax = values.iter().fold(0.0f32, |amax, v| amax.max(v.abs()));
        let d = amax / 127.0;
        let id = if d != 0.0 { 1.0 / d } else { 0.0 };
        let mut block = [0; 34];
        let [d0, d1, qs @ ..] = &mut block;
        [*d0, *d1] = f32_to_f16(d).to_le_bytes();
        for (q, value) in qs.iter_mut().zip(values) {
            // Half away from zero, as C's roundf; |value * id| <= 127 up to rounding, so the cast keeps the value.
            *q = (libm::roundf(value * id) as i8).cast_unsigned();
        }
        block
    }
}
