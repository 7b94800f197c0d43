//! The loops around a register tile: regions of panels -> panels -> column tiles -> row tiles -> parts -> steps of `k`.
//!
//! The order of sums is fixed by the innermost loop alone (`k` ascending into one accumulator per output), so every
//! nest below gives the same bits.

use crate::blocked;
use crate::clif::Emit;
use crate::fuse;
use crate::plan::{Home, Plan, Region};
use crate::{matmul_float, matmul_quant};
use alloc::vec;
use alloc::vec::Vec;
use cranelift_codegen::ir::Value;
use model::layout::PANEL;

/// Bytes at the start of the frame that hold 32-bit constants; accumulators follow.
pub(crate) const CONSTANT_BYTES: usize = 64;

/// Registers that stay the same for the whole kernel.
#[derive(Clone, Copy)]
pub(crate) struct Fixed {
    /// Bytes between rows of `y`.
    pub(crate) ldy: Value,
    /// Rows that are wanted.
    pub(crate) rows: Value,
    /// Where full row tiles end in `x`: behind as many rows as are left without the last, shorter row tile.
    pub(crate) x_end: Value,
    /// Constants, then accumulators. Only used where [`needs_frame`].
    pub(crate) frame: Value,
}

/// One register tile: where its operands are and how large it is.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) rows: usize,
    pub(crate) region: Region,
    /// First row of `x`.
    pub(crate) x: Value,
    /// The first stream's panel, at the tile's first column.
    pub(crate) weights: Weights,
    /// First output.
    pub(crate) y: Value,
    /// Frame address to which [`Self::frame_offset`] applies: that of the part being summed.
    pub(crate) frame: Value,
}

/// Pointers into a panel. All move together from panel to panel.
#[derive(Clone, Copy)]
pub(crate) struct Weights {
    /// Weights or codes of the step.
    pub(crate) quants: Value,
    /// Scales of the step (quantised types).
    pub(crate) scales: Value,
    /// Super-scales of the group of steps (K types).
    pub(crate) header: Value,
}

impl Weights {
    /// The pointers that this type has.
    fn pointers(&self, plan: &Plan) -> Vec<Value> {
        let count = 1 + usize::from(plan.blocks.is_some()) + usize::from(plan.group_steps > 1);
        [self.quants, self.scales, self.header][..count].to_vec()
    }

    /// The inverse of [`Self::pointers`].
    fn of(pointers: &[Value]) -> Self {
        let at = |i: usize| pointers[i.min(pointers.len() - 1)];
        Weights { quants: at(0), scales: at(1), header: at(2) }
    }
}

/// Pointers of one step of `k`.
#[derive(Clone, Copy)]
pub(crate) struct Cursor {
    pub(crate) x: Value,
    pub(crate) weights: Weights,
    /// Offset of the stream's panel plus that of the step, in bytes.
    pub(crate) w_offset: i32,
    /// Offset of the stream's panel, in bytes.
    pub(crate) header_offset: i32,
    /// Offset of the step in a row of `x`, in bytes.
    pub(crate) x_offset: i32,
}

impl Tile {
    /// Bytes from the first stream's panel to that of `stream`.
    fn stream_offset(&self, plan: &Plan, stream: usize) -> usize {
        stream * self.region.run * plan.unit_bytes()
    }

    /// Byte offset from the part's frame address to the accumulator of stream 0, `row`, vector `v`. Streams follow each
    /// other at [`stream_frame_bytes`].
    pub(crate) fn frame_offset(&self, plan: &Plan, row: usize, v: usize) -> i32 {
        let index = row * self.region.streams * plan.vectors + v;
        (fuse::constant_bytes(plan.op) + index * plan.vector_bytes()) as i32
    }

    /// Bytes of one part's accumulators in the frame.
    pub(crate) fn part_frame_bytes(&self, plan: &Plan) -> usize {
        self.rows * self.region.streams * stream_frame_bytes(plan)
    }

    /// Runs `body` for every stream with carried pointers that `steps` move by constants. The first is the frame address
    /// to which [`Self::frame_offset`] applies. One copy of the code serves all streams.
    pub(crate) fn each_stream<'b>(
        &self,
        e: &mut Emit<'_, 'b>,
        plan: &Plan,
        others: &[(Value, i64)],
        mut body: impl FnMut(&mut Emit<'_, 'b>, &[Value]),
    ) {
        let frame_step = stream_frame_bytes(plan) as i64;
        let end = e.offset(self.frame, self.region.streams as i64 * frame_step);
        let mut init = vec![self.frame];
        init.extend(others.iter().map(|(pointer, _)| *pointer));
        let once = self.region.streams == 1;
        e.repeat(once, &init, end, |e, at| {
            body(e, at);
            if once {
                return at.to_vec();
            }
            let steps = core::iter::once(frame_step).chain(others.iter().map(|(_, step)| *step));
            at.iter().zip(steps).map(|(pointer, step)| e.offset(*pointer, step)).collect()
        });
    }
}

/// Bytes between the accumulators of neighbouring streams in the frame.
fn stream_frame_bytes(plan: &Plan) -> usize {
    plan.vectors * plan.vector_bytes()
}

/// True when the kernel keeps constants or accumulators in its frame.
fn needs_frame(plan: &Plan) -> bool {
    plan.home == Home::Frame || plan.blocks.is_some() || plan.parts == 2 || plan.k_block.is_some()
}

/// Emits the whole kernel: `args` are `x`, `w`, `y`, `ldy` in bytes, and the number of rows.
pub(crate) fn kernel(e: &mut Emit<'_, '_>, plan: &Plan, args: [Value; 5]) {
    let [x, w, y, ldy, rows] = args;
    let frame = if needs_frame(plan) {
        let accumulators = match plan.k_block {
            Some(_) => blocked::sums_bytes(plan),
            None if plan.home == Home::Frame || plan.parts == 2 => plan.accumulators() * plan.vector_bytes(),
            None => 0,
        };
        let frame = e.frame((fuse::constant_bytes(plan.op) + accumulators) as u32);
        if plan.parts == 2 {
            fuse::store_activation_constants(e, frame, plan.op);
        }
        if let Some(layout) = &plan.blocks {
            matmul_quant::store_constants(e, frame, plan, layout);
        }
        frame
    } else {
        ldy
    };
    let full = e.offset(rows, -((plan.m % plan.rows) as i64));
    let full_bytes = e.times(full, plan.x_row_bytes as i64);
    let fixed = Fixed { ldy, frame, rows, x_end: e.add_address(x, full_bytes) };
    for region in &plan.regions {
        let w = e.offset(w, (region.first * plan.unit_bytes()) as i64);
        let y = e.offset(y, (region.first * PANEL * 4) as i64);
        let end = e.offset(y, (region.run * PANEL * 4) as i64);
        e.repeat(region.run == 1, &[y, w], end, |e, at| {
            match plan.k_block {
                Some(k_steps) => blocked::panel(e, plan, fixed, *region, k_steps, [x, at[1], at[0]]),
                None => panel(e, plan, fixed, *region, x, at[1], at[0]),
            }
            let y = e.offset(at[0], (PANEL * 4) as i64);
            let w = e.offset(at[1], plan.unit_bytes() as i64);
            vec![y, w]
        });
    }
}

/// One panel of every stream: its column tiles.
fn panel(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, region: Region, x: Value, w: Value, y: Value) {
    // Bytes of one column in a step: words and f32 take 4, f16 takes 2.
    let column_bytes = if plan.dtype == model::kernel::DType::F16 { 2 } else { 4 };
    let quants = e.offset(w, plan.header_bytes as i64);
    let (scales, scale_bytes) = match &plan.blocks {
        Some(layout) => (e.offset(quants, layout.scales_offset(0) as i64), layout.scale_bytes()),
        None => (quants, 0),
    };
    let mut init = vec![y];
    init.extend(Weights { quants, scales, header: w }.pointers(plan));
    let end = e.offset(y, (PANEL * 4) as i64);
    e.repeat(plan.columns == PANEL, &init, end, |e, at| {
        let tile = Tile { rows: plan.rows, region, x, weights: Weights::of(&at[1..]), y: at[0], frame: fixed.frame };
        rows(e, plan, fixed, tile);
        let bytes = [4, column_bytes, scale_bytes, 2];
        at.iter().zip(bytes).map(|(pointer, bytes)| e.offset(*pointer, (plan.columns * bytes) as i64)).collect()
    });
}

/// All rows of one column tile: full row tiles in a loop until those that are wanted are done, then the rest. With few rows
/// wanted the first tile is one too many, but still inside the batch.
fn rows(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: Tile) {
    let full = plan.m / plan.rows;
    let rest = plan.m % plan.rows;
    let after = e.repeat(full == 1, &[tile.x, tile.y], fixed.x_end, |e, at| {
        one_tile(e, plan, fixed, Tile { x: at[0], y: at[1], ..tile });
        if full == 1 && rest == 0 {
            return at.to_vec();
        }
        let x = e.offset(at[0], (plan.rows * plan.x_row_bytes) as i64);
        let step = e.times(fixed.ldy, plan.rows as i64);
        let y = e.add_address(at[1], step);
        vec![x, y]
    });
    if rest > 0 {
        one_tile(e, plan, fixed, Tile { rows: rest, x: after[0], y: after[1], ..tile });
    }
}

/// One register tile: sum over `k`, fuse and store.
fn one_tile(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: Tile) {
    if plan.parts == 1 {
        let accumulators = sums(e, plan, fixed, &tile);
        fuse::finish(e, plan, fixed, &tile, &accumulators);
        return;
    }
    // Gate, then up: they lie one behind the other, and side by side they would be two streams for the prefetchers.
    let part_bytes = tile.part_frame_bytes(plan) as i64;
    let end = e.offset(tile.frame, plan.parts as i64 * part_bytes);
    let mut init = vec![tile.frame];
    init.extend(tile.weights.pointers(plan));
    e.repeat(false, &init, end, |e, at| {
        let part = Tile { frame: at[0], weights: Weights::of(&at[1..]), ..tile };
        let accumulators = sums(e, plan, fixed, &part);
        fuse::keep(e, plan, &part, &accumulators);
        let mut next = vec![e.offset(at[0], part_bytes)];
        for pointer in &at[1..] {
            next.push(e.offset(*pointer, plan.panel_bytes as i64));
        }
        next
    });
    fuse::gate_up(e, plan, fixed, &tile);
}

/// Sums of one part over `k`: the accumulators, stream by stream, or none where they live in the frame.
fn sums(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile) -> Vec<Value> {
    let mut init = vec![tile.x];
    init.extend(tile.weights.pointers(plan));
    let pointers = init.len();
    match plan.home {
        Home::Registers => {
            for _ in 0..tile.region.streams * tile.rows * plan.vectors {
                init.push(e.zero_f32());
            }
        }
        Home::Frame => {
            let zero = e.zero_f32();
            let first = e.offset(tile.frame, fuse::constant_bytes(plan.op) as i64);
            let rounds = tile.rows * tile.region.streams;
            let end = e.offset(first, tile.part_frame_bytes(plan) as i64);
            e.repeat(rounds == 1, &[first], end, |e, at| {
                for v in 0..plan.vectors {
                    e.store(zero, at[0], (v * plan.vector_bytes()) as i32);
                }
                vec![e.offset(at[0], stream_frame_bytes(plan) as i64)]
            });
        }
    }
    if plan.group_steps == 1 {
        return k_loop(e, plan, fixed, tile, plan.k_steps, &init);
    }
    // Super-blocks: the steps of each in a loop of their own, then all pointers move behind them.
    let count = plan.k_steps / plan.group_steps;
    let group_bytes = plan.header_bytes + plan.group_steps * plan.step_bytes;
    let end = e.offset(tile.x, (plan.k_steps * plan.x_step_bytes) as i64);
    let after = e.repeat(count == 1, &init, end, |e, at| {
        let accumulators = k_loop(e, plan, fixed, tile, plan.group_steps, at);
        let mut next = vec![e.offset(at[0], (plan.group_steps * plan.x_step_bytes) as i64)];
        for pointer in &at[1..pointers] {
            next.push(e.offset(*pointer, group_bytes as i64));
        }
        next.extend(accumulators);
        next
    });
    after[pointers..].to_vec()
}

/// `k_steps` steps of `k` from the pointers and with the accumulators in `init`; returns the accumulators.
fn k_loop(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile, k_steps: usize, init: &[Value]) -> Vec<Value> {
    let pointers = 1 + tile.weights.pointers(plan).len();
    let at_tile = |at: &[Value]| Tile { x: at[0], weights: Weights::of(&at[1..pointers]), ..*tile };
    let trips = k_steps / plan.unroll;
    let tail = k_steps % plan.unroll;
    let end = e.offset(init[0], (trips * plan.unroll * plan.x_step_bytes) as i64);
    let after = e.repeat(trips == 1, init, end, |e, at| {
        let mut accumulators = at[pointers..].to_vec();
        steps(e, plan, fixed, &at_tile(at), plan.unroll, &mut accumulators);
        let mut next = at[..pointers].to_vec();
        if trips > 1 || tail > 0 {
            // Super-scales stay where they are.
            let bytes = [plan.x_step_bytes, plan.step_bytes, plan.step_bytes, 0];
            for (pointer, bytes) in next.iter_mut().zip(bytes) {
                *pointer = e.offset(*pointer, (plan.unroll * bytes) as i64);
            }
        }
        next.extend(accumulators);
        next
    });
    let mut accumulators = after[pointers..].to_vec();
    if tail > 0 {
        steps(e, plan, fixed, &at_tile(&after), tail, &mut accumulators);
    }
    accumulators
}

/// `count` steps of `k` for every stream.
pub(crate) fn steps(
    e: &mut Emit<'_, '_>,
    plan: &Plan,
    fixed: Fixed,
    tile: &Tile,
    count: usize,
    accumulators: &mut [Value],
) {
    match plan.home {
        // Steps outermost: streams share each x, and their loads alternate.
        Home::Registers => {
            for step in 0..count {
                let mut shared_x = None;
                for (stream, accumulators) in accumulators.chunks_mut(tile.rows * plan.vectors).enumerate() {
                    let at = cursor(plan, tile, tile.stream_offset(plan, stream), step);
                    match &plan.blocks {
                        Some(layout) => {
                            let sums = matmul_quant::Sums::Registers(accumulators);
                            matmul_quant::step(e, plan, layout, fixed, tile, at, sums);
                        }
                        None => matmul_float::step(e, plan, tile, at, &mut shared_x, accumulators),
                    }
                }
            }
        }
        // Streams outermost, in a loop: one stream's accumulators are loaded once for all steps of the iteration.
        Home::Frame => {
            let stream_bytes = tile.stream_offset(plan, 1) as i64;
            let others: Vec<_> =
                tile.weights.pointers(plan).into_iter().map(|pointer| (pointer, stream_bytes)).collect();
            tile.each_stream(e, plan, &others, |e, at| {
                let held_tile = Tile { frame: at[0], weights: Weights::of(&at[1..]), ..*tile };
                framed_steps(e, plan, fixed, &held_tile, count);
            });
        }
    }
}

/// `count` steps of `k` for the one stream whose accumulators are at the tile's frame address.
fn framed_steps(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile, count: usize) {
    if let Some(layout) = &plan.blocks {
        for step in 0..count {
            let at = cursor(plan, tile, 0, step);
            matmul_quant::step(e, plan, layout, fixed, tile, at, matmul_quant::Sums::Frame);
        }
        return;
    }
    let mut held = Vec::with_capacity(tile.rows * plan.vectors);
    for_each(tile.rows, plan.vectors, |row, v| {
        held.push(e.load_back(tile.frame, tile.frame_offset(plan, row, v)));
    });
    for step in 0..count {
        matmul_float::step(e, plan, tile, cursor(plan, tile, 0, step), &mut None, &mut held);
    }
    for_each(tile.rows, plan.vectors, |row, v| {
        e.store(held[row * plan.vectors + v], tile.frame, tile.frame_offset(plan, row, v));
    });
}

/// Pointers of step `step` of the stream `w_offset` bytes after the tile's first panel.
fn cursor(plan: &Plan, tile: &Tile, w_offset: usize, step: usize) -> Cursor {
    Cursor {
        x: tile.x,
        weights: tile.weights,
        w_offset: (w_offset + step * plan.step_bytes) as i32,
        header_offset: w_offset as i32,
        x_offset: (step * plan.x_step_bytes) as i32,
    }
}

/// Calls `f(row, v)` for every vector of a stream, rows outermost.
pub(crate) fn for_each(rows: usize, vectors: usize, mut f: impl FnMut(usize, usize)) {
    for row in 0..rows {
        for v in 0..vectors {
            f(row, v);
        }
    }
}
