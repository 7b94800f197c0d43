//! What a model file says: architecture, tensors, tokenizer, and the vocabulary of the kernels that run it.
//!
//! Data path: bytes of a GGUF or llama2.c file -> header and tensor directory -> `engine` (which packs the weights).
//!
//! [`formats::sniff`] names the format, [`gguf::read`] or [`llama2c::read`] turns the first bytes of the file into one
//! [`description::ModelDescription`]; [`quant`] defines what stored weights mean; [`convert`] and [`synthetic`] write files.
//!
//! Architecture invariant: no I/O and no unsafe; parsers never panic on any input and allocate no more than a small
//! multiple of the bytes they were given.
//! Architecture invariant: every format ends in the same [`description::ModelDescription`]; nothing above knows formats.
//! Architecture invariant: [`layout`] and [`numerics`] are the only places where packed bytes and the order of
//! operations are defined; `engine` and `jit` implement them and are tested against each other.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod architecture;
pub mod chat;
pub mod config;
pub mod convert;
mod cursor;
pub mod description;
mod error;
pub mod formats;
pub mod gguf;
pub mod isa;
pub mod kernel;
pub mod layout;
pub mod llama2c;
// The constants are written as their sources print them; each is the nearest f32.
#[allow(clippy::excessive_precision)]
pub mod numerics;
pub mod order;
pub mod quant;
mod scientific;
pub mod synthetic;
pub mod tokenizer;

pub use architecture::Architecture;
pub use config::Config;
pub use description::{Format, ModelDescription, Role, Tensor};
pub use error::ModelError;
pub use isa::Isa;
pub use quant::TensorType;
pub use tokenizer::Tokenizer;
