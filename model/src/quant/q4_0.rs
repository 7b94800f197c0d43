//! Q4_0: blocks of 32 nibbles with one f16 scale, `w = d * (q - 8)`. Bytes: `d: f16, nibbles: [u8; 16]`.

use super::{BlockFormat, f16_to_f32, f32_to_f16, nibbles, pack_nibbles};

pub(super) struct Q4_0;

impl BlockFormat<32, 18> for Q4_0 {
    fn decode(block: &[u8; 18]) -> [f32; 32] {
        let [d0, d1, qs @ ..] = block;
        let d = f16_to_f32(u16::from_le_bytes([*d0, *d1]));
        nibbles(qs).map(|q| (f32::from(q) - 8.0) * d)
    }

    fn encode(values: &[f32; 32]) -> [u8; 18] {
        // The value of largest magnitude, with its sign, becomes code 0 (= -8).
        let mut amax = 0.0f32;
        let mut extreme = 0.0f32;
        for &value in values {
            if amax < value.abs() {
                amax = value.abs();
                extreme = value;
            }
        }
        let d = extreme / -8.0;
        let id = if d != 0.0 { 1.0 / d } else { 0.0 };
        // Truncation after adding 8.5 is the reference's rounding; the sum is in 0.5..=16.5.
        let codes = values.map(|value| ((value * id + 8.5) as u8).min(15));
        let mut block = [0; 18];
        let [d0, d1, qs @ ..] = &mut block;
        [*d0, *d1] = f32_to_f16(d).to_le_bytes();
        *qs = pack_nibbles(&codes);
        block
    }
}
