//! One block of 32 `k` for quantised weights: exact integer dot products, then one fma for each scale and each minimum.
//!
//! One code for every type, from its [`BlockLayout`]: the quads of a word are shifted and masked out of it, high bits
//! are put on top, and each quad is multiplied with four activations of its column.
//!
//! Without VNNI, `vpmaddubsw` multiplies u8 by i8 into saturating i16 pairs, so sums are widened to i32 before they could
//! saturate: a pair adds at most `2 * code * 127`, so a whole block of nibbles fits i16 (8 * 2 * 15 * 127 = 30480), four
//! quads of 5 bits, and two of 6. Q8_0 takes `|w|` (at most 128) and `x` with the sign of `w` (at most 127), 2 * 128 * 127
//! = 32512, and widens at once; or its codes are widened first, all rows of a tile share that, and `vpmaddwd` multiplies them with an
//! `x` that was stored as i16 too ([`Plan::halves`]). With VNNI, `vpdpbusd` sums four products into i32 without saturation, and Q8_0 takes
//! `w + 128` as u8 and subtracts `128 * sum x` at the end.

use crate::clif::Emit;
use crate::nest::{Cursor, Fixed, Tile};
use crate::plan::Plan;
use alloc::vec;
use alloc::vec::Vec;
use cranelift_codegen::ir::Value;
use model::layout::{
    BlockLayout, PANEL, WORD_BYTES, XBLOCK_D, XBLOCK_DSUM, XBLOCK_HALVES, XBLOCK_QS, XBLOCK_SUM, XBLOCK_SUM_LOW,
};

/// Frame offset of the byte mask of high bits. SiLU's constants come before.
const HIGH_MASK: i32 = 52;
/// Frame offset of `1` in every i16.
const ONES: i32 = 56;
/// Frame offset of the byte mask: low bits of a code, or sign bits (Q8_0 with VNNI).
const MASK: i32 = 60;

/// Where the f32 accumulators of a stream are.
pub(crate) enum Sums<'a> {
    /// Row-major, `rows x vectors`.
    Registers(&'a mut [Value]),
    /// In the frame, at [`Tile::frame_offset`].
    Frame,
}

/// `byte` in every byte.
fn in_every_byte(byte: u32) -> u32 {
    byte * 0x0101_0101
}

/// Writes the constants blocks use to the frame.
pub(crate) fn store_constants(e: &mut Emit<'_, '_>, frame: Value, plan: &Plan, layout: &BlockLayout) {
    if !plan.vnni && !plan.halves {
        e.store_constant(frame, ONES, 0x0001_0001);
    }
    if !layout.signed_codes() {
        e.store_constant(frame, MASK, in_every_byte((1 << layout.low_bits) - 1));
    } else if plan.vnni {
        e.store_constant(frame, MASK, in_every_byte(0x80));
    }
    if layout.high_bits > 0 {
        e.store_constant(frame, HIGH_MASK, in_every_byte(((1 << layout.high_bits) - 1) << layout.low_bits));
    }
}

/// A value that is the same for all vectors of a row: made once for a single row, else again for each vector, so that
/// no row holds a register while the others run.
struct PerRow {
    single: Option<Value>,
}

impl PerRow {
    fn new() -> Self {
        PerRow { single: None }
    }

    fn get(&mut self, tile: &Tile, make: impl FnOnce() -> Value) -> Value {
        if tile.rows == 1 { *self.single.get_or_insert_with(make) } else { make() }
    }
}

/// Adds one block of one stream to its accumulators.
pub(crate) fn step(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    layout: &BlockLayout,
    fixed: Fixed,
    tile: &Tile,
    at: Cursor,
    mut sums: Sums<'_>,
) {
    for sub in 0..layout.sub_blocks {
        let dots = if plan.halves {
            dot_halves(e, plan, layout, tile, at)
        } else if layout.signed_codes() {
            dot_signed(e, plan, layout, fixed, tile, at)
        } else {
            dot_codes(e, plan, layout, fixed, tile, at, sub)
        };
        scale(e, plan, layout, tile, at, sub, &dots, &mut sums);
    }
}

/// Prefetches word `word` of a step.
fn prefetch(e: &mut Emit<'_, '_>, plan: &Plan, at: Cursor, word: usize) {
    for line in (0..plan.columns * 4).step_by(64) {
        e.prefetch(at.weights.quants, at.w_offset + (word * WORD_BYTES + line) as i32);
    }
}

/// Offset in `x` of byte `quad * 4` of a row's block.
fn x_quad(plan: &Plan, at: Cursor, row: usize, quad: usize) -> i32 {
    at.x_offset + (row * plan.x_row_bytes + XBLOCK_QS + 4 * quad) as i32
}

/// Loads vector `v` of word `word`.
fn load_word(e: &mut Emit<'_, '_>, plan: &Plan, at: Cursor, word: usize, v: usize) -> Value {
    e.load_bytes(at.weights.quants, at.w_offset + (word * WORD_BYTES + v * plan.vector_bytes()) as i32)
}

/// Exact block sums of codes of 8 bits, as i32 vectors (row-major).
fn dot_signed(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    layout: &BlockLayout,
    fixed: Fixed,
    tile: &Tile,
    at: Cursor,
) -> Vec<Value> {
    let mut sums = vec![None; tile.rows * plan.vectors];
    let constant = e.constant(fixed.frame, if plan.vnni { MASK } else { ONES });
    for word in 0..layout.low_words() {
        prefetch(e, plan, at, word);
        let mut x = PerRow::new();
        for v in 0..plan.vectors {
            let w = load_word(e, plan, at, word, v);
            let unsigned = if plan.vnni { e.flip_sign_bits(w, constant) } else { e.abs_i8(w) };
            for row in 0..tile.rows {
                let x = x.get(tile, || e.broadcast_i32(at.x, x_quad(plan, at, row, word)));
                let sum = &mut sums[row * plan.vectors + v];
                *sum = Some(if plan.vnni {
                    let sum = sum.unwrap_or_else(|| e.zero_i32());
                    e.accumulate_u8_i8(sum, unsigned, x)
                } else {
                    let signed = e.sign_i8(x, w);
                    let pairs = e.dot_u8_i8_pairs(unsigned, signed);
                    let quads = e.dot_i16_pairs(pairs, constant);
                    sum.map_or(quads, |sum| e.add_i32(sum, quads))
                });
            }
        }
    }
    sums.into_iter().flatten().collect()
}

/// [`dot_signed`] with codes widened to i16.
fn dot_halves(e: &mut Emit<'_, '_>, plan: &Plan, layout: &BlockLayout, tile: &Tile, at: Cursor) -> Vec<Value> {
    let mut sums = vec![None; tile.rows * plan.vectors];
    for word in 0..layout.low_words() {
        prefetch(e, plan, at, word);
        let w: Vec<_> = (0..plan.vectors)
            .map(|v| {
                let codes = load_word(e, plan, at, word, v);
                e.halves(codes)
            })
            .collect();
        for row in 0..tile.rows {
            for half in 0..2 {
                let x_offset = at.x_offset + (row * plan.x_row_bytes + XBLOCK_HALVES + 8 * word + 4 * half) as i32;
                let x = e.broadcast_i32(at.x, x_offset);
                for (v, w) in w.iter().enumerate() {
                    let sum = &mut sums[row * plan.vectors + v];
                    let products = e.dot_i16_pairs(x, w[half]);
                    *sum = Some(sum.map_or(products, |sum| e.add_i32(sum, products)));
                }
            }
        }
    }
    sums.into_iter().flatten().collect()
}

/// Exact sums of codes of less than 8 bits over sub-block `sub` (without the offset), as i32 vectors (row-major).
fn dot_codes(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    layout: &BlockLayout,
    fixed: Fixed,
    tile: &Tile,
    at: Cursor,
    sub: usize,
) -> Vec<Value> {
    // Quads whose pairs sum in 16 bits.
    let fit_16_bits = i16::MAX as usize / (2 * 127 * ((1 << layout.bits()) - 1));
    let (mut sums, mut pairs) = (vec![None; tile.rows * plan.vectors], vec![None; tile.rows * plan.vectors]);
    let mask = e.constant(fixed.frame, MASK);
    let high_mask = if layout.high_bits > 0 { e.constant(fixed.frame, HIGH_MASK) } else { mask };
    if sub == 0 {
        for word in layout.low_words()..layout.words() {
            prefetch(e, plan, at, word);
        }
    }
    let words = sub * layout.low_words_per_scale()..(sub + 1) * layout.low_words_per_scale();
    let mut in_pairs = 0;
    for word in words.clone() {
        prefetch(e, plan, at, word);
        let mut xs = [const { PerRow { single: None } }; 4];
        for v in 0..plan.vectors {
            let w = load_word(e, plan, at, word, v);
            // Both quads of a word of nibbles are unpacked at once, so that the word is done with; others one by one.
            let at_once = if layout.bits() == 4 { 2 } else { 1 };
            for (chunk, xs) in xs.chunks_mut(at_once).enumerate().take(layout.quads_per_word() / at_once) {
                let quads = (0..at_once).map(|i| layout.quad_in_word(word, chunk * at_once + i));
                let unpacked: Vec<_> =
                    quads.map(|quad| (quad, unpack(e, plan, layout, at, (w, quad, v), (mask, high_mask)))).collect();
                if layout.quads_per_word() > 2 {
                    // Too many to hold in registers from vector to vector.
                    xs.fill_with(PerRow::new);
                }
                for row in 0..tile.rows {
                    for ((quad, codes), x) in unpacked.iter().zip(&mut *xs) {
                        let index = row * plan.vectors + v;
                        let x = x.get(tile, || e.broadcast_i32(at.x, x_quad(plan, at, row, *quad)));
                        if plan.vnni {
                            let sum = sums[index].unwrap_or_else(|| e.zero_i32());
                            sums[index] = Some(e.accumulate_u8_i8(sum, *codes, x));
                        } else {
                            let products = e.dot_u8_i8_pairs(*codes, x);
                            pairs[index] = Some(pairs[index].map_or(products, |sum| e.add_i16(sum, products)));
                        }
                    }
                }
            }
        }
        in_pairs += layout.quads_per_word();
        if !plan.vnni && (in_pairs + layout.quads_per_word() > fit_16_bits || word + 1 == words.end) {
            let ones = e.constant(fixed.frame, ONES);
            for (sum, pairs) in sums.iter_mut().zip(&mut pairs) {
                if let Some(pairs) = pairs.take() {
                    let wide = e.dot_i16_pairs(pairs, ones);
                    *sum = Some(sum.map_or(wide, |sum| e.add_i32(sum, wide)));
                }
            }
            in_pairs = 0;
        }
    }
    sums.into_iter().flatten().collect()
}

/// The codes of `quad` in vector `v`, as unsigned bytes: its low bits from the word `w`, its high bits from another.
fn unpack(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    layout: &BlockLayout,
    at: Cursor,
    (w, quad, v): (Value, usize, usize),
    (mask, high_mask): (Value, Value),
) -> Value {
    let low = e.bits(w, layout.low_field(quad).shift, 0, mask);
    let Some(high) = layout.high_field(quad) else { return low };
    let w = load_word(e, plan, at, high.word, v);
    let high = e.bits(w, high.shift, layout.low_bits, high_mask);
    e.or(low, high)
}

/// Scale of sub-block `sub` in the columns of vector `v`, and its minimum for types that have one.
fn factors(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    layout: &BlockLayout,
    at: Cursor,
    sub: usize,
    v: usize,
) -> (Value, Option<Value>) {
    // Pointer and offsets are those of the tile's first column: one f16, or one byte, for each column.
    let of_first = |offset: usize| at.w_offset + (offset - layout.scales_offset(0)) as i32;
    let column = v * plan.width.lanes();
    let scale = of_first(layout.scales_offset(sub)) + (column * layout.scale_bytes()) as i32;
    let minimum = of_first(layout.minima_offset(sub)) + (column * layout.scale_bytes()) as i32;
    let scales = at.weights.scales;
    if !layout.super_blocks {
        let d = e.load_f16(scales, scale);
        return (d, layout.minima.then(|| e.load_f16(scales, minimum)));
    }
    let header = at.header_offset + 2 * column as i32;
    let d = e.load_f16(at.weights.header, header);
    let scale = if layout.signed_scales { e.load_i8(scales, scale) } else { e.load_u8(scales, scale) };
    let scale = e.convert_i32(scale);
    let d = e.mul(d, scale);
    let m = layout.minima.then(|| {
        let m = e.load_f16(at.weights.header, header + 2 * PANEL as i32);
        let minimum = e.load_u8(scales, minimum);
        let minimum = e.convert_i32(minimum);
        e.mul(m, minimum)
    });
    (d, m)
}

/// Scales the sums of sub-block `sub` and adds them to the f32 accumulators.
#[allow(clippy::too_many_arguments)] // what `step` has, and its sums
fn scale(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    layout: &BlockLayout,
    tile: &Tile,
    at: Cursor,
    sub: usize,
    dots: &[Value],
    sums: &mut Sums<'_>,
) {
    if sub == 0 {
        for line in (0..layout.step_bytes() - layout.scales_offset(0)).step_by(64) {
            e.prefetch(at.weights.scales, at.w_offset + line as i32);
        }
    }
    let x_field = |row: usize, field: usize| at.x_offset + (row * plan.x_row_bytes + field) as i32;
    // Sum of the activations of the sub-block.
    let sum_x = |e: &mut Emit<'_, '_>, row: usize| match (layout.sub_blocks, sub) {
        (1, _) => e.broadcast_i32(at.x, x_field(row, XBLOCK_SUM)),
        (_, 0) => e.broadcast_i32(at.x, x_field(row, XBLOCK_SUM_LOW)),
        _ => {
            let sum = e.broadcast_i32(at.x, x_field(row, XBLOCK_SUM));
            let low = e.broadcast_i32(at.x, x_field(row, XBLOCK_SUM_LOW));
            e.sub_i32(sum, low)
        }
    };
    // What the unsigned form of the weights added, a power of two times the sum of x.
    let offset = if layout.signed_codes() && plan.vnni { 128 } else { layout.offset };
    let (mut excess, mut d_x, mut dsum_x) = (PerRow::new(), PerRow::new(), PerRow::new());
    for v in 0..plan.vectors {
        let (d_w, m_w) = factors(e, plan, layout, at, sub, v);
        for row in 0..tile.rows {
            let index = row * plan.vectors + v;
            let mut dot = dots[index];
            if offset != 0 {
                let excess = excess.get(tile, || {
                    let sum = sum_x(e, row);
                    e.shift_left_i32(sum, offset.ilog2().into())
                });
                dot = e.sub_i32(dot, excess);
            }
            let dot = e.convert_i32(dot);
            let d_x = d_x.get(tile, || e.broadcast_f32(at.x, x_field(row, XBLOCK_D)));
            let d = e.mul(d_w, d_x);
            let mut accumulator = match sums {
                Sums::Registers(held) => held[index],
                Sums::Frame => e.load_back(tile.frame, tile.frame_offset(plan, row, v)),
            };
            accumulator = e.accumulate(accumulator, d, dot);
            if let Some(m_w) = m_w {
                let dsum_x = dsum_x.get(tile, || {
                    if layout.sub_blocks == 1 {
                        return e.broadcast_f32(at.x, x_field(row, XBLOCK_DSUM));
                    }
                    let sum = sum_x(e, row);
                    let sum = e.convert_i32(sum);
                    e.mul(d_x, sum)
                });
                accumulator = e.accumulate(accumulator, m_w, dsum_x);
            }
            match sums {
                Sums::Registers(held) => held[index] = accumulator,
                Sums::Frame => e.store(accumulator, tile.frame, tile.frame_offset(plan, row, v)),
            }
        }
    }
}
