//! Arenas and code pages from the operating system.

use cranelift_jit::{ArenaMemoryProvider, BranchProtection, JITMemoryKind, JITMemoryProvider};
use std::ptr::NonNull;

/// Alignment and granule of arenas: one huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Each publication gets pages of its own.
const PAGE_BYTES: usize = 4096;
/// Address space set aside for compiled kernels.
pub const CODE_ARENA_BYTES: usize = 64 << 20;

/// Which limit of the process.
#[derive(Clone, Copy)]
pub enum Limit {
    /// All that is mapped (`ulimit -v`).
    AddressSpace,
    /// What is private and can be written (`ulimit -d`).
    Data,
}

/// The limit in bytes, where there is one.
pub fn limit_bytes(limit: Limit) -> Option<u64> {
    let resource = match limit {
        Limit::AddressSpace => libc::RLIMIT_AS,
        Limit::Data => libc::RLIMIT_DATA,
    };
    let mut found = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the call writes one rlimit, and does so only when it succeeds.
    let status = unsafe { libc::getrlimit(resource, &mut found) };
    (status == 0 && found.rlim_cur != libc::RLIM_INFINITY).then_some(found.rlim_cur)
}

/// Zeroed memory for the life of the process, 2 MiB aligned, in huge pages where the system gives them.
/// `None` when the system refuses.
pub fn map_arena(len_bytes: usize) -> Option<&'static mut [u8]> {
    let mapped = len_bytes.next_multiple_of(HUGE_PAGE_BYTES).checked_add(HUGE_PAGE_BYTES)?;
    // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            mapped,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return None;
    }
    let skip = base.align_offset(HUGE_PAGE_BYTES);
    // SAFETY: `skip` is less than HUGE_PAGE_BYTES, which was added to the mapped length above.
    let start = unsafe { base.cast::<u8>().add(skip) };
    // SAFETY: the range is inside the mapping made above; the advice changes no contents. Its failure is harmless.
    unsafe { libc::madvise(start.cast(), mapped - HUGE_PAGE_BYTES, libc::MADV_HUGEPAGE) };
    // SAFETY: the mapping is zeroed, readable, writable, never unmapped, and handed out only here.
    Some(unsafe { std::slice::from_raw_parts_mut(start, len_bytes) })
}

/// Makes an arena of [`map_arena`] read-only.
pub fn freeze(arena: &'static mut [u8]) -> &'static [u8] {
    let len = arena.len().next_multiple_of(HUGE_PAGE_BYTES);
    // SAFETY: the arena starts on a page and its mapping reaches past `len`; the exclusive borrow given up here was the
    // only way to write to it.
    let status = unsafe { libc::mprotect(arena.as_mut_ptr().cast(), len, libc::PROT_READ) };
    assert_eq!(status, 0, "mprotect refuses a mapping of ours");
    arena
}

/// Executable memory: each publication gets pages of its own, written while RW and run while RX.
pub struct CodePages {
    provider: ArenaMemoryProvider,
    used_bytes: usize,
}

impl CodePages {
    /// Reserves the address space.
    ///
    /// # Errors
    /// The operating system's, as text.
    pub fn reserve() -> Result<Self, String> {
        let provider = ArenaMemoryProvider::new_with_size(CODE_ARENA_BYTES).map_err(|e| e.to_string())?;
        Ok(Self { provider, used_bytes: 0 })
    }

    /// Bytes of pages that hold machine code.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Copies `code` into executable pages; `None` when the reserved space is used up.
    pub fn publish(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let at = self.provider.allocate(code.len(), 64, JITMemoryKind::Executable).ok()?;
        // SAFETY: the provider gave `code.len()` writable bytes at `at`, which nobody else has.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), at, code.len()) };
        self.provider.finalize(BranchProtection::None).ok()?;
        self.used_bytes += code.len().next_multiple_of(PAGE_BYTES);
        NonNull::new(at)
    }
}
