//! Snapshot schema, framing, hashes and the two-slot commit.
//!
//! Data path: at boot [`open`] picks the newest whole snapshot of this model from two slot files -> `runtime` restores kernels
//! and profiles from it -> at the end of the boot [`save`] writes the other slot. [`DiskMedium`] puts both on a FAT16 volume.
//!
//! Architecture invariant: [`save`] never touches the slot [`open`] would pick, so a power cut at any sector write leaves
//! the previous snapshot or the new one, whole.
//! Architecture invariant: no bytes in a slot can make this crate panic or read more than [`MAX_PAYLOAD_BYTES`]; what they
//! decode to is a small multiple of that (a list never reserves more than its bytes can hold). What is not used is refused with a [`SlotReason`].
//! Architecture invariant: machine code leaves this crate only when build, machine and model are those of the running image.
//! It is not trusted even then: `runtime` verifies its results before use.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod commit;
mod disk;
pub mod frozen;
pub mod header;
mod reason;
mod schema;

pub use commit::{Medium, Opened, Saved, Slot, newest_model_file, open, open_any, save};
pub use disk::DiskMedium;
pub use header::{FORMAT_VERSION, HEADER_BYTES, Identity, MAX_PAYLOAD_BYTES};
pub use reason::{CodeUse, ColdStart, ForeignCode, SaveError, ShortHash, SlotReason};
pub use schema::{BootLine, KeyRecord, MAX_BOOT_LINES, ModelFile, Snapshot, StoredKernel, Trial, TrialOutcome};
