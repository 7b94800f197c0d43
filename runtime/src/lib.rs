//! The boot-to-report loop, generic over a Platform.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
