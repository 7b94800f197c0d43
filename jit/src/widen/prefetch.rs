//! Turns the byte stores that stand for prefetches into prefetches.
//!
//! Kernels store vectors, and 32-bit constants in the frame, but no bytes. So [`crate::clif`] places a store of
//! a mark ([`PREFETCHES`]) exactly where a prefetch belongs, and Cranelift folds its address arithmetic as for any store.

use super::table::{PREFETCH_CARRIER, PREFETCHES};
use iced_x86::{Instruction, MemoryOperand, OpKind, Register};

/// The prefetch `store` stands for; `None` when it is not the carrier, to be refused.
pub(super) fn prefetch(store: &Instruction) -> Option<Instruction> {
    let (_, prefetch) = PREFETCHES.iter().find(|(mark, _)| *mark == store.immediate8())?;
    let marked = store.code() == PREFETCH_CARRIER
        && store.op0_kind() == OpKind::Memory
        && !matches!(store.memory_base(), Register::RSP | Register::RBP | Register::RIP | Register::None);
    if !marked {
        return None;
    }
    let address = MemoryOperand::new(
        store.memory_base(),
        store.memory_index(),
        store.memory_index_scale(),
        store.memory_displacement64() as i64,
        u32::from(store.memory_displ_size() != 0),
        false,
        Register::None,
    );
    let mut prefetch = Instruction::with1(*prefetch, address).ok()?;
    prefetch.set_ip(store.ip());
    Some(prefetch)
}
