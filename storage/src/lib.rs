//! MBR and FAT16 volumes over a block device: find files, read extents, write in place.
//!
//! Data path: a driver in `kernel` or `hosted` implements [`BlockDevice`] -> [`FatVolume::find`] gives a file's extents, once ->
//! [`FileSource`] (or [`RawDisk`]) streams them in large requests into the weights arena; [`write_in_place`] takes
//! snapshot slots back.
//!
//! Architecture invariant: no bytes on a disk can make this crate panic, loop without end or allocate more than a few MiB.
//! Architecture invariant: file system metadata is never written; files are neither created nor resized.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod device;
mod error;
mod fat;
pub mod fault;
mod memory;
mod source;

pub use device::{BlockDevice, DeviceError, SECTOR_BYTES, STREAM_CHUNK_BYTES, SharedRead, check_range};
pub use error::{FatKind, StorageError};
pub use fat::{DirEntry, FatFile, FatVolume, MAX_DIRECTORY_ENTRIES};
pub use memory::MemoryDisk;
pub use source::{ByteSource, Extent, FileSource, RawDisk, write_in_place};
