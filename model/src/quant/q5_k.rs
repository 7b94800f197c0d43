//! Q5_K: super-blocks of 256 5-bit codes, for each 32 a 6-bit scale and a 6-bit minimum, `w = d * sc * q - dmin * mn`.
//! Bytes: `d: f16, dmin: f16, scales and minima: [u8; 12], fifth bits: [u8; 32], nibbles: [u8; 128]`. Nibbles and scales
//! as in Q4_K; bit `j` of byte `l` of the fifth bits is element `32 j + l`.

use super::parts::{pack_six_bit_pairs, six_bit_pairs};
use super::q2_k::{add_bits, take_bits};
use super::q4_k::{four_bits, pack_four_bits};
use super::{BlockFormat, Parts};
use crate::kernel::DType;
use crate::layout::BlockLayout;

/// The format of `block_q5_K`.
pub struct Q5K;

const LAYOUT: BlockLayout = BlockLayout::of(DType::Q5_K).unwrap();

impl BlockFormat<256, 176> for Q5K {
    const DTYPE: DType = DType::Q5_K;

    fn take_apart(block: &[u8; 176]) -> Parts<256> {
        let ([d0, d1, m0, m1], rest) = block.split_first_chunk().unwrap();
        let (pairs, rest) = rest.split_first_chunk().unwrap();
        let (fifth, qs) = rest.split_first_chunk::<32>().unwrap();
        let mut codes = four_bits(qs.first_chunk().unwrap());
        add_bits(&mut codes, fifth, 4);
        let (scales, minima) = six_bit_pairs(pairs);
        Parts {
            d: u16::from_le_bytes([*d0, *d1]),
            // The minimum is subtracted in the file and added here.
            m: u16::from_le_bytes([*m0, *m1]) ^ 0x8000,
            codes,
            scales,
            minima,
        }
    }

    fn put_together(parts: &Parts<256>) -> [u8; 176] {
        let mut block = [0; 176];
        block[..2].copy_from_slice(&parts.d.to_le_bytes());
        block[2..4].copy_from_slice(&(parts.m ^ 0x8000).to_le_bytes());
        block[4..16].copy_from_slice(&pack_six_bit_pairs(&parts.scales, &parts.minima));
        block[16..48].copy_from_slice(&take_bits(&parts.codes, 4));
        block[48..].copy_from_slice(&pack_four_bits(&parts.codes));
        block
    }

    fn quantise(values: &[f32; 256]) -> Parts<256> {
        Parts::quantise_with_minima(values, &LAYOUT, 63)
    }
}
