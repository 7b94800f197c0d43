//! Views of an image file: the partition as a stream for `fatfs`, the whole disk as a block device for `storage`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use storage::{BlockDevice, DeviceError, SECTOR_BYTES, check_range};

/// Bytes `offset..offset + len` of a file as a stream of its own.
pub(crate) struct Window<'a> {
    file: &'a File,
    offset: u64,
    len: u64,
    at: u64,
}

impl<'a> Window<'a> {
    pub(crate) fn new(file: &'a File, offset: u64, len: u64) -> Self {
        Self { file, offset, len, at: 0 }
    }

    /// Moves the file to this window's position and returns how many of `wanted` bytes lie inside.
    fn enter(&mut self, wanted: usize) -> io::Result<usize> {
        self.file.seek(SeekFrom::Start(self.offset + self.at))?;
        let left = usize::try_from(self.len.saturating_sub(self.at)).unwrap_or(usize::MAX);
        Ok(wanted.min(left))
    }
}

impl Read for Window<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.enter(buf.len())?;
        let n = self.file.read(&mut buf[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Write for Window<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.enter(buf.len())?;
        let n = self.file.write(&buf[..n])?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Window<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at =
            at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek before the start of the partition"))?;
        Ok(self.at)
    }
}

/// A disk image, read-only, as the guest's block layer sees it.
pub(crate) struct ImageDevice<'a> {
    file: &'a File,
    len_bytes: u64,
}

impl<'a> ImageDevice<'a> {
    pub(crate) fn new(file: &'a File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file, len_bytes: len - len % SECTOR_BYTES as u64 })
    }
}

impl BlockDevice for ImageDevice<'_> {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes, lba, buf.len() as u64)?;
        let sectors = (buf.len() / SECTOR_BYTES) as u64;
        let mut file = self.file;
        file.seek(SeekFrom::Start(lba * SECTOR_BYTES as u64))
            .and_then(|_| file.read_exact(buf))
            .map_err(|e| DeviceError::Failed { lba, sectors, status: e.raw_os_error().unwrap_or(-1) })
    }

    fn write(&mut self, lba: u64, _buf: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly { lba })
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}
