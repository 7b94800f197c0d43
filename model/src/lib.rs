//! What a model file says: architecture, tensors, tokenizer, and the vocabulary of the kernels that run it.
//!
//! Data path: bytes of a GGUF or llama2.c file -> header and tensor directory -> `engine` (which packs the weights).
//!
//! Architecture invariant: no I/O, no unsafe, no floating-point execution; parsers never panic on any input.
//! Architecture invariant: [`layout`] and [`numerics`] are the only places where packed bytes and the order of
//! operations are defined; `engine` and `jit` implement them and are tested against each other.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod kernel;
pub mod layout;
pub mod numerics;
