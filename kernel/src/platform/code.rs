//! The code arena: the same memory mapped twice, writable here and executable there, never both at one address.

use super::cores::Cores;
use crate::boot::info::Range;
use crate::boot::plan::CODE_ALIAS;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// Alignment of published code: a cache line.
const ALIGN: u64 = 64;

/// Bytes of the arena. Its symbol is how the audit of an exported image tells that none is there.
#[cfg(feature = "jit")]
#[unsafe(export_name = "bareflow_jit_arena")]
static CAPACITY: AtomicU64 = AtomicU64::new(0);
#[cfg(not(feature = "jit"))]
static CAPACITY: AtomicU64 = AtomicU64::new(0);

/// Offset of `address` in the executable alias, if it lies there.
pub fn offset_of(address: u64) -> Option<u64> {
    address.checked_sub(CODE_ALIAS).filter(|&offset| offset < CAPACITY.load(Ordering::Relaxed))
}

/// Memory for machine code, handed out once and kept for the life of the boot.
pub struct CodeArena {
    writable: u64,
    capacity: u64,
    used: u64,
}

/// The arena is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full {
    /// Bytes asked for.
    pub need_bytes: u64,
    /// Bytes left.
    pub have_bytes: u64,
}

impl CodeArena {
    /// # Safety
    /// `range` must be mapped read-write at its own address and read-execute at [`CODE_ALIAS`], and used by nothing else.
    pub(crate) unsafe fn new(range: Range) -> Self {
        CAPACITY.store(range.len_bytes(), Ordering::Relaxed);
        Self { writable: range.start, capacity: range.len_bytes(), used: 0 }
    }

    /// Copies `code` into the arena and returns where it can be executed, on every core.
    ///
    /// # Errors
    /// [`Full`].
    pub fn publish(&mut self, code: &[u8], cores: &Cores) -> Result<*const u8, Full> {
        let start = self.used.next_multiple_of(ALIGN);
        let full = Full { need_bytes: code.len() as u64, have_bytes: self.capacity.saturating_sub(start) };
        let end = start.checked_add(code.len() as u64).filter(|&end| end <= self.capacity).ok_or(full)?;
        // SAFETY: `start..end` lies inside the arena and was never handed out, so nothing executes or reads it.
        unsafe {
            core::ptr::copy_nonoverlapping(code.as_ptr(), (self.writable + start) as *mut u8, code.len());
        }
        self.used = end;
        // Written through one address, fetched through another: each core must serialise before its first fetch.
        cores.run_on_each(&|_| serialise());
        Ok((CODE_ALIAS + start) as *const u8)
    }

    /// Address where the byte published at executable address `code` is writable.
    pub fn writable_alias(&self, code: *const u8) -> Option<u64> {
        offset_of(code as u64).map(|offset| self.writable + offset)
    }

    /// Bytes in use and in all.
    pub fn used_and_capacity(&self) -> (u64, u64) {
        (self.used, self.capacity)
    }
}

/// Discards prefetched instructions: `iretq` to the next instruction, which serialises, needs no privilege and, unlike
/// `cpuid`, never leaves the guest.
///
/// # Source
/// Intel SDM volume 3A, section 8.1.3 (self- and cross-modifying code), 8.3 (serialising instructions).
pub fn serialise() {
    // SAFETY: returns to the label with the same segments, flags and stack pointer.
    unsafe {
        asm!(
            "mov {saved}, rsp",
            "mov {part:e}, ss",
            "push {part}",
            "push {saved}",
            "pushfq",
            "mov {part:e}, cs",
            "push {part}",
            "lea {part}, [rip + 2f]",
            "push {part}",
            "iretq",
            "2:",
            saved = out(reg) _,
            part = out(reg) _,
        );
    }
}
