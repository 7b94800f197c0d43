//! A disk in memory: the boot volume of hosted tests, and what [`crate::fault::FaultDisk`] leaves behind.

use crate::device::{BlockDevice, DeviceError, SECTOR_BYTES, check_range};
use alloc::vec::Vec;

/// A disk in memory. A write is durable at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryDisk {
    bytes: Vec<u8>,
    read_only: bool,
}

impl MemoryDisk {
    /// A writable disk that holds `image`, padded with zeros to a whole sector.
    pub fn new(mut image: Vec<u8>) -> Self {
        image.resize(image.len().next_multiple_of(SECTOR_BYTES), 0);
        Self { bytes: image, read_only: false }
    }

    /// The same disk with writes refused or allowed.
    pub fn with_read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// The whole disk.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The whole disk, for tests that damage it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Gives the image back.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

impl BlockDevice for MemoryDisk {
    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        let at = lba as usize * SECTOR_BYTES;
        buf.copy_from_slice(&self.bytes[at..at + buf.len()]);
        Ok(())
    }

    fn write(&mut self, lba: u64, buf: &[u8]) -> Result<(), DeviceError> {
        if self.read_only {
            return Err(DeviceError::ReadOnly { lba });
        }
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        let at = lba as usize * SECTOR_BYTES;
        self.bytes[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}
