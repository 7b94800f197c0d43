//! A fixed team of threads that run one job at a time, handed over by spinning.
//!
//! A decode step hands out a few hundred jobs of tens of microseconds each, so waking through the kernel would cost
//! more than the work. Waiting threads spin with `pause`, and sleep when the wait is long. They do not yield: a thread that
//! does gives a whole time slice to whatever else wants its CPU, so each wait of the others grows to one, and it never
//! leaves the CPU to a thread of the team that waits for another one. A sleeping thread does, and is put before others when
//! it is woken. A share that its worker has not even begun when the caller is done with its own is done by the caller.
//!
//! Decision 0013 has what each of these is worth. A team that has a thread for each CPU binds them: two of them would share
//! one at times.

use engine::workers::Workers;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

/// TSC ticks without a job before a worker sleeps: most of a millisecond, longer than any gap inside a forward pass.
const IDLE_CYCLES: u64 = 2_000_000;
/// TSC ticks the caller waits for a worker in the middle of its share before it sleeps: about what being woken costs.
const WAIT_CYCLES: u64 = 200_000;

type Job = &'static (dyn Fn(usize) + Sync);

struct Shared {
    /// Written by `run` while no worker reads it, read by workers after they see a new epoch.
    job: UnsafeCell<Option<Job>>,
    /// Counts jobs; a change is the start signal.
    epoch: AtomicU64,
    /// For each worker the last epoch in which its share was begun: by itself, or by the caller.
    begun: Vec<Begun>,
    /// Workers that have not finished the current job.
    running: AtomicUsize,
    stop: AtomicBool,
    /// Threads asleep, or about to be, in `asleep`.
    sleepers: AtomicUsize,
    /// Held while a sleeper looks for the last time, so that no signal falls between that and its sleep.
    sleep: Mutex<()>,
    asleep: Condvar,
}

/// On a cache line of its own.
#[repr(align(64))]
struct Begun(AtomicU64);

// SAFETY: `job` is written only by `run`, which holds the team's lock, before it publishes a new `epoch` (release) and
// after `running` has come back to 0 (acquire); workers read it only between beginning their share of that epoch, which
// nobody else can then, and decrementing `running`.
unsafe impl Sync for Shared {}

impl Shared {
    /// Whether the share of `index` in `epoch` falls to the caller of this: the first to ask.
    fn begin(&self, index: usize, epoch: u64) -> bool {
        let begun = &self.begun[index].0;
        begun.compare_exchange(epoch - 1, epoch, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Waits, the first `spin_cycles` awake, until `ready` gives something. That must come from a change which
    /// [`Shared::signal`] follows.
    fn wait_for<T>(&self, spin_cycles: u64, mut ready: impl FnMut() -> Option<T>) -> T {
        let start = engine::cycles();
        while engine::cycles().wrapping_sub(start) < spin_cycles {
            if let Some(value) = ready() {
                return value;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        let value = loop {
            // Pairs with that of `signal`: either this look sees the change, or the signaller sees a sleeper.
            fence(Ordering::SeqCst);
            if let Some(value) = ready() {
                break value;
            }
            guard = self.asleep.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        value
    }

    /// Wakes whoever sleeps; to be called after the change they wait for.
    fn signal(&self) {
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.asleep.notify_all();
        }
    }
}

/// The team. Worker 0 is the thread that calls [`Workers::run`].
pub struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    running_job: Mutex<()>,
    /// What the caller's thread was allowed before it was bound; none where it was not.
    cpus: Vec<usize>,
}

impl Threads {
    /// Starts `count - 1` threads.
    ///
    /// # Errors
    /// The operating system's, when it gives no thread.
    pub fn start(count: usize) -> std::io::Result<Self> {
        let cpus = allowed_cpus();
        // With a thread for each CPU there is nothing to choose; the scheduler would still put two of them on one at times.
        let is_bound = cpus.len() == count;
        BESIDE_CALLER.get_or_init(|| if count > 1 && is_bound { cpus[1..].to_vec() } else { cpus.clone() });
        Self::with_cpus(count, if is_bound { cpus } else { Vec::new() })
    }

    /// Starts `count - 1` threads that the system may put on any CPU, to help at times.
    ///
    /// # Errors
    /// As [`Threads::start`].
    pub fn unbound(count: usize) -> std::io::Result<Self> {
        Self::with_cpus(count, Vec::new())
    }

    /// A team with a CPU for each of its threads, or with none that is a thread's own.
    fn with_cpus(count: usize, cpus: Vec<usize>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            epoch: AtomicU64::new(0),
            begun: (0..count.max(1)).map(|_| Begun(AtomicU64::new(0))).collect(),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            asleep: Condvar::new(),
        });
        let own = |index: usize| cpus.get(index).map_or(Vec::new(), |&cpu| vec![cpu]);
        if !bind_to(&own(0)) {
            print_note!("warning: threads may share a CPU: the system does not let them be bound to one each");
        }
        let mut team = Self { shared, handles: Vec::new(), running_job: Mutex::new(()), cpus: cpus.clone() };
        for index in 1..count.max(1) {
            let shared = Arc::clone(&team.shared);
            let name = format!("bareflow-{index}");
            let cpu = own(index);
            let body = move || {
                bind_to(&cpu);
                work(&shared, index);
            };
            team.handles.push(std::thread::Builder::new().name(name).spawn(body)?);
        }
        Ok(team)
    }
}

/// The CPUs the calling thread may use; empty where the system does not say.
fn allowed_cpus() -> Vec<usize> {
    // SAFETY: all zero is an empty set, which the call fills; it is given the set's size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) != 0 {
            return Vec::new();
        }
        (0..8 * size_of::<libc::cpu_set_t>()).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect()
    }
}

/// Keeps the calling thread on `cpus`; without any, or where the system refuses, it runs where it may already. False where
/// the system refuses.
fn bind_to(cpus: &[usize]) -> bool {
    if cpus.is_empty() {
        return true;
    }
    // SAFETY: as above; each is below the set's size, it was found in one.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cpus.iter().for_each(|&cpu| libc::CPU_SET(cpu, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) == 0
    }
}

/// Lets the calling thread, started by the caller of a team, run on the CPUs the process had and that caller is not bound
/// to: it is to work beside it, not in turn with it.
pub fn work_beside_caller() {
    bind_to(BESIDE_CALLER.get().map_or(&[], Vec::as_slice));
}

/// CPUs of the first team's caller, without the one it was bound to if there are others.
static BESIDE_CALLER: OnceLock<Vec<usize>> = OnceLock::new();

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let epoch = shared.wait_for(IDLE_CYCLES, || {
            let epoch = shared.epoch.load(Ordering::Acquire);
            (epoch != seen || shared.stop.load(Ordering::Relaxed)).then_some(epoch)
        });
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        seen = epoch;
        if !shared.begin(index, epoch) {
            continue;
        }
        // SAFETY: see `Shared`: this share was begun here, so `running` still counts it.
        let job = unsafe { *shared.job.get() };
        job.expect("set before the epoch")(index);
        if shared.running.fetch_sub(1, Ordering::Release) == 1 {
            shared.signal();
        }
    }
}

impl Workers for Threads {
    fn count(&self) -> usize {
        self.handles.len() + 1
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        if self.handles.is_empty() {
            return job(0);
        }
        let _one_at_a_time = self.running_job.lock().expect("a job panicked and the process is ending");
        // SAFETY: the lifetime is extended only up to the end of this function: it returns after `running` is 0, and
        // no worker touches the job after its decrement.
        let job_static = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job) };
        // SAFETY: `running` is 0 (the last job ended before the lock was released), so no worker reads the cell.
        unsafe { *self.shared.job.get() = Some(job_static) };
        self.shared.running.store(self.handles.len(), Ordering::Relaxed);
        let epoch = self.shared.epoch.fetch_add(1, Ordering::Release) + 1;
        self.shared.signal();
        job(0);
        // Whoever has not begun by now is off its CPU: waiting for it would take longer than doing its share.
        for index in 1..self.count() {
            if self.shared.begin(index, epoch) {
                job(index);
                self.shared.running.fetch_sub(1, Ordering::Release);
            }
        }
        self.shared.wait_for(WAIT_CYCLES, || (self.shared.running.load(Ordering::Acquire) == 0).then_some(()));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Another team may be started from this thread.
        bind_to(&self.cpus);
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.shared.signal();
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_share_is_done_once() {
        for count in [1, 2, 5] {
            let team = Threads::start(count).unwrap();
            assert_eq!(team.count(), count);
            let calls: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..500 {
                team.run(&|index| {
                    // The caller is done at once, or last.
                    if (index == 0) == (round % 2 == 0) {
                        std::thread::sleep(Duration::from_micros(20));
                    }
                    calls[index].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 500));
        }
    }

    #[test]
    fn the_callers_thread_gets_its_cpus_back() {
        let before = allowed_cpus();
        for count in [1, before.len(), before.len() + 1] {
            drop(Threads::start(count).unwrap());
            assert_eq!(allowed_cpus(), before, "after a team of {count}");
        }
        let team = Threads::start(before.len()).unwrap();
        let beside = std::thread::spawn(|| {
            work_beside_caller();
            allowed_cpus()
        });
        let beside = beside.join().unwrap();
        assert!(!beside.is_empty() && beside.iter().all(|cpu| before.contains(cpu)), "{beside:?} of {before:?}");
        drop(team);
    }

    #[test]
    fn a_sleeping_worker_is_waited_for_and_woken() {
        let team = Threads::start(2).unwrap();
        for round in 0..50 {
            // Until the worker sleeps, or is about to.
            std::thread::sleep(Duration::from_micros(round * 40));
            let both = std::sync::Barrier::new(2);
            let begun = AtomicUsize::new(0);
            team.run(&|index| {
                // Its own share begins on the worker as long as the caller is busy with the first.
                if index == 1 {
                    begun.fetch_add(1, Ordering::Relaxed);
                }
                both.wait();
                // The caller is done long before the worker, and sleeps.
                std::thread::sleep(Duration::from_micros(index as u64 * 500));
            });
            assert_eq!(begun.into_inner(), 1);
        }
    }
}
