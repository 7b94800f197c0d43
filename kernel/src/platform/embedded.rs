//! A model file that is part of the image, as a read-only disk.

use storage::{BlockDevice, DeviceError, SECTOR_BYTES, check_range};

/// The file, its last sector filled up with zeros.
pub struct EmbeddedModel {
    file: &'static [u8],
}

impl EmbeddedModel {
    /// A disk that holds `file` from byte 0.
    pub fn new(file: &'static [u8]) -> Self {
        Self { file }
    }
}

impl BlockDevice for EmbeddedModel {
    fn len_bytes(&self) -> u64 {
        self.file.len().next_multiple_of(SECTOR_BYTES) as u64
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        let rest = self.file.get(lba as usize * SECTOR_BYTES..).unwrap_or(&[]);
        let (data, padding) = buf.split_at_mut(rest.len().min(buf.len()));
        data.copy_from_slice(&rest[..data.len()]);
        padding.fill(0);
        Ok(())
    }

    fn write(&mut self, lba: u64, _buf: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly { lba })
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Hands out the file itself, in place.
    fn stream(&mut self, lba: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, len_bytes)?;
        let rest = self.file.get(lba as usize * SECTOR_BYTES..).unwrap_or(&[]);
        let whole = &rest[..rest.len().min(len_bytes as usize)];
        if !whole.is_empty() {
            sink(whole);
        }
        let padding = len_bytes as usize - whole.len();
        if padding > 0 {
            sink(&[0; SECTOR_BYTES][..padding]);
        }
        Ok(())
    }
}
