//! The bare machine, piece by piece; [`crate::Machine`] puts the pieces together.
//!
//! Everything here runs in ring 3 after the seal, except what `boot::early` calls before it (serial, clock, PCI).

pub mod clock;
pub mod code;
pub mod cores;
pub mod cpu;
pub mod embedded;
mod lang;
pub mod memory;
pub mod pci;
mod port;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod stack;
pub mod traps;
pub mod virtio;
