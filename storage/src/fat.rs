//! FAT16 volumes, read-only in their metadata: from a device to the extents of a file.
//!
//! Input: a disk with an MBR (first partition of type 04, 06, 0E or EF that holds FAT16) or a bare volume in sector 0.
//! Output: [`FatFile`]s, whose extents are absolute sectors. The allocation table (at most 128 KiB) is read once, in one
//! request, by [`FatVolume::open`]; a chain is followed once, by [`FatVolume::find`].
//! Names are 8.3 names compared without case; entries of long names are skipped, their 8.3 aliases work.
//! Not done: FAT12, FAT32, extended partitions, GPT, creating, resizing or deleting.
//!
//! # Source
//! Microsoft, "FAT: General Overview of On-Disk Format", version 1.03: sections "Boot Sector and BPB", "FAT Type
//! Determination" and "FAT Directory Structure".

use crate::device::{BlockDevice, SECTOR_BYTES};
use crate::error::{FatKind, StorageError};
use crate::source::Extent;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// Most entries a FAT directory can have; more is damage.
pub const MAX_DIRECTORY_ENTRIES: usize = 65_536;

const ENTRY_BYTES: usize = 32;
const ENTRIES_PER_SECTOR: u64 = (SECTOR_BYTES / ENTRY_BYTES) as u64;
/// Fewest clusters of a FAT16 volume.
const FAT16_MIN_CLUSTERS: u64 = 4085;
/// Most clusters of a FAT16 volume.
const FAT16_MAX_CLUSTERS: u64 = 65_524;
const FIRST_CLUSTER: u16 = 2;
const END_OF_CHAIN: u16 = 0xfff8;
const ATTR_VOLUME_ID: u8 = 0x08;
const ATTR_DIRECTORY: u8 = 0x10;
const ATTR_LONG_NAME: u8 = 0x0f;
const DELETED: u8 = 0xe5;
/// Directory sectors read in one request.
const DIRECTORY_CHUNK_SECTORS: u64 = 128;

/// A mounted FAT16 volume: its geometry and its allocation table. Holds no device; each call takes the one it was
/// opened on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FatVolume {
    sectors_per_cluster: u64,
    root: Extent,
    data_lba: u64,
    /// The first allocation table, by cluster number; entries 0 and 1 are reserved.
    table: Vec<u16>,
}

/// A file found on a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FatFile {
    /// Length in bytes.
    pub len_bytes: u64,
    /// Where its bytes are, in order, neighbouring clusters merged. Their sum is `len_bytes` rounded up to a sector.
    pub extents: Vec<Extent>,
}

impl FatFile {
    /// True when the bytes are one run of sectors.
    pub fn is_contiguous(&self) -> bool {
        self.extents.len() <= 1
    }
}

/// One entry of a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntry {
    /// 8.3 name, `NAME.EXT`; bytes outside ASCII as `?`.
    pub name: String,
    /// Length in bytes; 0 for directories.
    pub len_bytes: u64,
    /// True for a directory.
    pub is_dir: bool,
    first_cluster: u16,
}

/// A directory entry as far as it matters here.
struct RawEntry {
    name: [u8; 11],
    is_dir: bool,
    first_cluster: u16,
    len_bytes: u32,
}

enum Directory {
    Root,
    Chain(Vec<Extent>),
}

impl FatVolume {
    /// Finds the FAT16 volume on `dev` and reads its allocation table.
    ///
    /// # Errors
    /// [`StorageError`] naming what was found in place of a FAT16 volume; of several candidate partitions, the first's.
    pub fn open(dev: &mut dyn BlockDevice) -> Result<Self, StorageError> {
        let sector = read_boot_sector(dev, 0)?;
        if looks_like_volume(&sector) {
            return Self::open_at(dev, 0, &sector);
        }
        let mut types = [0; 4];
        let mut first_error = None;
        for (slot, kind) in types.iter_mut().enumerate() {
            let Some(entry) = sector.get(446 + 16 * slot..).and_then(|rest| rest.first_chunk::<16>()) else { continue };
            *kind = entry[4];
            if !matches!(entry[4], 0x04 | 0x06 | 0x0e | 0xef) {
                continue;
            }
            let lba = u64::from(u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]));
            match read_boot_sector(dev, lba).and_then(|boot| Self::open_at(dev, lba, &boot)) {
                Ok(volume) => return Ok(volume),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or(StorageError::NoFat16Partition { types }))
    }

    fn open_at(dev: &mut dyn BlockDevice, lba: u64, boot: &[u8; SECTOR_BYTES]) -> Result<Self, StorageError> {
        let bad = |field, found: u64, expected| Err(StorageError::BadBootSector { lba, field, found, expected });
        let u16_at = |low: u8, high: u8| u64::from(u16::from_le_bytes([low, high]));
        let u32_at = |bytes: [u8; 4]| u64::from(u32::from_le_bytes(bytes));
        let sector_bytes = u16_at(boot[11], boot[12]);
        if sector_bytes != SECTOR_BYTES as u64 {
            return bad("bytes per sector", sector_bytes, "512");
        }
        let sectors_per_cluster = u64::from(boot[13]);
        if !sectors_per_cluster.is_power_of_two() {
            return bad("sectors per cluster", sectors_per_cluster, "a power of two up to 128");
        }
        let reserved_sectors = u16_at(boot[14], boot[15]);
        if reserved_sectors == 0 {
            return bad("reserved sectors", 0, "at least 1");
        }
        let tables = u64::from(boot[16]);
        if !(1..=2).contains(&tables) {
            return bad("allocation tables", tables, "1 or 2");
        }
        let root_entries = u16_at(boot[17], boot[18]);
        let volume_sectors = match u16_at(boot[19], boot[20]) {
            0 => u32_at([boot[32], boot[33], boot[34], boot[35]]),
            sectors => sectors,
        };
        let table_sectors_16 = u16_at(boot[22], boot[23]);
        // FAT32 keeps its table length elsewhere; reading it lets the error give the true cluster count.
        let table_sectors = match table_sectors_16 {
            0 => u32_at([boot[36], boot[37], boot[38], boot[39]]),
            sectors => sectors,
        };
        let root_sectors = root_entries.div_ceil(ENTRIES_PER_SECTOR);
        let metadata_sectors = reserved_sectors + tables * table_sectors + root_sectors;
        let Some(data_sectors) = volume_sectors.checked_sub(metadata_sectors) else {
            return bad("total sectors", volume_sectors, "more than the reserved, table and root sectors");
        };
        let clusters = data_sectors / sectors_per_cluster;
        if table_sectors_16 == 0 || clusters > FAT16_MAX_CLUSTERS {
            return Err(StorageError::NotFat16 { lba, found: FatKind::Fat32, clusters });
        }
        if clusters < FAT16_MIN_CLUSTERS {
            return Err(StorageError::NotFat16 { lba, found: FatKind::Fat12, clusters });
        }
        if root_entries == 0 {
            return bad("root entries", 0, "at least 1");
        }
        let table_entries = clusters + u64::from(FIRST_CLUSTER);
        let need_sectors = (2 * table_entries).div_ceil(SECTOR_BYTES as u64);
        if table_sectors < need_sectors {
            return bad("sectors per allocation table", table_sectors, "an entry for every cluster");
        }
        let device_sectors = dev.len_bytes() / SECTOR_BYTES as u64;
        if lba.checked_add(volume_sectors).is_none_or(|end| end > device_sectors) {
            return Err(StorageError::VolumeTruncated { lba, volume_sectors, device_sectors });
        }
        // At most 257 sectors: `need_sectors` follows from the cluster limit, not from the boot sector's own claim.
        let mut bytes = vec![0; need_sectors as usize * SECTOR_BYTES];
        dev.read(lba + reserved_sectors, &mut bytes)?;
        let table =
            bytes.as_chunks::<2>().0.iter().map(|entry| u16::from_le_bytes(*entry)).take(table_entries as usize);
        let root_lba = lba + reserved_sectors + tables * table_sectors;
        Ok(Self {
            sectors_per_cluster,
            root: Extent { lba: root_lba, sectors: root_sectors },
            data_lba: root_lba + root_sectors,
            table: table.collect(),
        })
    }

    /// Finds the file at `path`, such as `MODEL.GGUF` or `BOOT/BAREFLOW.CFG`, upper or lower case, and follows its chain.
    ///
    /// # Errors
    /// [`StorageError`]: no such file, a directory, a damaged chain or directory, a device error.
    pub fn find(&self, dev: &mut dyn BlockDevice, path: &str) -> Result<FatFile, StorageError> {
        let entry = match self.lookup(dev, path)? {
            Some(entry) if !entry.is_dir => entry,
            _ => return Err(StorageError::IsADirectory { path: path.into() }),
        };
        self.file(path, u64::from(entry.len_bytes), entry.first_cluster)
    }

    /// The file that [`FatVolume::list`] or [`FatVolume::list_in`] gave: also one whose name cannot be asked for.
    ///
    /// # Errors
    /// [`StorageError`]: a directory, a damaged chain.
    pub fn open_entry(&self, entry: &DirEntry) -> Result<FatFile, StorageError> {
        if entry.is_dir {
            return Err(StorageError::IsADirectory { path: entry.name.clone() });
        }
        self.file(&entry.name, entry.len_bytes, entry.first_cluster)
    }

    fn file(&self, path: &str, len_bytes: u64, first_cluster: u16) -> Result<FatFile, StorageError> {
        if len_bytes == 0 {
            return Ok(FatFile { len_bytes, extents: Vec::new() });
        }
        let mut extents = self.chain(path, first_cluster)?;
        let mut need_sectors = len_bytes.div_ceil(SECTOR_BYTES as u64);
        let have_sectors: u64 = extents.iter().map(|extent| extent.sectors).sum();
        if have_sectors < need_sectors {
            let chain_bytes = have_sectors * SECTOR_BYTES as u64;
            return Err(StorageError::ChainTooShort { path: path.into(), len_bytes, chain_bytes });
        }
        // Cut off what the last cluster, or a chain longer than the file, has too much.
        extents.retain_mut(|extent| {
            extent.sectors = extent.sectors.min(need_sectors);
            need_sectors -= extent.sectors;
            extent.sectors > 0
        });
        Ok(FatFile { len_bytes, extents })
    }

    /// Entries of the directory at `path` (empty for the root) in disk order, without `.`, `..` and the volume label.
    ///
    /// # Errors
    /// [`StorageError`]: no such directory, a file, a damaged chain or directory, a device error.
    pub fn list(&self, dev: &mut dyn BlockDevice, path: &str) -> Result<Vec<DirEntry>, StorageError> {
        let directory = match self.lookup(dev, path)? {
            None => Directory::Root,
            Some(entry) if entry.is_dir => Directory::Chain(self.chain(path, entry.first_cluster)?),
            Some(_) => return Err(StorageError::NotADirectory { path: path.into() }),
        };
        self.entries(dev, path, &directory)
    }

    /// Entries of a directory that a listing gave: also of one whose name cannot be asked for.
    ///
    /// # Errors
    /// As [`FatVolume::list`].
    pub fn list_in(&self, dev: &mut dyn BlockDevice, directory: &DirEntry) -> Result<Vec<DirEntry>, StorageError> {
        let path = &directory.name;
        if !directory.is_dir {
            return Err(StorageError::NotADirectory { path: path.clone() });
        }
        self.entries(dev, path, &Directory::Chain(self.chain(path, directory.first_cluster)?))
    }

    fn entries(
        &self,
        dev: &mut dyn BlockDevice,
        path: &str,
        directory: &Directory,
    ) -> Result<Vec<DirEntry>, StorageError> {
        let mut entries = Vec::new();
        self.scan(dev, path, directory, &mut |RawEntry { name, is_dir, first_cluster, len_bytes }| {
            let len_bytes = if is_dir { 0 } else { u64::from(len_bytes) };
            entries.push(DirEntry { name: display_name(&name), len_bytes, is_dir, first_cluster });
            false
        })?;
        Ok(entries)
    }

    /// Entry at `path`; `None` is the root.
    fn lookup(&self, dev: &mut dyn BlockDevice, path: &str) -> Result<Option<RawEntry>, StorageError> {
        let mut directory = Directory::Root;
        let mut found: Option<RawEntry> = None;
        let mut at = 0;
        for part in path.split('/') {
            let before = path.get(..at).unwrap_or_default().trim_end_matches('/');
            at += part.len() + 1;
            if part.is_empty() {
                continue;
            }
            if let Some(parent) = &found {
                if !parent.is_dir {
                    return Err(StorageError::NotADirectory { path: before.into() });
                }
                directory = Directory::Chain(self.chain(before, parent.first_cluster)?);
            }
            let name = short_name(part).ok_or_else(|| StorageError::BadPath { path: path.into() })?;
            found = None;
            self.scan(dev, before, &directory, &mut |entry| {
                let hit = entry.name.eq_ignore_ascii_case(&name);
                if hit {
                    found = Some(entry);
                }
                hit
            })?;
            if found.is_none() {
                return Err(StorageError::NotFound { path: path.get(..at - 1).unwrap_or(path).into() });
            }
        }
        Ok(found)
    }

    /// Hands every live entry to `visit` until it returns true.
    fn scan(
        &self,
        dev: &mut dyn BlockDevice,
        path: &str,
        directory: &Directory,
        visit: &mut dyn FnMut(RawEntry) -> bool,
    ) -> Result<(), StorageError> {
        let extents = match directory {
            Directory::Root => core::slice::from_ref(&self.root),
            Directory::Chain(extents) => extents,
        };
        let mut buf = Vec::new();
        let mut seen = 0;
        for extent in extents {
            let mut done = 0;
            while done < extent.sectors {
                let sectors = (extent.sectors - done).min(DIRECTORY_CHUNK_SECTORS);
                buf.resize(sectors as usize * SECTOR_BYTES, 0);
                dev.read(extent.lba + done, &mut buf)?;
                done += sectors;
                for raw in buf.as_chunks::<ENTRY_BYTES>().0 {
                    if raw[0] == 0 {
                        return Ok(());
                    }
                    seen += 1;
                    if seen > MAX_DIRECTORY_ENTRIES {
                        let limit = MAX_DIRECTORY_ENTRIES;
                        return Err(StorageError::DirectoryTooLong { path: path.into(), limit });
                    }
                    if let Some(entry) = live_entry(raw)
                        && visit(entry)
                    {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Follows a whole chain: every cluster once, neighbours merged.
    fn chain(&self, path: &str, first: u16) -> Result<Vec<Extent>, StorageError> {
        let last = (self.table.len() - 1) as u16;
        let mut visited = vec![false; self.table.len()];
        let mut extents: Vec<Extent> = Vec::new();
        let mut cluster = first;
        loop {
            let index = usize::from(cluster);
            let (Some(&next), Some(seen), true) =
                (self.table.get(index), visited.get_mut(index), cluster >= FIRST_CLUSTER)
            else {
                return Err(StorageError::ClusterOutOfRange { path: path.into(), cluster, last });
            };
            if core::mem::replace(seen, true) {
                return Err(StorageError::ChainLoop { path: path.into(), cluster });
            }
            let lba = self.data_lba + u64::from(cluster - FIRST_CLUSTER) * self.sectors_per_cluster;
            match extents.last_mut() {
                Some(extent) if extent.lba + extent.sectors == lba => extent.sectors += self.sectors_per_cluster,
                _ => extents.push(Extent { lba, sectors: self.sectors_per_cluster }),
            }
            if next >= END_OF_CHAIN {
                return Ok(extents);
            }
            cluster = next;
        }
    }
}

fn read_boot_sector(dev: &mut dyn BlockDevice, lba: u64) -> Result<[u8; SECTOR_BYTES], StorageError> {
    let mut sector = [0; SECTOR_BYTES];
    dev.read(lba, &mut sector)?;
    let found = [sector[510], sector[511]];
    if found == [0x55, 0xaa] { Ok(sector) } else { Err(StorageError::NoBootSignature { lba, found }) }
}

/// Tells a volume's boot sector from a partition table: boot code has a jump too, but no sector size.
fn looks_like_volume(sector: &[u8; SECTOR_BYTES]) -> bool {
    let sector_bytes = u16::from_le_bytes([sector[11], sector[12]]);
    matches!(sector[0], 0xeb | 0xe9) && matches!(sector_bytes, 512 | 1024 | 2048 | 4096) && sector[21] >= 0xf0
}

fn live_entry(raw: &[u8; ENTRY_BYTES]) -> Option<RawEntry> {
    let [n0, n1, n2, n3, n4, n5, n6, n7, e0, e1, e2, attributes, ..] = *raw;
    if n0 == DELETED || n0 == b'.' || attributes & ATTR_LONG_NAME == ATTR_LONG_NAME || attributes & ATTR_VOLUME_ID != 0
    {
        return None;
    }
    // A first byte of E5 is stored as 05.
    let n0 = if n0 == 0x05 { DELETED } else { n0 };
    Some(RawEntry {
        name: [n0, n1, n2, n3, n4, n5, n6, n7, e0, e1, e2],
        is_dir: attributes & ATTR_DIRECTORY != 0,
        first_cluster: u16::from_le_bytes([raw[26], raw[27]]),
        len_bytes: u32::from_le_bytes([raw[28], raw[29], raw[30], raw[31]]),
    })
}

/// `NAME.EXT` as the eleven padded bytes of a directory entry; `None` when it is not an 8.3 name.
fn short_name(part: &str) -> Option<[u8; 11]> {
    let (stem, extension) = part.rsplit_once('.').unwrap_or((part, ""));
    let plain = |b: u8| b.is_ascii_graphic() && !b"\"*+,./:;<=>?[\\]|".contains(&b);
    if stem.is_empty() || !stem.bytes().chain(extension.bytes()).all(plain) {
        return None;
    }
    let mut name = [b' '; 11];
    let (head, tail) = name.split_at_mut(8);
    head.get_mut(..stem.len())?.copy_from_slice(stem.as_bytes());
    tail.get_mut(..extension.len())?.copy_from_slice(extension.as_bytes());
    Some(name)
}

fn display_name(name: &[u8; 11]) -> String {
    let (stem, extension) = name.split_at(8);
    let text = |bytes: &[u8]| -> String {
        let text: String =
            bytes.iter().map(|&b| if b == b' ' || b.is_ascii_graphic() { b as char } else { '?' }).collect();
        text.trim_end().to_string()
    };
    let (mut stem, extension) = (text(stem), text(extension));
    if !extension.is_empty() {
        stem.push('.');
        stem.push_str(&extension);
    }
    stem
}
