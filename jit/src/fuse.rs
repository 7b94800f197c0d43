//! What happens to finished sums: stored, added to the residual, or put through `activation(gate) * up`.

use crate::clif::Emit;
use crate::nest::{CONSTANT_BYTES, Fixed, Tile, for_each};
use crate::plan::{Home, Plan};
use alloc::vec;
use alloc::vec::Vec;
use cranelift_codegen::ir::Value;
use model::kernel::Op;
use model::layout::PANEL;
use model::numerics::{EXP_HI, EXP_LO, EXP_POLY, GELU_CUBIC, GELU_LINEAR, LN2_HI, LN2_LO, LOG2E, ROUND_MAGIC};

/// Constants of `silu`, in the order of the frame's first words.
const SILU: [f32; 13] = [
    EXP_HI,
    EXP_LO,
    LOG2E,
    ROUND_MAGIC,
    -LN2_HI,
    -LN2_LO,
    1.0,
    EXP_POLY[0],
    EXP_POLY[1],
    EXP_POLY[2],
    EXP_POLY[3],
    EXP_POLY[4],
    EXP_POLY[5],
];
const HI: usize = 0;
const LO: usize = 1;
const LOG2: usize = 2;
const MAGIC: usize = 3;
const MINUS_LN2_HI: usize = 4;
const MINUS_LN2_LO: usize = 5;
const ONE: usize = 6;
const POLY: usize = 7;

/// Further constants of `gelu`, at this word of the frame: behind those of every other op.
const GELU: [f32; 2] = [GELU_CUBIC, GELU_LINEAR];
const GELU_AT: usize = CONSTANT_BYTES / 4;

/// Bytes at the start of a kernel's frame that hold constants.
pub(crate) fn constant_bytes(op: Op) -> usize {
    // The accumulators behind them start at a whole line.
    if op == Op::GateUpGelu { 2 * CONSTANT_BYTES } else { CONSTANT_BYTES }
}

/// Writes the constants of a gated op's activation to the frame.
pub(crate) fn store_activation_constants(e: &mut Emit<'_, '_>, frame: Value, op: Op) {
    for (i, constant) in SILU.iter().enumerate() {
        e.store_constant(frame, 4 * i as i32, constant.to_bits());
    }
    if op == Op::GateUpGelu {
        for (i, constant) in GELU.iter().enumerate() {
            e.store_constant(frame, 4 * (GELU_AT + i) as i32, constant.to_bits());
        }
    }
}

/// Takes a part's sums to the frame, where they wait for those of the other part: the activation needs registers of its
/// own.
pub(crate) fn keep(e: &mut Emit<'_, '_>, plan: &Plan, tile: &Tile, accumulators: &[Value]) {
    for (stream, accumulators) in accumulators.chunks(tile.rows * plan.vectors).enumerate() {
        let stream = (stream * plan.vectors * plan.vector_bytes()) as i32;
        for_each(tile.rows, plan.vectors, |row, v| {
            e.store(accumulators[row * plan.vectors + v], tile.frame, stream + tile.frame_offset(plan, row, v));
        });
    }
}

/// Takes the sums of an op of one part to `y`. `accumulators` are its registers, stream by stream, where they live there.
pub(crate) fn finish(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile, accumulators: &[Value]) {
    let stream_bytes = tile.region.run * PANEL * 4;
    match plan.home {
        Home::Registers => {
            let mut y = tile.y;
            for row in 0..tile.rows {
                if row > 0 {
                    y = e.add_address(y, fixed.ldy);
                }
                for stream in 0..tile.region.streams {
                    for v in 0..plan.vectors {
                        let sum = accumulators[(stream * tile.rows + row) * plan.vectors + v];
                        output(e, plan, sum, y, stream * stream_bytes + v * plan.vector_bytes());
                    }
                }
            }
        }
        Home::Frame => tile.each_stream(e, plan, &[(tile.y, stream_bytes as i64)], |e, at| {
            let mut y = at[1];
            for row in 0..tile.rows {
                if row > 0 {
                    y = e.add_address(y, fixed.ldy);
                }
                for v in 0..plan.vectors {
                    let sum = e.load_back(at[0], tile.frame_offset(plan, row, v));
                    output(e, plan, sum, y, v * plan.vector_bytes());
                }
            }
        }),
    }
}

/// Writes one vector of sums, added to what is there for a residual.
fn output(e: &mut Emit<'_, '_>, plan: &Plan, sum: Value, y: Value, offset: usize) {
    let offset = offset as i32;
    let value = if plan.op == Op::MatmulResidual {
        let old = e.load_back(y, offset);
        e.add(old, sum)
    } else {
        sum
    };
    e.store(value, y, offset);
}

/// Takes the sums of a whole panel from `sums`, row after row and part after part, to `y`: those of the rows wanted.
pub(crate) fn finish_rows(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, sums: Value, y: Value) {
    let row_bytes = PANEL * 4;
    let wanted_bytes = e.times(fixed.rows, row_bytes as i64);
    let end = e.add_address(sums, wanted_bytes);
    if plan.parts == 2 {
        let to_up = plan.m * row_bytes;
        let sums = Sums { first: sums, end, is_one_row: false, streams: 1, stream_bytes: row_bytes, to_up };
        gated(e, plan, fixed, sums, y, 0);
        return;
    }
    e.repeat(false, &[sums, y], end, |e, at| {
        for offset in (0..row_bytes).step_by(plan.vector_bytes()) {
            let sum = e.load_back(at[0], offset as i32);
            output(e, plan, sum, at[1], offset);
        }
        vec![e.offset(at[0], row_bytes as i64), e.add_address(at[1], fixed.ldy)]
    });
}

/// `y = activation(gate) * up` over the accumulators of a tile in the frame.
pub(crate) fn gate_up(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, tile: &Tile) {
    let first = e.offset(tile.frame, i64::from(tile.frame_offset(plan, 0, 0)));
    let to_up = tile.part_frame_bytes(plan);
    let sums = Sums {
        first,
        end: e.offset(first, to_up as i64),
        is_one_row: tile.rows == 1,
        streams: tile.region.streams,
        stream_bytes: plan.vectors * plan.vector_bytes(),
        to_up,
    };
    gated(e, plan, fixed, sums, tile.y, tile.region.run * PANEL * 4);
}

/// Sums of gates in the frame, rows outermost, and those of their ups `to_up` bytes behind.
#[derive(Clone, Copy)]
struct Sums {
    first: Value,
    /// Behind the gates of the last row.
    end: Value,
    is_one_row: bool,
    streams: usize,
    /// Bytes of one stream of one row.
    stream_bytes: usize,
    to_up: usize,
}

/// `y = activation(gate) * up`: loops over rows, streams (`y_stream_bytes` apart) and vectors.
fn gated(e: &mut Emit<'_, '_>, plan: &Plan, fixed: Fixed, sums: Sums, y: Value, y_stream_bytes: usize) {
    let Sums { first, end, is_one_row, streams, stream_bytes, to_up } = sums;
    let vector = plan.vector_bytes();
    let row_bytes = streams * stream_bytes;
    e.repeat(is_one_row, &[first, y], end, |e, row| {
        let end = e.offset(row[0], row_bytes as i64);
        e.repeat(streams == 1, &[row[0], row[1]], end, |e, stream| {
            let end = e.offset(stream[0], stream_bytes as i64);
            // Two vectors at once share the loads of the activation's constants.
            let at_once = if stream_bytes.is_multiple_of(2 * vector) { 2 } else { 1 };
            e.repeat(stream_bytes == at_once * vector, &[stream[0], stream[1]], end, |e, at| {
                let offsets = (0..at_once).map(|i| (i * vector) as i32);
                let gates: Vec<_> = offsets.clone().map(|offset| e.load_back(at[0], offset)).collect();
                for (active, offset) in activation(e, plan.op, fixed.frame, &gates).into_iter().zip(offsets) {
                    let up = e.load_back(at[0], to_up as i32 + offset);
                    let out = e.mul(active, up);
                    e.store(out, at[1], offset);
                }
                at.iter().map(|pointer| e.offset(*pointer, (at_once * vector) as i64)).collect()
            });
            let gate = e.offset(stream[0], stream_bytes as i64);
            vec![gate, e.offset(stream[1], y_stream_bytes as i64)]
        });
        let gate = e.offset(row[0], row_bytes as i64);
        vec![gate, e.add_address(row[1], fixed.ldy)]
    });
}

/// `x / (1 + exp(0 - z))` of each `x`, the sequence of [`model::numerics`]: `z` is `x` for silu and a cubic of `x` for gelu.
fn activation(e: &mut Emit<'_, '_>, op: Op, frame: Value, xs: &[Value]) -> Vec<Value> {
    let constant = |e: &mut Emit<'_, '_>, i: usize| {
        let v = e.constant(frame, 4 * i as i32);
        e.as_f32(v)
    };
    let mut zs = xs.to_vec();
    if op == Op::GateUpGelu {
        let (cubic, linear) = (constant(e, GELU_AT), constant(e, GELU_AT + 1));
        for z in &mut zs {
            let square = e.mul(*z, *z);
            let slope = e.fma(square, cubic, linear);
            *z = e.mul(*z, slope);
        }
    }
    let zero = e.zero_f32();
    let (lo, hi) = (constant(e, LO), constant(e, HI));
    for z in &mut zs {
        let minus = e.sub(zero, *z);
        let bounded = e.max(minus, lo);
        *z = e.min(bounded, hi);
    }
    let (log2e, magic) = (constant(e, LOG2), constant(e, MAGIC));
    let ts: Vec<_> = zs.iter().map(|z| e.fma(*z, log2e, magic)).collect();
    let (ln2_hi, ln2_lo) = (constant(e, MINUS_LN2_HI), constant(e, MINUS_LN2_LO));
    let mut rs = Vec::with_capacity(zs.len());
    for (t, z) in ts.iter().zip(&zs) {
        let n = e.sub(*t, magic);
        let r = e.fma(n, ln2_hi, *z);
        rs.push(e.fma(n, ln2_lo, r));
    }
    let first = constant(e, POLY);
    let mut ps = vec![first; zs.len()];
    for i in 1..EXP_POLY.len() {
        let c = constant(e, POLY + i);
        for (p, r) in ps.iter_mut().zip(&rs) {
            *p = e.fma(*p, *r, c);
        }
    }
    let one = constant(e, ONE);
    let mut out = Vec::with_capacity(zs.len());
    for (((x, t), r), p) in xs.iter().zip(&ts).zip(&rs).zip(&ps) {
        let square = e.mul(*r, *r);
        let linear = e.add(*r, one);
        let exp = e.fma(*p, square, linear);
        let power = e.shift_left_i32(*t, 23);
        let exp = e.add_i32(exp, power);
        let exp = e.as_f32(exp);
        let below = e.add(one, exp);
        out.push(e.div(*x, below));
    }
    out
}
