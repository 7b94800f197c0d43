//! Everything that can be wrong with a volume or a file, with its numbers.

use crate::DeviceError;
use alloc::string::String;

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
    /// A boot sector does not end in `55 AA`.
    #[error("sector {lba} ends in {:02x} {:02x} where a boot sector has 55 aa; this disk has no file system, write one with `bootimage`", found[0], found[1])]
    NoBootSignature {
        /// The sector.
        lba: u64,
        /// Its last two bytes.
        found: [u8; 2],
    },
    /// The partition table has no partition that may hold FAT16.
    #[error("no FAT16 partition: the partition types are {:02x} {:02x} {:02x} {:02x}, expected one of 04 06 0e ef", types[0], types[1], types[2], types[3])]
    NoFat16Partition {
        /// The type bytes of the four entries.
        types: [u8; 4],
    },
    /// A FAT volume, but not FAT16.
    #[error(
        "the volume at sector {lba} is {found} with {clusters} clusters, expected FAT16 (4085 to 65524 clusters); format it with `mkfs.fat -F 16` or `bootimage`"
    )]
    NotFat16 {
        /// First sector of the volume.
        lba: u64,
        /// What it is.
        found: FatKind,
        /// Data clusters it has.
        clusters: u64,
    },
    /// A field of the boot sector has a value no FAT16 volume has.
    #[error("the boot sector at sector {lba} is not FAT16: {field} is {found}, expected {expected}")]
    BadBootSector {
        /// The sector.
        lba: u64,
        /// Field name.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What would be right.
        expected: &'static str,
    },
    /// The volume is larger than the device it is on.
    #[error(
        "the volume at sector {lba} has {volume_sectors} sectors, but the device ends after {device_sectors}; the image is truncated, write it again"
    )]
    VolumeTruncated {
        /// First sector of the volume.
        lba: u64,
        /// Sectors its boot sector claims.
        volume_sectors: u64,
        /// Sectors of the device.
        device_sectors: u64,
    },
    /// No entry of that name.
    #[error("`{path}` is not on the volume")]
    NotFound {
        /// The path as asked for, up to the missing part.
        path: String,
    },
    /// A directory was expected.
    #[error("`{path}` is a file, a directory was expected")]
    NotADirectory {
        /// The path up to the file.
        path: String,
    },
    /// A file was expected.
    #[error("`{path}` is a directory, a file was expected")]
    IsADirectory {
        /// The path.
        path: String,
    },
    /// A path that no file on a FAT volume can have here.
    #[error("`{path}` is not a path of 8.3 names such as `DIR/NAME.EXT`")]
    BadPath {
        /// The path.
        path: String,
    },
    /// A cluster chain leads to itself.
    #[error("the chain of `{path}` comes back to cluster {cluster}; the volume is damaged, write the image again")]
    ChainLoop {
        /// The file or directory.
        path: String,
        /// The cluster met twice.
        cluster: u16,
    },
    /// A cluster chain leads out of the volume, or to a free or bad cluster.
    #[error(
        "the chain of `{path}` leads to cluster {cluster}, expected 2 to {last}; the volume is damaged, write the image again"
    )]
    ClusterOutOfRange {
        /// The file or directory.
        path: String,
        /// The value found.
        cluster: u16,
        /// Largest cluster number of the volume.
        last: u16,
    },
    /// A cluster chain ends before the file does.
    #[error(
        "`{path}` has {len_bytes} bytes but clusters for {chain_bytes}; the volume is damaged, write the image again"
    )]
    ChainTooShort {
        /// The file.
        path: String,
        /// Length its directory entry claims.
        len_bytes: u64,
        /// Bytes its chain holds.
        chain_bytes: u64,
    },
    /// A directory has more than [`MAX_DIRECTORY_ENTRIES`](crate::MAX_DIRECTORY_ENTRIES).
    #[error("the directory `{path}` has more than {limit} entries, the most FAT allows; the volume is damaged")]
    DirectoryTooLong {
        /// The directory.
        path: String,
        /// The limit.
        limit: usize,
    },
}

/// The kinds of FAT, by cluster count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FatKind {
    /// Fewer than 4085 clusters.
    Fat12,
    /// 65525 clusters and more, or a boot sector of the FAT32 form.
    Fat32,
}

impl core::fmt::Display for FatKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            FatKind::Fat12 => "FAT12",
            FatKind::Fat32 => "FAT32",
        })
    }
}
