//! What the host does with a guest: start it under QEMU, listen, judge, boot it again, and write down what changed.
//!
//! Data path: [`Machine`] -> [`Session`] (COM1 text, COM2 [`report::wire`] frames) -> [`Transcript`] -> [`Boot`] or
//! [`BootError`]; [`accel::probe`] decides between KVM and TCG by a boot of our own kernel; [`runs::converge`] repeats boots of
//! one image until the guest says it has converged and fills a [`RunReport`]: JSON, [`text::summary`], [`html::page`].
//!
//! What this crate does not do: build images (`bootimage`), build kernels (`xtask`), or interpret COM1 text.
//!
//! Architecture invariant: a boot passed only if QEMU exited with 33 *and* the guest's `End` message said pass *and* no message
//! before it was lost.
//! Architecture invariant: every number in a report comes from the guest's own messages; nothing is filled in.

#![forbid(unsafe_code)]

pub mod accel;
pub mod display;
mod elf;
pub mod html;
mod machine;
mod plot;
mod run_report;
pub mod runs;
mod session;
pub mod text;
mod transcript;

pub use elf::{ImageBytes, image_bytes};
pub use machine::{Accel, BootFrom, Drive, Firmware, Machine, MachineError, Qemu};
pub use run_report::{BootRecord, Environment, LoadRecord, NativeRecord, RunReport, SCHEMA, Settled, Spread};
pub use session::{Boot, BootError, Deadlines, Event, Session};
pub use transcript::{BootFailure, ProcessExit, Transcript};
