//! Snapshot schema, framing, hashes and the two-slot commit.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
