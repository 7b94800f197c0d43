//! The cores to compute on, as the engine sees them.
//!
//! `kernel` implements [`Workers`] with its started cores, `hosted` with threads, and [`Single`] is the calling core
//! alone. How an output matrix is shared between workers without locks is `dispatch`'s part
//! ([`crate::dispatch::SharedColumns`]).

/// A fixed set of cores that run one job together.
pub trait Workers: Sync {
    /// Number of workers, at least 1. The caller of [`Workers::run`] is worker 0.
    fn count(&self) -> usize;

    /// Calls `job(i)` once on each worker `i < count()`, in parallel, and returns when every call has returned.
    fn run(&self, job: &(dyn Fn(usize) + Sync));
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
