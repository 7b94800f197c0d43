//! Per-key cycle statistics, roofline fraction, hot list and the convergence decision.
//!
//! Data path: `engine` calls a kernel and hands its `rdtsc` difference to [`Profile::record`] -> [`Profile::hot_list`] tells
//! `runtime` what to tune.
//!
//! Architecture invariant: nothing here reads a clock; every decision is a function of numbers passed in, so it can be
//! replayed from a recorded trace.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod profile;
mod stats;

pub use profile::{HotKey, Profile};
pub use stats::{KeyStats, SUB_BUCKETS};
