//! The other cores as [`Workers`].
//!
//! Between jobs a core spins, because in a forward pass the next job comes within microseconds. After [`SPIN_CYCLES`]
//! without one it asks ring 0 to park it: on a host with no more cores than the guest, a spinning core would otherwise take
//! the time of the very thread that serves the disk. The core that waits for the others parks after [`WAIT_CYCLES`]: one
//! that takes so much longer has been put aside by the host, and gets to run sooner when this one does not spin. Where
//! that happens again and again (two cores of the guest on one of a busy host) both give way sooner. A core that has not
//! even begun its share when the boot CPU is done with its own finds it done by that one.

use super::clock;
use crate::boot::area::MAX_CPUS;
use crate::boot::gates;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use engine::workers::Workers;

/// TSC ticks without a job before a core parks: about a millisecond, longer than any gap inside a forward pass.
const SPIN_CYCLES: u64 = 3_000_000;
/// The same after a job that woke this core, or whose end woke the waiting core: one of the two may be off the host's CPU
/// because the other is on it, and gets it when that one parks. Still longer than the gaps of a prompt: a core that parks in
/// one is late for the next job, whose share it then finds done, and late again for all that follow.
const SPIN_CYCLES_AFTER_WAKE: u64 = 500_000;
/// TSC ticks of waiting for the other cores before the waiting one parks: about what parking and waking cost.
const WAIT_CYCLES: u64 = 300_000;
/// The same after a wait that was longer than [`WAIT_CYCLES`].
const WAIT_CYCLES_AFTER_PARKING: u64 = 60_000;
/// In [`Board::parked`]: this core is awake.
const AWAKE: u16 = 0;
/// Set beside the APIC id of a core that is parked or about to.
const PARKED: u16 = 1 << 8;

type Job = dyn Fn(usize) + Sync;

/// What the cores share. Each field that is written by many has a cache line of its own.
struct Board {
    job: UnsafeCell<Option<*const Job>>,
    /// Raised once for each job.
    round: Line,
    /// Workers whose share of this round's job is finished.
    done: Line,
    arrived: AtomicUsize,
    busy: AtomicBool,
    areas: AtomicU64,
    /// APIC id of the boot CPU.
    boot_apic_id: AtomicU8,
    /// TSC ticks the boot CPU spins before it parks.
    patience: AtomicU64,
    /// For each worker [`AWAKE`], or [`PARKED`] with its APIC id.
    parked: [AtomicU16; MAX_CPUS],
}

#[repr(align(64))]
struct Line(AtomicUsize);

// SAFETY: `job` is written by the core that owns `busy` once every share of the round before is finished, and read by the
// others only between beginning their share of a round, which nobody else can then, and counting it in `done`.
unsafe impl Sync for Board {}

static BOARD: Board = Board {
    job: UnsafeCell::new(None),
    round: Line(AtomicUsize::new(0)),
    done: Line(AtomicUsize::new(0)),
    arrived: AtomicUsize::new(0),
    busy: AtomicBool::new(false),
    areas: AtomicU64::new(0),
    boot_apic_id: AtomicU8::new(0),
    patience: AtomicU64::new(WAIT_CYCLES),
    parked: [const { AtomicU16::new(AWAKE) }; MAX_CPUS],
};

/// For each worker the last round in which its share was begun: by itself, or by the boot CPU. Apart from the board because
/// it is all zeros, which an image need not hold.
static BEGUN: [Line; MAX_CPUS] = [const { Line(AtomicUsize::new(0)) }; MAX_CPUS];

/// Notes where the other cores' areas start.
pub fn set_areas(address: u64) {
    BOARD.areas.store(address, Ordering::Release);
}

/// Notes the boot CPU's APIC id, by which the other cores wake it.
pub fn set_boot_apic_id(id: u8) {
    BOARD.boot_apic_id.store(id, Ordering::Release);
}

/// Where the other cores' areas start, if any were started.
pub fn areas() -> Option<u64> {
    Some(BOARD.areas.load(Ordering::Acquire)).filter(|&a| a != 0)
}

/// Set in `arrived` once no further core may join.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Other cores that reached ring 3.
pub fn arrived() -> usize {
    BOARD.arrived.load(Ordering::Acquire) & !CLOSED
}

/// Fixes the number of cores: one that arrives later waits for ever.
pub fn close() {
    BOARD.arrived.fetch_or(CLOSED, Ordering::AcqRel);
}

/// Entry of ring 3 on every core but the first, with the core's APIC id.
#[unsafe(no_mangle)]
extern "sysv64" fn core_main(apic_id: u32) -> ! {
    // SAFETY: sets the floating-point state of this core to its defaults.
    unsafe { core::arch::asm!("fninit", "ldmxcsr [{}]", in(reg) &0x1f80u32, options(nostack)) };
    let mut seen = BOARD.round.0.load(Ordering::Acquire);
    // Workers are numbered in the order they arrive, so that the numbers have no gap.
    let join = |n: usize| (n & CLOSED == 0).then_some(n + 1);
    let Ok(before) = BOARD.arrived.fetch_update(Ordering::AcqRel, Ordering::Acquire, join) else {
        loop {
            gates::park();
        }
    };
    let index = before + 1;
    let parked = parked_state(apic_id as u8);
    let mut idle_since = clock::tsc();
    let mut spin_cycles = SPIN_CYCLES;
    let mut was_parked = false;
    loop {
        let round = BOARD.round.0.load(Ordering::Acquire);
        if round == seen {
            core::hint::spin_loop();
            if clock::tsc().wrapping_sub(idle_since) > spin_cycles {
                // Announced before the last look at the round; `run` raises the round before it looks here. So
                // either this core sees the round or `run` sees the announcement and wakes it.
                park_while(&BOARD.parked[index], parked, || BOARD.round.0.load(Ordering::SeqCst) == seen);
                was_parked = true;
            }
            continue;
        }
        seen = round;
        if !begin(index, round) {
            spin_cycles = SPIN_CYCLES_AFTER_WAKE;
            idle_since = clock::tsc();
            continue;
        }
        // SAFETY: the job was stored before the round was raised, and the boot CPU waits for this share before it stores
        // another one or returns, so it is alive and not written meanwhile.
        if let Some(job) = unsafe { *BOARD.job.get() } {
            // SAFETY: as above.
            unsafe { (*job)(index) };
        }
        BOARD.done.0.fetch_add(1, Ordering::SeqCst);
        let woke = wake_if_parked(&BOARD.parked[0]);
        spin_cycles = if woke || was_parked { SPIN_CYCLES_AFTER_WAKE } else { SPIN_CYCLES };
        was_parked = false;
        idle_since = clock::tsc();
    }
}

/// Whether the share of worker `index` in `round` falls to who asks: the first to do so.
fn begin(index: usize, round: usize) -> bool {
    let begun = &BEGUN[index].0;
    begun.compare_exchange(round - 1, round, Ordering::Acquire, Ordering::Relaxed).is_ok()
}

/// What [`Board::parked`] holds while the core with this APIC id is parked.
fn parked_state(apic_id: u8) -> u16 {
    PARKED | u16::from(apic_id)
}

/// Parks the calling core, announced in `place` as `state`, unless `idle` has become false. The announcement precedes the
/// look at `idle`; who ends the idleness does that first and looks at `place` after. So either this core sees the
/// change, or the other sees the announcement and wakes it.
fn park_while(place: &AtomicU16, state: u16, idle: impl Fn() -> bool) {
    place.store(state, Ordering::SeqCst);
    if idle() {
        gates::park();
    }
    place.store(AWAKE, Ordering::SeqCst);
}

/// Wakes the core whose state `place` is, if it is parked; returns whether it was.
fn wake_if_parked(place: &AtomicU16) -> bool {
    let state = place.load(Ordering::SeqCst);
    let parked =
        state & PARKED != 0 && place.compare_exchange(state, AWAKE, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    if parked {
        // Refused only where no core was started, and then nobody is parked.
        let _ = gates::wake(state as u8);
    }
    parked
}

/// The cores of this machine. Used from the boot CPU.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    count: usize,
    /// What [`Board::parked`] holds while the boot CPU is parked.
    parked: u16,
}

impl Cores {
    /// `count` cores, the calling one included.
    pub(crate) fn new(count: usize) -> Self {
        Self { count: count.clamp(1, 1 + arrived()), parked: parked_state(BOARD.boot_apic_id.load(Ordering::Acquire)) }
    }

    /// Waits until `others` shares are finished.
    fn wait_for(&self, others: usize) {
        let start = clock::tsc();
        let mut since = start;
        let mut patience = BOARD.patience.load(Ordering::Relaxed);
        while BOARD.done.0.load(Ordering::Acquire) != others {
            core::hint::spin_loop();
            let now = clock::tsc();
            if now.wrapping_sub(since) > patience {
                park_while(&BOARD.parked[0], self.parked, || BOARD.done.0.load(Ordering::SeqCst) != others);
                since = clock::tsc();
                patience = WAIT_CYCLES_AFTER_PARKING;
            }
        }
        let waited = clock::tsc().wrapping_sub(start);
        let next = if waited > WAIT_CYCLES { WAIT_CYCLES_AFTER_PARKING } else { WAIT_CYCLES };
        BOARD.patience.store(next, Ordering::Relaxed);
    }

    /// Calls `job(i)` on each core `i` itself, in parallel, and returns when every call has returned. Not from within a job.
    pub fn run_on_each(&self, job: &(dyn Fn(usize) + Sync)) {
        self.hand_out(job, false);
    }

    /// Hands out `job` and takes part in it; with `take_over`, also in place of cores that have not begun by then.
    fn hand_out(&self, job: &(dyn Fn(usize) + Sync), take_over: bool) {
        let others = arrived();
        // A job that starts a job, or a single core: every index here, one after the other.
        if self.count == 1 || BOARD.busy.swap(true, Ordering::Acquire) {
            (0..self.count).for_each(job);
            return;
        }
        let count = self.count;
        let bounded = move |index: usize| {
            if index < count {
                job(index);
            }
        };
        let job: &(dyn Fn(usize) + Sync) = &bounded;
        // SAFETY: the lifetime is forgotten only for the time of this call: it returns after every share is finished, and
        // who has not begun one by then does not look at the job.
        let job = unsafe { core::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Job>(job) };
        BOARD.done.0.store(0, Ordering::Relaxed);
        // SAFETY: `busy` is ours, and every share of the round before is finished.
        unsafe { *BOARD.job.get() = Some(job) };
        let round = BOARD.round.0.fetch_add(1, Ordering::SeqCst) + 1;
        for place in BOARD.parked.get(1..=others).unwrap_or(&[]) {
            wake_if_parked(place);
        }
        job(0);
        for index in 1..=others {
            if take_over && begin(index, round) {
                job(index);
                BOARD.done.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.wait_for(others);
        BOARD.busy.store(false, Ordering::Release);
    }
}

impl Workers for Cores {
    fn count(&self) -> usize {
        self.count
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        self.hand_out(job, true);
    }
}
