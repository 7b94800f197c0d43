//! Q3_K: super-blocks of 256 3-bit codes, for each 16 a 6-bit scale, `w = d * (sc - 32) * (q - 4)`.
//! Bytes: `third bits: [u8; 32], low bits: [u8; 64], scales: [u8; 12], d: f16`. Low bits as in Q2_K; bit `j` of byte `l`
//! of the third bits is element `32 j + l`. Bytes 0..8 of the scales hold the low nibbles of scales 0..8 (low) and 8..16
//! (high), byte `8 + i` the upper two bits of scales `i`, `i + 4`, `i + 8`, `i + 12`, from the low bits up.

use super::q2_k::{add_bits, pack_two_bits, take_bits, two_bits};
use super::{BlockFormat, Parts};
use crate::kernel::DType;
use crate::layout::BlockLayout;

/// The format of `block_q3_K`.
pub struct Q3K;

const LAYOUT: BlockLayout = BlockLayout::of(DType::Q3_K).unwrap();

/// Scales in the file are 6 bits without sign, this much above what they mean.
const SCALE_OFFSET: u8 = 32;

fn scales(bytes: &[u8; 12]) -> [u8; 16] {
    core::array::from_fn(|i| {
        let low = if i < 8 { bytes[i] & 15 } else { bytes[i - 8] >> 4 };
        let high = bytes[8 + i % 4] >> (i / 4 * 2) & 3;
        (low | high << 4).wrapping_sub(SCALE_OFFSET)
    })
}

fn pack_scales(scales: &[u8; 16]) -> [u8; 12] {
    let scales = scales.map(|scale| scale.wrapping_add(SCALE_OFFSET));
    core::array::from_fn(|i| {
        if i < 8 {
            return scales[i] & 15 | (scales[i + 8] & 15) << 4;
        }
        (0..4).fold(0, |byte, j| byte | (scales[i - 8 + 4 * j] >> 4 & 3) << (2 * j))
    })
}

impl BlockFormat<256, 110> for Q3K {
    const DTYPE: DType = DType::Q3_K;

    fn take_apart(block: &[u8; 110]) -> Parts<256> {
        let (third, rest) = block.split_first_chunk::<32>().unwrap();
        let (qs, rest) = rest.split_first_chunk::<64>().unwrap();
        let (packed_scales, d) = rest.split_first_chunk::<12>().unwrap();
        let mut codes = two_bits(qs);
        add_bits(&mut codes, third, 2);
        Parts { d: u16::from_le_bytes([d[0], d[1]]), codes, scales: scales(packed_scales), ..Parts::ZERO }
    }

    fn put_together(parts: &Parts<256>) -> [u8; 110] {
        let mut block = [0; 110];
        block[..32].copy_from_slice(&take_bits(&parts.codes, 2));
        block[32..96].copy_from_slice(&pack_two_bits(&parts.codes));
        block[96..108].copy_from_slice(&pack_scales(&parts.scales));
        block[108..].copy_from_slice(&parts.d.to_le_bytes());
        block
    }

    fn quantise(values: &[f32; 256]) -> Parts<256> {
        Parts::quantise_symmetric(values, &LAYOUT, 31)
    }
}
