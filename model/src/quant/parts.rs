//! What every quantised format is made of: codes, and the scales and minima that turn them into weights.

use super::{f16_to_f32, f32_to_f16};
use crate::layout::{BLOCK, BlockLayout};

/// Most scales in a block of any format.
const MAX_SCALES: usize = 16;

/// One block of `LEN` weights taken apart, whatever the order of bits in the file.
///
/// Sub-block `s` covers `LEN / scales` weights and means `w = d_w * (q - offset)`, plus `m_w` for formats with minima,
/// where `d_w = f32(d)`, `m_w = f32(m)`, or for K types the exact products `f32(d) * scales[s]` and `f32(m) * minima[s]`.
/// Each operation rounds on its own, in this order; ggml and its tools do the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts<const LEN: usize> {
    /// Bits of the f16 scale, or of the scale of scales.
    pub d: u16,
    /// Bits of the f16 minimum, or of the scale of minima, signed so that it is added; 0 where there is none.
    pub m: u16,
    /// Codes in the order of the weights. Those of 8 bits are `i8`.
    pub codes: [u8; LEN],
    /// Scale of each sub-block of a K type; `i8` where scales are signed.
    pub scales: [u8; MAX_SCALES],
    /// Minimum of each sub-block of a K type.
    pub minima: [u8; MAX_SCALES],
}

impl<const LEN: usize> Parts<LEN> {
    /// A block of zero weights.
    pub const ZERO: Self = Parts { d: 0, m: 0, codes: [0; LEN], scales: [0; MAX_SCALES], minima: [0; MAX_SCALES] };

    /// Scale and minimum of sub-block `sub`.
    fn factors(&self, layout: &BlockLayout, sub: usize) -> (f32, f32) {
        let (d, m) = (f16_to_f32(self.d), f16_to_f32(self.m));
        if !layout.super_blocks {
            return (d, m);
        }
        let scale = self.scales[sub];
        let scale = if layout.signed_scales { f32::from(scale.cast_signed()) } else { f32::from(scale) };
        (d * scale, m * f32::from(self.minima[sub]))
    }

    /// The weights.
    pub fn values(&self, layout: &BlockLayout) -> [f32; LEN] {
        let mut out = [0.0; LEN];
        let len = BLOCK / layout.sub_blocks;
        for (sub, (out, codes)) in out.chunks_mut(len).zip(self.codes.chunks(len)).enumerate() {
            let (d, m) = self.factors(layout, sub);
            for (out, &code) in out.iter_mut().zip(codes) {
                let q = if layout.signed_codes() { i32::from(code.cast_signed()) } else { i32::from(code) };
                let w = (q - layout.offset) as f32 * d;
                *out = if layout.minima { w + m } else { w };
            }
        }
        out
    }

    /// Codes for `values` with the scales that are set: the nearest each.
    fn choose_codes(&mut self, layout: &BlockLayout, values: &[f32; LEN]) {
        let last = (1i32 << layout.bits()) - 1;
        let len = BLOCK / layout.sub_blocks;
        let factors: [_; MAX_SCALES] = core::array::from_fn(|sub| self.factors(layout, sub));
        for (i, (code, &value)) in self.codes.iter_mut().zip(values).enumerate() {
            let (d, m) = factors[i / len];
            let steps = if d == 0.0 { 0.0 } else { (value - m) / d };
            *code = (libm::roundf(steps) as i32).saturating_add(layout.offset).clamp(0, last) as u8;
        }
    }

    /// A K type without minima: of each sub-block the value of largest magnitude gets the lowest code. `max_scale` is the
    /// largest scale.
    pub(super) fn quantise_symmetric(values: &[f32; LEN], layout: &BlockLayout, max_scale: i8) -> Self {
        let mut wanted = [0.0f32; MAX_SCALES];
        for (wanted, values) in wanted.iter_mut().zip(values.chunks(BLOCK / layout.sub_blocks)) {
            let extreme = values.iter().fold(0.0f32, |max, v| if v.abs() > max.abs() { *v } else { max });
            *wanted = extreme / -(layout.offset as f32);
        }
        let largest = wanted.iter().fold(0.0f32, |max, s| max.max(s.abs()));
        let mut parts = Self { d: f32_to_f16(largest / f32::from(max_scale)), ..Self::ZERO };
        parts.scales = wanted.map(|s| multiple(s, parts.d, -f32::from(max_scale), f32::from(max_scale)) as u8);
        parts.choose_codes(layout, values);
        parts
    }

    /// A K type with minima: each sub-block spans from its least value, or 0, to its largest. `max_scale` is the largest
    /// scale and minimum.
    pub(super) fn quantise_with_minima(values: &[f32; LEN], layout: &BlockLayout, max_scale: u8) -> Self {
        let (mut spans, mut minima) = ([0.0f32; MAX_SCALES], [0.0f32; MAX_SCALES]);
        for (i, values) in values.chunks(BLOCK / layout.sub_blocks).enumerate() {
            let least = values.iter().fold(0.0f32, |least, &v| least.min(v));
            let most = values.iter().fold(0.0f32, |most, &v| most.max(v));
            minima[i] = least;
            spans[i] = (most - least) / ((1 << layout.bits()) - 1) as f32;
        }
        let limit = f32::from(max_scale);
        let largest = spans.iter().fold(0.0f32, |max, &s| max.max(s));
        let deepest = minima.iter().fold(0.0f32, |least, &m| least.min(m));
        let mut parts = Self { d: f32_to_f16(largest / limit), m: f32_to_f16(deepest / limit), ..Self::ZERO };
        parts.scales = spans.map(|s| multiple(s, parts.d, 0.0, limit) as u8);
        parts.minima = minima.map(|m| multiple(m, parts.m, 0.0, limit) as u8);
        parts.choose_codes(layout, values);
        parts
    }
}

/// `value` in units of the f16 `unit`, rounded and kept in `low..=high`.
fn multiple(value: f32, unit: u16, low: f32, high: f32) -> i32 {
    let unit = f16_to_f32(unit);
    if unit == 0.0 { 0 } else { libm::roundf(value / unit).clamp(low, high) as i32 }
}

/// Splits 16 bytes of nibbles into 32 codes: low nibbles are elements 0..16, high nibbles 16..32.
pub(super) fn nibbles(qs: &[u8; 16]) -> [u8; 32] {
    core::array::from_fn(|i| if i < 16 { qs[i] & 0x0f } else { qs[i - 16] >> 4 })
}

/// The inverse of [`nibbles`]; only the low four bits of a code count.
pub(super) fn pack_nibbles(codes: &[u8; 32]) -> [u8; 16] {
    core::array::from_fn(|i| codes[i] & 0x0f | codes[i + 16] << 4)
}

/// 32 codes of five bits: [`nibbles`], and bit `i` of `fifth` above those of element `i`.
pub(super) fn five_bits(qs: &[u8; 16], fifth: [u8; 4]) -> [u8; 32] {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let mut codes = [0; 32];
    for (i, (codes, bits)) in codes.as_chunks_mut().0.iter_mut().zip(fifth).enumerate() {
        let nibbles = (u64::from_le_bytes(qs.as_chunks().0[i % 2]) >> (i / 2 * 4)) & (0x0f * EACH);
        // Bit j of byte j, and then in the top bit whether it is set.
        let own = (u64::from(bits) * EACH) & 0x8040_2010_0804_0201;
        let upper = ((own + 0x7f * EACH) >> 3) & (0x10 * EACH);
        *codes = (nibbles | upper).to_le_bytes();
    }
    codes
}

/// The fifth bits for [`five_bits`]; only bit 4 of a code counts.
pub(super) fn pack_fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    let bit = |bits, (i, &code)| bits | (u32::from(code) >> 4 & 1) << i;
    codes.iter().enumerate().fold(0u32, bit).to_le_bytes()
}

/// The 12 bytes of Q4_K and Q5_K that hold eight 6-bit scales and eight 6-bit minima, as 16 and 16 (the last 8 zero).
///
/// Bytes 0..4 hold scales 0..4, bytes 4..8 minima 0..4; bytes 8..12 the low nibbles of scales (low) and minima (high)
/// 4..8, whose upper two bits are those of bytes 0..4 and 4..8.
pub(super) fn six_bit_pairs(bytes: &[u8; 12]) -> ([u8; MAX_SCALES], [u8; MAX_SCALES]) {
    let (mut scales, mut minima) = ([0; MAX_SCALES], [0; MAX_SCALES]);
    for i in 0..4 {
        scales[i] = bytes[i] & 63;
        minima[i] = bytes[i + 4] & 63;
        scales[i + 4] = bytes[i + 8] & 15 | bytes[i] >> 6 << 4;
        minima[i + 4] = bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4;
    }
    (scales, minima)
}

/// The inverse of [`six_bit_pairs`].
pub(super) fn pack_six_bit_pairs(scales: &[u8; MAX_SCALES], minima: &[u8; MAX_SCALES]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for i in 0..4 {
        bytes[i] = scales[i] | scales[i + 4] >> 4 << 6;
        bytes[i + 4] = minima[i] | minima[i + 4] >> 4 << 6;
        bytes[i + 8] = scales[i + 4] & 15 | minima[i + 4] << 4;
    }
    bytes
}
