//! Re-encodes Cranelift's 128-bit code at the width a kernel was written for.
//!
//! Input: machine code of one function. Output: machine code in which every vector instruction has been replaced by its
//! form at the wanted width according to [`table`], with branches fixed up. Whatever is not on the table, touches the
//! stack pointer with a vector (a spill would save 128 bits only) or reads a constant pool is refused with a typed error.
//!
//! Architecture invariant: this pass never drops, adds or reorders arithmetic; it replaces instructions one for one,
//! folds loads into their only user ([`fold`]) and adds `vzeroupper`.

pub mod fold;
pub mod prefetch;
pub mod table;

use crate::error::JitError;
use alloc::string::ToString;
use alloc::vec::Vec;
use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, Instruction, InstructionBlock, OpKind, Register,
};
use model::kernel::Width;

/// Address the code pretends to be at while it is rewritten; also the first label of branch targets.
const ORIGIN: u64 = 0x1000;

/// What the pass did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WidenStats {
    /// Instructions of the finished kernel.
    pub instructions: u32,
    /// Vector instructions re-encoded.
    pub widened: u32,
    /// Of those, carriers.
    pub carriers: u32,
    /// Register-to-register vector moves left by the register allocator.
    pub moves: u32,
    /// Loads folded into their user.
    pub folded: u32,
    /// Prefetches.
    pub prefetches: u32,
}

/// Re-encodes `code` at `width`.
///
/// # Errors
/// [`JitError::Undecodable`], [`JitError::ConstantPool`], [`JitError::Spill`], [`JitError::Unlisted`],
/// [`JitError::NoWidth`] or [`JitError::Encode`].
pub fn widen(code: &[u8], width: Width) -> Result<(Vec<u8>, WidenStats), JitError> {
    let mut stats = WidenStats::default();
    let mut out = Vec::with_capacity(code.len() / 5);
    let mut decoder = Decoder::with_ip(64, code, ORIGIN, DecoderOptions::NONE);
    while decoder.can_decode() {
        let offset = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Err(JitError::Undecodable { offset });
        }
        rewrite(instruction, offset, width, &mut out, &mut stats)?;
    }
    stats.folded = fold::fold_loads(&mut out);
    stats.instructions = out.len() as u32;
    let block = InstructionBlock::new(&out, ORIGIN);
    let encoded = BlockEncoder::encode(64, block, BlockEncoderOptions::NONE)
        .map_err(|e| JitError::Encode { message: e.to_string() })?;
    Ok((encoded.code_buffer, stats))
}

/// True when an operand is a vector register.
fn is_vector(i: &Instruction) -> bool {
    (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Register && i.op_register(k).is_vector_register())
}

/// True when an operand is in memory.
pub(crate) fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory)
}

/// `r` at `width`.
fn at_width(r: Register, width: Width) -> Register {
    let first = match width {
        Width::X128 => Register::XMM0,
        Width::Y256 => Register::YMM0,
        Width::Z512 => Register::ZMM0,
    };
    first + r.number() as u32
}

fn rewrite(
    mut i: Instruction,
    offset: usize,
    width: Width,
    out: &mut Vec<Instruction>,
    stats: &mut WidenStats,
) -> Result<(), JitError> {
    let code = i.code();
    if code == table::PREFETCH_CARRIER {
        out.push(prefetch::prefetch(&i).ok_or(JitError::Unlisted { offset, code })?);
        stats.prefetches += 1;
        return Ok(());
    }
    if !is_vector(&i) {
        if !table::SCALAR.contains(&code) {
            return Err(JitError::Unlisted { offset, code });
        }
        if code == Code::Retnq && width != Width::X128 {
            let mut clean = Instruction::with(Code::VEX_Vzeroupper);
            // A branch to the return must clean up too.
            clean.set_ip(i.ip());
            i.set_ip(0);
            out.push(clean);
        }
        out.push(i);
        return Ok(());
    }

    if has_memory(&i) {
        if i.is_ip_rel_memory_operand() {
            return Err(JitError::ConstantPool { offset, code });
        }
        if matches!(i.memory_base(), Register::RSP | Register::RBP) {
            return Err(JitError::Spill { offset, code });
        }
        if i.memory_displ_size() > 1 {
            // Let the encoder choose again: EVEX displacements are scaled.
            i.set_memory_displ_size(1);
        }
    }
    let row = table::row(code).ok_or(JitError::Unlisted { offset, code })?;
    let is_move = matches!(code, Code::Movaps_xmm_xmmm128 | Code::Movdqa_xmm_xmmm128);
    // Moves of the register allocator never touch memory: that would be a spill through another register.
    if (is_move && has_memory(&i)) || (table::memory_only(code) && !has_memory(&i)) {
        return Err(JitError::Unlisted { offset, code });
    }
    let form = row.form(width);
    if form == Code::INVALID {
        return Err(JitError::NoWidth { offset, code, bits: width.bits() });
    }
    i.set_code(form);
    for k in 0..i.op_count() {
        if i.op_kind(k) == OpKind::Register && i.op_register(k).is_vector_register() {
            i.set_op_register(k, at_width(i.op_register(k), width));
        }
    }
    stats.widened += 1;
    stats.moves += u32::from(is_move);
    stats.carriers += u32::from(table::CARRIERS.iter().any(|row| row.emitted == code));
    out.push(i);
    Ok(())
}
