//! The boot-to-report loop, generic over a [`platform::Platform`]: the only place where all parts meet.
//!
//! Data path: [`boot::run`] -> [`options`] -> [`load`] (model into the weights arena) -> [`kernels`] (restore and verify
//! machine code) -> [`generate`] -> `tune` (compile and try variants) -> snapshot -> report. What differs between an
//! image that learns and one that does not is `learning` and `frozen`.
//!
//! What it does not do: touch hardware, run unchecked machine code, or parse anything by itself.
//!
//! Architecture invariant: without the feature `jit` no compiler is linked: that is the native image.
//! Architecture invariant: where a public key is configured, no byte of a model is parsed before its signature held.
//! Architecture invariant: every compiled kernel gives the reference's answers in this boot before it serves.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod boot;
pub mod error;
#[cfg(not(feature = "jit"))]
mod frozen;
pub mod generate;
mod hash;
pub mod identity;
pub mod kernels;
#[cfg(feature = "jit")]
mod learning;
pub mod load;
pub mod options;
pub mod platform;
pub mod prompt;
pub mod reporter;
pub mod rows;
mod signature;
mod summary;
#[cfg(feature = "jit")]
pub mod tune;

pub use boot::{Outcome, run};
pub use error::RunError;
pub use identity::BUILD_ID;
pub use options::Options;
