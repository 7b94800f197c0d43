//! Packed weights, forward pass, KV cache, sampling, reference and SIMD ops, kernel dispatch.
#![no_std]

extern crate alloc;
