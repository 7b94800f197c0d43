//! RAM after the seal: the Rust heap, named arenas and the code arena.
//!
//! ```text
//! a range of free RAM (boot/plan.rs)
//! +---------------------------+------------------------------+-----------+---------+
//! | heap, grows up as needed  |            free              |  arena 2  | arena 1 |   arenas come from the top
//! +---------------------------+------------------------------+-----------+---------+
//! ```
//! The heap lives in the lowest range of at least 16 MiB; an arena is cut from the range that has most left. Everything
//! is mapped already (2 MiB pages, read-write, never executable), so neither needs ring 0.
//!
//! Before [`init`], and once the machine is going down, allocations come from a small area that is never freed: early
//! messages and the fault reporter need no working heap.
//!
//! Not here: what is executable ([`super::code`]), who may write an arena after `freeze` (`boot::gates`).

use crate::boot::info::Range;
use crate::boot::paging::LARGE_PAGE_BYTES;
use crate::boot::plan::RAM_RANGES;
use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use linked_list_allocator::Heap;
use spin::Mutex;

/// Smallest range the heap is put into, if there is such a range.
const HEAP_RANGE_BYTES: u64 = 16 << 20;
/// Step of heap growth.
const HEAP_STEP_BYTES: usize = 4 << 20;
/// What arenas leave of the heap's piece, or a quarter of it where that is less: the compiler, captured operands and profiles come after them, and what found no
/// room then would end a boot that had begun to answer.
const HEAP_RESERVE_BYTES: u64 = 32 << 20;
/// Bytes for allocations before the heap and after a fault.
const EMERGENCY_BYTES: usize = 128 << 10;
/// Most arenas.
const ARENAS: usize = 16;

/// An arena that was handed out.
#[derive(Clone, Copy, Debug)]
pub struct Arena {
    /// Its name.
    pub name: &'static str,
    /// Its pages, whole 2 MiB.
    pub range: Range,
    /// Bytes asked for.
    pub len_bytes: u64,
}

/// An arena does not fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exhausted {
    /// Bytes asked for.
    pub need_bytes: u64,
    /// Largest piece that is left.
    pub have_bytes: u64,
}

struct Memory {
    heap: Heap,
    heap_range: usize,
    /// Bytes of that range that no arena takes.
    heap_reserve_bytes: u64,
    ranges: [Range; RAM_RANGES],
    arenas: [Option<Arena>; ARENAS],
    used_bytes: usize,
    peak_bytes: usize,
    allocations: u64,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory {
    heap: Heap::empty(),
    heap_range: 0,
    heap_reserve_bytes: 0,
    ranges: [Range { start: 0, end: 0 }; RAM_RANGES],
    arenas: [None; ARENAS],
    used_bytes: 0,
    peak_bytes: 0,
    allocations: 0,
});

/// True between [`init`] and [`enter_emergency`].
static HEAP_READY: AtomicBool = AtomicBool::new(false);
/// Size of the allocation that could not be served, 0 when none failed.
static FAILED_BYTES: AtomicUsize = AtomicUsize::new(0);

#[repr(align(64))]
struct Emergency(UnsafeCell<[u8; EMERGENCY_BYTES]>);
// SAFETY: bytes are handed out once each, by an atomic counter.
unsafe impl Sync for Emergency {}
static EMERGENCY: Emergency = Emergency(UnsafeCell::new([0; EMERGENCY_BYTES]));
static EMERGENCY_USED: AtomicUsize = AtomicUsize::new(0);

/// Takes over all free RAM. Called once, after the seal.
///
/// # Safety
/// `ranges` must be mapped read-write and used by nothing else.
pub unsafe fn init(ranges: &[Range]) {
    let mut memory = MEMORY.lock();
    for (place, range) in memory.ranges.iter_mut().zip(ranges) {
        *place = *range;
    }
    let heap_range = ranges.iter().position(|r| r.len_bytes() >= HEAP_RANGE_BYTES).unwrap_or(0);
    memory.heap_range = heap_range;
    let Some(range) = memory.ranges.get_mut(heap_range).filter(|r| r.len_bytes() > 0) else { return };
    let reserve_bytes = HEAP_RESERVE_BYTES.min(range.len_bytes() / 4);
    let start = range.start;
    let len = range.len_bytes().min(HEAP_STEP_BYTES as u64);
    range.start += len;
    memory.heap_reserve_bytes = reserve_bytes;
    // SAFETY: the caller gives the range to us alone; the piece was just taken out of it.
    unsafe { memory.heap.init(start as *mut u8, len as usize) };
    HEAP_READY.store(true, Ordering::Release);
}

/// From now on allocations come from the emergency area and nothing is freed: the heap may be locked or damaged.
pub fn enter_emergency() {
    HEAP_READY.store(false, Ordering::Release);
}

/// Size of the allocation that brought the machine down, if one did.
pub fn failed_allocation() -> Option<usize> {
    match FAILED_BYTES.load(Ordering::Relaxed) {
        0 => None,
        bytes => Some(bytes),
    }
}

/// Heap use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeapUse {
    /// Bytes allocated now.
    pub used_bytes: u64,
    /// Most bytes ever allocated at once.
    pub peak_bytes: u64,
    /// Bytes the heap could grow to.
    pub capacity_bytes: u64,
    /// Allocations made.
    pub allocations: u64,
}

/// Heap use now.
pub fn heap_use() -> HeapUse {
    let memory = MEMORY.lock();
    HeapUse {
        used_bytes: memory.used_bytes as u64,
        peak_bytes: memory.peak_bytes as u64,
        capacity_bytes: memory.heap.size() as u64 + memory.ranges[memory.heap_range].len_bytes(),
        allocations: memory.allocations,
    }
}

/// Arenas handed out so far.
pub fn arenas() -> Vec<Arena> {
    // Copied first: collecting allocates, which takes the lock again.
    let arenas = MEMORY.lock().arenas;
    arenas.into_iter().flatten().collect()
}

/// Bytes of RAM that belong to nothing yet.
pub fn free_bytes() -> u64 {
    MEMORY.lock().ranges.iter().map(Range::len_bytes).sum()
}

/// Cuts an arena of at least `len_bytes` out of free RAM: whole 2 MiB pages of any content, for the life of the boot.
///
/// # Errors
/// [`Exhausted`] when no piece is large enough.
#[expect(clippy::mut_from_ref, reason = "the bytes are taken out of free RAM, not out of the name")]
pub fn arena(name: &'static str, len_bytes: u64) -> Result<&'static mut [u8], Exhausted> {
    let range = take(name, len_bytes)?;
    // SAFETY: `take` removed the range from everything that is handed out; it is mapped read-write (boot/plan.rs).
    Ok(unsafe { core::slice::from_raw_parts_mut(range.start as *mut u8, len_bytes as usize) })
}

fn take(name: &'static str, len_bytes: u64) -> Result<Range, Exhausted> {
    let mut memory = MEMORY.lock();
    let (heap_range, heap_reserve_bytes) = (memory.heap_range, memory.heap_reserve_bytes);
    let free = |(index, range): (usize, &Range)| {
        let reserve_bytes = if index == heap_range { heap_reserve_bytes } else { 0 };
        range.len_bytes().saturating_sub(reserve_bytes)
    };
    let (largest, have_bytes) =
        memory.ranges.iter().enumerate().map(|piece| (piece.0, free(piece))).max_by_key(|p| p.1).unwrap_or((0, 0));
    let exhausted = Exhausted { need_bytes: len_bytes, have_bytes };
    let whole = len_bytes.max(1).checked_next_multiple_of(LARGE_PAGE_BYTES).ok_or(exhausted)?;
    let slot = memory.arenas.iter().position(Option::is_none).ok_or(exhausted)?;
    if whole > have_bytes {
        return Err(exhausted);
    }
    let largest = &mut memory.ranges[largest];
    // The heap's piece starts inside a large page; what is cut off at the top is whole pages.
    let start = largest.end.checked_sub(whole).filter(|&start| start >= largest.start).ok_or(exhausted)?;
    let range = Range { start, end: largest.end };
    largest.end = start;
    memory.arenas[slot] = Some(Arena { name, range, len_bytes });
    Ok(range)
}

impl Memory {
    fn allocate(&mut self, layout: Layout) -> *mut u8 {
        if let Ok(place) = self.heap.allocate_first_fit(layout) {
            return self.count(layout, place);
        }
        // Room for the request whatever the last hole looks like, in whole steps while there are any.
        let need = layout.size().saturating_add(layout.align()).saturating_add(64);
        let range = &mut self.ranges[self.heap_range];
        let step = need.next_multiple_of(HEAP_STEP_BYTES).min(range.len_bytes() as usize);
        if step < need {
            FAILED_BYTES.store(layout.size(), Ordering::Relaxed);
            return ptr::null_mut();
        }
        range.start += step as u64;
        // SAFETY: the bytes after the heap belong to its range, were free, and are mapped read-write.
        unsafe { self.heap.extend(step) };
        match self.heap.allocate_first_fit(layout) {
            Ok(place) => self.count(layout, place),
            Err(()) => ptr::null_mut(),
        }
    }

    fn count(&mut self, layout: Layout, place: NonNull<u8>) -> *mut u8 {
        self.used_bytes += layout.size();
        self.peak_bytes = self.peak_bytes.max(self.used_bytes);
        self.allocations += 1;
        place.as_ptr()
    }
}

fn emergency(layout: Layout) -> *mut u8 {
    let base = EMERGENCY.0.get() as usize;
    let mut used = EMERGENCY_USED.load(Ordering::Relaxed);
    loop {
        let start = (base + used).next_multiple_of(layout.align());
        let Some(end) = start.checked_add(layout.size()).filter(|&end| end <= base + EMERGENCY_BYTES) else {
            return ptr::null_mut();
        };
        match EMERGENCY_USED.compare_exchange_weak(used, end - base, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return start as *mut u8,
            Err(now) => used = now,
        }
    }
}

struct Allocator;

// SAFETY: every pointer comes from the heap, which hands out disjoint memory of the layout asked for, or from the
// emergency area, whose bytes are handed out once.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if HEAP_READY.load(Ordering::Acquire) { MEMORY.lock().allocate(layout) } else { emergency(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        let base = EMERGENCY.0.get() as usize;
        if (base..base + EMERGENCY_BYTES).contains(&(place as usize)) || !HEAP_READY.load(Ordering::Acquire) {
            return;
        }
        let mut memory = MEMORY.lock();
        memory.used_bytes -= layout.size();
        if let Some(place) = NonNull::new(place) {
            // SAFETY: the caller returns what `alloc` gave for this layout, and it is not from the emergency area.
            unsafe { memory.heap.deallocate(place, layout) };
        }
    }
}

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;
