//! Q2_K: super-blocks of 256 2-bit codes, for each 16 a 4-bit scale and a 4-bit minimum, `w = d * sc * q - dmin * mn`.
//! Bytes: `[sc | mn << 4; 16], codes: [u8; 64], d: f16, dmin: f16`. Byte `l` of the `h`-th 32 code bytes holds elements
//! `128 h + l`, `+ 32`, `+ 64`, `+ 96`, from the low bits up.

use super::{BlockFormat, Parts};
use crate::kernel::DType;
use crate::layout::BlockLayout;

/// The format of `block_q2_K`.
pub struct Q2K;

const LAYOUT: BlockLayout = BlockLayout::of(DType::Q2_K).unwrap();

/// 256 codes of two bits in the order of Q2_K and Q3_K.
#[inline]
pub(super) fn two_bits(qs: &[u8; 64]) -> [u8; 256] {
    let mut codes = [0; 256];
    for (codes, qs) in codes.as_chunks_mut::<128>().0.iter_mut().zip(qs.as_chunks::<32>().0) {
        for (j, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, q) in codes.iter_mut().zip(qs) {
                *code = q >> (2 * j) & 3;
            }
        }
    }
    codes
}

/// Adds to 256 codes a bit each, moved to bit `to`: bit `j` of byte `l` belongs to element `32 j + l`.
#[inline]
pub(super) fn add_bits(codes: &mut [u8; 256], bits: &[u8; 32], to: u32) {
    for (j, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (code, bits) in codes.iter_mut().zip(bits) {
            *code |= (bits >> j & 1) << to;
        }
    }
}

/// The inverse of [`add_bits`]: bit `from` of every code.
pub(super) fn take_bits(codes: &[u8; 256], from: u32) -> [u8; 32] {
    core::array::from_fn(|l| (0..8).fold(0, |byte, j| byte | (codes[32 * j + l] >> from & 1) << j))
}

/// The inverse of [`two_bits`]; only the low two bits of a code count.
pub(super) fn pack_two_bits(codes: &[u8; 256]) -> [u8; 64] {
    core::array::from_fn(|i| {
        let first = i / 32 * 128 + i % 32;
        (0..4).fold(0, |byte, j| byte | (codes[first + 32 * j] & 3) << (2 * j))
    })
}

impl BlockFormat<256, 84> for Q2K {
    const DTYPE: DType = DType::Q2_K;

    fn take_apart(block: &[u8; 84]) -> Parts<256> {
        let (pairs, rest) = block.split_first_chunk::<16>().unwrap();
        let (qs, rest) = rest.split_first_chunk::<64>().unwrap();
        // The minimum is subtracted in the file and added here.
        let m = u16::from_le_bytes([rest[2], rest[3]]) ^ 0x8000;
        Parts {
            d: u16::from_le_bytes([rest[0], rest[1]]),
            m,
            codes: two_bits(qs),
            scales: pairs.map(|pair| pair & 15),
            minima: pairs.map(|pair| pair >> 4),
        }
    }

    fn put_together(parts: &Parts<256>) -> [u8; 84] {
        let mut block = [0; 84];
        for ((pair, scale), minimum) in block.iter_mut().zip(parts.scales).zip(parts.minima) {
            *pair = scale | minimum << 4;
        }
        block[16..80].copy_from_slice(&pack_two_bits(&parts.codes));
        block[80..82].copy_from_slice(&parts.d.to_le_bytes());
        block[82..84].copy_from_slice(&(parts.m ^ 0x8000).to_le_bytes());
        block
    }

    fn quantise(values: &[f32; 256]) -> Parts<256> {
        Parts::quantise_with_minima(values, &LAYOUT, 15)
    }
}
