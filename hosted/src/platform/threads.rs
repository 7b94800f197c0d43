//! A fixed team of threads that run one job at a time, handed over by spinning.
//!
//! A decode step hands out a few hundred jobs of tens of microseconds each, so waking through the kernel would cost
//! more than the work: a waiting thread spins with `pause`. But only for so long. One that waits longer waits for a thread
//! that is not running, and on a machine with more threads than cores a spinning thread takes the very core that the
//! other one needs: then it sleeps, so that the kernel has an idle core to run the other on. Where that happens again and
//! again the spinning gets shorter, and longer again where it helped.

use engine::cycles;
use engine::workers::Workers;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

/// Ticks that a thread spins at most before it sleeps: about 100 us, longer than a core's serial part between two jobs.
const LONGEST_SPIN: u64 = 250_000;
/// Ticks that it spins at least: a few microseconds, as long as a call into the kernel.
const SHORTEST_SPIN: u64 = 10_000;
/// Longest sleep: a lost wake-up must not happen, but would cost no more than this.
const LONGEST_SLEEP: Duration = Duration::from_millis(200);

type Job = &'static (dyn Fn(usize) + Sync);

struct Shared {
    /// Written by `run` while no worker reads it, read by workers after they see a new epoch.
    job: UnsafeCell<Option<Job>>,
    /// Counts jobs; a change is the start signal.
    epoch: AtomicU64,
    /// Workers that have not finished the current job.
    running: AtomicUsize,
    stop: AtomicBool,
    /// Worker `i` at `i`; place 0 is that of whoever called `run`.
    places: Vec<Place>,
}

/// Where one thread waits, on a cache line of its own.
#[repr(align(64))]
#[derive(Default)]
struct Place {
    /// The thread, once it has slept.
    thread: Mutex<Option<Thread>>,
    /// It sleeps, or is about to.
    asleep: AtomicBool,
    /// Ticks it spins before it sleeps; 0 stands for `LONGEST_SPIN`.
    patience: AtomicU64,
}

impl Place {
    /// Waits until `ready` gives something.
    fn wait_for<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        let patience = match self.patience.load(Ordering::Relaxed) {
            0 => LONGEST_SPIN,
            ticks => ticks,
        };
        let start = cycles();
        loop {
            if let Some(value) = ready() {
                let longer = (patience + patience / 8).min(LONGEST_SPIN);
                self.patience.store(longer, Ordering::Relaxed);
                return value;
            }
            if cycles().wrapping_sub(start) > patience {
                break;
            }
            std::hint::spin_loop();
        }
        self.patience.store((patience / 2).max(SHORTEST_SPIN), Ordering::Relaxed);
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        loop {
            self.asleep.store(true, Ordering::Relaxed);
            // Pairs with the fence in `wake`: either the waker sees `asleep`, or we see what it changed before.
            fence(Ordering::SeqCst);
            if let Some(value) = ready() {
                self.asleep.store(false, Ordering::Relaxed);
                return value;
            }
            std::thread::park_timeout(LONGEST_SLEEP);
        }
    }

    /// Wakes the thread if it sleeps, after what it waits for was changed.
    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed)
            && self.asleep.swap(false, Ordering::Relaxed)
            && let Some(thread) = &*self.thread.lock().unwrap_or_else(PoisonError::into_inner)
        {
            thread.unpark();
        }
    }
}

// SAFETY: `job` is written only by `run`, which holds the team's lock, before it publishes a new `epoch` (release) and
// after `running` has come back to 0 (acquire); workers read it only between seeing that epoch and decrementing `running`.
unsafe impl Sync for Shared {}

/// The team. Worker 0 is the thread that calls [`Workers::run`].
pub struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    running_job: Mutex<()>,
}

impl Threads {
    /// Starts `count - 1` threads.
    ///
    /// # Errors
    /// The operating system's, when it gives no thread.
    pub fn start(count: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            epoch: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            places: (0..count.max(1)).map(|_| Place::default()).collect(),
        });
        let mut team = Self { shared, handles: Vec::new(), running_job: Mutex::new(()) };
        for index in 1..count.max(1) {
            let shared = Arc::clone(&team.shared);
            let name = format!("bareflow-{index}");
            team.handles.push(std::thread::Builder::new().name(name).spawn(move || work(&shared, index))?);
        }
        Ok(team)
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let epoch = shared.places[index].wait_for(|| {
            let epoch = shared.epoch.load(Ordering::Acquire);
            (epoch != seen || shared.stop.load(Ordering::Relaxed)).then_some(epoch)
        });
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        seen = epoch;
        // SAFETY: see `Shared`: a new epoch was seen and `running` still counts this worker.
        let job = unsafe { *shared.job.get() };
        job.expect("set before the epoch")(index);
        if shared.running.fetch_sub(1, Ordering::Release) == 1 {
            shared.places[0].wake();
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
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.shared.places[1..].iter().for_each(Place::wake);
        job(0);
        self.shared.places[0].wait_for(|| (self.shared.running.load(Ordering::Acquire) == 0).then_some(()));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.shared.places[1..].iter().for_each(Place::wake);
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_every_job_once() {
        for count in [1, 2, 5] {
            let team = Threads::start(count).unwrap();
            assert_eq!(team.count(), count);
            let calls: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..500 {
                team.run(&|index| {
                    calls[index].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 500));
        }
    }

    #[test]
    fn sleepers_are_woken() {
        let team = Threads::start(3).unwrap();
        let calls = AtomicUsize::new(0);
        let start = std::time::Instant::now();
        const JOBS: usize = 40;
        for round in 0..JOBS {
            // Long enough for the others to fall asleep before the job, and for the caller during it.
            std::thread::sleep(Duration::from_micros(300));
            team.run(&|index| {
                if index == round % 3 {
                    std::thread::sleep(Duration::from_micros(300));
                }
                calls.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(calls.load(Ordering::Relaxed), 3 * JOBS);
        // A wake-up that is lost costs `LONGEST_SLEEP`.
        assert!(start.elapsed() < LONGEST_SLEEP * JOBS as u32 / 2, "{:?}", start.elapsed());
    }

    /// `cargo test --release -p hosted barrier -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn barrier_cost() {
        for count in [2, 4] {
            let team = Threads::start(count).unwrap();
            let mut ticks: Vec<u64> = (0..20_000)
                .map(|_| {
                    let start = cycles();
                    team.run(&|_| {});
                    cycles() - start
                })
                .collect();
            ticks.sort_unstable();
            let at = |share: f64| ticks[(ticks.len() as f64 * share) as usize];
            let mean = ticks.iter().sum::<u64>() / ticks.len() as u64;
            println!(
                "{count} threads: ticks of an empty job: 10 % {}, median {}, 90 % {}, mean {mean}",
                at(0.1),
                at(0.5),
                at(0.9)
            );
        }
    }
}
