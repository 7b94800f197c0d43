//! Per-key cycle statistics, roofline fraction, hot list and the convergence decision.
//!
//! Data path: `engine` calls a kernel and hands its `rdtsc` difference to [`Profile::record`] -> [`Profile::hot_list`] tells
//! `runtime` what to tune -> [`trial`] decides each candidate from paired samples -> [`Settled`] says when a key is done, against
//! the [`Roofline`] -> [`convergence`] says when the whole run is.
//!
//! Architecture invariant: nothing here reads a clock; every decision is a function of numbers passed in, so it can be
//! replayed from a recorded trace.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod convergence;
mod parts;
mod profile;
mod roofline;
mod stats;
pub mod trial;

pub use convergence::{BootEvidence, Convergence, ConvergenceConfig};
pub use parts::{Part, PartTimes};
pub use profile::{HotKey, Profile};
pub use roofline::{Roofline, Settled};
pub use stats::KeyStats;
pub use trial::{Trial, TrialConfig, Verdict};
