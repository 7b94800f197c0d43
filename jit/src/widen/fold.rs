//! Folds loads into the instruction after them, where it is their only user.
//!
//! `vmovups ymm1, [m]` and `vfmadd231ps ymm0, ymm2, ymm1` become `vfmadd231ps ymm0, ymm2, [m]`, and at 512 bits a
//! broadcast folds too: `vfmadd231ps zmm0, zmm2, [m]{1to16}`. Cranelift folds most full loads by itself, but not those
//! behind a value that leaves a loop both ways.

use super::has_memory;
use alloc::vec::Vec;
use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

/// Folds what can be folded and returns how many loads went.
pub(super) fn fold_loads(code: &mut Vec<Instruction>) -> u32 {
    let targets: Vec<u64> =
        code.iter().filter(|i| i.op0_kind() == OpKind::NearBranch64).map(|i| i.near_branch64()).collect();
    let mut info = InstructionInfoFactory::new();
    let mut out: Vec<Instruction> = Vec::with_capacity(code.len());
    let mut folded = 0;
    let mut at = 0;
    while at < code.len() {
        if let Some((load, user)) = code.get(at).zip(code.get(at + 1))
            && let Some(merged) = merge(load, user)
            && !targets.contains(&user.ip())
            && dead_from(code, at + 2, load.op0_register(), &mut info)
        {
            out.push(merged);
            folded += 1;
            at += 2;
            continue;
        }
        out.push(code[at]);
        at += 1;
    }
    *code = out;
    folded
}

/// `user` with `load`'s memory operand in place of the register, if the pair has that form.
fn merge(load: &Instruction, user: &Instruction) -> Option<Instruction> {
    let broadcast = load.code() == Code::EVEX_Vbroadcastss_zmm_k1z_xmmm32;
    let full = matches!(load.mnemonic(), Mnemonic::Vmovups | Mnemonic::Vmovdqu | Mnemonic::Vmovdqu32);
    if !(broadcast || full) || load.op1_kind() != OpKind::Memory || has_memory(user) || user.op_count() != 3 {
        return None;
    }
    let value = load.op0_register();
    let other = match user.mnemonic() {
        // The product commutes: the load may be either factor.
        Mnemonic::Vfmadd231ps if user.op1_register() == value => user.op2_register(),
        Mnemonic::Vfmadd231ps | Mnemonic::Vpdpbusd => user.op1_register(),
        _ => return None,
    };
    let uses = [user.op1_register(), user.op2_register()].iter().filter(|r| **r == value).count();
    if uses != 1 || other == value || user.op0_register() == value {
        return None;
    }
    let mut merged = *user;
    merged.set_ip(load.ip());
    merged.set_op1_register(other);
    merged.set_op2_kind(OpKind::Memory);
    merged.set_memory_base(load.memory_base());
    merged.set_memory_index(load.memory_index());
    merged.set_memory_index_scale(load.memory_index_scale());
    merged.set_memory_displacement64(load.memory_displacement64());
    merged.set_memory_displ_size(load.memory_displ_size());
    merged.set_is_broadcast(broadcast);
    Some(merged)
}

/// True when no path from instruction `from` reads `register` before it is written.
fn dead_from(code: &[Instruction], from: usize, register: Register, info: &mut InstructionInfoFactory) -> bool {
    let mut paths = alloc::vec![from];
    let mut seen: Vec<usize> = Vec::new();
    while let Some(start) = paths.pop() {
        for (at, i) in code.iter().enumerate().skip(start) {
            // Kernels return nothing in a register, so the upper halves' end is everybody's end.
            if i.code() == Code::VEX_Vzeroupper || i.flow_control() == FlowControl::Return {
                break;
            }
            let (mut read, mut written) = (false, false);
            for used in info.info(i).used_registers() {
                if used.register().full_register() == register.full_register() {
                    written |= used.access() == OpAccess::Write;
                    read |= used.access() != OpAccess::Write;
                }
            }
            if read {
                return false;
            }
            if written {
                break;
            }
            if i.op0_kind() == OpKind::NearBranch64 {
                let Some(to) = code.iter().position(|t| t.ip() == i.near_branch64()) else { return false };
                if !seen.contains(&to) {
                    seen.push(to);
                    paths.push(to);
                }
                if i.flow_control() == FlowControl::UnconditionalBranch {
                    break;
                }
            }
            if at + 1 == code.len() {
                return false;
            }
        }
    }
    true
}
