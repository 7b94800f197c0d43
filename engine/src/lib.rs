//! Packed weights, forward pass, KV cache, sampling, reference and SIMD ops, kernel dispatch.
//!
//! Data path: model file bytes -> [`pack`] (panels in one arena) -> forward pass: every matmul goes through the
//! kernel table, which runs a compiled [`dispatch::Kernel`], a hand-written op of `simd`, or the portable
//! `reference`; rmsnorm, rope, attention and sampling are this crate's own -> logits -> token.
//!
//! Architecture invariant: unsafe code lives in [`dispatch`] and `simd` only.
//! Architecture invariant: every way to compute an op gives bit-identical results (`model::numerics`), so which one
//! runs, and on how many workers, can change the time of a token but never the token.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod attention;
#[allow(unsafe_code)]
pub mod dispatch;
mod error;
pub mod forward;
pub mod isa;
mod loader;
mod math;
pub mod operands;
pub mod ops;
pub mod pack;
mod pieces;
mod random;
mod reference;
mod replay;
pub mod sampler;
#[allow(unsafe_code)]
pub mod simd;
mod table;
pub mod verify;
mod weights;
pub mod workers;

pub use error::EngineError;
pub use forward::{Engine, Session, SessionMemory};
pub use loader::{LoadedModel, Loader};
pub use pieces::ReadAt;
pub use random::SplitMix64;
pub use sampler::{Sampler, Sampling};
pub use simd::cycles;
pub use table::{KernelTable, Runs, Tier};
pub use weights::Plan;
