//! One block of 32 `k` for Q8_0, Q4_0 and Q4_1 weights: an exact integer dot product, then one fma (two for Q4_1).
//!
//! Without VNNI, `vpmaddubsw` multiplies u8 by i8 into saturating i16 pairs, so operands are chosen such that no sum can
//! saturate: Q8_0 takes `|w|` (at most 128) and `x` with the sign of `w` (at most 127), 2 * 128 * 127 = 32512; Q4 takes
//! nibbles, and even the sum of a whole block fits i16: 8 * 2 * 15 * 127 = 30480. With VNNI, `vpdpbusd` sums four products
//! into i32 without saturation, and Q8_0 takes `w + 128` as u8 and subtracts `128 * sum x` at the end.

use crate::clif::Emit;
use crate::nest::{Cursor, Fixed, Tile};
use crate::plan::Plan;
use cranelift_codegen::ir::Value;
use model::kernel::DType;
use model::layout::{MINS_OFFSET, PANEL, XBLOCK_D, XBLOCK_DSUM, XBLOCK_QS, XBLOCK_SUM, scales_offset};

/// Frame offset of `1` in every i16. SiLU's constants come before.
const ONES: i32 = 56;
/// Frame offset of the byte mask: nibbles (Q4) or sign bits (Q8_0 with VNNI).
const MASK: i32 = 60;

/// Bytes of one 4-byte group of a whole panel.
const GROUP_BYTES: usize = 4 * PANEL;

/// Where the f32 accumulators of a group are.
pub(crate) enum Sums<'a> {
    /// Row-major, `rows x vectors`.
    Registers(&'a mut [Value]),
    /// In the frame; the address is what [`Tile::frame_offset`] is relative to.
    Frame(Value),
}

/// Writes the constants blocks use to the frame.
pub(crate) fn store_constants(e: &mut Emit<'_, '_>, frame: Value, plan: &Plan) {
    if !plan.vnni {
        e.store_constant(frame, ONES, 0x0001_0001);
    }
    if plan.dtype == DType::Q8_0 {
        if plan.vnni {
            e.store_constant(frame, MASK, 0x8080_8080);
        }
    } else {
        e.store_constant(frame, MASK, 0x0f0f_0f0f);
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

/// Adds one block of one group to its accumulators.
pub(crate) fn step(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile, at: Cursor, sums: Sums<'_>) {
    let blocks =
        if plan.dtype == DType::Q8_0 { dot_q8(e, plan, fixed, tile, at) } else { dot_q4(e, plan, fixed, tile, at) };
    scale(e, plan, fixed, tile, at, blocks, sums);
}

/// Prefetches what group `g` of a step will read, one stream distance ahead.
fn prefetch(e: &mut Emit<'_, '_>, plan: &Plan, at: Cursor, g: usize) {
    if plan.prefetch_bytes > 0 {
        for line in (0..plan.columns * 4).step_by(64) {
            e.prefetch(at.w, at.w_offset + (g * GROUP_BYTES + line) as i32 + plan.prefetch_bytes);
        }
    }
}

/// Offset in `x` of byte `quad * 4` of a row's block.
fn x_quad(plan: &Plan, at: Cursor, row: usize, quad: usize) -> i32 {
    at.x_offset + (row * plan.x_row_bytes + XBLOCK_QS + 4 * quad) as i32
}

/// Loads vector `v` of group `g`.
fn weights(e: &mut Emit<'_, '_>, plan: &Plan, at: Cursor, g: usize, v: usize) -> Value {
    e.load_bytes(at.w, at.w_offset + (g * GROUP_BYTES + v * plan.vector_bytes()) as i32)
}

/// Exact block sums of Q8_0, as i32 vectors (row-major).
fn dot_q8(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile, at: Cursor) -> alloc::vec::Vec<Value> {
    let mut sums = alloc::vec![None; tile.rows * plan.vectors];
    let constant = e.constant(fixed.frame, if plan.vnni { MASK } else { ONES });
    for g in 0..8 {
        prefetch(e, plan, at, g);
        let mut x = PerRow::new();
        for v in 0..plan.vectors {
            let w = weights(e, plan, at, g, v);
            let unsigned = if plan.vnni { e.flip_sign_bits(w, constant) } else { e.abs_i8(w) };
            for row in 0..tile.rows {
                let x = x.get(tile, || e.broadcast_i32(at.x, x_quad(plan, at, row, g)));
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

/// Exact block sums of Q4 nibbles (without the minus 8 of Q4_0), as i32 vectors, or as i16 pairs without VNNI.
fn dot_q4(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile, at: Cursor) -> alloc::vec::Vec<Value> {
    let mut sums = alloc::vec![None; tile.rows * plan.vectors];
    let mask = e.constant(fixed.frame, MASK);
    for g in 0..4 {
        prefetch(e, plan, at, g);
        let (mut x_low, mut x_high) = (PerRow::new(), PerRow::new());
        for v in 0..plan.vectors {
            let w = weights(e, plan, at, g, v);
            let low = e.low_nibbles(w, mask);
            let high = e.high_nibbles(w, mask);
            for row in 0..tile.rows {
                let sum = &mut sums[row * plan.vectors + v];
                let x = x_low.get(tile, || e.broadcast_i32(at.x, x_quad(plan, at, row, g)));
                let mut total = if plan.vnni {
                    let sum = sum.unwrap_or_else(|| e.zero_i32());
                    e.accumulate_u8_i8(sum, low, x)
                } else {
                    let pairs = e.dot_u8_i8_pairs(low, x);
                    sum.map_or(pairs, |sum| e.add_i16(sum, pairs))
                };
                let x = x_high.get(tile, || e.broadcast_i32(at.x, x_quad(plan, at, row, 4 + g)));
                total = if plan.vnni {
                    e.accumulate_u8_i8(total, high, x)
                } else {
                    let pairs = e.dot_u8_i8_pairs(high, x);
                    e.add_i16(total, pairs)
                };
                *sum = Some(total);
            }
        }
    }
    sums.into_iter().flatten().collect()
}

/// Scales the block sums and adds them to the f32 accumulators.
fn scale(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    fixed: Fixed,
    tile: &Tile,
    at: Cursor,
    blocks: alloc::vec::Vec<Value>,
    mut sums: Sums<'_>,
) {
    if plan.prefetch_bytes > 0 {
        e.prefetch(at.scales, at.w_offset + plan.prefetch_bytes);
        if plan.dtype == DType::Q4_1 {
            e.prefetch(at.scales, at.w_offset + PANEL as i32 * 2 + plan.prefetch_bytes);
        }
    }
    let x_field = |row: usize, field: usize| at.x_offset + (row * plan.x_row_bytes + field) as i32;
    let pairs_left = !plan.vnni && plan.dtype != DType::Q8_0;
    // What the unsigned form of the weights added: 8 * sum x for Q4_0, 128 * sum x for Q8_0 with VNNI.
    let excess_shift = match plan.dtype {
        DType::Q4_0 => Some(3),
        DType::Q8_0 if plan.vnni => Some(7),
        _ => None,
    };
    let (mut ones, mut excess, mut d_x, mut sum_x) = (PerRow::new(), PerRow::new(), PerRow::new(), PerRow::new());
    for v in 0..plan.vectors {
        let half = (v * plan.vector_bytes() / 2) as i32;
        let d_w = e.load_f16(at.scales, at.w_offset + half);
        let m_w = (plan.dtype == DType::Q4_1)
            .then(|| e.load_f16(at.scales, at.w_offset + half + (MINS_OFFSET - scales_offset(plan.dtype)) as i32));
        for row in 0..tile.rows {
            let index = row * plan.vectors + v;
            let mut block = blocks[index];
            if pairs_left {
                let ones = ones.get(tile, || e.constant(fixed.frame, ONES));
                block = e.dot_i16_pairs(block, ones);
            }
            if let Some(shift) = excess_shift {
                let excess = excess.get(tile, || {
                    let sum = e.broadcast_i32(at.x, x_field(row, XBLOCK_SUM));
                    e.shift_left_i32(sum, shift)
                });
                block = e.sub_i32(block, excess);
            }
            let block = e.convert_i32(block);
            let d_x = d_x.get(tile, || e.broadcast_f32(at.x, x_field(row, XBLOCK_D)));
            let d = e.mul(d_w, d_x);
            let mut accumulator = match &sums {
                Sums::Registers(held) => held[index],
                Sums::Frame(frame) => e.load_back(*frame, tile.frame_offset(plan, 0, row, v)),
            };
            accumulator = e.accumulate(accumulator, d, block);
            if let Some(m_w) = m_w {
                let sum_x = sum_x.get(tile, || e.broadcast_f32(at.x, x_field(row, XBLOCK_DSUM)));
                accumulator = e.accumulate(accumulator, m_w, sum_x);
            }
            match &mut sums {
                Sums::Registers(held) => held[index] = accumulator,
                Sums::Frame(frame) => e.store(accumulator, *frame, tile.frame_offset(plan, 0, row, v)),
            }
        }
    }
}
