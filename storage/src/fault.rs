//! Test equipment: a disk that fails, tears a sector, or loses power at a chosen sector write.
//!
//! The model of a power cut: sectors are written one at a time; writes since the last flush sit in a volatile cache
//! and each of them may or may not have reached the medium; the sector being written when power goes is old, new, or
//! new up to some byte and old after it. After the cut every request fails until [`FaultDisk::power_on`].
//! Nothing in the data path uses this module.

use crate::device::{BlockDevice, DeviceError, SECTOR_BYTES, check_range};
use crate::memory::MemoryDisk;
use alloc::vec::Vec;

/// Status of the [`DeviceError::Failed`] that every injected failure reports.
pub const FAULT_STATUS: i32 = -5;

/// What happens at the chosen sector write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The request fails at this sector; the sector keeps its content and the device goes on working.
    Fail,
    /// Power is lost before the sector is written.
    Cut,
    /// Power is lost while the sector is written: its first `new_bytes` bytes are new.
    Tear {
        /// Bytes that reached the medium, at most 512.
        new_bytes: usize,
    },
}

/// What a power cut does to writes that were not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unflushed {
    /// They all reached the medium.
    Kept,
    /// None did.
    Dropped,
    /// Each did or did not, by the bits of a generator with this seed: as after reordering in the device.
    Some {
        /// Seed.
        seed: u64,
    },
}

/// A disk in memory with one planned fault.
#[derive(Clone, Debug)]
pub struct FaultDisk {
    /// What the medium holds.
    medium: MemoryDisk,
    /// Writes since the last flush, oldest first.
    cache: Vec<(u64, [u8; SECTOR_BYTES])>,
    fault: Option<(u64, Fault)>,
    unflushed: Unflushed,
    failing_read: Option<u64>,
    sector_writes: u64,
    flushes: u64,
    powered: bool,
}

impl FaultDisk {
    /// A disk that holds `medium` and works.
    pub fn new(medium: MemoryDisk) -> Self {
        Self {
            medium,
            cache: Vec::new(),
            fault: None,
            unflushed: Unflushed::Dropped,
            failing_read: None,
            sector_writes: 0,
            flushes: 0,
            powered: true,
        }
    }

    /// Plans `fault` for the sector write with index `at` (0 is the first), and the fate of unflushed writes.
    pub fn with_fault(mut self, at: u64, fault: Fault, unflushed: Unflushed) -> Self {
        (self.fault, self.unflushed) = (Some((at, fault)), unflushed);
        self
    }

    /// Makes every read that covers sector `lba` fail.
    pub fn with_failing_read(mut self, lba: u64) -> Self {
        self.failing_read = Some(lba);
        self
    }

    /// Sector writes so far, the failed one included.
    pub fn sector_writes(&self) -> u64 {
        self.sector_writes
    }

    /// Flushes so far.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// False once the planned cut has happened.
    pub fn is_powered(&self) -> bool {
        self.powered
    }

    /// Cuts power now.
    pub fn cut(&mut self) {
        if core::mem::replace(&mut self.powered, false) {
            let mut state = match self.unflushed {
                Unflushed::Some { seed } => seed | 1,
                _ => 1,
            };
            for (lba, sector) in core::mem::take(&mut self.cache) {
                // xorshift64: any generator does, it only has to be the same for the same seed.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let kept = match self.unflushed {
                    Unflushed::Kept => true,
                    Unflushed::Dropped => false,
                    Unflushed::Some { .. } => state >> 63 == 1,
                };
                if kept {
                    self.commit(lba, &sector);
                }
            }
        }
    }

    /// What a reader finds after power is back: the medium, with the cache lost as planned.
    pub fn power_on(mut self) -> MemoryDisk {
        self.cut();
        self.medium
    }

    fn commit(&mut self, lba: u64, sector: &[u8; SECTOR_BYTES]) {
        let at = lba as usize * SECTOR_BYTES;
        self.medium.bytes_mut()[at..at + SECTOR_BYTES].copy_from_slice(sector);
    }

    fn check_power(&self, lba: u64, len_bytes: usize) -> Result<(), DeviceError> {
        let failed = DeviceError::Failed { lba, sectors: (len_bytes / SECTOR_BYTES) as u64, status: FAULT_STATUS };
        if self.powered { Ok(()) } else { Err(failed) }
    }
}

impl BlockDevice for FaultDisk {
    fn len_bytes(&self) -> u64 {
        self.medium.len_bytes()
    }

    fn read_only(&self) -> bool {
        self.medium.read_only()
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.check_power(lba, buf.len())?;
        self.medium.read(lba, buf)?;
        let sectors = (buf.len() / SECTOR_BYTES) as u64;
        if self.failing_read.is_some_and(|bad| (lba..lba + sectors).contains(&bad)) {
            return Err(DeviceError::Failed { lba, sectors, status: FAULT_STATUS });
        }
        // The device reads its own cache: newest last.
        for (cached, sector) in &self.cache {
            if let Some(at) = cached.checked_sub(lba).filter(|at| *at < sectors) {
                let at = at as usize * SECTOR_BYTES;
                buf[at..at + SECTOR_BYTES].copy_from_slice(sector);
            }
        }
        Ok(())
    }

    fn write(&mut self, lba: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.check_power(lba, buf.len())?;
        if self.read_only() {
            return Err(DeviceError::ReadOnly { lba });
        }
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        for (i, sector) in buf.as_chunks::<SECTOR_BYTES>().0.iter().enumerate() {
            let (at, index) = (lba + i as u64, self.sector_writes);
            self.sector_writes += 1;
            match self.fault {
                Some((planned, fault)) if planned == index => {
                    if let Fault::Tear { new_bytes } = fault {
                        let mut torn = [0; SECTOR_BYTES];
                        self.read(at, &mut torn)?;
                        let new_bytes = new_bytes.min(SECTOR_BYTES);
                        torn[..new_bytes].copy_from_slice(&sector[..new_bytes]);
                        self.cut();
                        self.commit(at, &torn);
                    } else if fault == Fault::Cut {
                        self.cut();
                    }
                    return Err(DeviceError::Failed { lba: at, sectors: 1, status: FAULT_STATUS });
                }
                _ => self.cache.push((at, *sector)),
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        self.check_power(0, 0)?;
        self.flushes += 1;
        for (lba, sector) in core::mem::take(&mut self.cache) {
            self.commit(lba, &sector);
        }
        Ok(())
    }
}
