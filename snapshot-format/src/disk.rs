//! The slots as files of a FAT16 volume: preallocated, found once, written in place.

use crate::commit::{Medium, Slot};
use storage::{BlockDevice, ByteSource, FatFile, FatVolume, FileSource, StorageError, write_in_place};

/// Both slot files of a boot volume.
pub struct DiskMedium<'a> {
    dev: &'a mut dyn BlockDevice,
    a: Result<FatFile, StorageError>,
    b: Result<FatFile, StorageError>,
}

impl<'a> DiskMedium<'a> {
    /// Finds the slot files in the root directory of the FAT16 volume on `dev`. A slot that is missing or damaged is
    /// reported when it is used, so that the other can be.
    ///
    /// # Errors
    /// [`StorageError`] when there is no FAT16 volume.
    pub fn open(dev: &'a mut dyn BlockDevice) -> Result<Self, StorageError> {
        let volume = FatVolume::open(dev)?;
        let [a, b] = Slot::ALL.map(|slot| volume.find(dev, slot.file_name()));
        Ok(Self { dev, a, b })
    }

    fn file(&self, slot: Slot) -> Result<&FatFile, StorageError> {
        let file = if slot == Slot::A { &self.a } else { &self.b };
        file.as_ref().map_err(Clone::clone)
    }
}

impl Medium for DiskMedium<'_> {
    fn slot_len_bytes(&self, slot: Slot) -> Result<u64, StorageError> {
        Ok(self.file(slot)?.len_bytes)
    }

    fn read_only(&self) -> bool {
        self.dev.read_only()
    }

    fn read(&mut self, slot: Slot, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        let file = self.file(slot)?.clone();
        FileSource::new(self.dev, &file).read_at(offset, buf)
    }

    fn write(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> Result<(), StorageError> {
        let file = self.file(slot)?.clone();
        write_in_place(self.dev, &file, offset, bytes)
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(self.dev.flush()?)
    }
}
