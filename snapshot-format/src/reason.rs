//! Why a slot was not used, why code was dropped, why a save did not happen. Each text says what was expected, what was
//! found and what happens now.

use crate::commit::Slot;
use crate::header::FORMAT_VERSION;
use alloc::boxed::Box;
use core::fmt;
use model::kernel::KernelKey;
use storage::StorageError;

/// The first bytes of a hash, for people.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ShortHash<'a>(pub &'a [u8; 32]);

impl fmt::Display for ShortHash<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ShortHash<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why one slot holds no snapshot that can be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SlotReason {
    /// The volume has no such file.
    #[error(
        "the slot file is not on the volume; snapshots are off until the image is built again with slots (`bootimage`)"
    )]
    NoFile,
    /// The file is too short for a header and a payload.
    #[error(
        "the slot file has {len_bytes} bytes, expected at least 1024; build the image again with larger slots (`bootimage`)"
    )]
    TooSmall {
        /// Length of the file.
        len_bytes: u64,
    },
    /// The device or the file system failed.
    #[error("the slot cannot be read ({0}); it is not used")]
    Unreadable(StorageError),
    /// All zeros: never written.
    #[error("the slot is empty, as on a new image; a save will fill it")]
    Empty,
    /// Something else is in the file.
    #[error("expected the magic \"SNAP\", found bytes {:02x} {:02x} {:02x} {:02x}: not a snapshot; the slot is not used and a save will replace it", found[0], found[1], found[2], found[3])]
    BadMagic {
        /// What is there.
        found: [u8; 4],
    },
    /// The header does not match its own hash.
    #[error(
        "expected header hash {}, found {}: a torn write or a flipped bit; the slot is not used and a save will replace it",
        ShortHash(expected),
        ShortHash(found)
    )]
    HeaderDamaged {
        /// Hash in the header.
        expected: [u8; 32],
        /// Hash of the header.
        found: [u8; 32],
    },
    /// The header is whole but a field cannot be right.
    #[error(
        "the header is whole but its {field} is {found:#x}, which no build writes; the slot is not used and a save will replace it"
    )]
    BadField {
        /// Field name.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// Another format version.
    #[error("expected format {supported}, found {found}: written by {} build (generation {generation}); the slot is not used and a save will replace it", if found > supported { "a newer" } else { "an older" })]
    OtherFormat {
        /// Version in the header.
        found: u32,
        /// Version this build reads.
        supported: u32,
        /// Generation in the header.
        generation: u64,
    },
    /// A save was cut short.
    #[error(
        "the save of generation {generation} was cut short before its {payload_bytes} bytes were durable; the slot is not used and a save will replace it"
    )]
    Torn {
        /// Generation that was being written.
        generation: u64,
        /// Bytes it would have had.
        payload_bytes: u64,
    },
    /// The payload would not fit the slot.
    #[error(
        "the header claims {payload_bytes} bytes, expected at most {limit_bytes}; the slot is not used and a save will replace it"
    )]
    PayloadTooLong {
        /// Length in the header.
        payload_bytes: u64,
        /// Most the slot holds, or [`MAX_PAYLOAD_BYTES`](crate::MAX_PAYLOAD_BYTES).
        limit_bytes: u64,
    },
    /// The payload does not match the header's hash.
    #[error(
        "generation {generation}: expected payload hash {}, found {}: changed after it was written; the slot is not used and a save will replace it",
        ShortHash(expected),
        ShortHash(found)
    )]
    PayloadDamaged {
        /// Generation in the header.
        generation: u64,
        /// Hash in the header.
        expected: [u8; 32],
        /// Hash of the payload.
        found: [u8; 32],
    },
    /// The payload is whole but is not a snapshot of this format.
    #[error(
        "generation {generation}: {payload_bytes} whole bytes are not a snapshot of format {FORMAT_VERSION}: our bug, please report it; the slot is not used and a save will replace it"
    )]
    Schema {
        /// Generation in the header.
        generation: u64,
        /// Length of the payload.
        payload_bytes: u64,
    },
    /// A kernel's code does not match its own hash.
    #[error(
        "generation {generation}: the code of {key} does not match its hash though the payload is whole: our bug, please report it; the slot is not used and a save will replace it"
    )]
    CodeDamaged {
        /// Generation in the header.
        generation: u64,
        /// The kernel's key.
        key: KernelKey,
    },
    /// A snapshot of another model.
    #[error(
        "generation {generation} was made with model {}, this is model {}; the slot is not used",
        ShortHash(found),
        ShortHash(expected)
    )]
    OtherModel {
        /// Generation in the header.
        generation: u64,
        /// Model in the header.
        found: [u8; 32],
        /// Model of this boot.
        expected: [u8; 32],
    },
}

impl SlotReason {
    /// Short stable name, for reports and tests.
    pub fn name(&self) -> &'static str {
        match self {
            SlotReason::NoFile => "no_file",
            SlotReason::TooSmall { .. } => "too_small",
            SlotReason::Unreadable(_) => "unreadable",
            SlotReason::Empty => "empty",
            SlotReason::BadMagic { .. } => "bad_magic",
            SlotReason::HeaderDamaged { .. } => "header_damaged",
            SlotReason::BadField { .. } => "bad_field",
            SlotReason::OtherFormat { .. } => "other_format",
            SlotReason::Torn { .. } => "torn",
            SlotReason::PayloadTooLong { .. } => "payload_too_long",
            SlotReason::PayloadDamaged { .. } => "payload_damaged",
            SlotReason::Schema { .. } => "schema",
            SlotReason::CodeDamaged { .. } => "code_damaged",
            SlotReason::OtherModel { .. } => "other_model",
        }
    }
}

/// No slot could be used: this boot starts from nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ColdStart {
    reasons: Box<[SlotReason; 2]>,
}

impl ColdStart {
    pub(crate) fn new(a: SlotReason, b: SlotReason) -> Self {
        Self { reasons: Box::new([a, b]) }
    }

    /// Why not this slot.
    pub fn reason(&self, slot: Slot) -> &SlotReason {
        let [a, b] = &*self.reasons;
        if slot == Slot::A { a } else { b }
    }
}

impl fmt::Display for ColdStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = &*self.reasons;
        if a == b {
            return write!(f, "cold start: both slots: {a}");
        }
        write!(f, "cold start: {}: {a}; {}: {b}", Slot::A.file_name(), Slot::B.file_name())
    }
}

impl core::error::Error for ColdStart {}

/// Whether the machine code of an opened snapshot may run here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeUse {
    /// Same build, same machine: the code may be used once verified.
    Full,
    /// The code was dropped; the profile, or what of it holds here, is kept.
    ProfileOnly(ForeignCode),
}

/// Why stored machine code does not fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ForeignCode {
    /// Another build wrote it: its kernels may follow another contract.
    #[error(
        "written by build {}, this is build {}; the profile and the trials are kept, the kernels are compiled again",
        ShortHash(found),
        ShortHash(expected)
    )]
    OtherBuild {
        /// Build in the header.
        found: [u8; 32],
        /// Build of this boot.
        expected: [u8; 32],
    },
    /// Another machine wrote it: its code may not run, and its times say nothing here.
    #[error(
        "written on machine {}, this is machine {}; the variants are kept as first guesses, the times are dropped, the kernels are compiled and measured again",
        ShortHash(found),
        ShortHash(expected)
    )]
    OtherMachine {
        /// Machine in the header.
        found: [u8; 32],
        /// Machine of this boot.
        expected: [u8; 32],
    },
}

/// Why a snapshot was not saved. The one before it is untouched in every case.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SaveError {
    /// The volume cannot be written.
    #[error("snapshot not saved: the boot volume is read-only; attach it writable to keep what was learnt")]
    ReadOnly,
    /// The slot to write is not on the volume.
    #[error("snapshot not saved: {} is not on the volume; build the image again with slots (`bootimage`)", slot.file_name())]
    NoSlotFile {
        /// The slot.
        slot: Slot,
    },
    /// The snapshot does not fit.
    #[error("snapshot not saved: {need_bytes} bytes are needed, {} has {have_bytes}; build the image again with larger slots (`bootimage`)", slot.file_name())]
    TooLarge {
        /// The slot.
        slot: Slot,
        /// Header and payload.
        need_bytes: u64,
        /// Length of the slot, or what this build would read of it.
        have_bytes: u64,
    },
    /// More records than an image reads back.
    #[error(
        "snapshot not saved: {keys} kernels with up to {trials} trials are more than an image reads back; start a new disk (each number of threads has kernels of its own)"
    )]
    TooMany {
        /// Keys.
        keys: usize,
        /// Trials of the key with most.
        trials: usize,
    },
    /// No generation is left.
    #[error("snapshot not saved: generation {generation} is the last; zero the slot files to start again")]
    LastGeneration {
        /// The newest generation on the volume.
        generation: u64,
    },
    /// The device failed while writing.
    #[error("snapshot not saved: writing {}: {error}; the previous snapshot is kept", slot.file_name())]
    Write {
        /// The slot to write; torn now if anything of it was written.
        slot: Slot,
        /// What failed.
        error: StorageError,
    },
}
