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
        let high = two_bits(upper);
        let low = |i: usize| qs[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        Parts {
            d: u16::from_le_bytes([d[0], d[1]]),
            codes: core::array::from_fn(|i| low(i) | high[i] << 4),
            scales: *scales,
            ..Parts::ZERO
        }
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
