//! MBR and FAT16 volumes over a block device: find files, read extents, write in place.
//!
//! Data path: a driver in `kernel` or `hosted` implements [`BlockDevice`] -> this crate finds a file's extents once ->
//! [`ByteSource`] streams them in large requests into the weights arena.
//!
//! Architecture invariant: no bytes on a disk can make this crate panic, loop without end or allocate without bound.
//! Architecture invariant: file system metadata is never written; files are neither created nor resized.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod device;
mod source;

pub use device::{BlockDevice, DeviceError, SECTOR_BYTES, STREAM_CHUNK_BYTES, check_range};
pub use source::ByteSource;

/// Why a volume or file could not be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StorageError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A read or write reaches past the end of a file.
    #[error("bytes {offset}..{offset}+{len_bytes} were asked for, but the file has {file_bytes} bytes")]
    BeyondEnd {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
}
