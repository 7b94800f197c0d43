//! The vocabulary kernels are written in: vector operations over CLIF, independent of the register width.
//!
//! Cranelift has 128-bit vectors only, so every value here is an x4, x8 or x16 CLIF type that *stands for* a vector of
//! whatever width the kernel will have. All operations used are lane-wise or 128-bit-lane-local, offsets are given in the real width,
//! and [`crate::widen`] later re-encodes each instruction at that width. Where CLIF has no name for the x86 instruction
//! a kernel needs, a *carrier* is emitted: a CLIF operation that no kernel needs for itself and whose x64 lowering is a
//! single instruction with the same operand shape. [`crate::widen::table`] is the one list of carriers.
//!
//! What is deliberately absent: lane shuffles, horizontal sums, constant pools, calls.
//!
//! The vocabulary is public for whoever tests the widening pass with functions that are no kernels
//! ([`Compiler::narrow`](crate::compiler::Compiler::narrow)). Operations take the bits of any vector only where kernels need
//! that; otherwise operands have the CLIF type with the lanes that the operation names.

use crate::widen::table::{PREFETCH_FAR_MARK, PREFETCH_MARK};
use alloc::vec::Vec;
use core::cmp::Ordering;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{F32X4, I8, I8X16, I16X8, I32, I32X4, I64};
use cranelift_codegen::ir::{
    BlockArg, ConstantData, Endianness, InstBuilder, MemFlagsData, Opcode, StackSlotData, StackSlotKind, Type, Value,
};
use cranelift_frontend::FunctionBuilder;

/// Flags of plain accesses: aligned or not, never trapping.
fn flags() -> MemFlagsData {
    MemFlagsData::trusted()
}

/// Flags of reads of `x` and `w`, which nothing writes while the kernel runs: these may fold into their user.
fn readonly() -> MemFlagsData {
    MemFlagsData::trusted().with_readonly().with_can_move()
}

/// Emits one kernel. Wraps the CLIF builder with the operations of the numerics contract.
pub struct Emit<'a, 'b> {
    pub(crate) b: &'a mut FunctionBuilder<'b>,
}

impl<'a, 'b> Emit<'a, 'b> {
    /// Wraps `b`.
    pub(crate) fn new(b: &'a mut FunctionBuilder<'b>) -> Self {
        Emit { b }
    }

    /// The function being written, for CLIF that no kernel needs: a test's way to ask what becomes of it.
    pub fn function(&mut self) -> &mut FunctionBuilder<'b> {
        self.b
    }

    fn cast(&mut self, ty: Type, value: Value) -> Value {
        if self.b.func.dfg.value_type(value) == ty {
            return value;
        }
        let flags = MemFlagsData::new().with_endianness(Endianness::Little);
        self.b.ins().bitcast(ty, flags, value)
    }

    /// `value` as f32, never folded into its user's memory operand: a factor or sum that Cranelift folds takes another
    /// place among the operands, and there a carrier would mean something else.
    fn in_register(&mut self, value: Value) -> Value {
        let dfg = &self.b.func.dfg;
        if dfg.value_def(value).inst().is_some_and(|inst| dfg.insts[inst].opcode() == Opcode::Load) {
            // Only a load itself folds, not what casts make of it.
            let integers = self.cast(I32X4, value);
            return self.cast(F32X4, integers);
        }
        self.cast(F32X4, value)
    }

    fn zero(&mut self, ty: Type) -> Value {
        let zero = self.b.func.dfg.constants.insert(ConstantData::from(&[0u8; 16][..]));
        self.b.ins().vconst(ty, zero)
    }

    // Addresses and control.

    /// `pointer + bytes`.
    pub fn offset(&mut self, pointer: Value, bytes: i64) -> Value {
        if bytes == 0 { pointer } else { self.b.ins().iadd_imm_s(pointer, bytes) }
    }

    /// `a + b` of two 64-bit integers.
    pub fn add_address(&mut self, a: Value, b: Value) -> Value {
        self.b.ins().iadd(a, b)
    }

    /// `value * factor`, 64 bits.
    pub fn times(&mut self, value: Value, factor: i64) -> Value {
        if factor == 1 { value } else { self.b.ins().imul_imm_s(value, factor) }
    }

    /// Address of `len_bytes` of stack memory, 64-byte aligned.
    pub fn frame(&mut self, len_bytes: u32) -> Value {
        // Cranelift aligns frames to 16 bytes: take 64 more and round up.
        let slot = StackSlotData::new(StackSlotKind::ExplicitSlot, len_bytes + 64, 4);
        let slot = self.b.create_sized_stack_slot(slot);
        let address = self.b.ins().stack_addr(I64, slot, 63);
        self.b.ins().band_imm_s(address, -64)
    }

    /// Runs `body` with carried values until the first one, an address, reaches `end`; at least once. Returns the last
    /// carried values.
    ///
    /// `once` says that one round is all there is: then no loop is emitted.
    pub fn repeat(
        &mut self,
        once: bool,
        init: &[Value],
        end: Value,
        body: impl FnOnce(&mut Emit<'_, 'b>, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        if once {
            return body(&mut Emit { b: self.b }, init);
        }
        let head = self.b.create_block();
        let exit = self.b.create_block();
        for value in init {
            let ty = self.b.func.dfg.value_type(*value);
            self.b.append_block_param(head, ty);
        }
        let args: Vec<BlockArg> = init.iter().map(|v| BlockArg::Value(*v)).collect();
        self.b.ins().jump(head, &args);
        self.b.switch_to_block(head);
        let carried: Vec<Value> = self.b.block_params(head).to_vec();
        let next = body(&mut Emit { b: self.b }, &carried);
        let more = self.b.ins().icmp(IntCC::UnsignedLessThan, next[0], end);
        let args: Vec<BlockArg> = next.iter().map(|v| BlockArg::Value(*v)).collect();
        self.b.ins().brif(more, head, &args, exit, &[]);
        self.b.switch_to_block(exit);
        next
    }

    // Memory.

    /// A vector of weight or activation bytes.
    pub fn load_bytes(&mut self, p: Value, offset: i32) -> Value {
        self.b.ins().load(I8X16, readonly(), p, offset)
    }

    /// A vector of f32 weights.
    pub fn load_f32(&mut self, p: Value, offset: i32) -> Value {
        self.b.ins().load(F32X4, readonly(), p, offset)
    }

    /// A vector of f32 converted from f16 memory (half a vector of bytes).
    pub fn load_f16(&mut self, p: Value, offset: i32) -> Value {
        // Carrier: vpmovzxwd reads half a vector, as vcvtph2ps does.
        let v = self.b.ins().uload16x4(readonly(), p, offset);
        self.cast(F32X4, v)
    }

    /// A vector of i32 made from as many u8 in memory (a quarter of a vector of bytes).
    pub fn load_u8(&mut self, p: Value, offset: i32) -> Value {
        // Carrier: vpmovzxbw, re-encoded as vpmovzxbd, which reads half as much.
        let v = self.b.ins().uload8x8(readonly(), p, offset);
        self.cast(I32X4, v)
    }

    /// A vector of i32 made from as many i8 in memory (a quarter of a vector of bytes).
    pub fn load_i8(&mut self, p: Value, offset: i32) -> Value {
        // Carrier: vpmovsxbw, re-encoded as vpmovsxbd, which reads half as much.
        let v = self.b.ins().sload8x8(readonly(), p, offset);
        self.cast(I32X4, v)
    }

    /// Four bytes of memory in every 4-byte lane.
    fn broadcast(&mut self, flags: MemFlagsData, p: Value, offset: i32) -> Value {
        // Carrier: a splat of a load that is used more than once becomes two instructions, so take a load that has no
        // scalar half. vpmovzxdq is re-encoded as vbroadcastss.
        self.b.ins().uload32x2(flags, p, offset)
    }

    /// One f32 of an activation in every lane.
    pub fn broadcast_f32(&mut self, p: Value, offset: i32) -> Value {
        let v = self.broadcast(readonly(), p, offset);
        self.cast(F32X4, v)
    }

    /// One 4-byte group of an activation in every lane.
    pub fn broadcast_i32(&mut self, p: Value, offset: i32) -> Value {
        let v = self.broadcast(readonly(), p, offset);
        self.cast(I32X4, v)
    }

    /// Writes a 32-bit constant to the frame.
    pub fn store_constant(&mut self, frame: Value, offset: i32, bits: u32) {
        let value = self.b.ins().iconst(I32, i64::from(bits as i32));
        self.b.ins().store(flags(), value, frame, offset);
    }

    /// A constant written by [`Self::store_constant`], in every lane, as i32.
    pub fn constant(&mut self, frame: Value, offset: i32) -> Value {
        let v = self.broadcast(flags(), frame, offset);
        self.cast(I32X4, v)
    }

    /// A vector from memory that the kernel also writes (the frame, or `y`).
    pub fn load_back(&mut self, p: Value, offset: i32) -> Value {
        // Loaded as integers: a float load used once could fold into the tied operand's place of a carrier.
        let v = self.b.ins().load(I32X4, flags(), p, offset);
        self.cast(F32X4, v)
    }

    /// Stores a vector.
    pub fn store(&mut self, value: Value, p: Value, offset: i32) {
        let value = self.cast(F32X4, value);
        self.b.ins().store(flags(), value, p, offset);
    }

    /// Asks for the cache line as far ahead of `p + offset` as the variant's distance is, which is left to the widening pass.
    pub fn prefetch(&mut self, p: Value, offset: i32) {
        self.marked_store(PREFETCH_MARK, p, offset);
    }

    /// Asks for the cache line at `p + offset` in the second-level cache.
    pub fn prefetch_far(&mut self, p: Value, offset: i32) {
        self.marked_store(PREFETCH_FAR_MARK, p, offset);
    }

    /// Carrier: kernels store no bytes, so a byte store of a mark is a prefetch.
    fn marked_store(&mut self, mark: u8, p: Value, offset: i32) {
        let mark = self.b.ins().iconst(I8, i64::from(mark as i8));
        self.b.ins().store(flags(), mark, p, offset);
    }

    // Float arithmetic.

    /// All lanes `+0.0`.
    pub fn zero_f32(&mut self) -> Value {
        self.zero(F32X4)
    }

    /// `fma(a, b, acc)` with the accumulator's register kept in place.
    pub fn accumulate(&mut self, acc: Value, a: Value, b: Value) -> Value {
        // Carrier: vfnmadd213ps ties its first operand; re-encoded as vfmadd231ps, whose tied operand is the sum.
        let (acc, a) = (self.in_register(acc), self.cast(F32X4, a));
        let tied = self.b.ins().fneg(acc);
        self.b.ins().fma(tied, a, b)
    }

    /// `fma(a, b, c)`, one rounding.
    pub fn fma(&mut self, a: Value, b: Value, c: Value) -> Value {
        let (a, b) = (self.in_register(a), self.in_register(b));
        self.b.ins().fma(a, b, c)
    }

    /// `a + b`.
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        self.b.ins().fadd(a, b)
    }

    /// `a - b`.
    pub fn sub(&mut self, a: Value, b: Value) -> Value {
        self.b.ins().fsub(a, b)
    }

    /// `a * b`.
    pub fn mul(&mut self, a: Value, b: Value) -> Value {
        self.b.ins().fmul(a, b)
    }

    /// `a / b`.
    pub fn div(&mut self, a: Value, b: Value) -> Value {
        self.b.ins().fdiv(a, b)
    }

    /// `min(a, b)`; `b` where `a` is not a number.
    pub fn min(&mut self, a: Value, b: Value) -> Value {
        // Carrier: CLIF's fmin is a sequence; smin is vpminsd, re-encoded as vminps.
        let (a, b) = (self.cast(I32X4, a), self.cast(I32X4, b));
        let v = self.b.ins().smin(a, b);
        self.cast(F32X4, v)
    }

    /// `max(a, b)`; `b` where `a` is not a number.
    pub fn max(&mut self, a: Value, b: Value) -> Value {
        // Carrier: vpmaxsd, re-encoded as vmaxps.
        let (a, b) = (self.cast(I32X4, a), self.cast(I32X4, b));
        let v = self.b.ins().smax(a, b);
        self.cast(F32X4, v)
    }

    /// i32 lanes to f32, rounded to nearest even.
    pub fn convert_i32(&mut self, v: Value) -> Value {
        self.b.ins().fcvt_from_sint(F32X4, v)
    }

    /// Reads the lanes as f32 without converting.
    pub fn as_f32(&mut self, v: Value) -> Value {
        self.cast(F32X4, v)
    }

    // Integer arithmetic.

    /// `a + b`, i32 lanes, wrapping.
    pub fn add_i32(&mut self, a: Value, b: Value) -> Value {
        let (a, b) = (self.cast(I32X4, a), self.cast(I32X4, b));
        self.b.ins().iadd(a, b)
    }

    /// `a - b`, i32 lanes, wrapping.
    pub fn sub_i32(&mut self, a: Value, b: Value) -> Value {
        let (a, b) = (self.cast(I32X4, a), self.cast(I32X4, b));
        self.b.ins().isub(a, b)
    }

    /// `0` in every i32 lane.
    pub fn zero_i32(&mut self) -> Value {
        self.zero(I32X4)
    }

    /// `v << by`, i32 lanes.
    pub fn shift_left_i32(&mut self, v: Value, by: i64) -> Value {
        let v = self.cast(I32X4, v);
        self.b.ins().ishl_imm_u(v, by)
    }

    /// `a + b`, i16 lanes, wrapping.
    pub fn add_i16(&mut self, a: Value, b: Value) -> Value {
        self.b.ins().iadd(a, b)
    }

    /// The bits of every byte that `mask` has, shifted by 16-bit lanes from bit `from` to bit `to` first. `mask` is the same
    /// in every byte and has no bits that came from a neighbour.
    pub fn bits(&mut self, v: Value, from: usize, to: usize, mask: Value) -> Value {
        let words = self.cast(I16X8, v);
        let moved = match from.cmp(&to) {
            Ordering::Equal => words,
            Ordering::Greater => self.b.ins().ushr_imm_u(words, (from - to) as i64),
            Ordering::Less => self.b.ins().ishl_imm_u(words, (to - from) as i64),
        };
        let (moved, mask) = (self.cast(I8X16, moved), self.cast(I8X16, mask));
        self.b.ins().band(moved, mask)
    }

    /// The bytes of every 16-bit lane as i16: the lower ones, and the upper ones.
    pub fn halves(&mut self, v: Value) -> [Value; 2] {
        let words = self.cast(I16X8, v);
        let top = self.b.ins().ishl_imm_u(words, 8);
        [top, words].map(|words| self.b.ins().sshr_imm_u(words, 8))
    }

    /// `a | b`.
    pub fn or(&mut self, a: Value, b: Value) -> Value {
        let (a, b) = (self.cast(I8X16, a), self.cast(I8X16, b));
        self.b.ins().bor(a, b)
    }

    /// Adds 128 to every byte (mod 256); `flip` is `0x80` in every byte.
    pub fn flip_sign_bits(&mut self, v: Value, flip: Value) -> Value {
        let flip = self.cast(I8X16, flip);
        self.b.ins().bxor(v, flip)
    }

    /// `|v|` of every i8, as u8 (so -128 gives 128).
    pub fn abs_i8(&mut self, v: Value) -> Value {
        self.b.ins().iabs(v)
    }

    /// `x`, negated where the byte of `by` is negative, zero where it is zero.
    pub fn sign_i8(&mut self, x: Value, by: Value) -> Value {
        // Carrier: vpsubsb (not commutative), re-encoded as vpsignb.
        let x = self.cast(I8X16, x);
        self.b.ins().ssub_sat(x, by)
    }

    /// Sums of two neighbouring products of u8 `unsigned` and i8 `signed`, i16 lanes, saturating.
    pub fn dot_u8_i8_pairs(&mut self, unsigned: Value, signed: Value) -> Value {
        let signed = self.cast(I8X16, signed);
        self.b.ins().x86_pmaddubsw(signed, unsigned)
    }

    /// Sums of two neighbouring products of i16, i32 lanes.
    pub fn dot_i16_pairs(&mut self, a: Value, b: Value) -> Value {
        // Carrier: vpmulhrsw, re-encoded as vpmaddwd.
        let (a, b) = (self.cast(I16X8, a), self.cast(I16X8, b));
        let v = self.b.ins().x86_pmulhrsw(a, b);
        self.cast(I32X4, v)
    }

    /// `acc` plus the sums of four neighbouring products of u8 `unsigned` and i8 `signed`, i32 lanes (VNNI).
    pub fn accumulate_u8_i8(&mut self, acc: Value, unsigned: Value, signed: Value) -> Value {
        // Carrier: vfnmsub213ps, whose tied operand is the accumulator; re-encoded as vpdpbusd.
        let (acc, unsigned, signed) = (self.in_register(acc), self.in_register(unsigned), self.cast(F32X4, signed));
        let tied = self.b.ins().fneg(acc);
        let minus = self.b.ins().fneg(signed);
        let v = self.b.ins().fma(tied, unsigned, minus);
        self.cast(I32X4, v)
    }
}
