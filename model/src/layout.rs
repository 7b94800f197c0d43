//! Byte layout of packed weights and of activations: the contract between `engine` (which packs), the hand-written
//! ops and the compiled kernels (which read).
//!
//! Weights are stored in *panels* of [`PANEL`] output columns. Inside a panel the sum index `k` runs slowest, so
//! a kernel reads each panel as one sequential stream, and each vector lane is one output column: no horizontal
//! reduction exists anywhere. `N` is padded to a whole panel with zero weights.
//!
//! ```text
//! F32   per k:             32 x f32                                  128 B
//! F16   per k:             32 x f16                                   64 B
//! else  per block of 32 k: one step, described by its BlockLayout:
//!         words  w x [32 columns x 4 B]        low bits of the codes, then their high bits
//!         scales s x [32 columns x f16 or 8 bits], then minima of the same size where the type has them
//!       per super-block of 256 k (K types): 32 x f16 d, (32 x f16 m), then its 8 steps
//!
//!         words  low + high   scales per column      minima    bytes of a step   bits per weight
//! Q8_0    8      8 + 0 bits   f16                    -         1088              8.5
//! Q4_0    4      4 + 0        f16                    -          576              4.5
//! Q4_1    4      4 + 0        f16                    f16        640              5
//! Q5_0    5      4 + 1        f16                    -          704              5.5
//! Q5_1    5      4 + 1        f16                    f16        768              6
//! Q2_K    2      2 + 0        u8 for each 16         u8 for 16  384              3.125
//! Q3_K    3      2 + 1        i8 for each 16         -          448              3.5625
//! Q4_K    4      4 + 0        u8                     u8         576              4.625
//! Q5_K    5      4 + 1        u8                     u8         704              5.625
//! Q6_K    6      4 + 2        i8 for each 16         -          832              6.5625
//! ```
//!
//! Four neighbouring codes `q[4s..4s+4]`, the *quad* `s`, always share a word, one in each of its bytes, at the bits that
//! [`BlockLayout::low_field`] and [`BlockLayout::high_field`] give: one shift and one mask of a vector of words make the
//! quads of all its columns. Q4 and Q5 keep the pairing of the GGUF block (quads `s` and `s + 4` share a word), types
//! with a scale for each 16 keep each half block in words of its own.
//!
//! Every packed type holds exactly what the file held, and can be turned back into it. One thing is changed: the sign of
//! a K type's `dmin`, so that minima are always added.
//!
//! For [`Op::GateUpSilu`] and [`Op::GateUpGelu`] gate and up panels alternate: panel `2p` is gate columns `32p..`,
//! panel `2p+1` the same up columns. For `Qkv` the three matrices' columns are concatenated before panels are cut.
//!
//! Activations: for F32/F16 weights row `r` is `k` f32 values at byte `r * 4k`. For quantised weights it is `k/32`
//! blocks of [`BlockLayout::x_block_bytes`], each as the `XBLOCK_*` offsets say.
//! Outputs are f32, row-major, with a row stride (`ldy`) of at least `n` rounded up to [`PANEL`]; kernels write the
//! padding columns.
//!
//! KV cache: blocks of [`KV_BLOCK`] positions, in each of them for every layer and kv head
//!
//! ```text
//! keys           2 panels x head_dim x 64 positions
//! values         128 positions x head_dim
//! key scales     128 x f32    int8 only
//! value scales   128 x f32    int8 only
//! ```
//!
//! with elements of f32, f16 or int8.
//!
//! Sources: GGUF block formats `block_q8_0` to `block_q6_K` of the ggml project; [`crate::quant`] reads them.

use crate::kernel::{DType, Op};

/// Output columns in a panel.
pub const PANEL: usize = 32;
/// Elements of `k` in a quantisation block.
pub const BLOCK: usize = 32;
/// Blocks in a super-block of the K types.
pub const SUPER: usize = 8;
/// Quads (four neighbouring elements) in a block.
pub const QUADS: usize = BLOCK / 4;
/// Bytes of one word of every column of a panel.
pub const WORD_BYTES: usize = 4 * PANEL;
/// Bytes of one quantised activation block, without [`XBLOCK_HALVES`].
pub const XBLOCK_BYTES: usize = 48;
/// Offset of the 32 `i8` values `q`.
pub const XBLOCK_QS: usize = 0;
/// Offset of the f32 scale `d` (`x = d * q`).
pub const XBLOCK_D: usize = 32;
/// Offset of the i32 sum of the 32 `q`.
pub const XBLOCK_SUM: usize = 36;
/// Offset of the f32 product `d * sum` (what a block's minimum multiplies).
pub const XBLOCK_DSUM: usize = 40;
/// Offset of the i32 sum of the first 16 `q` (for types with a scale for each 16).
pub const XBLOCK_SUM_LOW: usize = 44;
/// Offset of the 32 `q` as `i16`, for types with codes of 8 bits: of each quad the elements 0, 2, 1, 3. (That is the order in which two
/// shifts of a word widen its codes.)
pub const XBLOCK_HALVES: usize = 64;
/// Positions in a block of the KV cache: the piece of the context whose attention is computed on its own.
pub const KV_BLOCK: usize = 128;
/// Positions in a panel of keys.
pub const KV_PANEL: usize = 64;
/// Alignment of every packed matrix, in bytes.
pub const WEIGHT_ALIGN: usize = 64;

/// Where a quad is: in each byte of word `word` of the step, the bits from `shift` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QuadField {
    /// Index of the word in the step.
    pub word: usize,
    /// Lowest bit in the byte.
    pub shift: usize,
    /// Number of bits.
    pub bits: usize,
}

/// How a quantised type is laid out in a step, and what its codes mean. See the table in the module docs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockLayout {
    /// Bits of each code in the first words: 8, 4 or 2.
    pub low_bits: usize,
    /// Bits of each code in the words behind them: 0, 1 or 2; they stand above the low ones.
    pub high_bits: usize,
    /// What is subtracted from a code. Codes of 8 bits are signed instead.
    pub offset: i32,
    /// Scales in a block of 32: 1, or 2 for one each 16.
    pub sub_blocks: usize,
    /// True when a minimum is added.
    pub minima: bool,
    /// True when scales and minima are 8-bit multiples of f16 numbers that 8 blocks share.
    pub super_blocks: bool,
    /// True when these multiples are signed.
    pub signed_scales: bool,
}

impl BlockLayout {
    const fn plain(low_bits: usize, high_bits: usize, offset: i32, minima: bool) -> Self {
        BlockLayout { low_bits, high_bits, offset, sub_blocks: 1, minima, super_blocks: false, signed_scales: false }
    }

    const fn k(low_bits: usize, high_bits: usize, offset: i32, sub_blocks: usize) -> Self {
        // K types have either signed codes and scales, or minima.
        let signed = offset != 0;
        BlockLayout {
            low_bits,
            high_bits,
            offset,
            sub_blocks,
            minima: !signed,
            super_blocks: true,
            signed_scales: signed,
        }
    }

    /// The layout of `dtype`; `None` for types without blocks.
    pub const fn of(dtype: DType) -> Option<BlockLayout> {
        Some(match dtype {
            DType::F32 | DType::F16 => return None,
            DType::Q8_0 => Self::plain(8, 0, 0, false),
            DType::Q4_0 => Self::plain(4, 0, 8, false),
            DType::Q4_1 => Self::plain(4, 0, 0, true),
            DType::Q5_0 => Self::plain(4, 1, 16, false),
            DType::Q5_1 => Self::plain(4, 1, 0, true),
            DType::Q2_K => Self::k(2, 0, 0, 2),
            DType::Q3_K => Self::k(2, 1, 4, 2),
            DType::Q4_K => Self::k(4, 0, 0, 1),
            DType::Q5_K => Self::k(4, 1, 0, 1),
            DType::Q6_K => Self::k(4, 2, 32, 2),
        })
    }

    /// True for codes that are `i8`.
    pub const fn signed_codes(&self) -> bool {
        self.low_bits == 8
    }

    /// Bytes of one block of the activations that such weights are multiplied with.
    pub const fn x_block_bytes(&self) -> usize {
        if self.signed_codes() { XBLOCK_HALVES + 2 * BLOCK } else { XBLOCK_BYTES }
    }

    /// Bits of a code.
    pub const fn bits(&self) -> usize {
        self.low_bits + self.high_bits
    }

    /// Words of a column that hold the low bits of a block.
    pub const fn low_words(&self) -> usize {
        self.low_bits
    }

    /// Words of a column that hold a block's codes.
    pub const fn words(&self) -> usize {
        self.bits()
    }

    /// Where the low bits of `quad` are.
    pub const fn low_field(&self, quad: usize) -> QuadField {
        let bits = self.low_bits;
        if bits == 4 && self.sub_blocks == 1 {
            return QuadField { word: quad % 4, shift: 4 * (quad / 4), bits };
        }
        QuadField { word: quad * bits / 8, shift: quad * bits % 8, bits }
    }

    /// Where the high bits of `quad` are, for types that have them.
    pub const fn high_field(&self, quad: usize) -> Option<QuadField> {
        let bits = self.high_bits;
        if bits == 0 {
            return None;
        }
        Some(QuadField { word: self.low_words() + quad * bits / 8, shift: quad * bits % 8, bits })
    }

    /// Quads in a word.
    pub const fn quads_per_word(&self) -> usize {
        8 / self.low_bits
    }

    /// Words of low bits that belong to a sub-block; those of sub-block `s` are words `s * low_words_per_scale()` on.
    pub const fn low_words_per_scale(&self) -> usize {
        self.low_words() / self.sub_blocks
    }

    /// The quad whose low bits are the `i`-th in `word`, counted from the lowest bits.
    pub const fn quad_in_word(&self, word: usize, i: usize) -> usize {
        if self.low_bits == 4 && self.sub_blocks == 1 { word + 4 * i } else { word * self.quads_per_word() + i }
    }

    /// The codes of `quad`, one in each byte, from the words of its column.
    #[inline(always)]
    pub fn codes(&self, quad: usize, word: impl Fn(usize) -> u32) -> u32 {
        let field = |f: QuadField| word(f.word) >> f.shift & byte_mask(f.bits);
        let high = self.high_field(quad).map_or(0, field);
        field(self.low_field(quad)) | high << self.low_bits
    }

    /// Puts the `codes` of `quad`, one in each byte, into the words of its column, where their bits are still zero.
    #[inline(always)]
    pub fn place(&self, quad: usize, codes: u32, words: &mut [u32; QUADS]) {
        let low = self.low_field(quad);
        words[low.word] |= (codes & byte_mask(low.bits)) << low.shift;
        if let Some(high) = self.high_field(quad) {
            words[high.word] |= (codes >> self.low_bits & byte_mask(high.bits)) << high.shift;
        }
    }

    /// Quads that share a scale.
    pub const fn quads_per_scale(&self) -> usize {
        QUADS / self.sub_blocks
    }

    /// Bytes of a scale in the step, and of a minimum.
    pub const fn scale_bytes(&self) -> usize {
        if self.super_blocks { 1 } else { 2 }
    }

    /// Offset in a step of the scales of sub-block `sub`: one for each column.
    pub const fn scales_offset(&self, sub: usize) -> usize {
        self.words() * WORD_BYTES + sub * self.scale_bytes() * PANEL
    }

    /// Offset in a step of the minima of sub-block `sub`.
    pub const fn minima_offset(&self, sub: usize) -> usize {
        self.scales_offset(self.sub_blocks + sub)
    }

    /// Bytes of one step.
    pub const fn step_bytes(&self) -> usize {
        self.scales_offset(if self.minima { 2 * self.sub_blocks } else { self.sub_blocks })
    }

    /// Bytes in front of the steps of a super-block: f16 `d`, and f16 `m` behind it where there are minima.
    pub const fn header_bytes(&self) -> usize {
        match (self.super_blocks, self.minima) {
            (false, _) => 0,
            (true, false) => 2 * PANEL,
            (true, true) => 4 * PANEL,
        }
    }
}

/// The lowest `bits` of every byte.
const fn byte_mask(bits: usize) -> u32 {
    0x0101_0101 * ((1 << bits) - 1)
}

/// Elements of `k` that one step of a panel covers.
pub const fn step_k(dtype: DType) -> usize {
    match dtype {
        DType::F32 | DType::F16 => 1,
        _ => BLOCK,
    }
}

/// Bytes of one step (see the table in the module docs).
pub const fn step_bytes(dtype: DType) -> usize {
    match (dtype, BlockLayout::of(dtype)) {
        (_, Some(layout)) => layout.step_bytes(),
        (DType::F16, None) => 2 * PANEL,
        (_, None) => 4 * PANEL,
    }
}

/// Steps that share super-scales: 8 for K types, otherwise 1.
pub const fn group_steps(dtype: DType) -> usize {
    match BlockLayout::of(dtype) {
        Some(BlockLayout { super_blocks: true, .. }) => SUPER,
        _ => 1,
    }
}

/// `k` of a matrix is a multiple of this: 1, 32, or 256 for K types.
pub const fn k_multiple(dtype: DType) -> usize {
    group_steps(dtype) * step_k(dtype)
}

/// Bytes of one group of steps with the super-scales in front of it; of one step for types without.
pub const fn group_bytes(dtype: DType) -> usize {
    group_steps(dtype) * step_bytes(dtype) + header_bytes(dtype)
}

/// Bytes of super-scales in front of a group of steps; 0 for types without.
pub const fn header_bytes(dtype: DType) -> usize {
    match BlockLayout::of(dtype) {
        Some(layout) => layout.header_bytes(),
        None => 0,
    }
}

/// Panels that cover `n` columns.
pub const fn panels(n: usize) -> usize {
    n.div_ceil(PANEL)
}

/// Columns after padding to whole panels.
pub const fn padded(n: usize) -> usize {
    panels(n) * PANEL
}

/// Bytes of one packed panel of depth `k`, a multiple of [`k_multiple`].
pub const fn panel_bytes(dtype: DType, k: usize) -> usize {
    k / k_multiple(dtype) * group_bytes(dtype)
}

/// Bytes of `n` packed columns of depth `k`.
pub const fn packed_len_bytes(dtype: DType, n: usize, k: usize) -> usize {
    panels(n) * panel_bytes(dtype, k)
}

/// Bytes of one activation row of length `k`.
pub const fn x_row_bytes(dtype: DType, k: usize) -> usize {
    match BlockLayout::of(dtype) {
        None => 4 * k,
        Some(layout) => k / BLOCK * layout.x_block_bytes(),
    }
}

/// Bytes of packed weights for `n` output columns of `op`.
pub const fn op_weight_bytes(op: Op, dtype: DType, n: usize, k: usize) -> usize {
    let factor = if op.is_gated() { 2 } else { 1 };
    factor * packed_len_bytes(dtype, n, k)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the module docs.
    #[test]
    fn steps_have_the_documented_sizes() {
        let sizes = [128, 64, 1088, 576, 640, 704, 768, 384, 448, 576, 704, 832];
        for (dtype, bytes) in DType::ALL.into_iter().zip(sizes) {
            assert_eq!(step_bytes(dtype), bytes, "{dtype}");
            assert_eq!(group_bytes(dtype) % WEIGHT_ALIGN, 0, "{dtype}");
        }
        assert_eq!([DType::Q2_K, DType::Q6_K, DType::Q8_0].map(group_bytes), [3200, 6720, 1088]);
    }

    /// Codes come back, and the words that are filled are those the quads are looked for in.
    #[test]
    fn codes_come_back_from_their_words() {
        for dtype in DType::ALL {
            let Some(layout) = BlockLayout::of(dtype) else { continue };
            let mut words = [0; QUADS];
            let codes: [u32; QUADS] =
                core::array::from_fn(|quad| 0x1f83_d9ab_u32.rotate_left(3 * quad as u32) & byte_mask(layout.bits()));
            for (quad, &codes) in codes.iter().enumerate() {
                layout.place(quad, codes, &mut words);
            }
            for (quad, &codes) in codes.iter().enumerate() {
                assert_eq!(layout.codes(quad, |word| words[word]), codes, "{dtype} quad {quad}");
            }
            for word in 0..layout.low_words() {
                for i in 0..layout.quads_per_word() {
                    let quad = layout.quad_in_word(word, i);
                    let field = QuadField { word, shift: i * layout.low_bits, bits: layout.low_bits };
                    assert_eq!(layout.low_field(quad), field, "{dtype} word {word}");
                    assert_eq!(quad / layout.quads_per_scale(), word / layout.low_words_per_scale(), "{dtype} {quad}");
                }
            }
        }
    }

    /// No two quads share a bit, and together they fill every word.
    #[test]
    fn every_bit_of_a_word_belongs_to_one_quad() {
        for dtype in DType::ALL {
            let Some(layout) = BlockLayout::of(dtype) else { continue };
            let mut used = [0u8; QUADS];
            for quad in 0..QUADS {
                for field in [Some(layout.low_field(quad)), layout.high_field(quad)].into_iter().flatten() {
                    let mask = (((1u32 << field.bits) - 1) << field.shift) as u8;
                    assert_eq!(used[field.word] & mask, 0, "{dtype} quad {quad}");
                    used[field.word] |= mask;
                }
            }
            assert!(used[..layout.words()].iter().all(|&bits| bits == 0xff), "{dtype}: {used:?}");
            assert!(used[layout.words()..].iter().all(|&bits| bits == 0), "{dtype}: {used:?}");
        }
    }
}
