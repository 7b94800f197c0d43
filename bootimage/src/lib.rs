//! Kernel, model and configuration in; one disk image out, without root and without loop mounts.
//!
//! ```text
//! sector 0            MBR: one partition; with `bootable`, GRUB's boot.img
//! sectors 1..2047     with `bootable`, GRUB's core.img
//! 1 MiB..             FAT16 volume "BAREFLOW"
//!   KERNEL.ELF        the guest
//!   BAREFLOW.CFG      key=value lines
//!   SNAPA.BIN         snapshot slots: zeroed, contiguous, written in place by the guest
//!   SNAPB.BIN
//!   REPORT.TXT        room for the last boot's report, written in place
//!   EFI/BOOT/BOOTX64.EFI   with `bootable`
//!   MODEL.GGU, TOK.BIN     when the model is to live on this volume
//! ```
//!
//! Data path: [`ImageSpec`] -> [`build`] -> file -> QEMU or a USB stick; [`list`] and [`read_file`] look into an image afterwards.
//! What this crate does not do: check the configuration (the guest does, and says so) or run anything.
//!
//! Architecture invariant: the same inputs give the same bytes (serial numbers and times are fixed).
//! Architecture invariant: an image is only handed over after `storage`, the guest's own reader, has found every file in
//! it and every slot in one piece.

#![forbid(unsafe_code)]

mod error;
mod grub;
mod mbr;
mod names;
mod window;

pub use error::ImageError;
pub use grub::has_grub_modules;
pub use names::{short_name, split_name};

use fatfs::{Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use storage::{DirEntry, FatVolume, SECTOR_BYTES, StorageError};
use window::{ImageDevice, Window};

/// First byte of the partition: 1 MiB, as every partitioning tool aligns it.
pub const PARTITION_OFFSET_BYTES: u64 = MIB;
/// Largest FAT16 volume: 65524 clusters of 32 KiB, rounded down to whole MiB.
pub const MAX_VOLUME_MIB: u64 = 2047;
/// Smallest volume made; below it FAT16 has too few clusters.
pub const MIN_VOLUME_MIB: u64 = 8;
/// Names of the two snapshot slots.
pub const SLOT_NAMES: [&str; 2] = ["SNAPA.BIN", "SNAPB.BIN"];
/// Default length of each slot.
pub const DEFAULT_SLOT_MIB: u64 = 4;
/// Length of REPORT.TXT.
pub const REPORT_LEN_BYTES: usize = 64 << 10;
const MIB: u64 = 1 << 20;
/// Root directory entries of the volume (long names take several).
const ROOT_ENTRIES: u16 = 512;
const VOLUME_LABEL: [u8; 11] = *b"BAREFLOW   ";
/// Volume serial and disk signature: fixed, so that images can be compared byte for byte.
const SERIAL: u32 = 0x4246_4c57;

/// A file to put on the volume.
#[derive(Clone, Debug)]
pub struct FileSpec {
    /// Name on the volume, `NAME.EXT` in upper case.
    pub name: String,
    /// Where the bytes come from.
    pub path: PathBuf,
}

/// What goes into an image.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// The guest's ELF file; `None` makes a volume that only holds data, such as `hosted`'s snapshot.
    pub kernel: Option<PathBuf>,
    /// Text of BAREFLOW.CFG.
    pub config: String,
    /// Models and tokenizers.
    pub files: Vec<FileSpec>,
    /// Length of each snapshot slot.
    pub slot_mib: u64,
    /// Size of the whole image; `None` takes what the files need and some room.
    pub size_mib: Option<u64>,
    /// Install GRUB for BIOS and UEFI.
    pub bootable: bool,
    /// Words for the kernel's command line, which GRUB passes on; empty unless `bootable`.
    pub append: String,
    /// Replace an existing file.
    pub overwrite: bool,
}

impl ImageSpec {
    /// An image of `kernel` alone, with default slots and an empty configuration.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self { kernel: Some(kernel.into()), ..Self::without_kernel() }
    }

    /// An image with slots and nothing to boot.
    pub fn without_kernel() -> Self {
        Self {
            kernel: None,
            config: String::new(),
            files: Vec::new(),
            slot_mib: DEFAULT_SLOT_MIB,
            size_mib: None,
            bootable: false,
            append: String::new(),
            overwrite: false,
        }
    }
}

/// A file found on an image's volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Path from the volume's root, such as `EFI/BOOT/BOOTX64.EFI`.
    pub path: String,
    /// Length.
    pub len_bytes: u64,
    /// Contiguous runs on the disk; empty for an empty file.
    pub extents: Vec<storage::Extent>,
}

impl Entry {
    /// Byte offset in the image of a file that lies in one piece.
    pub fn offset_bytes(&self) -> Option<u64> {
        match self.extents.as_slice() {
            [extent] => Some(extent.lba * SECTOR_BYTES as u64),
            _ => None,
        }
    }
}

/// Builds the image at `out`, which appears only when it is complete.
///
/// Returns the files on it.
///
/// # Errors
/// [`ImageError`], with what to do about it; `out` is then as it was.
pub fn build(spec: &ImageSpec, out: &Path) -> Result<Vec<Entry>, ImageError> {
    if !spec.overwrite && out.exists() {
        return Err(ImageError::OutputExists { path: out.to_owned() });
    }
    let mut lengths: Vec<(String, u64)> = Vec::new();
    match &spec.kernel {
        Some(path) => {
            let (kernel, len_bytes) = open_input(path, "the kernel")?;
            check_elf(kernel, path)?;
            lengths.push(("KERNEL.ELF".into(), len_bytes));
        }
        None if spec.bootable => return Err(ImageError::NothingToBoot),
        None => {}
    }
    let mut inputs = Vec::new();
    for file in &spec.files {
        names::check(&file.name)?;
        let (_, len_bytes) = open_input(&file.path, &file.name)?;
        if OWN_NAMES.contains(&file.name.as_str()) || inputs.iter().any(|(f, _): &(&FileSpec, u64)| f.name == file.name)
        {
            return Err(ImageError::DuplicateName { name: file.name.clone() });
        }
        inputs.push((file, len_bytes));
    }
    if spec.slot_mib == 0 {
        return Err(ImageError::EmptySlots);
    }
    if !spec.bootable && !spec.append.is_empty() {
        return Err(ImageError::AppendWithoutGrub);
    }
    grub::check_append(&spec.append)?;
    let grub = if spec.bootable { Some(grub::make(&spec.append)?) } else { None };

    lengths.extend(inputs.iter().map(|(file, len)| (file.name.clone(), *len)));
    lengths.extend(SLOT_NAMES.map(|name| (name.to_owned(), spec.slot_mib.saturating_mul(MIB))));
    lengths.push(("REPORT.TXT".into(), REPORT_LEN_BYTES as u64));
    lengths.push(("BAREFLOW.CFG".into(), spec.config.len() as u64));
    lengths.extend(grub.iter().map(|g| ("BOOTX64.EFI".to_owned(), g.efi.len() as u64)));
    let volume_mib = volume_mib(&lengths, spec.size_mib)?;

    let directory = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let writing = |reason| ImageError::Write { path: out.to_owned(), reason };
    let temporary = tempfile::NamedTempFile::new_in(directory).map_err(writing)?;
    let image = temporary.as_file();
    image.set_len(PARTITION_OFFSET_BYTES + volume_mib * MIB).map_err(writing)?;
    mbr::write(image, volume_mib * MIB, grub.as_ref()).map_err(writing)?;
    write_volume(image, volume_mib * MIB, spec, grub.as_ref(), out)?;
    image.sync_all().map_err(writing)?;

    let entries = list_file(image, out)?;
    for name in SLOT_NAMES {
        let pieces = entries.iter().find(|e| e.path == name).map_or(0, |e| e.extents.len());
        if pieces != 1 {
            return Err(ImageError::SlotInPieces { name, pieces });
        }
    }
    persist(temporary, out, spec.overwrite)?;
    Ok(entries)
}

/// Files of the root directory that [`build`] makes itself; no other file can have such a name.
pub const OWN_NAMES: [&str; 5] = ["KERNEL.ELF", "BAREFLOW.CFG", "REPORT.TXT", SLOT_NAMES[0], SLOT_NAMES[1]];

fn open_input(path: &Path, what: &str) -> Result<(File, u64), ImageError> {
    let failed = |reason| ImageError::Input { what: what.to_owned(), path: path.to_owned(), reason };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(ImageError::NotAFile { what: what.to_owned(), path: path.to_owned() });
    }
    Ok((file, metadata.len()))
}

fn check_elf(mut kernel: File, path: &Path) -> Result<(), ImageError> {
    let mut magic = [0; 5];
    match kernel.read_exact(&mut magic) {
        Ok(()) if magic == *b"\x7fELF\x02" => Ok(()),
        _ => Err(ImageError::NotAnElf { path: path.to_owned() }),
    }
}

/// Size of the volume that holds files of these `lengths`.
fn volume_mib(lengths: &[(String, u64)], size_mib: Option<u64>) -> Result<u64, ImageError> {
    // Rounding to the largest cluster covers every cluster size; 1 MiB covers both FATs and the directories.
    const LARGEST_CLUSTER: u64 = 32 << 10;
    let (largest, largest_bytes) =
        lengths.iter().max_by_key(|(_, len)| *len).map_or((String::new(), 0), |(name, len)| (name.clone(), *len));
    let need_bytes = lengths.iter().fold(MIB, |sum, (_, len)| {
        sum.saturating_add(len.div_ceil(LARGEST_CLUSTER).saturating_add(1).saturating_mul(LARGEST_CLUSTER))
    });
    let need_mib = need_bytes.div_ceil(MIB).max(MIN_VOLUME_MIB);
    if need_mib > MAX_VOLUME_MIB {
        return Err(ImageError::TooLargeForFat16 { largest, largest_bytes, need_mib });
    }
    match size_mib {
        None => Ok((need_mib + need_mib / 16 + 1).min(MAX_VOLUME_MIB)),
        Some(size) if size > MAX_VOLUME_MIB + 1 => Err(ImageError::ImageTooLarge { size_mib: size }),
        Some(size) if size < need_mib + 1 => {
            Err(ImageError::DoesNotFit { size_mib: size, need_mib: need_mib + 1, largest, largest_bytes })
        }
        Some(size) => Ok(size - 1),
    }
}

/// A clock that stands still, for reproducible images.
#[derive(Debug)]
struct FixedTime;

impl TimeProvider for FixedTime {
    fn get_current_date(&self) -> Date {
        Date { year: 2026, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime { date: self.get_current_date(), time: Time { hour: 0, min: 0, sec: 0, millis: 0 } }
    }
}

static FIXED_TIME: FixedTime = FixedTime;

fn write_volume(
    image: &File,
    len_bytes: u64,
    spec: &ImageSpec,
    grub: Option<&grub::Grub>,
    out: &Path,
) -> Result<(), ImageError> {
    let failed = |reason| ImageError::Write { path: out.to_owned(), reason };
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat16)
        .max_root_dir_entries(ROOT_ENTRIES)
        .volume_id(SERIAL)
        .volume_label(VOLUME_LABEL);
    let window = || Window::new(image, PARTITION_OFFSET_BYTES, len_bytes);
    fatfs::format_volume(window(), options).map_err(failed)?;
    mbr::set_hidden_sectors(image).map_err(failed)?;
    let volume = FileSystem::new(window(), FsOptions::new().time_provider(&FIXED_TIME)).map_err(failed)?;
    {
        let root = volume.root_dir();
        let put = |name: &str, source: &mut dyn Read| -> std::io::Result<()> {
            let mut file = root.create_file(name)?;
            file.truncate()?;
            std::io::copy(source, &mut file)?;
            file.flush()
        };
        // The slots come first: an empty volume hands out its clusters in order, so each lies in one piece.
        for name in SLOT_NAMES {
            put(name, &mut std::io::repeat(0).take(spec.slot_mib * MIB)).map_err(failed)?;
        }
        let mut report = b"No boot has written its report here yet.\n".to_vec();
        report.resize(REPORT_LEN_BYTES, b'\n');
        put("REPORT.TXT", &mut report.as_slice()).map_err(failed)?;
        put("BAREFLOW.CFG", &mut spec.config.as_bytes()).map_err(failed)?;
        if let Some(path) = &spec.kernel {
            let (mut kernel, _) = open_input(path, "the kernel")?;
            put("KERNEL.ELF", &mut kernel).map_err(failed)?;
        }
        if let Some(grub) = grub {
            root.create_dir("EFI").and_then(|efi| efi.create_dir("BOOT")).map_err(failed)?;
            put("EFI/BOOT/BOOTX64.EFI", &mut grub.efi.as_slice()).map_err(failed)?;
        }
        for file in &spec.files {
            let (mut source, _) = open_input(&file.path, &file.name)?;
            put(&file.name, &mut source).map_err(failed)?;
        }
    }
    volume.unmount().map_err(failed)
}

/// A file is to be read and written over.
#[derive(Debug, thiserror::Error)]
#[error("{}: input and output are the same file; name another output", output.display())]
pub struct SameFile {
    output: PathBuf,
}

/// Refuses to write `output` over one of `inputs`, by whatever name.
///
/// # Errors
/// [`SameFile`].
pub fn not_over<P: AsRef<Path>>(inputs: impl IntoIterator<Item = P>, output: &Path) -> Result<(), SameFile> {
    let of = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let written = of(output);
    if written.is_some() && inputs.into_iter().any(|input| of(input.as_ref()) == written) {
        return Err(SameFile { output: output.to_owned() });
    }
    Ok(())
}

fn persist(temporary: tempfile::NamedTempFile, out: &Path, overwrite: bool) -> Result<(), ImageError> {
    set_default_permissions(temporary.as_file());
    let result = if overwrite { temporary.persist(out) } else { temporary.persist_noclobber(out) };
    match result {
        Ok(_) => Ok(()),
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(ImageError::OutputExists { path: out.to_owned() })
        }
        Err(e) => Err(ImageError::Write { path: out.to_owned(), reason: e.error }),
    }
}

/// Temporary files are private to their owner; an image is an ordinary file.
#[cfg(unix)]
fn set_default_permissions(file: &File) {
    use std::os::unix::fs::PermissionsExt;
    // A file system without permissions is no reason to fail.
    let _ = file.set_permissions(std::fs::Permissions::from_mode(0o644));
}

#[cfg(not(unix))]
fn set_default_permissions(_file: &File) {}

fn open_image(path: &Path) -> Result<File, ImageError> {
    File::open(path).map_err(|reason| ImageError::Read { path: path.to_owned(), reason })
}

/// Every file on the image's volume, by path.
///
/// # Errors
/// [`ImageError::Read`], [`ImageError::Volume`] or [`ImageError::TooManyEntries`].
pub fn list(image: &Path) -> Result<Vec<Entry>, ImageError> {
    list_file(&open_image(image)?, image)
}

fn list_file(image: &File, path: &Path) -> Result<Vec<Entry>, ImageError> {
    let mut device = ImageDevice::new(image).map_err(|reason| ImageError::Read { path: path.to_owned(), reason })?;
    let mut walk = Walk { looked_at: 0, files: Vec::new() };
    FatVolume::open(&mut device)
        .and_then(|volume| {
            let root = volume.list(&mut device, "")?;
            walk.directory(&volume, &mut device, root, "", 0)
        })
        .map_err(|reason| ImageError::Volume { path: path.to_owned(), reason })?;
    if walk.has_enough() {
        return Err(ImageError::TooManyEntries { path: path.to_owned(), limit: MAX_ENTRIES });
    }
    let mut entries = walk.files;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// Directories deeper than this are not looked into; a damaged volume can hold loops.
const MAX_DEPTH: usize = 8;
/// Entries looked at, at most: each of a damaged volume's may lead to all of the others.
const MAX_ENTRIES: usize = 1 << 16;

/// A search for every file.
struct Walk {
    looked_at: usize,
    files: Vec<Entry>,
}

impl Walk {
    /// No more is looked at.
    fn has_enough(&self) -> bool {
        self.looked_at > MAX_ENTRIES
    }

    fn directory(
        &mut self,
        volume: &FatVolume,
        device: &mut ImageDevice<'_>,
        entries: Vec<DirEntry>,
        path: &str,
        depth: usize,
    ) -> Result<(), StorageError> {
        for entry in entries {
            self.looked_at += 1;
            if self.has_enough() {
                return Ok(());
            }
            let path = if path.is_empty() { entry.name.clone() } else { format!("{path}/{}", entry.name) };
            if !entry.is_dir {
                let file = volume.open_entry(&entry)?;
                self.files.push(Entry { path, len_bytes: file.len_bytes, extents: file.extents });
            } else if depth < MAX_DEPTH {
                let inside = volume.list_in(device, &entry)?;
                self.directory(volume, device, inside, &path, depth + 1)?;
            }
        }
        Ok(())
    }
}

/// The bytes of one file, by its path as [`list`] gives it.
///
/// # Errors
/// [`ImageError::Read`], [`ImageError::NoSuchFile`] or [`ImageError::Volume`].
pub fn read_file(image: &Path, name: &str) -> Result<Vec<u8>, ImageError> {
    let mut file = open_image(image)?;
    let entries = list_file(&file, image)?;
    let Some(entry) = entries.iter().find(|e| e.path.eq_ignore_ascii_case(name)) else {
        let have = entries.into_iter().map(|e| e.path).collect();
        return Err(ImageError::NoSuchFile { image: image.to_owned(), name: name.to_owned(), have });
    };
    let mut bytes = Vec::new();
    for extent in &entry.extents {
        let left = entry.len_bytes - bytes.len() as u64;
        file.seek(SeekFrom::Start(extent.lba * SECTOR_BYTES as u64))
            .and_then(|_| (&file).take(left.min(extent.sectors * SECTOR_BYTES as u64)).read_to_end(&mut bytes))
            .map_err(|reason| ImageError::Read { path: image.to_owned(), reason })?;
    }
    Ok(bytes)
}
