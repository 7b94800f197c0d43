//! Q4_K: super-blocks of 256 nibbles, for each 32 a 6-bit scale and a 6-bit minimum, `w = d * sc * q - dmin * mn`.
//! Bytes: `d: f16, dmin: f16, scales and minima: [u8; 12], nibbles: [u8; 128]`. Byte `l` of the `c`-th 32 nibble bytes
//! holds elements `64 c + l` (low) and `64 c + 32 + l` (high).

use super::parts::{pack_six_bit_pairs, six_bit_pairs};
use super::{BlockFormat, Parts};
use crate::kernel::DType;
use crate::layout::BlockLayout;

/// The format of `block_q4_K`.
pub struct Q4K;

const LAYOUT: BlockLayout = BlockLayout::of(DType::Q4_K).unwrap();

/// 256 nibbles in the order of Q4_K and Q5_K.
#[inline]
pub(super) fn four_bits(qs: &[u8; 128]) -> [u8; 256] {
    let mut codes = [0; 256];
    for (codes, qs) in codes.as_chunks_mut::<64>().0.iter_mut().zip(qs.as_chunks::<32>().0) {
        let (low, high) = codes.split_at_mut(32);
        for ((low, high), q) in low.iter_mut().zip(high).zip(qs) {
            *low = q & 15;
            *high = q >> 4;
        }
    }
    codes
}

/// The inverse of [`four_bits`]; only the low four bits of a code count.
pub(super) fn pack_four_bits(codes: &[u8; 256]) -> [u8; 128] {
    core::array::from_fn(|i| {
        let first = i / 32 * 64 + i % 32;
        codes[first] & 15 | codes[first + 32] << 4
    })
}

impl BlockFormat<256, 144> for Q4K {
    const DTYPE: DType = DType::Q4_K;

    fn take_apart(block: &[u8; 144]) -> Parts<256> {
        let ([d0, d1, m0, m1], rest) = block.split_first_chunk().unwrap();
        let (pairs, qs) = rest.split_first_chunk().unwrap();
        let (scales, minima) = six_bit_pairs(pairs);
        Parts {
            d: u16::from_le_bytes([*d0, *d1]),
            // The minimum is subtracted in the file and added here.
            m: u16::from_le_bytes([*m0, *m1]) ^ 0x8000,
            codes: four_bits(qs.first_chunk().unwrap()),
            scales,
            minima,
        }
    }

    fn put_together(parts: &Parts<256>) -> [u8; 144] {
        let mut block = [0; 144];
        block[..2].copy_from_slice(&parts.d.to_le_bytes());
        block[2..4].copy_from_slice(&(parts.m ^ 0x8000).to_le_bytes());
        block[4..16].copy_from_slice(&pack_six_bit_pairs(&parts.scales, &parts.minima));
        block[16..].copy_from_slice(&pack_four_bits(&parts.codes));
        block
    }

    fn quantise(values: &[f32; 256]) -> Parts<256> {
        Parts::quantise_with_minima(values, &LAYOUT, 63)
    }
}
