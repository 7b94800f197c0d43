//! A fixed team of threads that run one job at a time, handed over by spinning.
//!
//! A decode step hands out a few hundred jobs of tens of microseconds each, so waking through the kernel would cost
//! more than the work. Waiting threads spin with `pause`, give up their time slice when the wait is long (which keeps
//! an oversubscribed machine moving), and sleep when it is very long.

use engine::workers::Workers;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Spins before a waiting thread yields its time slice: some tens of microseconds.
const SPINS_BEFORE_YIELD: u32 = 10_000;
/// Yields before an idle worker sleeps between looks.
const YIELDS_BEFORE_SLEEP: u32 = 50_000;

type Job = &'static (dyn Fn(usize) + Sync);

struct Shared {
    /// Written by `run` while no worker reads it, read by workers after they see a new epoch.
    job: UnsafeCell<Option<Job>>,
    /// Counts jobs; a change is the start signal.
    epoch: AtomicU64,
    /// Workers that have not finished the current job.
    running: AtomicUsize,
    stop: AtomicBool,
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
        let epoch = wait_for(|| {
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
        shared.running.fetch_sub(1, Ordering::Release);
    }
}

fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let mut yields = 0;
    loop {
        for _ in 0..SPINS_BEFORE_YIELD {
            if let Some(value) = ready() {
                return value;
            }
            std::hint::spin_loop();
        }
        if yields < YIELDS_BEFORE_SLEEP {
            yields += 1;
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(200));
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
        job(0);
        wait_for(|| (self.shared.running.load(Ordering::Acquire) == 0).then_some(()));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Release);
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
}
