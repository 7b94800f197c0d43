//! The cores to compute on, as the engine sees them.
//!
//! `kernel` implements [`Workers`] with its started cores, `hosted` with threads, and [`Single`] is the calling core
//! alone. How an output matrix is shared between workers without locks is `dispatch`'s part
//! ([`crate::dispatch::SharedColumns`]).

use alloc::vec::Vec;
use spin::Mutex;

/// A fixed set of cores that run one job together.
pub trait Workers: Sync {
    /// Number of workers, at least 1. The caller of [`Workers::run`] is worker 0.
    fn count(&self) -> usize;

    /// Calls `job(i)` once for each `i < count()`, in parallel, and returns when every call has returned. Each call is a
    /// worker's own, but where one is late the caller may make its call, so no call may wait for another.
    fn run(&self, job: &(dyn Fn(usize) + Sync));
}

/// Runs `job` once for each part; with fewer workers than parts, each takes several.
pub(crate) fn for_parts(workers: &dyn Workers, parts: usize, job: &(dyn Fn(usize) + Sync)) {
    let stride = workers.count();
    workers.run(&|worker| (worker..parts).step_by(stride).for_each(job));
}

/// Calls `work` on every one of `items`, which the workers share out evenly and in order.
pub fn for_each<T: Send>(workers: &dyn Workers, items: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let count = workers.count();
    workers.run(&|worker| {
        for item in items.iter().skip(worker).step_by(count) {
            if let Some(item) = item.lock().take() {
                work(item);
            }
        }
    });
}

/// The calling core alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Workers for Single {
    fn count(&self) -> usize {
        1
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        job(0);
    }
}
