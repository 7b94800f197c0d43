//! Q4_1: blocks of 32 nibbles with an f16 scale and an f16 minimum, `w = d * q + m`.
//! Bytes: `d: f16, m: f16, nibbles: [u8; 16]`.

use super::{BlockFormat, f16_to_f32, f32_to_f16, nibbles, pack_nibbles};

pub(super) struct Q4_1;

impl BlockFormat<32, 20> for Q4_1 {
    fn decode(block: &[u8; 20]) -> [f32; 32] {
        let [d0, d1, m0, m1, qs @ ..] = block;
        let d = f16_to_f32(u16::from_le_bytes([*d0, *d1]));
        let m = f16_to_f32(u16::from_le_bytes([*m0, *m1]));
        nibbles(qs).map(|q| f32::from(q) * d + m)
    }

    fn encode(values: &[f32; 32]) -> [u8; 20] {
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
        let d = (max - min) / 15.0;
        let id = if d != 0.0 { 1.0 / d } else { 0.0 };
        let codes = values.map(|value| (((value - min) * id + 0.5) as u8).min(15));
        let mut block = [0; 20];
        let [d0, d1, m0, m1, qs @ ..] = &mut block;
        [*d0, *d1] = f32_to_f16(d).to_le_bytes();
        [*m0, *m1] = f32_to_f16(min).to_le_bytes();
        *qs = pack_nibbles(&codes);
        block
    }
}
