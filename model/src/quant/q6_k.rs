//! Q6_K: super-blocks of 256 6-bit codes, for each 16 an `i8` scale, `w = d * sc * (q - 32)`.
//! Bytes: `nibbles: [u8; 128], upper bits: [u8; 64], scales: [i8; 16], d: f16`. Of the `h`-th 128 elements, byte `l < 64`
//! of 64 nibble bytes holds elements `l` (low) and `l + 64` (high); byte `l < 32` of 32 bytes holds the upper two bits of
//! elements `l`, `l + 32`, `l + 64`, `l + 96`, from the low bits up (the order of Q2_K's codes).

use super::q2_k::{pack_two_bits, two_bits};
use super::{BlockFormat, Parts};
use crate::kernel::DType;
use crate::layout::BlockLayout;

/// The format of `block_q6_K`.
pub struct Q6K;

const LAYOUT: BlockLayout = BlockLayout::of(DType::Q6_K).unwrap();

impl BlockFormat<256, 210> for Q6K {
    const DTYPE: DType = DType::Q6_K;

    fn take_apart(block: &[u8; 210]) -> Parts<256> {
        let (qs, rest) = block.split_first_chunk::<128>().unwrap();
        let (upper, rest) = rest.split_first_chunk::<64>().unwrap();
        let (scales, d) = rest.split_first_chunk::<16>().unwrap();
        let mut codes = two_bits(upper);
        for (codes, qs) in codes.as_chunks_mut::<128>().0.iter_mut().zip(qs.as_chunks::<64>().0) {
            let (first, second) = codes.split_at_mut(64);
            for ((first, second), q) in first.iter_mut().zip(second).zip(qs) {
                *first = *first << 4 | q & 15;
                *second = *second << 4 | q >> 4;
            }
        }
        Parts { d: u16::from_le_bytes([d[0], d[1]]), codes, scales: *scales, ..Parts::ZERO }
    }

    fn put_together(parts: &Parts<256>) -> [u8; 210] {
        let nibbles: [u8; 128] = core::array::from_fn(|i| {
            let first = i / 64 * 128 + i % 64;
            parts.codes[first] & 15 | parts.codes[first + 64] << 4
        });
        let mut block = [0; 210];
        block[..128].copy_from_slice(&nibbles);
        block[128..192].copy_from_slice(&pack_two_bits(&parts.codes.map(|code| code >> 4)));
        block[192..208].copy_from_slice(&parts.scales);
        block[208..].copy_from_slice(&parts.d.to_le_bytes());
        block
    }

    fn quantise(values: &[f32; 256]) -> Parts<256> {
        Parts::quantise_symmetric(values, &LAYOUT, 127)
    }
}
