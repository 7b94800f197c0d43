//! What the guest says and the host reads: typed messages, exit codes and the boot report.
//!
//! Data path: `runtime` builds [`Message`]s -> [`wire::encode`] -> second serial port -> [`wire::Decoder`] -> `qemu-runs`.
//! The first serial port carries the same report as text for people ([`screen`]); nothing parses it.
//!
//! Architecture invariant: this is the only definition of the wire; both sides build against it, and the
//! [`Message::Hello`] protocol number changes with it.
//! Architecture invariant: unknown values are `None` (text `-`), never zero.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod message;
pub mod screen;
pub mod wire;

pub use message::*;
