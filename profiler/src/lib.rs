//! Per-key cycle statistics, roofline fraction, hot list and the convergence decision.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
