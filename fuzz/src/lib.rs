//! Fuzz targets: functions that take any bytes and must return. Panics, hangs and unbounded memory are the failures.
//!
//! `cargo test` runs each for a second on deterministic mutations of good inputs, so that a target cannot rot unnoticed.
//! `cargo xtask fuzz --cases 1000000` runs them for long, and writes the first input that panics or hangs to a file. No coverage guides them yet.
#![forbid(unsafe_code)]

mod mutate;
mod targets;

pub use mutate::Mutator;
pub use targets::{TARGETS, Target};
