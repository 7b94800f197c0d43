//! Fuzz targets: functions that take any bytes and must return. Panics, hangs and unbounded memory are the failures.
//!
//! One for each parser, given damaged copies of good inputs; and two that make code of the bytes and run it: [`widen`] and
//! [`kernels`].
//!
//! `cargo test` runs each for a second on deterministic mutations of its seeds, so that a target cannot rot unnoticed, and
//! demands that some inputs were accepted. `cargo xtask fuzz --cases 1000000` runs them for long, and writes the first input
//! that panics or hangs to a file. No coverage guides them yet.
#![deny(unsafe_code)]

// What runs compiled code in jit's own tests.
#[allow(unsafe_code)]
#[path = "../../jit/tests/common/mod.rs"]
mod common;
mod decisions;
pub mod kernels;
mod mutate;
mod snapshot;
mod targets;
#[allow(unsafe_code)]
pub mod widen;

pub use decisions::seeds;
pub use mutate::Mutator;
pub use targets::{Outcome, TARGETS, Target};
