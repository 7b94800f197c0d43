//! BareFlow on a bare x86-64 machine.
#![no_std]

extern crate alloc;
