//! Turns the byte stores that stand for prefetches into prefetches.
//!
//! Kernels store vectors, and 32-bit constants in the frame, but no bytes. So [`crate::clif`] places a store of
//! a mark ([`PREFETCHES`]) exactly where a prefetch belongs, and Cranelift folds its address arithmetic as for any store.
//!
//! How far ahead a prefetch to the first level asks, or that it does not, is decided here: variants that differ in nothing
//! else share what Cranelift compiled.

use super::table::{PREFETCH_CARRIER, PREFETCH_MARK, PREFETCHES};
use iced_x86::{Instruction, MemoryOperand, OpKind, Register};

/// The prefetch `store` stands for, `distance` bytes ahead where it is one to the first level; `None` when it is not the
/// carrier, to be refused.
pub(super) fn prefetch(store: &Instruction, distance: u16) -> Option<Instruction> {
    let (mark, prefetch) = PREFETCHES.iter().find(|(mark, _)| *mark == store.immediate8())?;
    let marked = store.code() == PREFETCH_CARRIER
        && store.op0_kind() == OpKind::Memory
        && !matches!(store.memory_base(), Register::RSP | Register::RBP | Register::RIP | Register::None);
    if !marked {
        return None;
    }
    let ahead = if *mark == PREFETCH_MARK { i64::from(distance) } else { 0 };
    let displacement = (store.memory_displacement64() as i64).checked_add(ahead)?;
    let address = MemoryOperand::new(
        store.memory_base(),
        store.memory_index(),
        store.memory_index_scale(),
        displacement,
        u32::from(displacement != 0),
        false,
        Register::None,
    );
    let mut prefetch = Instruction::with1(*prefetch, address).ok()?;
    prefetch.set_ip(store.ip());
    Some(prefetch)
}

/// Lets branches to what was left out go to what follows: pairs of both addresses, ascending.
pub(super) fn skip(code: &mut [Instruction], left_out: &[(u64, u64)]) {
    for branch in code.iter_mut().filter(|i| i.op0_kind() == OpKind::NearBranch64) {
        let mut target = branch.near_branch64();
        // Several may have stood there one behind the other.
        while let Ok(at) = left_out.binary_search_by_key(&target, |(ip, _)| *ip) {
            target = left_out[at].1;
        }
        branch.set_near_branch64(target);
    }
}
