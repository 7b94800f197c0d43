//! The nest of long prompts: panels -> parts -> blocks of `k` -> row tiles -> column tiles -> steps of `k`.
//!
//! The nest of [`crate::nest`] meets each weight for the first time in the first row tile of a column tile, and waits for
//! memory there. Here all rows go through one block of `k` before the next, and meanwhile the next one is fetched. Blocks,
//! parts and panels lie one behind the other in memory, so the next block is always what follows this one, and each register
//! tile asks for a few of its lines in every iteration: asked for all at once they get in the way of the tile's own loads.
//! They go to the second level, from where the first row tile reads them without waiting.
//!
//! The sums of all rows wait in the frame between blocks: saved and loaded again, so every output still has one accumulator
//! with `k` ascending.

use crate::clif::Emit;
use crate::fuse;
use crate::nest::{Fixed, Tile, Weights, for_each, steps};
use crate::plan::{Plan, Region};
use alloc::vec;
use alloc::vec::Vec;
use cranelift_codegen::ir::Value;
use model::layout::PANEL;

/// Bytes of one row's sums in the frame.
const ROW_BYTES: usize = PANEL * 4;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes of the frame that hold sums: those of every row, part after part.
pub(crate) fn sums_bytes(plan: &Plan) -> usize {
    plan.parts * plan.m * ROW_BYTES
}

/// What does not change within a block.
#[derive(Clone, Copy)]
struct Block {
    fixed: Fixed,
    region: Region,
    /// Steps of `k`.
    k_steps: usize,
}

impl Block {
    /// Lines of the next block that a register tile asks for in each iteration over `k`, so that all tiles together ask
    /// for all of them.
    fn lines(&self, plan: &Plan) -> usize {
        let tiles = plan.m.div_ceil(plan.rows) * (PANEL / plan.columns);
        (plan.unroll * plan.step_bytes).div_ceil(LINE).div_ceil(tiles)
    }

    /// Bytes of its weights.
    fn bytes(&self, plan: &Plan) -> usize {
        self.k_steps * plan.step_bytes
    }
}

/// Pointers of one register tile, which move together.
#[derive(Clone, Copy)]
struct At {
    x: Value,
    w: Value,
    /// Saved sums.
    sums: Value,
    /// Weights of the next block to ask for.
    ahead: Value,
}

/// One panel of outputs from `w`, in blocks of `k_steps`, to `y`.
pub(crate) fn panel(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    fixed: Fixed,
    region: Region,
    k_steps: usize,
    [x, w, y]: [Value; 3],
) {
    let sums = e.offset(fixed.frame, fuse::constant_bytes(plan.op) as i64);
    let sums_end = e.offset(sums, sums_bytes(plan) as i64);
    let zero = e.zero_f32();
    e.repeat(false, &[sums], sums_end, |e, at| {
        for v in (0..ROW_BYTES).step_by(plan.vector_bytes()) {
            e.store(zero, at[0], v as i32);
        }
        vec![e.offset(at[0], ROW_BYTES as i64)]
    });

    let block = Block { fixed, region, k_steps };
    let x_end = e.offset(x, (plan.k_steps * plan.x_step_bytes) as i64);
    let part_bytes = plan.m * ROW_BYTES;
    e.repeat(plan.parts == 1, &[sums, w], sums_end, |e, part| {
        let after = e.repeat(plan.k_steps == k_steps, &[x, part[1]], x_end, |e, at| {
            let ahead = e.offset(at[1], block.bytes(plan) as i64);
            rows(e, plan, block, At { x: at[0], w: at[1], sums: part[0], ahead });
            vec![e.offset(at[0], (k_steps * plan.x_step_bytes) as i64), ahead]
        });
        vec![e.offset(part[0], part_bytes as i64), after[1]]
    });
    fuse::finish_rows(e, plan, fixed, sums, y);
}

/// All rows of one block, as in [`crate::nest`]: full row tiles in a loop, then the rest.
fn rows(e: &mut Emit<'_, '_>, plan: &Plan, block: Block, at: At) {
    let (full, rest) = (plan.m / plan.rows, plan.m % plan.rows);
    let full_rows = e.offset(block.fixed.rows, -(rest as i64));
    let full_bytes = e.times(full_rows, ROW_BYTES as i64);
    let end = e.add_address(at.sums, full_bytes);
    let after = e.repeat(full == 1, &[at.sums, at.x, at.ahead], end, |e, next| {
        let at = At { sums: next[0], x: next[1], ahead: next[2], ..at };
        let ahead = columns(e, plan, block, plan.rows, at);
        let x = e.offset(at.x, (plan.rows * plan.x_row_bytes) as i64);
        vec![e.offset(at.sums, (plan.rows * ROW_BYTES) as i64), x, ahead]
    });
    if rest > 0 {
        columns(e, plan, block, rest, At { sums: after[0], x: after[1], ahead: after[2], ..at });
    }
}

/// All columns of one row tile. Returns what the next one asks for.
fn columns(e: &mut Emit<'_, '_>, plan: &Plan, block: Block, rows: usize, at: At) -> Value {
    let steps = [plan.columns * 4, plan.columns * plan.step_bytes / PANEL, block.lines(plan) * LINE];
    let end = e.offset(at.sums, ROW_BYTES as i64);
    let after = e.repeat(plan.columns == PANEL, &[at.sums, at.w, at.ahead], end, |e, next| {
        tile(e, plan, block, rows, At { sums: next[0], w: next[1], ahead: next[2], ..at });
        next.iter().zip(steps).map(|(pointer, bytes)| e.offset(*pointer, bytes as i64)).collect()
    });
    after[2]
}

/// One register tile through the block: its sums are loaded, go on, and are saved.
fn tile(e: &mut Emit<'_, '_>, plan: &Plan, block: Block, rows: usize, at: At) {
    const POINTERS: usize = 3;
    let tile_at = |next: &[Value]| {
        let weights = Weights { quants: next[1], scales: next[1], header: next[1] };
        Tile { rows, region: block.region, x: next[0], weights, y: at.sums, frame: at.sums }
    };
    let place = |row: usize, v: usize| (row * ROW_BYTES + v * plan.vector_bytes()) as i32;
    let mut init = vec![at.x, at.w, at.ahead];
    for_each(rows, plan.vectors, |row, v| init.push(e.load_back(at.sums, place(row, v))));

    let (trips, tail) = (block.k_steps / plan.unroll, block.k_steps % plan.unroll);
    let bytes = [plan.x_step_bytes, plan.step_bytes, plan.step_bytes].map(|bytes| plan.unroll * bytes);
    let end = e.offset(at.x, (trips * bytes[0]) as i64);
    let after = e.repeat(trips == 1, &init, end, |e, next| {
        for line in 0..block.lines(plan) {
            e.prefetch_far(next[2], (line * LINE) as i32);
        }
        let mut sums = next[POINTERS..].to_vec();
        steps(e, plan, block.fixed, &tile_at(next), plan.unroll, &mut sums);
        let moved = next.iter().zip(bytes).map(|(pointer, bytes)| e.offset(*pointer, bytes as i64));
        moved.collect::<Vec<_>>().into_iter().chain(sums).collect()
    });
    let mut sums = after[POINTERS..].to_vec();
    if tail > 0 {
        steps(e, plan, block.fixed, &tile_at(&after), tail, &mut sums);
    }
    for_each(rows, plan.vectors, |row, v| e.store(sums[row * plan.vectors + v], at.sums, place(row, v)));
}
