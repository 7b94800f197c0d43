//! Byte-addressed reading on top of sectors: what the model loader sees. And the one way to write: in place.

use crate::device::{BlockDevice, SECTOR_BYTES, SharedRead};
use crate::error::StorageError;
use crate::fat::FatFile;
use alloc::vec;
use alloc::vec::Vec;

/// Sectors in one request of [`ByteSource::read_at`]: 1 MiB.
const REQUEST_SECTORS: u64 = 2048;
/// Sectors read ahead for small reads: 64 KiB. A request costs about as much for one sector as for this many.
const WINDOW_SECTORS: u64 = 128;
const SECTOR: u64 = SECTOR_BYTES as u64;

/// A run of sectors of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First sector, counted from the start of the device.
    pub lba: u64,
    /// Sectors.
    pub sectors: u64,
}

/// A run of bytes that can be read at any offset: a file, or a raw disk that holds one.
pub trait ByteSource {
    /// Length in bytes.
    fn len_bytes(&self) -> u64;

    /// Bytes before what only fills up the last sector, where that is known ([`BlockDevice::content_bytes`]).
    fn content_bytes(&self) -> u64 {
        self.len_bytes()
    }

    /// Says that the next call will be a [`ByteSource::stream`] from the first byte on ([`BlockDevice::read_ahead`]).
    fn read_ahead(&mut self) {}

    /// Fills `buf` from byte `offset` on.
    ///
    /// # Errors
    /// [`StorageError::BeyondEnd`], or a device error.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), StorageError>;

    /// Reads `len_bytes` bytes from byte `offset` on once, in order, and hands consecutive chunks of any size but zero
    /// to `sink`.
    ///
    /// # Errors
    /// [`StorageError::BeyondEnd`] before anything is read, or a device error after the chunks that preceded it.
    fn stream(&mut self, offset: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), StorageError>;

    /// The bytes as ones that several cores can read at once, where they are ([`BlockDevice::shared`]).
    fn shared(&self) -> Option<&dyn SharedRead> {
        None
    }

    /// Reads the first `len_bytes` bytes, in whole sectors, and drops them ([`BlockDevice::read_and_drop`]).
    ///
    /// # Errors
    /// As [`ByteSource::stream`].
    fn read_and_drop(&mut self, len_bytes: u64) -> Result<(), StorageError>;
}

/// A file as a [`ByteSource`]. Large reads go straight to the caller's buffer, small ones through a 64 KiB read-ahead.
pub struct FileSource<'a> {
    dev: &'a mut dyn BlockDevice,
    extents: Vec<Extent>,
    len_bytes: u64,
    window: Vec<u8>,
    /// Sector of the file that `window` starts with.
    window_sector: u64,
}

impl<'a> FileSource<'a> {
    /// Reads `file` from the device it was found on.
    pub fn new(dev: &'a mut dyn BlockDevice, file: &FatFile) -> Self {
        Self::over(dev, file.extents.clone(), file.len_bytes)
    }

    fn over(dev: &'a mut dyn BlockDevice, extents: Vec<Extent>, len_bytes: u64) -> Self {
        Self { dev, extents, len_bytes, window: Vec::new(), window_sector: 0 }
    }

    /// Copies the part of `buf` that starts at byte `offset` from the window, filling it first where needed.
    fn read_windowed(&mut self, mut offset: u64, mut buf: &mut [u8]) -> Result<(), StorageError> {
        while !buf.is_empty() {
            let sector = offset / SECTOR;
            let held = sector.checked_sub(self.window_sector).map(|s| s * SECTOR + offset % SECTOR);
            let held = held.and_then(|at| self.window.get(usize::try_from(at).ok()?..)).filter(|rest| !rest.is_empty());
            let Some(held) = held else {
                // Forget the window before the read: after a failed one its content is unspecified.
                let mut window = core::mem::take(&mut self.window);
                let sectors = (self.len_bytes.div_ceil(SECTOR) - sector).min(WINDOW_SECTORS);
                window.resize(sectors as usize * SECTOR_BYTES, 0);
                read_sectors(self.dev, &self.extents, sector, &mut window)?;
                (self.window, self.window_sector) = (window, sector);
                continue;
            };
            let now = held.len().min(buf.len());
            let (head, tail) = buf.split_at_mut(now);
            head.copy_from_slice(&held[..now]);
            offset += now as u64;
            buf = tail;
        }
        Ok(())
    }
}

impl ByteSource for FileSource<'_> {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_ahead(&mut self) {
        if let Some(extent) = self.extents.first() {
            self.dev.read_ahead(extent.lba, (extent.sectors * SECTOR).min(self.len_bytes.next_multiple_of(SECTOR)));
        }
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        check_end(offset, buf.len() as u64, self.len_bytes)?;
        if (buf.len() as u64) < WINDOW_SECTORS * SECTOR {
            return self.read_windowed(offset, buf);
        }
        let head = offset.next_multiple_of(SECTOR) - offset;
        let (head, rest) = buf.split_at_mut(head as usize);
        let (middle, tail) = rest.split_at_mut(rest.len() / SECTOR_BYTES * SECTOR_BYTES);
        let at = offset + head.len() as u64;
        self.read_windowed(offset, head)?;
        read_sectors(self.dev, &self.extents, at / SECTOR, middle)?;
        self.read_windowed(at + middle.len() as u64, tail)
    }

    fn stream(&mut self, offset: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), StorageError> {
        check_end(offset, len_bytes, self.len_bytes)?;
        if len_bytes == 0 {
            return Ok(());
        }
        let first = offset / SECTOR;
        let mut skip = (offset % SECTOR) as usize;
        let mut left = len_bytes;
        let sectors = (offset + len_bytes).div_ceil(SECTOR) - first;
        let dev = &mut *self.dev;
        for_each_run(&self.extents, first, sectors, &mut |lba, _, sectors| {
            let mut trim = |chunk: &[u8]| {
                let from = skip.min(chunk.len());
                skip -= from;
                let rest = &chunk[from..];
                let now = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                left -= now as u64;
                if now > 0 {
                    sink(&rest[..now]);
                }
            };
            dev.stream(lba, sectors * SECTOR, &mut trim).map_err(StorageError::from)
        })
    }

    fn read_and_drop(&mut self, len_bytes: u64) -> Result<(), StorageError> {
        check_end(0, len_bytes, self.len_bytes)?;
        let Self { dev, extents, .. } = self;
        for_each_run(extents, 0, len_bytes.div_ceil(SECTOR), &mut |lba, _, sectors| {
            Ok(dev.read_and_drop(lba, sectors * SECTOR)?)
        })
    }
}

/// A whole device as a [`ByteSource`]: a model file written raw to a disk. Its length is the device's, so a file whose
/// length is not a whole number of sectors is followed by padding.
pub struct RawDisk<'a>(FileSource<'a>);

impl<'a> RawDisk<'a> {
    /// Reads `dev` from its first byte on.
    pub fn new(dev: &'a mut dyn BlockDevice) -> Self {
        let len_bytes = dev.len_bytes();
        Self(FileSource::over(dev, vec![Extent { lba: 0, sectors: len_bytes / SECTOR }], len_bytes))
    }
}

impl ByteSource for RawDisk<'_> {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn content_bytes(&self) -> u64 {
        self.0.dev.content_bytes()
    }

    fn read_ahead(&mut self) {
        self.0.read_ahead();
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        self.0.read_at(offset, buf)
    }

    fn stream(&mut self, offset: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), StorageError> {
        self.0.stream(offset, len_bytes, sink)
    }

    fn shared(&self) -> Option<&dyn SharedRead> {
        self.0.dev.shared()
    }

    fn read_and_drop(&mut self, len_bytes: u64) -> Result<(), StorageError> {
        self.0.read_and_drop(len_bytes)
    }
}

/// Writes `bytes` over the bytes of `file` from `offset` on. The file keeps its length, and nothing but its own sectors
/// is written. Whole sectors are written as they are; a sector covered in part is read, changed and written. Durable only
/// after [`BlockDevice::flush`].
///
/// # Errors
/// [`StorageError::BeyondEnd`] before anything is written, or a device error, after which the range holds old and new
/// sectors.
pub fn write_in_place(
    dev: &mut dyn BlockDevice,
    file: &FatFile,
    offset: u64,
    bytes: &[u8],
) -> Result<(), StorageError> {
    check_end(offset, bytes.len() as u64, file.len_bytes)?;
    let mut at = offset;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (sector, skip) = (at / SECTOR, (at % SECTOR) as usize);
        let written = if skip == 0 && rest.len() >= SECTOR_BYTES {
            let whole = rest.len() / SECTOR_BYTES * SECTOR_BYTES;
            let whole = &rest[..whole];
            for_each_run(&file.extents, sector, whole.len() as u64 / SECTOR, &mut |lba, from, sectors| {
                let from = from as usize * SECTOR_BYTES;
                Ok(dev.write(lba, &whole[from..from + sectors as usize * SECTOR_BYTES])?)
            })?;
            whole.len()
        } else {
            let now = rest.len().min(SECTOR_BYTES - skip);
            for_each_run(&file.extents, sector, 1, &mut |lba, _, _| {
                let mut buf = [0; SECTOR_BYTES];
                dev.read(lba, &mut buf)?;
                buf[skip..skip + now].copy_from_slice(&rest[..now]);
                Ok(dev.write(lba, &buf)?)
            })?;
            now
        };
        at += written as u64;
        rest = &rest[written..];
    }
    Ok(())
}

/// Fills `buf` (whole sectors) from sector `first` of the extents on.
fn read_sectors(dev: &mut dyn BlockDevice, extents: &[Extent], first: u64, buf: &mut [u8]) -> Result<(), StorageError> {
    let sectors = buf.len() as u64 / SECTOR;
    for_each_run(extents, first, sectors, &mut |lba, from, sectors| {
        let from = from as usize * SECTOR_BYTES;
        let part = &mut buf[from..from + sectors as usize * SECTOR_BYTES];
        for (i, request) in part.chunks_mut(REQUEST_SECTORS as usize * SECTOR_BYTES).enumerate() {
            dev.read(lba + i as u64 * REQUEST_SECTORS, request)?;
        }
        Ok(())
    })
}

/// Cuts `sectors` sectors, from sector `first` of the file on, into runs that are contiguous on the device, and calls
/// `run(lba, sectors done before, sectors)` for each. The caller has checked the range against the file's length.
fn for_each_run(
    extents: &[Extent],
    first: u64,
    sectors: u64,
    run: &mut dyn FnMut(u64, u64, u64) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let (mut skip, mut done) = (first, 0);
    for extent in extents {
        if skip >= extent.sectors {
            skip -= extent.sectors;
            continue;
        }
        let now = (extent.sectors - skip).min(sectors - done);
        if now == 0 {
            return Ok(());
        }
        run(extent.lba + skip, done, now)?;
        done += now;
        skip = 0;
    }
    if done == sectors {
        return Ok(());
    }
    // A `FatFile` built by hand whose extents are shorter than its length.
    let file_bytes = (first + done) * SECTOR;
    Err(StorageError::BeyondEnd { offset: first * SECTOR, len_bytes: sectors * SECTOR, file_bytes })
}

fn check_end(offset: u64, len_bytes: u64, file_bytes: u64) -> Result<(), StorageError> {
    match offset.checked_add(len_bytes) {
        Some(end) if end <= file_bytes => Ok(()),
        _ => Err(StorageError::BeyondEnd { offset, len_bytes, file_bytes }),
    }
}
