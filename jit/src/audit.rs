//! Decodes a finished kernel again and checks what can be proved of it without trusting anything that made it.
//!
//! Checked for every instruction that can be reached: it is on the allow-list at the kernel's width; its memory operand's
//! base derives from `x`, `w` or `y` (or is the stack within the frame), and nothing is written but `y` and the frame; jumps
//! land on instructions of the kernel; `rsp` and the callee-saved registers are what they were at every `ret`; a wide
//! kernel runs `vzeroupper` right before `ret`; the code ends there. So a kernel reaches memory only from an argument or
//! the frame, and code only by what lies in the frame.
//!
//! Not checked here: offsets from the arguments (a kernel's shape decides them; the tests run kernels between unmapped
//! pages), offsets of frame addresses that are kept in a register or have an index (loops move them; stores through `rsp` and
//! `rbp` are bounded, and what they overwrite counts as lost), and the arithmetic (the caller compares results with the
//! reference).
//!
//! Method: forward data flow over basic blocks with one [`Origin`] per integer register and saved stack slot.

use crate::widen::table;
use alloc::vec::Vec;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use model::kernel::Width;

/// Largest frame a kernel may take, in bytes.
pub const MAX_STACK_BYTES: u32 = 64 * 1024;

/// Longest code of a kernel, in bytes.
pub const MAX_CODE_BYTES: usize = 256 * 1024;

/// What the audit found out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Audited {
    /// Instructions in the kernel.
    pub instructions: u32,
    /// Stack bytes it uses, its return address not counted.
    pub stack_bytes: u32,
}

/// An invariant a kernel broke, with the byte offset of the instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AuditError {
    /// Bytes that are no instruction, or no bytes.
    #[error("byte {offset} is not an instruction")]
    Undecodable {
        /// Byte offset.
        offset: usize,
    },
    /// More than a kernel's code.
    #[error("{len_bytes} bytes of code, at most {MAX_CODE_BYTES}")]
    TooLong {
        /// Bytes.
        len_bytes: usize,
    },
    /// An instruction not allowed at the kernel's width.
    #[error("instruction at byte {offset} ({code:?}) is not allowed")]
    NotAllowed {
        /// Byte offset.
        offset: usize,
        /// The instruction.
        code: Code,
    },
    /// A jump to something that is not an instruction of the kernel.
    #[error("jump at byte {offset} leaves the kernel or lands inside an instruction (target {target:#x})")]
    Jump {
        /// Byte offset.
        offset: usize,
        /// Where it goes.
        target: u64,
    },
    /// Control can run past the last byte.
    #[error("the kernel does not end in a return")]
    NoReturn,
    /// A memory operand whose base is not derived from an argument or the frame.
    #[error("memory operand at byte {offset} is not based on an argument or the frame (base is {origin:?})")]
    Base {
        /// Byte offset.
        offset: usize,
        /// What the base is.
        origin: Origin,
    },
    /// A store to read-only memory.
    #[error("store at byte {offset} writes to {origin:?}, not to y or the frame")]
    Store {
        /// Byte offset.
        offset: usize,
        /// What it writes to.
        origin: Origin,
    },
    /// A stack operand outside the frame.
    #[error("stack operand at byte {offset} is outside the frame")]
    OutsideFrame {
        /// Byte offset.
        offset: usize,
    },
    /// `rsp` is moved in a way the audit cannot follow, too far, or differently on two paths.
    #[error("stack pointer at byte {offset} cannot be followed")]
    StackPointer {
        /// Byte offset.
        offset: usize,
    },
    /// A register that belongs to the caller is not restored.
    #[error("return at byte {offset} does not restore {register:?}")]
    NotRestored {
        /// Byte offset.
        offset: usize,
        /// The register.
        register: Register,
    },
    /// A wide kernel returns with dirty upper halves.
    #[error("return at byte {offset} is not preceded by vzeroupper")]
    NoVzeroupper {
        /// Byte offset.
        offset: usize,
    },
}

/// Where the value of an integer register comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Not set by the kernel.
    Unset,
    /// Derived from the pointer `x`.
    X,
    /// Derived from the pointer `w`.
    W,
    /// Derived from the pointer `y`.
    Y,
    /// An address in the frame.
    Frame,
    /// A number: constants, `ldy` and `rows`.
    Number,
    /// The caller's value of a callee-saved register.
    Saved(Register),
    /// Different things on different paths, or arithmetic that mixes pointers.
    Mixed,
}

const CALLEE_SAVED: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

/// Registers and stack at one point of the kernel.
#[derive(Clone, PartialEq, Debug)]
struct State {
    registers: [Origin; 16],
    /// `rsp` minus its value at entry.
    rsp: i64,
    /// `rbp` minus `rsp` at entry, while `rbp` is a frame pointer.
    rbp: Option<i64>,
    /// 8-byte stack slots by offset from `rsp` at entry.
    slots: Vec<(i64, Origin)>,
}

impl State {
    fn entry() -> State {
        let mut state = State { registers: [Origin::Unset; 16], rsp: 0, rbp: None, slots: Vec::new() };
        for register in CALLEE_SAVED {
            state.set(register, Origin::Saved(register));
        }
        state.set(Register::RDI, Origin::X);
        state.set(Register::RSI, Origin::W);
        state.set(Register::RDX, Origin::Y);
        state.set(Register::RCX, Origin::Number);
        state.set(Register::R8, Origin::Number);
        state.set(Register::RSP, Origin::Frame);
        state
    }

    fn get(&self, register: Register) -> Origin {
        let full = register.full_register();
        if full.is_gpr64() {
            self.registers.get(full.number()).copied().unwrap_or(Origin::Mixed)
        } else {
            Origin::Mixed
        }
    }

    fn set(&mut self, register: Register, origin: Origin) {
        if let Some(place) = self.registers.get_mut(register.full_register().number()) {
            *place = origin;
        }
    }

    fn slot(&self, at: i64) -> Origin {
        self.slots.iter().find(|(offset, _)| *offset == at).map_or(Origin::Unset, |(_, origin)| *origin)
    }

    /// Forgets the slots that `len_bytes` bytes written at `at` overlap.
    fn lose_slots(&mut self, at: i64, len_bytes: i64) {
        self.slots.retain(|(offset, _)| offset + 8 <= at || at + len_bytes <= *offset);
    }

    fn set_slot(&mut self, at: i64, origin: Origin) {
        self.lose_slots(at, 8);
        let place = self.slots.partition_point(|(offset, _)| *offset < at);
        self.slots.insert(place, (at, origin));
    }

    /// Moves `rsp` to `to`, which must lie in the largest frame there may be, and not above where it was at entry.
    fn move_rsp(&mut self, to: i64, offset: usize) -> Result<(), AuditError> {
        if !(-i64::from(MAX_STACK_BYTES)..=0).contains(&to) {
            return Err(AuditError::StackPointer { offset });
        }
        self.rsp = to;
        Ok(())
    }

    /// Takes in what another path brings here. `None` if the stack pointers differ.
    fn join(&mut self, other: &State) -> Option<bool> {
        if self.rsp != other.rsp {
            return None;
        }
        let before = self.clone();
        for (mine, theirs) in self.registers.iter_mut().zip(&other.registers) {
            if mine != theirs {
                *mine = Origin::Mixed;
            }
        }
        if self.rbp != other.rbp {
            self.rbp = None;
        }
        self.slots.retain(|(offset, origin)| other.slot(*offset) == *origin);
        Some(*self != before)
    }
}

/// Checks `code`, a kernel whose vectors are `width` wide.
///
/// # Errors
/// The first broken invariant found.
pub fn audit(code: &[u8], width: Width) -> Result<Audited, AuditError> {
    let instructions = decode(code, width)?;
    let index_of = |ip: u64| instructions.binary_search_by_key(&ip, Instruction::ip).ok();
    // Leaders of basic blocks: the entry, jump targets, and what follows a jump.
    let mut leaders = alloc::vec![false; instructions.len()];
    leaders[0] = true;
    for (i, instruction) in instructions.iter().enumerate() {
        let offset = instruction.ip() as usize;
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::Return => {
                let clean = i.checked_sub(1).is_some_and(|p| instructions[p].code() == Code::VEX_Vzeroupper);
                if width != Width::X128 && !clean {
                    return Err(AuditError::NoVzeroupper { offset });
                }
            }
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                let target = instruction.near_branch64();
                let to = index_of(target).ok_or(AuditError::Jump { offset, target })?;
                // A jump straight to a return would pass by the vzeroupper before it.
                if width != Width::X128 && instructions[to].flow_control() == FlowControl::Return {
                    return Err(AuditError::NoVzeroupper { offset: target as usize });
                }
                leaders[to] = true;
            }
            _ => return Err(AuditError::NotAllowed { offset, code: instruction.code() }),
        }
        if instruction.flow_control() != FlowControl::Next
            && let Some(next) = leaders.get_mut(i + 1)
        {
            *next = true;
        }
    }

    let mut states: Vec<Option<State>> = alloc::vec![None; instructions.len()];
    states[0] = Some(State::entry());
    let mut work = alloc::vec![0usize];
    let mut deepest = 0;
    while let Some(leader) = work.pop() {
        let Some(mut state) = states[leader].clone() else { continue };
        let mut flow_to = |to: usize, state: &State, work: &mut Vec<usize>| -> Result<(), AuditError> {
            let offset = instructions[to].ip() as usize;
            match &mut states[to] {
                Some(known) => {
                    if known.join(state).ok_or(AuditError::StackPointer { offset })? {
                        work.push(to);
                    }
                }
                unknown => {
                    *unknown = Some(state.clone());
                    work.push(to);
                }
            }
            Ok(())
        };
        for i in leader..instructions.len() {
            if i > leader && leaders[i] {
                flow_to(i, &state, &mut work)?;
                break;
            }
            let instruction = &instructions[i];
            step(&mut state, instruction)?;
            deepest = deepest.max(-state.rsp);
            match instruction.flow_control() {
                FlowControl::Return => {
                    returns(&state, instruction)?;
                    break;
                }
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                    if let Some(to) = index_of(instruction.near_branch64()) {
                        flow_to(to, &state, &mut work)?;
                    }
                    if instruction.flow_control() == FlowControl::UnconditionalBranch {
                        break;
                    }
                    if i + 1 == instructions.len() {
                        return Err(AuditError::NoReturn);
                    }
                }
                _ if i + 1 == instructions.len() => return Err(AuditError::NoReturn),
                _ => {}
            }
        }
    }
    Ok(Audited { instructions: instructions.len() as u32, stack_bytes: deepest as u32 })
}

/// All instructions, each of them allowed.
fn decode(code: &[u8], width: Width) -> Result<Vec<Instruction>, AuditError> {
    if code.len() > MAX_CODE_BYTES {
        return Err(AuditError::TooLong { len_bytes: code.len() });
    }
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let mut instructions = Vec::with_capacity(code.len() / 5);
    while decoder.can_decode() {
        let offset = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Err(AuditError::Undecodable { offset });
        }
        let plain = instruction.segment_prefix() == Register::None
            && !instruction.has_lock_prefix()
            && !instruction.has_op_mask();
        if !plain || !table::allowed(instruction.code(), width) {
            return Err(AuditError::NotAllowed { offset, code: instruction.code() });
        }
        instructions.push(instruction);
    }
    match instructions.last() {
        Some(last) if last.flow_control() == FlowControl::Return => Ok(instructions),
        Some(_) => Err(AuditError::NoReturn),
        None => Err(AuditError::Undecodable { offset: 0 }),
    }
}

/// `rsp` and the caller's registers at a return.
fn returns(state: &State, instruction: &Instruction) -> Result<(), AuditError> {
    let offset = instruction.ip() as usize;
    if state.rsp != 0 {
        return Err(AuditError::StackPointer { offset });
    }
    for register in CALLEE_SAVED {
        if state.get(register) != Origin::Saved(register) {
            return Err(AuditError::NotRestored { offset, register });
        }
    }
    Ok(())
}

/// Sum of two values.
fn plus(a: Origin, b: Origin) -> Origin {
    match (a, b) {
        (Origin::Number, pointer @ (Origin::X | Origin::W | Origin::Y | Origin::Frame | Origin::Number))
        | (pointer @ (Origin::X | Origin::W | Origin::Y | Origin::Frame), Origin::Number) => pointer,
        _ => Origin::Mixed,
    }
}

/// The memory operand's base and index as one origin, and its offset from `rsp` at entry where that is known.
fn address(state: &State, i: &Instruction) -> (Origin, Option<i64>) {
    let base = i.memory_base();
    let mut origin = match base {
        Register::None => Origin::Number,
        _ => state.get(base),
    };
    let displacement = i.memory_displacement64() as i64;
    let known = match base {
        Register::RSP => Some(state.rsp + displacement),
        Register::RBP => state.rbp.map(|rbp| rbp + displacement),
        _ => None,
    };
    if i.memory_index() != Register::None {
        let index = match state.get(i.memory_index()) {
            Origin::Number => Origin::Number,
            // A multiple of a pointer is none.
            _ if i.memory_index_scale() != 1 => Origin::Mixed,
            index => index,
        };
        origin = plus(origin, index);
        return (origin, None);
    }
    (origin, known)
}

/// Checks one instruction's memory operand and applies it to `state`.
fn step(state: &mut State, i: &Instruction) -> Result<(), AuditError> {
    let offset = i.ip() as usize;
    let memory = crate::widen::has_memory(i);
    let (origin, stack) = if memory { address(state, i) } else { (Origin::Unset, None) };
    if memory && i.code() != Code::Lea_r64_m {
        if !matches!(origin, Origin::X | Origin::W | Origin::Y | Origin::Frame) {
            return Err(AuditError::Base { offset, origin });
        }
        let writes = i.op0_kind() == OpKind::Memory && !table::is_prefetch(i.code());
        if writes && !matches!(origin, Origin::Y | Origin::Frame) {
            return Err(AuditError::Store { offset, origin });
        }
        if let Some(at) = stack {
            let len_bytes = i.memory_size().size() as i64;
            // The return address lies at 0.
            if at < state.rsp || at + len_bytes > 0 {
                return Err(AuditError::OutsideFrame { offset });
            }
            if writes {
                state.lose_slots(at, len_bytes);
            }
        }
    }
    let immediate = || i.immediate(i.op_count() - 1) as i64;
    match i.code() {
        Code::Push_r64 => {
            let value = state.get(i.op0_register());
            state.move_rsp(state.rsp - 8, offset)?;
            let at = state.rsp;
            state.set_slot(at, value);
        }
        Code::Pop_r64 => {
            let value = state.slot(state.rsp);
            state.move_rsp(state.rsp + 8, offset)?;
            write(state, i.op0_register(), value, offset)?;
        }
        // The end of a frame.
        Code::Mov_r64_rm64 | Code::Mov_rm64_r64
            if i.op0_register() == Register::RSP && i.op1_register() == Register::RBP =>
        {
            state.move_rsp(state.rbp.ok_or(AuditError::StackPointer { offset })?, offset)?;
        }
        Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => {
            let value = match (i.op1_kind() == OpKind::Memory, stack) {
                (true, Some(at)) => state.slot(at),
                (true, None) => Origin::Mixed,
                _ => state.get(i.op1_register()),
            };
            match (i.op0_kind() == OpKind::Memory, stack) {
                (true, Some(at)) => state.set_slot(at, value),
                // An integer goes to a stack slot the audit can name, or nowhere.
                (true, None) => return Err(AuditError::Store { offset, origin }),
                _ => {
                    let from_rsp = i.op1_kind() == OpKind::Register && i.op1_register() == Register::RSP;
                    write(state, i.op0_register(), value, offset)?;
                    if i.op0_register() == Register::RBP {
                        state.rbp = from_rsp.then_some(state.rsp);
                    }
                }
            }
        }
        // Constants go to the frame only.
        Code::Mov_rm32_imm32 if origin != Origin::Frame => return Err(AuditError::Store { offset, origin }),
        Code::Lea_r64_m => write(state, i.op0_register(), origin, offset)?,
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 => {
            let by =
                if matches!(i.code(), Code::Add_rm64_imm8 | Code::Add_rm64_imm32) { immediate() } else { -immediate() };
            if memory {
                return Err(AuditError::NotAllowed { offset, code: i.code() });
            }
            if i.op0_register() == Register::RSP {
                state.move_rsp(state.rsp + by, offset)?;
            } else {
                // A pointer or number moved by a constant stays what it is.
                let value = plus(state.get(i.op0_register()), Origin::Number);
                write(state, i.op0_register(), value, offset)?;
            }
        }
        Code::Add_r64_rm64 | Code::Add_rm64_r64 => {
            if i.op0_kind() == OpKind::Memory {
                return Err(AuditError::NotAllowed { offset, code: i.code() });
            }
            let other = match (memory, stack) {
                (true, Some(at)) => state.slot(at),
                (true, None) => Origin::Mixed,
                _ => state.get(i.op1_register()),
            };
            let value = plus(state.get(i.op0_register()), other);
            write(state, i.op0_register(), value, offset)?;
        }
        Code::And_rm64_imm8 | Code::Shl_rm64_imm8 | Code::Imul_r64_rm64_imm8 | Code::Imul_r64_rm64_imm32 => {
            if memory {
                return Err(AuditError::NotAllowed { offset, code: i.code() });
            }
            let from = if i.op_count() == 3 { i.op1_register() } else { i.op0_register() };
            let value = match (state.get(from), i.code()) {
                (Origin::Number, _) => Origin::Number,
                // Rounding a frame address to an alignment.
                (Origin::Frame, Code::And_rm64_imm8) => Origin::Frame,
                _ => Origin::Mixed,
            };
            write(state, i.op0_register(), value, offset)?;
        }
        Code::Mov_r32_imm32 => write(state, i.op0_register(), Origin::Number, offset)?,
        Code::Cmp_r64_rm64 | Code::Cmp_rm64_r64 => {}
        // Vector instructions, prefetches, jumps and returns write no integer register; should one be listed that does,
        // nothing is known of its result.
        _ if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr() => {
            write(state, i.op0_register(), Origin::Mixed, offset)?;
        }
        _ => {}
    }
    Ok(())
}

/// Sets a register; `rsp` moves by push, pop, add, sub and from `rbp` only.
fn write(state: &mut State, register: Register, origin: Origin, offset: usize) -> Result<(), AuditError> {
    if register.full_register() == Register::RSP {
        return Err(AuditError::StackPointer { offset });
    }
    if register.full_register() == Register::RBP {
        state.rbp = None;
    }
    state.set(register, origin);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::code_asm::*;

    fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
        let mut a = CodeAssembler::new(64).unwrap();
        build(&mut a).unwrap();
        a.assemble(0).unwrap()
    }

    /// The body between nothing and `vzeroupper; ret`, audited at 256 bits.
    fn body(build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Result<Audited, AuditError> {
        let code = assemble(|a| {
            build(a)?;
            a.vzeroupper()?;
            a.ret()
        });
        audit(&code, Width::Y256)
    }

    #[test]
    fn a_loop_over_the_operands_passes() {
        let audited = body(|a| {
            a.push(rbx)?;
            a.mov(rbx, rsi)?;
            let mut head = a.create_label();
            a.set_label(&mut head)?;
            a.vmovups(ymm0, ymmword_ptr(rbx))?;
            a.vmovups(ymmword_ptr(rdx), ymm0)?;
            a.add(rbx, 32)?;
            a.add(rdx, rcx)?;
            a.cmp(rdi, rbx)?;
            a.jb(head)?;
            a.pop(rbx)
        });
        assert_eq!(audited, Ok(Audited { instructions: 11, stack_bytes: 8 }));
    }

    #[test]
    fn every_invariant_is_enforced() {
        assert_eq!(audit(&[], Width::X128), Err(AuditError::Undecodable { offset: 0 }));
        assert_eq!(audit(&[0x0f, 0xff], Width::X128), Err(AuditError::Undecodable { offset: 0 }));
        assert_eq!(audit(&[0x90], Width::X128), Err(AuditError::NotAllowed { offset: 0, code: Code::Nopd }));
        // A wide instruction in a narrow kernel, a narrow one in a wide kernel, a system call, a call.
        let wide = assemble(|a| a.vaddps(ymm0, ymm0, ymm0));
        assert!(matches!(audit(&wide, Width::X128), Err(AuditError::NotAllowed { offset: 0, .. })));
        assert!(matches!(body(|a| a.vaddps(xmm0, xmm0, xmm0)), Err(AuditError::NotAllowed { offset: 0, .. })));
        assert!(matches!(body(|a| a.syscall()), Err(AuditError::NotAllowed { offset: 0, .. })));
        assert!(matches!(body(|a| a.call(0x40)), Err(AuditError::NotAllowed { offset: 0, .. })));
        assert!(matches!(body(|a| a.jmp(rdi)), Err(AuditError::NotAllowed { offset: 0, .. })));

        assert_eq!(audit(&[0xc3], Width::Y256), Err(AuditError::NoVzeroupper { offset: 0 }));
        assert_eq!(audit(&[0xc3], Width::X128), Ok(Audited { instructions: 1, stack_bytes: 0 }));
        assert_eq!(audit(&assemble(|a| a.push(rbx)), Width::X128), Err(AuditError::NoReturn));
        // Jumps: out of the code, into an instruction, past the vzeroupper.
        assert!(matches!(body(|a| a.jb(0x4000)), Err(AuditError::Jump { offset: 0, target: 0x4000 })));
        assert!(matches!(
            audit(&[0x72, 0x01, 0x48, 0x01, 0xc8, 0xc3], Width::X128),
            Err(AuditError::Jump { target: 3, .. })
        ));
        assert_eq!(body(|a| a.jb(5)), Err(AuditError::NoVzeroupper { offset: 5 }));

        // Memory: through a number, through nothing known, through two pointers, writing to x and w.
        assert_eq!(
            body(|a| a.vmovups(ymm0, ymmword_ptr(rcx))),
            Err(AuditError::Base { offset: 0, origin: Origin::Number })
        );
        assert_eq!(
            body(|a| a.vmovups(ymm0, ymmword_ptr(rax))),
            Err(AuditError::Base { offset: 0, origin: Origin::Unset })
        );
        assert_eq!(
            body(|a| a.vmovups(ymm0, ymmword_ptr(rdi + rsi))),
            Err(AuditError::Base { offset: 0, origin: Origin::Mixed })
        );
        assert_eq!(
            body(|a| a.vmovups(ymmword_ptr(rdi), ymm0)),
            Err(AuditError::Store { offset: 0, origin: Origin::X })
        );
        assert_eq!(
            body(|a| a.vmovups(ymmword_ptr(rsi + rcx * 4), ymm0)),
            Err(AuditError::Store { offset: 0, origin: Origin::W })
        );
        assert!(body(|a| a.vmovups(ymmword_ptr(rdx + rcx * 4), ymm0)).is_ok());
        assert_eq!(
            body(|a| a.vmovups(ymm0, ymmword_ptr(rcx + rdi * 8))),
            Err(AuditError::Base { offset: 0, origin: Origin::Mixed })
        );
        assert_eq!(
            audit(&[0xc3; MAX_CODE_BYTES + 1], Width::X128),
            Err(AuditError::TooLong { len_bytes: MAX_CODE_BYTES + 1 })
        );
        // A pointer that is only sometimes one.
        let sometimes = body(|a| {
            let mut over = a.create_label();
            a.cmp(rdi, rsi)?;
            a.jb(over)?;
            a.imul_3(rdi, rdi, 3)?;
            a.set_label(&mut over)?;
            a.vmovups(ymm0, ymmword_ptr(rdi))
        });
        assert!(matches!(sometimes, Err(AuditError::Base { origin: Origin::Mixed, .. })));

        // The stack: below rsp, the return address, unbalanced, lost registers.
        assert_eq!(body(|a| a.vmovups(ymm0, ymmword_ptr(rsp - 64))), Err(AuditError::OutsideFrame { offset: 0 }));
        assert_eq!(body(|a| a.mov(qword_ptr(rsp), rax)), Err(AuditError::OutsideFrame { offset: 0 }));
        assert_eq!(body(|a| a.push(rax)), Err(AuditError::StackPointer { offset: 4 }));
        assert_eq!(body(|a| a.sub(rsp, 0x10_0000)), Err(AuditError::StackPointer { offset: 0 }));
        assert_eq!(body(|a| a.mov(rsp, rdi)), Err(AuditError::StackPointer { offset: 0 }));
        // The return address taken off, and another put in its place.
        let replaced = body(|a| {
            a.pop(rax)?;
            a.push(rdi)
        });
        assert_eq!(replaced, Err(AuditError::StackPointer { offset: 0 }));
        let pushed = MAX_STACK_BYTES as usize / 8;
        let deep = assemble(|a| {
            (0..=pushed).try_for_each(|_| a.push(rax))?;
            a.ret()
        });
        assert_eq!(audit(&deep, Width::X128), Err(AuditError::StackPointer { offset: pushed }));
        // A vector store over a saved register, over the return address, a constant over half a saved register.
        let saved = |store: &dyn Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
            body(|a| {
                a.push(rbx)?;
                a.sub(rsp, 32)?;
                store(a)?;
                a.add(rsp, 32)?;
                a.pop(rbx)
            })
        };
        assert!(saved(&|a| a.vmovups(ymmword_ptr(rsp), ymm0)).is_ok());
        assert!(saved(&|a| a.mov(dword_ptr(rsp + 28), 7)).is_ok());
        let lost = |got| matches!(got, Err(AuditError::NotRestored { register: Register::RBX, .. }));
        assert!(lost(saved(&|a| a.vmovups(ymmword_ptr(rsp + 8), ymm0))));
        assert!(lost(saved(&|a| a.mov(dword_ptr(rsp + 36), 7))));
        assert!(matches!(saved(&|a| a.vmovups(ymmword_ptr(rsp + 16), ymm0)), Err(AuditError::OutsideFrame { .. })));
        assert_eq!(body(|a| a.mov(rbx, rdi)), Err(AuditError::NotRestored { offset: 6, register: Register::RBX }));
    }
}
