//! Calling compiled kernels: the one place where bytes become code, and where several workers write one matrix.
//!
//! Key types: [`Kernel`] (callable machine code with the key it computes), [`KernelArgs`], [`ColumnsMut`] and
//! [`SharedColumns`] (disjoint column windows of one output matrix), and [`guard`] (a call that survives a CPU fault).
//! It does not decide which kernel runs (`table`), nor does it map executable memory (the platform does).

use crate::workers::{self, Workers};
use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use model::kernel::KernelKey;
use model::layout::{WEIGHT_ALIGN, op_weight_bytes, padded, x_row_bytes};

/// ABI of every compiled kernel: `(x, w, y, ldy_bytes, rows)`, System V, no stack arguments.
///
/// Of the key's `m` rows it does at least the first `rows` (1 to `m`), and up to where its last register tile ends. Every
/// other shape is a constant in the code. Kernels are leaf functions, touch no globals, and end in `vzeroupper`
/// when they used vectors wider than 128 bits.
type Entry = unsafe extern "sysv64" fn(x: *const u8, w: *const u8, y: *mut f32, ldy_bytes: usize, rows: usize);

/// A compiled kernel and the problem it computes.
#[derive(Clone, Copy)]
pub struct Kernel {
    key: KernelKey,
    entry: Entry,
}

/// Operands of one kernel call, all as laid out by `model::layout`.
pub struct KernelArgs<'a> {
    /// Activations: `m` rows of `x_row_bytes(dtype, k)` bytes, 4-byte aligned.
    pub x: &'a [u8],
    /// Packed weights: `op_weight_bytes(op, dtype, n, k)` bytes, aligned to `WEIGHT_ALIGN`.
    pub w: &'a [u8],
    /// Output, row-major, `(m, ldy)`; the last row may end after `padded(n)` elements.
    pub y: &'a mut [f32],
    /// Elements from one row of `y` to the next, at least `padded(n)`.
    pub ldy: usize,
    /// Rows that are wanted, 1 to `m`; the content of the others is then either what it was or what it would be.
    pub rows: usize,
}

impl Kernel {
    /// Makes machine code callable. The only such constructor in the project.
    ///
    /// # Safety
    /// `entry` must point at code that stays mapped and executable, unchanged, for the life of the program, follows
    /// the ABI above, uses only instructions this CPU runs, and for operands of the sizes [`KernelArgs`] states reads
    /// only `x` and `w` and writes only `y[r * ldy .. r * ldy + padded(n)]` for `r < m`, for any `rows` from 1 to `m`. The publishers (`kernel`, `hosted`) publish only
    /// what `jit` made and audited, in this boot or an earlier one; before its first use it is called with a guard against faults
    /// and its results are checked. The audit does not bound offsets from `x`, `w` and `y`: that code from a disk keeps these
    /// sizes rests on who may write the disk.
    pub unsafe fn from_entry(key: KernelKey, entry: *const u8) -> Kernel {
        // SAFETY: the caller promises that `entry` is code of this ABI.
        let entry = unsafe { core::mem::transmute::<*const u8, Entry>(entry) };
        Kernel { key, entry }
    }

    /// The problem this kernel computes.
    pub fn key(&self) -> KernelKey {
        self.key
    }

    /// Address of its first instruction.
    pub fn entry_address(&self) -> usize {
        self.entry as usize
    }

    /// Runs the kernel.
    ///
    /// # Panics
    /// When an operand is shorter than the key needs, `w` is not aligned, or `rows` is not 1 to `m`.
    pub fn call(&self, args: KernelArgs<'_>) {
        let KernelArgs { x, w, y, ldy, rows } = args;
        self.call_columns(x, w, ColumnsMut::new(y, self.key.m as usize, padded(self.key.n as usize), ldy), rows);
    }

    /// Runs the kernel on one window of a larger output matrix, for `rows` rows of it (as in [`KernelArgs`]).
    ///
    /// # Panics
    /// As [`Kernel::call`].
    pub fn call_columns(&self, x: &[u8], w: &[u8], mut y: ColumnsMut<'_>, rows: usize) {
        check_operands(&self.key, x, w, &y);
        check_rows(&self.key, rows);
        // SAFETY: `from_entry`'s caller promised the ABI and the memory behaviour for operands of the sizes just checked.
        unsafe { (self.entry)(x.as_ptr(), w.as_ptr(), y.as_mut_ptr(), y.stride * size_of::<f32>(), rows) }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.key, self.entry_address())
    }
}

/// Asserts what every implementation of an op, compiled or not, relies on.
///
/// # Panics
/// When an operand is shorter than the key needs or `w` is not aligned.
pub(crate) fn check_operands(key: &KernelKey, x: &[u8], w: &[u8], y: &ColumnsMut<'_>) {
    let (m, n, k) = (key.m as usize, key.n as usize, key.k as usize);
    let x_need = m * x_row_bytes(key.dtype, k);
    assert!(x.len() >= x_need, "{key}: x has {} bytes, {x_need} needed", x.len());
    let w_need = op_weight_bytes(key.op, key.dtype, n, k);
    assert!(w.len() >= w_need, "{key}: w has {} bytes, {w_need} needed", w.len());
    assert!(w.as_ptr().addr().is_multiple_of(WEIGHT_ALIGN), "{key}: w at {:p} is not {WEIGHT_ALIGN}-aligned", w);
    assert!(x.as_ptr().addr().is_multiple_of(align_of::<f32>()), "{key}: x at {:p} is not 4-aligned", x);
    assert!(y.rows >= m, "{key}: y has {} rows, {m} needed", y.rows);
    assert!(y.columns >= padded(n), "{key}: y has {} columns, {} needed", y.columns, padded(n));
}

/// Asserts that a kernel can do `rows` rows.
fn check_rows(key: &KernelKey, rows: usize) {
    assert!((1..=key.m as usize).contains(&rows), "{key}: {rows} rows");
}

/// A `(rows, columns)` window of a row-major f32 matrix, writable by its holder alone.
///
/// Windows of the same matrix that share no column may be held at the same time by different workers, which `&mut`
/// slices cannot express because their rows interleave in memory.
pub struct ColumnsMut<'a> {
    base: NonNull<f32>,
    rows: usize,
    columns: usize,
    /// Elements from one row to the next.
    stride: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a window is a unique borrow of its elements, and f32 is Send.
unsafe impl Send for ColumnsMut<'_> {}

impl<'a> ColumnsMut<'a> {
    /// The first `rows` rows and `columns` columns of `data`, whose rows are `stride` elements apart.
    ///
    /// # Panics
    /// When `data` is too short or `stride < columns`.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(stride >= columns, "rows {stride} elements apart cannot hold {columns} columns");
        let need = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
        assert!(data.len() >= need, "a matrix of {need} elements does not fit in {}", data.len());
        Self { base: NonNull::from(data).cast(), rows, columns, stride, owner: PhantomData }
    }

    /// Rows of the window.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the window.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `r` of the window.
    ///
    /// # Panics
    /// When `r` is not below `rows()`.
    pub fn row(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: `new` checked that row `r` lies inside the borrowed data; no other window holds these columns, and
        // the result borrows `self` mutably.
        unsafe { core::slice::from_raw_parts_mut(self.base.as_ptr().add(r * self.stride), self.columns) }
    }

    /// Address of row 0, column 0.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.base.as_ptr()
    }
}

/// How the columns of an output are shared: one range of columns per worker, ascending, disjoint, possibly empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Partition {
    /// `ends[i]` is the column after part `i`; part `i` starts where part `i - 1` ends.
    ends: alloc::vec::Vec<u32>,
}

/// Most parts a [`Partition`] can have, and so most workers the engine uses.
pub const MAX_PARTS: usize = 64;

impl Partition {
    /// Cuts `units` units of `unit_columns` columns each into `parts` runs whose sizes differ by at most one unit.
    ///
    /// # Panics
    /// When `parts` is 0 or above [`MAX_PARTS`], or a column number does not fit in 32 bits.
    pub fn even(units: usize, unit_columns: usize, parts: usize) -> Partition {
        assert!((1..=MAX_PARTS).contains(&parts), "{parts} parts, at most {MAX_PARTS}");
        let (base, longer) = (units / parts, units % parts);
        let end = |part: usize| (part + 1) * base + (part + 1).min(longer);
        let column = |part| u32::try_from(end(part) * unit_columns).expect("columns fit in 32 bits");
        Partition { ends: (0..parts).map(column).collect() }
    }

    /// Number of parts.
    pub fn parts(&self) -> usize {
        self.ends.len()
    }

    /// Columns of all parts together.
    pub fn columns(&self) -> usize {
        self.ends.last().map_or(0, |&end| end as usize)
    }

    /// Columns of part `i`.
    ///
    /// # Panics
    /// When there is no such part.
    pub fn range(&self, i: usize) -> Range<usize> {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        start as usize..self.ends[i] as usize
    }
}

/// An output matrix that each worker takes its own columns of, without locks.
pub struct SharedColumns<'a> {
    base: NonNull<f32>,
    rows: usize,
    stride: usize,
    partition: &'a Partition,
    /// Bit `i` is set once part `i` was handed out.
    taken: AtomicU64,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a shared reference gives out each part at most once (`taken`), parts are disjoint (`Partition`), f32 is Send.
unsafe impl Sync for SharedColumns<'_> {}

impl<'a> SharedColumns<'a> {
    /// Shares `whole` as `partition` says.
    ///
    /// # Panics
    /// When the partition has more columns than `whole`.
    pub fn new(whole: ColumnsMut<'a>, partition: &'a Partition) -> Self {
        assert!(partition.columns() <= whole.columns, "{} columns of {}", partition.columns(), whole.columns);
        let ColumnsMut { base, rows, stride, .. } = whole;
        Self { base, rows, stride, partition, taken: AtomicU64::new(0), owner: PhantomData }
    }

    /// The columns of part `i`; `None` when there is no such part or it was taken before.
    pub fn take(&self, i: usize) -> Option<ColumnsMut<'_>> {
        if i >= self.partition.parts() {
            return None;
        }
        // Relaxed is enough: exclusiveness needs only the atomicity of the bit, and the workers' own start and end
        // barriers order the data.
        if self.taken.fetch_or(1 << i, Ordering::Relaxed) & (1 << i) != 0 {
            return None;
        }
        let Range { start, end } = self.partition.range(i);
        // SAFETY: `start` is at most the number of columns, so the address stays inside or one past the borrowed data.
        let base = unsafe { self.base.add(start) };
        Some(ColumnsMut { base, rows: self.rows, columns: end - start, stride: self.stride, owner: PhantomData })
    }
}

pub mod guard {
    //! Running a kernel so that a CPU fault inside it comes back as an error.
    //!
    //! [`call`] notes its stack pointer and runs the kernel. If the kernel faults, the platform's fault handler (an
    //! exception stub's ring-3 continuation, or a Linux signal handler) asks [`recovery`] where to resume, writes
    //! that into the interrupted context's instruction pointer and returns to it; `call` then returns [`Faulted`].
    //! One guarded call runs at a time (others wait); the platform makes it on one core and must not send faults of
    //! other cores or threads to the recovery address.

    use super::{ColumnsMut, Kernel, KernelArgs, check_operands, check_rows};
    use core::arch::global_asm;
    use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
    use model::layout::padded;

    /// A kernel raised a CPU exception.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
    #[error("a compiled kernel raised CPU exception {vector} at {rip:#x}")]
    pub struct Faulted {
        /// Exception vector (6 invalid opcode, 13 general protection, 14 page fault, ...).
        pub vector: u8,
        /// Address of the faulting instruction.
        pub rip: u64,
    }

    /// Stack pointer of the guarded call that is running, 0 when none is.
    static RECOVERY_RSP: AtomicU64 = AtomicU64::new(0);
    static BUSY: AtomicBool = AtomicBool::new(false);
    static FAULT_VECTOR: AtomicU8 = AtomicU8::new(0);
    static FAULT_RIP: AtomicU64 = AtomicU64::new(0);

    // The callee-saved registers and MXCSR go on the stack, so the only static state is the stack pointer. A faulting
    // kernel may have changed every register; only memory outside its operands is trusted to be intact.
    global_asm!(
        ".pushsection .text.bareflow_guard, \"ax\", @progbits",
        ".globl bareflow_guard_call",
        ".globl bareflow_guard_recover",
        ".p2align 4",
        "bareflow_guard_call:", // (x, w, y, ldy_bytes, rows, entry) -> 0 | 1
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8", // entry had rsp = 8 mod 16, six pushes keep it: now 0 mod 16, as a call needs
        "stmxcsr [rsp]",
        "mov [rip + {rsp}], rsp",
        "call r9",
        "xor eax, eax",
        "2:",
        "mov qword ptr [rip + {rsp}], 0",
        "cld",
        "ldmxcsr [rsp]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        "bareflow_guard_recover:",
        "mov rsp, [rip + {rsp}]",
        "mov eax, 1",
        "jmp 2b",
        ".popsection",
        rsp = sym RECOVERY_RSP,
    );

    unsafe extern "sysv64" {
        fn bareflow_guard_call(
            x: *const u8,
            w: *const u8,
            y: *mut f32,
            ldy_bytes: usize,
            rows: usize,
            entry: usize,
        ) -> u64;
        /// A label, not a function: it is never called, only jumped to by a fault handler.
        fn bareflow_guard_recover();
    }

    /// Runs `kernel` once; a CPU fault inside it comes back as an error with `y` in any state.
    ///
    /// # Errors
    /// [`Faulted`], with what the platform's handler noted.
    ///
    /// # Panics
    /// When an operand is shorter than the key needs, `w` is not aligned, or `rows` is not 1 to `m`.
    pub fn call(kernel: Kernel, args: KernelArgs<'_>) -> Result<(), Faulted> {
        let KernelArgs { x, w, y, ldy, rows } = args;
        let mut y = ColumnsMut::new(y, kernel.key.m as usize, padded(kernel.key.n as usize), ldy);
        check_operands(&kernel.key, x, w, &y);
        check_rows(&kernel.key, rows);
        while BUSY.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            core::hint::spin_loop();
        }
        FAULT_VECTOR.store(0, Ordering::Relaxed);
        FAULT_RIP.store(0, Ordering::Relaxed);
        let ldy_bytes = y.stride() * size_of::<f32>();
        // SAFETY: the trampoline keeps the callee-saved registers, and `Kernel::from_entry`'s contract covers the
        // kernel for operands of the sizes just checked. After a fault nothing of the kernel's frame is used again.
        let faulted = unsafe {
            bareflow_guard_call(x.as_ptr(), w.as_ptr(), y.as_mut_ptr(), ldy_bytes, rows, kernel.entry_address())
        };
        let fault = Faulted { vector: FAULT_VECTOR.load(Ordering::Relaxed), rip: FAULT_RIP.load(Ordering::Relaxed) };
        BUSY.store(false, Ordering::Release);
        if faulted == 0 {
            return Ok(());
        }
        // A kernel that died in its loop left the upper vector halves dirty, which slows every later SSE instruction.
        crate::simd::clear_upper_halves();
        Err(fault)
    }

    /// Where a fault handler must resume the interrupted code, when a guarded call is running. Safe in signal handlers.
    pub fn recovery() -> Option<u64> {
        let running = RECOVERY_RSP.load(Ordering::Relaxed) != 0;
        running.then_some(bareflow_guard_recover as *const () as u64)
    }

    /// Called by the fault handler before it resumes: what the [`Faulted`] will say. Safe in signal handlers.
    pub fn note_fault(vector: u8, rip: u64) {
        FAULT_VECTOR.store(vector, Ordering::Relaxed);
        FAULT_RIP.store(rip, Ordering::Relaxed);
    }
}

/// Calls `job` for all rows of `out`, `(rows, row_len)`, cut into `parts` pieces on `workers`: with the rows of a piece, and these.
pub(crate) fn for_rows(
    workers: &dyn Workers,
    parts: usize,
    out: &mut [f32],
    row_len: usize,
    job: &(dyn Fn(Range<usize>, &mut [f32]) + Sync),
) {
    let len = out.len();
    if parts == 1 {
        return job(0..len / row_len, out);
    }
    let cut = Partition::even(len / row_len, row_len, parts);
    let shared = SharedColumns::new(ColumnsMut::new(out, 1, len, len), &cut);
    workers::for_parts(workers, parts, &|part| {
        let Some(mut out) = shared.take(part) else { return };
        let columns = cut.range(part);
        job(columns.start / row_len..columns.end / row_len, out.row(0));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    #[test]
    fn partitions_cover_all_columns_evenly() {
        for (units, parts) in [(18, 1), (18, 4), (48, 5), (2, 3), (0, 2), (1536, 64)] {
            let partition = Partition::even(units, 32, parts);
            let sizes: Vec<usize> = (0..parts).map(|i| partition.range(i).len() / 32).collect();
            assert_eq!(sizes.iter().sum::<usize>(), units);
            assert_eq!(partition.columns(), units * 32);
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
            assert_eq!(partition.range(0).start, 0);
        }
    }

    #[test]
    fn parts_are_handed_out_once_and_write_only_their_columns() {
        let mut data = vec![0.0f32; 3 * 10];
        let partition = Partition::even(4, 2, 3);
        let shared = SharedColumns::new(ColumnsMut::new(&mut data, 3, 8, 10), &partition);
        for i in [2, 0, 1] {
            let mut part = shared.take(i).unwrap();
            assert_eq!(part.columns(), partition.range(i).len());
            for r in 0..3 {
                part.row(r).fill((10 * r + i + 1) as f32);
            }
            assert!(shared.take(i).is_none());
        }
        assert!(shared.take(3).is_none());
        for r in 0..3 {
            let t = 10.0 * r as f32;
            let want = [t + 1.0, t + 1.0, t + 1.0, t + 1.0, t + 2.0, t + 2.0, t + 3.0, t + 3.0, 0.0, 0.0];
            assert_eq!(data[10 * r..10 * r + 10], want);
        }
    }
}
