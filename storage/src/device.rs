//! The sector device under everything: what a driver implements and what can go wrong in it.

use alloc::vec;

/// Bytes in a sector. Every device here has this sector size; a disk with another one is refused by its driver.
pub const SECTOR_BYTES: usize = 512;

/// Bytes of one request of the default [`BlockDevice::stream`].
pub const STREAM_CHUNK_BYTES: usize = 1 << 20;

/// A transfer that did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeviceError {
    /// The transfer reaches past the last sector. Nothing was transferred.
    #[error(
        "sectors {lba}..{lba}+{sectors} were asked for, but the device has {device_sectors} sectors; the image is truncated or the file system on it is damaged"
    )]
    OutOfRange {
        /// First sector asked for.
        lba: u64,
        /// Sectors asked for.
        sectors: u64,
        /// Sectors the device has.
        device_sectors: u64,
    },
    /// The buffer is not a whole number of sectors: a bug in the caller.
    #[error("a transfer of {len_bytes} bytes is not a whole number of 512-byte sectors")]
    Unaligned {
        /// Length of the buffer.
        len_bytes: u64,
    },
    /// A write to a device that cannot be written.
    #[error("write to sector {lba} refused: the device is read-only; attach it writable to keep a snapshot")]
    ReadOnly {
        /// First sector of the write.
        lba: u64,
    },
    /// The device reported a failure. A write may have happened in part.
    #[error(
        "the device failed on sectors {lba}..{lba}+{sectors} with status {status}; check the disk image and the host's storage"
    )]
    Failed {
        /// First sector of the request.
        lba: u64,
        /// Sectors in the request.
        sectors: u64,
        /// The driver's own status (virtio-blk: the status byte; hosted: errno).
        status: i32,
    },
    /// The device did not answer in the time its driver allows.
    #[error("the device did not answer within {timeout_ms} ms on sectors {lba}..{lba}+{sectors}")]
    Timeout {
        /// First sector of the request.
        lba: u64,
        /// Sectors in the request.
        sectors: u64,
        /// The driver's limit.
        timeout_ms: u32,
    },
}

/// A disk of 512-byte sectors.
pub trait BlockDevice {
    /// Capacity in bytes, a multiple of [`SECTOR_BYTES`].
    fn len_bytes(&self) -> u64;

    /// Bytes of it that hold something, where the device knows: a file is filled up with zeros to whole sectors.
    fn content_bytes(&self) -> u64 {
        self.len_bytes()
    }

    /// True when every write will be refused.
    fn read_only(&self) -> bool;

    /// Fills `buf` (a whole number of sectors) from sector `lba` on.
    ///
    /// # Errors
    /// [`DeviceError`]; the content of `buf` is then unspecified.
    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError>;

    /// Writes `buf` (a whole number of sectors) from sector `lba` on. Durable only after [`BlockDevice::flush`].
    ///
    /// # Errors
    /// [`DeviceError`]; any of the sectors may then hold old, new or (one of them) mixed bytes.
    fn write(&mut self, lba: u64, buf: &[u8]) -> Result<(), DeviceError>;

    /// Returns when every earlier write is durable.
    ///
    /// # Errors
    /// [`DeviceError`]; which of the earlier writes are durable is then unknown.
    fn flush(&mut self) -> Result<(), DeviceError>;

    /// Says that the next request will be a [`BlockDevice::stream`] from sector `lba` on: an implementation may begin to read
    /// what that needs first. What goes wrong is the stream's to tell. Any other request may come first, and costs time.
    fn read_ahead(&mut self, _lba: u64, _len_bytes: u64) {}

    /// Reads `len_bytes` (a whole number of sectors) from sector `lba` on and hands consecutive chunks to `sink`, each
    /// a whole number of sectors, in order. An implementation may have later chunks under way while `sink` runs; this
    /// default reads [`STREAM_CHUNK_BYTES`] at a time.
    ///
    /// # Errors
    /// [`DeviceError`]; `sink` has then seen only the chunks before the failed one.
    fn stream(&mut self, lba: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, len_bytes)?;
        let chunk_bytes = usize::try_from(len_bytes).unwrap_or(usize::MAX).min(STREAM_CHUNK_BYTES);
        let mut chunk = vec![0; chunk_bytes];
        let (mut lba, mut left) = (lba, len_bytes);
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            let part = &mut chunk[..now];
            self.read(lba, part)?;
            sink(part);
            lba += (now / SECTOR_BYTES) as u64;
            left -= now as u64;
        }
        Ok(())
    }

    /// The device as one that several cores can read at once, where it is one.
    fn shared(&self) -> Option<&dyn SharedRead> {
        None
    }

    /// Reads as [`BlockDevice::stream`] does and drops the bytes: what a load is measured against. To be overridden where
    /// streaming alone reads nothing yet.
    ///
    /// # Errors
    /// As [`BlockDevice::stream`].
    fn read_and_drop(&mut self, lba: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.stream(lba, len_bytes, &mut |_| {})
    }
}

/// A device that several cores can read at once, each what it works on next.
pub trait SharedRead: Sync {
    /// Fills `buf` from byte `offset` on; neither needs to be whole sectors.
    ///
    /// # Errors
    /// [`DeviceError`]; the content of `buf` is then unspecified.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError>;
}

/// Checks that a transfer is whole sectors and inside a device: what every [`BlockDevice`] does first.
///
/// # Errors
/// [`DeviceError::Unaligned`] or [`DeviceError::OutOfRange`].
pub fn check_range(device_bytes: u64, lba: u64, len_bytes: u64) -> Result<(), DeviceError> {
    const SECTOR: u64 = SECTOR_BYTES as u64;
    if !len_bytes.is_multiple_of(SECTOR) {
        return Err(DeviceError::Unaligned { len_bytes });
    }
    let (sectors, device_sectors) = (len_bytes / SECTOR, device_bytes / SECTOR);
    match lba.checked_add(sectors) {
        Some(end) if end <= device_sectors => Ok(()),
        _ => Err(DeviceError::OutOfRange { lba, sectors, device_sectors }),
    }
}
