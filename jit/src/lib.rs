//! Kernel key and variant in, verified machine code out.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
