//! Everything that can keep an image from being built or read, with what to do about it.

use crate::{MAX_VOLUME_MIB, MIN_VOLUME_MIB};
use std::io;
use std::path::PathBuf;

/// Why an image could not be built or read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A bootable image without a kernel.
    #[error("a bootable image needs a kernel; give one or leave out --bootable")]
    NothingToBoot,
    /// Words for a kernel that GRUB does not start.
    #[error("words for the kernel's command line (--append) go into GRUB's configuration, which only --bootable makes")]
    AppendWithoutGrub,
    /// Words that GRUB would not pass on as they stand.
    #[error(
        "GRUB would not pass `{found}` on as it stands: --append takes words of letters, digits and ._-=,:/+ only; other values belong in BAREFLOW.CFG"
    )]
    BadAppend {
        /// The first character that is none of these.
        found: char,
    },
    /// An input cannot be opened.
    #[error("cannot read {what} at {}: {reason}", path.display())]
    Input {
        /// Its role.
        what: String,
        /// Where it was expected.
        path: PathBuf,
        /// The system's reason.
        reason: io::Error,
    },
    /// An input is a directory or a device.
    #[error("{what}: {} is not a regular file", path.display())]
    NotAFile {
        /// Its role.
        what: String,
        /// What was given.
        path: PathBuf,
    },
    /// The kernel is something else.
    #[error("{} is not a 64-bit ELF file; the kernel is the file the `kernel` crate builds (cargo xtask jit-image)", path.display())]
    NotAnElf {
        /// What was given.
        path: PathBuf,
    },
    /// Not a name FAT16 can hold.
    #[error(
        "`{name}` is not a name for a file on the volume: 1 to 8 letters, digits, `_` or `-`, then a dot and 1 to 3 of them, in upper case; give one with FILE=NAME.EXT"
    )]
    BadName {
        /// What was given.
        name: String,
    },
    /// Two files of one name.
    #[error("two files would be called {name} on the volume; name one of them with FILE=NAME.EXT")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// Slots of no length.
    #[error("the snapshot slots must have at least 1 MiB (4 is the default)")]
    EmptySlots,
    /// More than any FAT16 volume holds.
    #[error(
        "the files need a volume of {need_mib} MiB, but FAT16 ends at {MAX_VOLUME_MIB} MiB; the largest is {largest} with {largest_bytes} bytes. \
         Leave the model off the image and attach its file as a raw second disk instead (qemu-runs --model FILE)"
    )]
    TooLargeForFat16 {
        /// Name of the largest file.
        largest: String,
        /// Its length.
        largest_bytes: u64,
        /// Volume size that would be needed.
        need_mib: u64,
    },
    /// The size asked for is too small.
    #[error(
        "the files do not fit an image of {size_mib} MiB: {need_mib} MiB are needed (the largest file is {largest} with {largest_bytes} bytes, \
         and a volume has at least {MIN_VOLUME_MIB} MiB); raise --size-mib or leave it out"
    )]
    DoesNotFit {
        /// What was asked for.
        size_mib: u64,
        /// The smallest size that works.
        need_mib: u64,
        /// Name of the largest file.
        largest: String,
        /// Its length.
        largest_bytes: u64,
    },
    /// The size asked for is beyond FAT16.
    #[error("an image of {size_mib} MiB is too large: FAT16 volumes end at {MAX_VOLUME_MIB} MiB")]
    ImageTooLarge {
        /// What was asked for.
        size_mib: u64,
    },
    /// The output is there already.
    #[error("{} exists; remove it or say --force (it may hold a snapshot worth keeping)", path.display())]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// The image cannot be written.
    #[error("cannot write the image {}: {reason}", path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// The system's or the FAT library's reason.
        reason: io::Error,
    },
    /// The image cannot be read.
    #[error("cannot read the image {}: {reason}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// The system's or the FAT library's reason.
        reason: io::Error,
    },
    /// The guest's own reader refuses the volume.
    #[error("{} is not an image a guest can use: {reason}", path.display())]
    Volume {
        /// The image.
        path: PathBuf,
        /// The reader's reason.
        reason: storage::StorageError,
    },
    /// Directories that lead to each other, or more files than any guest needs.
    #[error("the volume of {} leads to more than {limit} entries: it is damaged, its directories may lead in circles; build it again", path.display())]
    TooManyEntries {
        /// The image.
        path: PathBuf,
        /// Entries looked at.
        limit: usize,
    },
    /// A slot has more than one piece: a bug here, caught before the image is handed over.
    #[error("snapshot slot {name} came out in {pieces} pieces instead of one; please report this")]
    SlotInPieces {
        /// The slot.
        name: &'static str,
        /// Extents found.
        pieces: usize,
    },
    /// No such file on the volume.
    #[error("{} holds no file {name}; it holds: {}", image.display(), have.join(" "))]
    NoSuchFile {
        /// The image.
        image: PathBuf,
        /// What was asked for.
        name: String,
        /// What there is.
        have: Vec<String>,
    },
    /// GRUB's tool is missing.
    #[error(
        "--bootable needs grub-mkimage, which is not installed: apt-get install grub-common grub-pc-bin grub-efi-amd64-bin (images for `qemu-runs --kernel` do not need --bootable)"
    )]
    GrubMissing,
    /// GRUB's files for one firmware are missing.
    #[error("--bootable needs GRUB's files for {platform}, but {} does not exist: apt-get install {package}", path.display())]
    GrubFilesMissing {
        /// GRUB's platform name.
        platform: &'static str,
        /// What was looked for.
        path: PathBuf,
        /// The package that has it.
        package: &'static str,
    },
    /// GRUB's tool failed.
    #[error("grub-mkimage for {platform} failed: {message}")]
    GrubFailed {
        /// GRUB's platform name.
        platform: &'static str,
        /// What it printed.
        message: String,
    },
    /// The BIOS core does not fit before the partition.
    #[error("GRUB's BIOS core has {len_bytes} bytes, but only {room_bytes} are free before the partition")]
    GrubTooLarge {
        /// Its length.
        len_bytes: usize,
        /// Room there is.
        room_bytes: usize,
    },
}
