//! The target `widen`: functions written at random in the vocabulary of kernels ([`jit::clif`]) go through the widening
//! pass and must compute, at every width, what a scalar model of them computes.
//!
//! A function is a few sections, straight-line or loops with carried values, over vectors of 64 bytes, of which narrower
//! code does a part in each call: the same code, told by its last argument which. So one compilation by Cranelift serves
//! all widths. Functions without carriers also run as Cranelift made them, without the pass. Before any code runs, the
//! audit has to accept it.
//!
//! What the vocabulary asks of a function is kept: operands have the types they must have, nothing is written but `y` and the frame, and nothing is read there that was not
//! written (or was there before). Everything else is random: how many values live at once (with too many, registers
//! spill, and the pass must refuse), how far loads are from where they are used, and which values outlive a loop. Some
//! functions contain CLIF that is not of the vocabulary: it has to be refused, or right.
//!
//! NaNs: the numerics contract says nothing of their payloads, and which operand's payload survives depends on the order
//! of factors, which folding a load may change. So the model knows *that* a lane is NaN, and expects any NaN there; of what
//! integer operations make of such a lane it knows nothing, and expects nothing. Every other lane is compared bit for bit.

use crate::common::{Mapping, Random, Runnable, f16_value, host_isa};
use crate::decisions::Decisions;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{ConstantData, InstBuilder, MemFlagsData, Value};
use jit::clif::Emit;
use jit::widen::{Encoding, widen};
use jit::{Compiler, JitError, audit, disassemble};
use model::kernel::{Dot, Width};
use std::cell::RefCell;

/// Bytes of the widest vector, and 32-bit lanes in it.
const VECTOR: usize = 64;
const LANES: usize = VECTOR / 4;
/// Bytes of `w` and numbers in `x` that operations of one round reach.
const W_REACH: usize = 1024;
const X_REACH: usize = 64;
/// Most rounds of a loop.
const ROUNDS: usize = 4;
/// Most bytes of `w` and numbers of `x` that a round goes on by.
const W_STEP: usize = 96;
const X_STEP: usize = 8;
/// Vectors and constants in the frame.
const FRAME_VECTORS: usize = 3;
const FRAME_CONSTANTS: usize = 3;
/// Where the frame's vectors begin.
const FRAME_START: usize = 64;
/// Vectors of `y` that any operation may write or read back; behind them each round has those that are written once.
const Y_SHARED: usize = 6;

/// CLIF type of a value, by its lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lanes {
    F32,
    I32,
    I16,
    I8,
}

/// What an operand has to be.
#[derive(Clone, Copy, Debug)]
enum Want {
    /// Of this type.
    Of(Lanes),
    /// Anything.
    Any,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    LoadF32,
    LoadBytes,
    LoadF16,
    LoadU8,
    LoadI8,
    BroadcastF32,
    BroadcastI32,
    Constant,
    ZeroF32,
    ZeroI32,
    LoadY,
    LoadFrame,
    StoreY,
    StoreIntegers,
    StoreFrame,
    Prefetch,
    PrefetchFar,
    Accumulate,
    Fma,
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
    Convert,
    AsF32,
    AddI32,
    SubI32,
    ShiftLeft,
    AddI16,
    Bits,
    Halves,
    Or,
    Flip,
    Abs,
    Sign,
    DotU8,
    DotI16,
    AccumulateU8,
    // Not of the vocabulary.
    MulI32,
    AndNot,
    ShiftRight,
    Sqrt,
    Reverse,
}

/// Operations that mean at 128 bits what Cranelift makes of them.
const PLAIN: &[Op] = &[
    Op::LoadF32,
    Op::LoadBytes,
    Op::LoadY,
    Op::LoadFrame,
    Op::StoreY,
    Op::StoreIntegers,
    Op::StoreFrame,
    Op::ZeroF32,
    Op::ZeroI32,
    Op::Fma,
    Op::Add,
    Op::Sub,
    Op::Mul,
    Op::Div,
    Op::Convert,
    Op::AsF32,
    Op::AddI32,
    Op::SubI32,
    Op::ShiftLeft,
    Op::AddI16,
    Op::Bits,
    Op::Halves,
    Op::Or,
    Op::Flip,
    Op::Abs,
    Op::DotU8,
];
/// Operations that stand for others until they are widened. Sums are frequent in kernels, and loads fold into them.
const CARRIERS: &[Op] = &[
    Op::LoadF16,
    Op::LoadU8,
    Op::LoadI8,
    Op::BroadcastF32,
    Op::BroadcastF32,
    Op::BroadcastI32,
    Op::Constant,
    Op::Prefetch,
    Op::PrefetchFar,
    Op::Accumulate,
    Op::Accumulate,
    Op::Accumulate,
    Op::Min,
    Op::Max,
    Op::DotI16,
];
/// Carriers that not every width or machine has.
const SIGN: &[Op] = &[Op::Sign];
const VNNI: &[Op] = &[Op::AccumulateU8, Op::AccumulateU8];
const FOREIGN: &[Op] = &[Op::MulI32, Op::AndNot, Op::ShiftRight, Op::Sqrt, Op::Reverse];

impl Op {
    /// Types of operands and of the result.
    fn signature(self) -> (&'static [Want], Option<Lanes>) {
        use Lanes::{F32, I8, I16, I32};
        use Want::{Any, Of};
        match self {
            Op::LoadF32 | Op::LoadF16 | Op::BroadcastF32 | Op::ZeroF32 | Op::LoadY | Op::LoadFrame => (&[], Some(F32)),
            Op::LoadBytes => (&[], Some(I8)),
            Op::LoadU8 | Op::LoadI8 | Op::BroadcastI32 | Op::Constant | Op::ZeroI32 => (&[], Some(I32)),
            Op::StoreY | Op::StoreFrame => (&[Any], None),
            Op::StoreIntegers => (&[Of(I8)], None),
            Op::Prefetch | Op::PrefetchFar => (&[], None),
            Op::Accumulate => (&[Of(F32), Any, Of(F32)], Some(F32)),
            Op::Fma => (&[Of(F32), Of(F32), Of(F32)], Some(F32)),
            Op::Add | Op::Sub | Op::Mul | Op::Div => (&[Of(F32), Of(F32)], Some(F32)),
            Op::Min | Op::Max => (&[Any, Any], Some(F32)),
            Op::Convert => (&[Of(I32)], Some(F32)),
            Op::AsF32 => (&[Any], Some(F32)),
            Op::AddI32 | Op::SubI32 | Op::DotI16 => (&[Any, Any], Some(I32)),
            Op::ShiftLeft => (&[Any], Some(I32)),
            Op::AddI16 => (&[Of(I16), Of(I16)], Some(I16)),
            Op::Bits | Op::Or => (&[Any, Any], Some(I8)),
            Op::Halves => (&[Any], Some(I16)),
            Op::Flip => (&[Of(I8), Any], Some(I8)),
            Op::Abs => (&[Of(I8)], Some(I8)),
            Op::Sign => (&[Any, Of(I8)], Some(I8)),
            Op::DotU8 => (&[Of(I8), Any], Some(I16)),
            Op::AccumulateU8 => (&[Any, Any, Any], Some(I32)),
            Op::MulI32 | Op::AndNot => (&[Of(I32), Of(I32)], Some(I32)),
            Op::ShiftRight => (&[Of(I32)], Some(I32)),
            Op::Sqrt => (&[Of(F32)], Some(F32)),
            Op::Reverse => (&[Of(I8)], Some(I8)),
        }
    }
}

/// One operation: its operands and its result are numbers of values.
#[derive(Clone, Debug)]
struct Step {
    op: Op,
    args: Vec<usize>,
    result: Option<usize>,
    /// Where a load or a store goes: bytes in `w`, the number in `x`, the vector of `y` or of the frame, the constant; or
    /// how far to shift.
    at: usize,
    /// The second number of [`Op::Bits`].
    to: usize,
}

/// A value that a loop carries.
#[derive(Clone, Copy, Debug)]
struct Carried {
    before: usize,
    inside: usize,
    next: usize,
}

/// Operations one after the other, or a loop of them.
#[derive(Clone, Debug)]
struct Section {
    /// Rounds of the loop; `None` where there is none.
    rounds: Option<usize>,
    carried: Vec<Carried>,
    steps: Vec<Step>,
    w_step: usize,
    x_step: usize,
}

/// A function.
#[derive(Clone, Debug)]
struct Program {
    sections: Vec<Section>,
    /// Types of values by number.
    types: Vec<Lanes>,
    constants: [u32; FRAME_CONSTANTS],
    framed: bool,
    /// Vectors of `y` in one round.
    y_vectors: usize,
    /// Without carriers: right before it is widened.
    plain: bool,
    /// With sums of four products, which this machine has.
    vnni: bool,
    /// With CLIF that is not of the vocabulary.
    foreign: bool,
}

impl Program {
    fn random(d: &mut Decisions<'_>) -> Program {
        let plain = d.once_in(4);
        let foreign = d.once_in(16);
        let framed = d.once_in(2);
        let vnni = (host_isa().avx512_vnni || host_isa().avx_vnni) && d.once_in(4);
        // Values further back than this are left alone, so about as many are alive at once.
        let window = d.pick(&[3, 5, 7, 9, 11, 14, 20]);
        let mut ops = PLAIN.to_vec();
        if !plain {
            ops.extend(CARRIERS);
            ops.extend(if vnni { VNNI } else { &[] });
            ops.extend(if d.once_in(4) { SIGN } else { &[] });
        }
        if foreign {
            ops.extend(FOREIGN);
        }
        ops.retain(|op| framed || !matches!(op, Op::LoadFrame | Op::StoreFrame | Op::Constant));
        let mut random = d.random();
        let constants = [0x8080_8080, 0x0f0f_0f0f, random.next() as u32];
        let program =
            Program { sections: vec![], types: vec![], constants, framed, y_vectors: Y_SHARED, plain, vnni, foreign };
        let mut writer = Writer { program, ops, window, uses: vec![] };
        for _ in 0..1 + d.below(3) {
            writer.section(d);
        }
        let mut program = writer.program;
        // What nothing uses is stored right away, each to a place of its own: else nobody would see it.
        for section in &mut program.sections {
            let steps = std::mem::take(&mut section.steps);
            for step in steps {
                let unused = step.result.filter(|value| writer.uses[*value] == 0);
                section.steps.push(step);
                if let Some(value) = unused {
                    let at = program.y_vectors;
                    section.steps.push(Step { op: Op::StoreY, args: vec![value], result: None, at, to: 0 });
                    program.y_vectors += 1;
                }
            }
        }
        program
    }
}

/// A program in the making.
struct Writer {
    program: Program,
    ops: Vec<Op>,
    window: usize,
    /// Uses of each value.
    uses: Vec<usize>,
}

impl Writer {
    fn value(&mut self, of: Lanes) -> usize {
        self.program.types.push(of);
        self.uses.push(0);
        self.program.types.len() - 1
    }

    /// A value that fits, not far back; if need be one is made.
    fn operand(&mut self, d: &mut Decisions<'_>, want: Want, steps: &mut Vec<Step>) -> usize {
        let count = self.program.types.len();
        let near: Vec<usize> = (count.saturating_sub(self.window)..count)
            .filter(|value| match want {
                Want::Of(of) => self.program.types[*value] == of,
                Want::Any => true,
            })
            .collect();
        let value = if near.is_empty() {
            let op = match want {
                Want::Of(Lanes::F32) => Op::LoadF32,
                Want::Of(Lanes::I32) => Op::AddI32,
                Want::Of(Lanes::I16) => Op::DotU8,
                Want::Of(Lanes::I8) | Want::Any => Op::LoadBytes,
            };
            self.step(d, op, steps).expect("these operations have a result")
        } else {
            d.pick(&near)
        };
        self.uses[value] += 1;
        value
    }

    fn step(&mut self, d: &mut Decisions<'_>, op: Op, steps: &mut Vec<Step>) -> Option<usize> {
        let (wants, result) = op.signature();
        let sum = matches!(op, Op::Accumulate | Op::AccumulateU8);
        let mut args = Vec::with_capacity(wants.len());
        for (i, want) in wants.iter().enumerate() {
            // Factors loaded right before they are needed are what the pass folds.
            args.push(if sum && i > 0 && d.once_in(3) {
                let load = d.pick(&[Op::BroadcastF32, Op::LoadY, Op::LoadF32]);
                let value = self.step(d, load, steps).expect("a load has a result");
                self.uses[value] += 1;
                value
            } else {
                self.operand(d, *want, steps)
            });
        }
        let at = match op {
            Op::LoadF32 | Op::LoadBytes | Op::LoadF16 | Op::LoadU8 | Op::LoadI8 => {
                let at = d.below(W_REACH - VECTOR + 1);
                // Whole vectors, where displacements of wide code are compressed, and anything.
                if d.once_in(2) { at / VECTOR * VECTOR } else { at }
            }
            Op::BroadcastF32 | Op::BroadcastI32 => d.below(X_REACH),
            Op::Constant => d.below(FRAME_CONSTANTS),
            Op::LoadFrame | Op::StoreFrame => d.below(FRAME_VECTORS),
            Op::LoadY | Op::StoreY | Op::StoreIntegers => d.below(Y_SHARED),
            Op::Prefetch | Op::PrefetchFar => d.below(4096),
            Op::ShiftLeft | Op::ShiftRight => d.below(32),
            Op::Bits => d.below(8),
            Op::Halves => d.below(2),
            _ => 0,
        };
        let to = if op == Op::Bits { d.below(8) } else { 0 };
        let result = result.map(|of| self.value(of));
        steps.push(Step { op, args, result, at, to });
        result
    }

    fn section(&mut self, d: &mut Decisions<'_>) {
        let mut steps = Vec::new();
        let rounds = (!d.once_in(3)).then(|| 1 + d.below(ROUNDS));
        let mut carried = Vec::new();
        if rounds.is_some() {
            let mut before = Vec::new();
            for _ in 0..d.below(6) {
                let want = d.pick(&[Want::Of(Lanes::F32), Want::Of(Lanes::F32), Want::Any]);
                let value = self.operand(d, want, &mut before);
                carried.push(Carried { before: value, inside: 0, next: 0 });
            }
            if !before.is_empty() {
                let section = Section { rounds: None, carried: vec![], steps: before, w_step: 0, x_step: 0 };
                self.program.sections.push(section);
            }
            for value in &mut carried {
                let of = self.program.types[value.before];
                value.inside = self.value(of);
            }
        }
        for _ in 0..2 + d.below(28) {
            let op = d.pick(&self.ops);
            self.step(d, op, &mut steps);
        }
        for value in &mut carried {
            let want = Want::Of(self.program.types[value.before]);
            value.next = self.operand(d, want, &mut steps);
        }
        let (w_step, x_step) = (d.below(W_STEP + 1), d.below(X_STEP + 1));
        self.program.sections.push(Section { rounds, carried, steps, w_step, x_step });
    }
}

/// Addresses of the operands.
#[derive(Clone, Copy)]
struct Pointers<V> {
    y: V,
    w: V,
    /// As `w`, for loads of half and of a quarter of a vector.
    half: V,
    quarter: V,
    x: V,
}

/// Writes `program`. Its arguments: `x`, `w`, `y`, nothing, and the first 32-bit lane to compute.
fn emit(e: &mut Emit<'_, '_>, program: &Program, [x, w, y, _, lane]: [Value; 5]) {
    let bytes = e.times(lane, 4);
    let half = e.times(lane, 2);
    let frame = if program.framed {
        let frame = e.frame((FRAME_START + FRAME_VECTORS * VECTOR) as u32);
        for (i, bits) in program.constants.into_iter().enumerate() {
            e.store_constant(frame, 4 * i as i32, bits);
        }
        let zero = e.zero_i32();
        for i in 0..FRAME_VECTORS {
            e.store(zero, frame, (FRAME_START + i * VECTOR) as i32);
        }
        frame
    } else {
        x
    };
    let base = Pointers {
        y: e.add_address(y, bytes),
        w: e.add_address(w, bytes),
        half: e.add_address(w, half),
        quarter: e.add_address(w, lane),
        x,
    };
    let mut values: Vec<Option<Value>> = vec![None; program.types.len()];
    for section in &program.sections {
        let Some(rounds) = section.rounds else {
            emit_steps(e, section, base, frame, &mut values);
            continue;
        };
        let y_step = (program.y_vectors * VECTOR) as i64;
        let end = e.offset(base.y, y_step * rounds as i64);
        let mut init = vec![base.y, base.w, base.half, base.quarter, base.x];
        init.extend(section.carried.iter().map(|carried| known(&values, carried.before)));
        e.repeat(false, &init, end, |e, at| {
            let p = Pointers { y: at[0], w: at[1], half: at[2], quarter: at[3], x: at[4] };
            for (carried, value) in section.carried.iter().zip(&at[5..]) {
                values[carried.inside] = Some(*value);
            }
            emit_steps(e, section, p, frame, &mut values);
            let w_step = section.w_step as i64;
            let mut next = vec![e.offset(p.y, y_step)];
            next.extend([p.w, p.half, p.quarter].map(|pointer| e.offset(pointer, w_step)));
            next.push(e.offset(p.x, 4 * section.x_step as i64));
            next.extend(section.carried.iter().map(|carried| known(&values, carried.next)));
            next
        });
    }
}

fn known(values: &[Option<Value>], value: usize) -> Value {
    values[value].expect("values are written before they are used")
}

fn emit_steps(e: &mut Emit<'_, '_>, section: &Section, p: Pointers<Value>, frame: Value, values: &mut [Option<Value>]) {
    for step in &section.steps {
        let at = step.at as i32;
        let vector = |first: usize| (first + step.at * VECTOR) as i32;
        let arg = |i: usize| known(values, step.args[i]);
        let value = match step.op {
            Op::LoadF32 => e.load_f32(p.w, at),
            Op::LoadBytes => e.load_bytes(p.w, at),
            Op::LoadF16 => e.load_f16(p.half, at),
            Op::LoadU8 => e.load_u8(p.quarter, at),
            Op::LoadI8 => e.load_i8(p.quarter, at),
            Op::BroadcastF32 => e.broadcast_f32(p.x, 4 * at),
            Op::BroadcastI32 => e.broadcast_i32(p.x, 4 * at),
            Op::Constant => e.constant(frame, 4 * at),
            Op::ZeroF32 => e.zero_f32(),
            Op::ZeroI32 => e.zero_i32(),
            Op::LoadY => e.load_back(p.y, vector(0)),
            Op::LoadFrame => e.load_back(frame, vector(FRAME_START)),
            Op::StoreY => {
                e.store(arg(0), p.y, vector(0));
                continue;
            }
            // Listed, but the vocabulary stores all vectors as floats.
            Op::StoreIntegers => {
                e.function().ins().store(MemFlagsData::trusted(), arg(0), p.y, vector(0));
                continue;
            }
            Op::StoreFrame => {
                e.store(arg(0), frame, vector(FRAME_START));
                continue;
            }
            Op::Prefetch => {
                e.prefetch(p.w, at);
                continue;
            }
            Op::PrefetchFar => {
                e.prefetch_far(p.x, at);
                continue;
            }
            Op::Accumulate => e.accumulate(arg(0), arg(1), arg(2)),
            Op::Fma => e.fma(arg(0), arg(1), arg(2)),
            Op::Add => e.add(arg(0), arg(1)),
            Op::Sub => e.sub(arg(0), arg(1)),
            Op::Mul => e.mul(arg(0), arg(1)),
            Op::Div => e.div(arg(0), arg(1)),
            Op::Min => e.min(arg(0), arg(1)),
            Op::Max => e.max(arg(0), arg(1)),
            Op::Convert => e.convert_i32(arg(0)),
            Op::AsF32 => e.as_f32(arg(0)),
            Op::AddI32 => e.add_i32(arg(0), arg(1)),
            Op::SubI32 => e.sub_i32(arg(0), arg(1)),
            Op::ShiftLeft => e.shift_left_i32(arg(0), i64::from(at)),
            Op::AddI16 => e.add_i16(arg(0), arg(1)),
            Op::Bits => e.bits(arg(0), step.at, step.to, arg(1)),
            Op::Halves => e.halves(arg(0))[at as usize],
            Op::Or => e.or(arg(0), arg(1)),
            Op::Flip => e.flip_sign_bits(arg(0), arg(1)),
            Op::Abs => e.abs_i8(arg(0)),
            Op::Sign => e.sign_i8(arg(0), arg(1)),
            Op::DotU8 => e.dot_u8_i8_pairs(arg(0), arg(1)),
            Op::DotI16 => e.dot_i16_pairs(arg(0), arg(1)),
            Op::AccumulateU8 => e.accumulate_u8_i8(arg(0), arg(1), arg(2)),
            Op::MulI32 => e.function().ins().imul(arg(0), arg(1)),
            Op::AndNot => e.function().ins().band_not(arg(0), arg(1)),
            Op::ShiftRight => {
                let by = e.function().ins().iconst(I64, i64::from(at));
                e.function().ins().ushr(arg(0), by)
            }
            Op::Sqrt => e.function().ins().sqrt(arg(0)),
            Op::Reverse => {
                let order: Vec<u8> = (0..16).rev().collect();
                let order = e.function().func.dfg.immediates.push(ConstantData::from(&order[..]));
                e.function().ins().shuffle(arg(0), arg(0), order)
            }
        };
        if let Some(result) = step.result {
            values[result] = Some(value);
        }
    }
}

/// What the model knows of a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lane {
    Bits(u32),
    /// Not a number; which one is open.
    Nan,
    /// Made of a NaN's payload.
    Unknown,
}

impl Lane {
    fn float(self) -> Option<f32> {
        match self {
            Lane::Bits(bits) => Some(f32::from_bits(bits)),
            Lane::Nan => Some(f32::NAN),
            Lane::Unknown => None,
        }
    }

    fn of_float(value: f32) -> Lane {
        if value.is_nan() { Lane::Nan } else { Lane::Bits(value.to_bits()) }
    }
}

type Vector = [Lane; LANES];

/// Memory of a run.
struct Data {
    x: Vec<u8>,
    w: Vec<u8>,
    y: Vec<u8>,
}

impl Data {
    /// Mostly ordinary floats; sometimes any bytes, and extremes of small integers.
    fn random(random: &mut Random, program: &Program) -> Data {
        let mut fill = |len: usize| {
            let mut bytes = Vec::with_capacity(len);
            while bytes.len() < len {
                let word = match random.below(12) {
                    0 | 1 => random.next() as u32,
                    2 => random.next() as u32 & 0x807f_ffff,
                    3 => [0x8080_8080, 0x7f7f_7f7f, u32::MAX, 0x7f80_0000, 0x8000_8000][random.below(5) as usize],
                    _ => random.float().to_bits(),
                };
                bytes.extend(word.to_le_bytes());
            }
            bytes
        };
        Data {
            x: fill(4 * (X_REACH + ROUNDS * X_STEP)),
            w: fill(W_REACH + ROUNDS * W_STEP),
            y: fill(ROUNDS * program.y_vectors * VECTOR),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// What `program` has to leave in `y`.
fn model(program: &Program, data: &Data) -> Vec<Lane> {
    let mut y: Vec<Lane> = (0..data.y.len() / 4).map(|i| Lane::Bits(word(&data.y, 4 * i))).collect();
    let mut frame = [[Lane::Bits(0); LANES]; FRAME_VECTORS];
    let mut values = vec![[Lane::Unknown; LANES]; program.types.len()];
    for section in &program.sections {
        for carried in &section.carried {
            values[carried.inside] = values[carried.before];
        }
        for round in 0..section.rounds.unwrap_or(1) {
            if round > 0 {
                let next: Vec<Vector> = section.carried.iter().map(|carried| values[carried.next]).collect();
                for (carried, next) in section.carried.iter().zip(next) {
                    values[carried.inside] = next;
                }
            }
            let w = &data.w[round * section.w_step..];
            let x = &data.x[round * 4 * section.x_step..];
            let y = &mut y[round * program.y_vectors * LANES..];
            for step in &section.steps {
                let vector = step.at * LANES..(step.at + 1) * LANES;
                match step.op {
                    Op::StoreY | Op::StoreIntegers => y[vector].copy_from_slice(&values[step.args[0]]),
                    Op::StoreFrame => frame[step.at] = values[step.args[0]],
                    Op::Prefetch | Op::PrefetchFar => {}
                    _ => {
                        let made: Vector = std::array::from_fn(|i| match step.op {
                            Op::LoadY => y[vector.start + i],
                            Op::LoadFrame => frame[step.at][i],
                            Op::Reverse => match values[step.args[0]][i ^ 3] {
                                Lane::Bits(bits) => Lane::Bits(bits.swap_bytes()),
                                _ => Lane::Unknown,
                            },
                            _ => {
                                let args: Vec<Lane> = step.args.iter().map(|value| values[*value][i]).collect();
                                lane(step, i, &args, [x, w], program)
                            }
                        });
                        values[step.result.expect("the rest have a result")] = made;
                    }
                }
            }
        }
    }
    y
}

/// Lane `i` of the result of `step`.
fn lane(step: &Step, i: usize, args: &[Lane], [x, w]: [&[u8]; 2], program: &Program) -> Lane {
    let at = step.at;
    let float = |f: &dyn Fn(&[f32]) -> f32| {
        let args: Option<Vec<f32>> = args.iter().map(|lane| lane.float()).collect();
        args.map_or(Lane::Unknown, |args| Lane::of_float(f(&args)))
    };
    let integer = |f: &dyn Fn(&[u32]) -> u32| {
        let bits = |lane: &Lane| if let Lane::Bits(bits) = lane { Some(*bits) } else { None };
        let args: Option<Vec<u32>> = args.iter().map(bits).collect();
        args.map_or(Lane::Unknown, |args| Lane::Bits(f(&args)))
    };
    // One of two operands as it is: the second, unless the first is `better`.
    let choice = |better: fn(f32, f32) -> bool| match (args[0].float(), args[1].float()) {
        (Some(a), Some(b)) if better(a, b) => args[0],
        (Some(_), Some(_)) => args[1],
        _ => Lane::Unknown,
    };
    match step.op {
        Op::LoadF32 | Op::LoadBytes => Lane::Bits(word(w, at + 4 * i)),
        Op::LoadF16 => Lane::of_float(f16_value(u16::from_le_bytes([w[at + 2 * i], w[at + 2 * i + 1]]))),
        Op::LoadU8 => Lane::Bits(w[at + i].into()),
        Op::LoadI8 => Lane::Bits(w[at + i] as i8 as u32),
        Op::BroadcastF32 | Op::BroadcastI32 => Lane::Bits(word(x, 4 * at)),
        Op::Constant => Lane::Bits(program.constants[at]),
        Op::ZeroF32 | Op::ZeroI32 => Lane::Bits(0),
        Op::Accumulate => float(&|v| v[1].mul_add(v[2], v[0])),
        Op::Fma => float(&|v| v[0].mul_add(v[1], v[2])),
        Op::Add => float(&|v| v[0] + v[1]),
        Op::Sub => float(&|v| v[0] - v[1]),
        Op::Mul => float(&|v| v[0] * v[1]),
        Op::Div => float(&|v| v[0] / v[1]),
        Op::Min => choice(|a, b| a < b),
        Op::Max => choice(|a, b| a > b),
        Op::Convert => integer(&|v| (v[0] as i32 as f32).to_bits()),
        Op::AsF32 => args[0],
        Op::AddI32 => integer(&|v| v[0].wrapping_add(v[1])),
        Op::SubI32 => integer(&|v| v[0].wrapping_sub(v[1])),
        Op::ShiftLeft => integer(&|v| v[0] << at),
        Op::AddI16 => integer(&|v| words(|half| half(v[0]).wrapping_add(half(v[1])))),
        Op::Bits => integer(&|v| {
            words(|half| if at >= step.to { half(v[0]) >> (at - step.to) } else { half(v[0]) << (step.to - at) }) & v[1]
        }),
        Op::Halves => integer(&|v| words(|half| (((half(v[0]) << (8 * (1 - at))) as i16) >> 8) as u16)),
        Op::Or => integer(&|v| v[0] | v[1]),
        Op::Flip => integer(&|v| v[0] ^ v[1]),
        Op::Abs => integer(&|v| bytes(|byte| (byte(v[0]) as i8).unsigned_abs())),
        Op::Sign => integer(&|v| {
            bytes(|byte| match byte(v[1]) as i8 {
                0 => 0,
                1.. => byte(v[0]),
                _ => byte(v[0]).wrapping_neg(),
            })
        }),
        Op::DotU8 => integer(&|v| {
            words_at(|h| {
                let product = |i: u32| i32::from((v[0] >> (8 * i)) as u8) * i32::from((v[1] >> (8 * i)) as i8);
                let sum = product(2 * h) + product(2 * h + 1);
                sum.clamp(i16::MIN.into(), i16::MAX.into()) as u16
            })
        }),
        Op::DotI16 => integer(&|v| {
            let product = |i: u32| i32::from((v[0] >> (16 * i)) as i16) * i32::from((v[1] >> (16 * i)) as i16);
            product(0).wrapping_add(product(1)) as u32
        }),
        Op::AccumulateU8 => integer(&|v| {
            let product = |i: u32| i32::from((v[1] >> (8 * i)) as u8) * i32::from((v[2] >> (8 * i)) as i8);
            v[0].wrapping_add((0..4).map(product).sum::<i32>() as u32)
        }),
        Op::MulI32 => integer(&|v| v[0].wrapping_mul(v[1])),
        Op::AndNot => integer(&|v| v[0] & !v[1]),
        Op::ShiftRight => integer(&|v| v[0] >> at),
        Op::Sqrt => float(&|v| v[0].sqrt()),
        Op::LoadY
        | Op::LoadFrame
        | Op::StoreY
        | Op::StoreIntegers
        | Op::StoreFrame
        | Op::Prefetch
        | Op::PrefetchFar
        | Op::Reverse => {
            unreachable!("the caller does these")
        }
    }
}

/// Both 16-bit halves of a lane, each made of the same half of others.
fn words(make: impl Fn(&dyn Fn(u32) -> u16) -> u16) -> u32 {
    words_at(|h| make(&|bits| (bits >> (16 * h)) as u16))
}

fn words_at(make: impl Fn(u32) -> u16) -> u32 {
    u32::from(make(0)) | u32::from(make(1)) << 16
}

/// The four bytes of a lane, each made of the same byte of others.
fn bytes(make: impl Fn(&dyn Fn(u32) -> u8) -> u8) -> u32 {
    (0..4).fold(0, |all, i| all | u32::from(make(&|bits| (bits >> (8 * i)) as u8)) << (8 * i))
}

/// What became of one function.
#[derive(Default)]
pub struct Report {
    /// Cranelift's code.
    pub narrow: Vec<u8>,
    /// Widths that ran and were right.
    pub compared: Vec<Width>,
    /// True when Cranelift's own code ran, too.
    pub compared_unwidened: bool,
    /// Why the others did not run.
    pub refused: Vec<JitError>,
    /// Loads folded at some width.
    pub folded: u32,
    /// Lanes of the result, and those of them whose bits the model knows.
    pub lanes: usize,
    /// Of these, lanes whose bits the model knows: no NaN has passed through them.
    pub known_lanes: usize,
}

/// Makes a function of `data` and compares all its forms.
///
/// # Panics
/// When one of them is wrong, or is refused without a reason to be.
pub fn check(data: &[u8]) -> Report {
    thread_local! {
        static COMPILER: RefCell<Compiler> = RefCell::new(Compiler::new(host_isa()).expect("Cranelift for x86-64"));
    }
    let mut d = Decisions::new(data);
    let program = Program::random(&mut d);
    let mut random = d.random();
    let narrow = COMPILER.with_borrow_mut(|compiler| compiler.narrow(|e, args| emit(e, &program, args)));
    let mut report = Report::default();
    let code = match narrow {
        Ok(narrow) => narrow,
        // Only CLIF that kernels do not use may need something outside the function.
        Err(error @ (JitError::Relocation { .. } | JitError::Codegen { .. })) if program.foreign => {
            report.refused.push(error);
            return report;
        }
        Err(error) => panic!("{error}\n{program:?}"),
    };
    report.narrow = code;
    let operands = Data::random(&mut random, &program);
    let want = model(&program, &operands);
    report.lanes = want.len();
    report.known_lanes = want.iter().filter(|lane| matches!(lane, Lane::Bits(_))).count();

    let isa = host_isa();
    let mut widened_right = false;
    let prefetch_bytes = random.below(2) as u16 * 512;
    // Without such sums, how they are encoded makes no difference.
    let dots = [
        (Dot::Pairs, !program.vnni),
        (Dot::Evex, program.vnni && isa.avx512_vnni),
        (Dot::Vex, program.vnni && isa.avx_vnni),
    ];
    let forms = [Width::X128, Width::Y256, Width::Z512].map(|width| dots.map(|(dot, runs)| (width, dot, runs)));
    for (width, dot, runs) in forms.into_iter().flatten() {
        if !runs || !isa.avx2 || width == Width::Z512 && !isa.avx512 {
            continue;
        }
        let (code, stats) = match widen(&report.narrow, Encoding { width, dot, prefetch_bytes }) {
            Ok(widened) => widened,
            Err(error) => {
                let expected = match error {
                    JitError::Spill { .. } => true,
                    JitError::NoWidth { .. } => width == Width::Z512,
                    JitError::Unlisted { .. } | JitError::ConstantPool { .. } | JitError::Undecodable { .. } => {
                        program.foreign
                    }
                    _ => false,
                };
                assert!(expected, "{error}\n{}\n{program:?}", disassemble(&report.narrow));
                report.refused.push(error);
                continue;
            }
        };
        if let Err(error) = audit::audit(&code, width) {
            panic!("the audit refuses the code at {} bits: {error}\n{}\n{program:?}", width.bits(), disassemble(&code));
        }
        report.folded += stats.folded;
        compare(&program, &operands, &want, &code, width, "widened");
        report.compared.push(width);
        widened_right = true;
    }
    // Code that was refused may be as Cranelift meant it, but what refused it is compared with nothing.
    if program.plain && widened_right {
        compare(&program, &operands, &want, &report.narrow, Width::X128, "Cranelift's own");
        report.compared_unwidened = true;
    }
    report
}

/// Runs `code` on a copy of the operands.
fn compare(program: &Program, operands: &Data, want: &[Lane], code: &[u8], width: Width, what: &str) {
    let memory = |bytes: &[u8]| {
        let mut memory = Mapping::new(bytes.len(), 4);
        memory.bytes_mut().copy_from_slice(bytes);
        memory
    };
    let (mut x, mut w, mut y) = (memory(&operands.x), memory(&operands.w), memory(&operands.y));
    x.protect(libc::PROT_READ);
    w.protect(libc::PROT_READ);
    let runnable = Runnable::of_code(code);
    for lane in (0..LANES).step_by(width.lanes()) {
        let y = y.floats_mut().as_mut_ptr();
        // SAFETY: the audit found that the code follows the kernel ABI, reads and writes only by these pointers (Cranelift's
        // own code, from which it was made, has the same operands) and returns; the memory behind them is as long as the
        // generator's bounds say and has unmapped pages around it.
        unsafe { runnable.call(x.bytes().as_ptr(), w.bytes().as_ptr(), y, 0, lane) };
    }
    for (i, want) in want.iter().enumerate() {
        let got = word(y.bytes(), 4 * i);
        let same = match *want {
            Lane::Bits(bits) => got == bits,
            Lane::Nan => f32::from_bits(got).is_nan(),
            Lane::Unknown => true,
        };
        assert!(
            same,
            "{what} code at {} bits: vector {} of y, lane {}: {got:#010x}, not {want:x?}\n{}\n{program:?}",
            width.bits(),
            i / LANES,
            i % LANES,
            disassemble(code)
        );
    }
}
