//! One step of `k` for F32 and F16 weights: `acc = fma(f32(w[k]), x[k], acc)`.
//!
//! A tile of several rows keeps its weights in registers and passes `x` through one. At 512 bits every second row's `x` is an operand
//! in memory of each multiply-add that needs it, not a load of its own: a core that runs two hardware threads has half of its issue
//! slots left for ours and is short of these, not of loads (decision 0012).

use crate::clif::Emit;
use crate::nest::{Cursor, Tile};
use crate::plan::Plan;
use alloc::vec::Vec;
use cranelift_codegen::ir::Value;
use model::kernel::DType;

/// Adds one `k` of one stream to its accumulators (row-major, `rows x vectors`).
///
/// `shared_x` carries the broadcast `x[k]` of a single-row tile from stream to stream.
pub(crate) fn step(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    tile: &Tile,
    at: Cursor,
    shared_x: &mut Option<Value>,
    accumulators: &mut [Value],
) {
    let weight_bytes = if plan.dtype == DType::F16 { 2 } else { 4 };
    // Blocks of k ask for the next block.
    if plan.k_block.is_none() {
        for line in (0..plan.columns * weight_bytes).step_by(64) {
            e.prefetch(at.weights.quants, at.w_offset + line as i32);
        }
    }
    let weights = |e: &mut Emit<'_, '_>, v: usize| {
        let offset = at.w_offset + (v * plan.width.lanes() * weight_bytes) as i32;
        if plan.dtype == DType::F16 {
            e.load_f16(at.weights.quants, offset)
        } else {
            e.load_f32(at.weights.quants, offset)
        }
    };
    if tile.rows == 1 {
        let x = *shared_x.get_or_insert_with(|| e.broadcast_f32(at.x, at.x_offset));
        for (v, accumulator) in accumulators.iter_mut().enumerate() {
            let w = weights(e, v);
            *accumulator = e.accumulate(*accumulator, x, w);
        }
        return;
    }
    let x = |e: &mut Emit<'_, '_>, row: usize| e.broadcast_f32(at.x, at.x_offset + (row * plan.x_row_bytes) as i32);
    let held: Vec<Value> = (0..plan.vectors).map(|v| weights(e, v)).collect();
    for (row, accumulators) in accumulators.chunks_mut(plan.vectors).enumerate() {
        let shared = (!plan.x_is_operand(row)).then(|| x(e, row));
        for (w, accumulator) in held.iter().zip(accumulators) {
            let x = shared.unwrap_or_else(|| x(e, row));
            *accumulator = e.accumulate(*accumulator, *w, x);
        }
    }
}
