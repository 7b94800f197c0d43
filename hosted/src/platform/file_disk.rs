//! A file as a disk: the model, or a FAT16 image that holds the snapshot.

use super::threads;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;
use storage::{BlockDevice, DeviceError, SECTOR_BYTES, SharedRead, check_range};

/// Bytes read at a time: a buffer that stays in the caches.
const READ_BYTES: u64 = 1 << 20;
/// Buffers of a stream: one is read into, one waits, one is used.
const STREAM_BUFFERS: usize = 3;

/// [`BlockDevice`] over a regular file or block special file. A length that is not a whole number of sectors is
/// rounded up, and the missing bytes read as zero.
pub struct FileDisk {
    file: File,
    file_bytes: u64,
    read_only: bool,
}

impl FileDisk {
    /// Opens `path`; with `writable` also for writing.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(path: &Path, writable: bool) -> std::io::Result<Self> {
        let mut file = File::options().read(true).write(writable).open(path)?;
        if file.metadata()?.is_dir() {
            return Err(std::io::ErrorKind::IsADirectory.into());
        }
        // Seeking, unlike metadata, also sizes block special files.
        let file_bytes = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
        Ok(Self { file, file_bytes, read_only: !writable })
    }

    fn read_padded(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let have = self.file_bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        self.file.read_exact_at(&mut buf[..have], offset).map_err(|error| match error.kind() {
            // It was longer when it was opened.
            ErrorKind::UnexpectedEof => {
                let device_sectors = self.file.metadata().map_or(0, |metadata| metadata.len()) / SECTOR_BYTES as u64;
                let (lba, sectors) = sectors(offset, have);
                DeviceError::OutOfRange { lba, sectors, device_sectors }
            }
            _ => failed(&error, offset, have),
        })?;
        buf[have..].fill(0);
        Ok(())
    }
}

/// The sectors that `len_bytes` bytes from `offset` on are in: the first, and how many.
fn sectors(offset: u64, len_bytes: usize) -> (u64, u64) {
    const SECTOR: u64 = SECTOR_BYTES as u64;
    let first = offset / SECTOR;
    (first, (offset + len_bytes as u64).div_ceil(SECTOR) - first)
}

fn failed(error: &std::io::Error, offset: u64, len_bytes: usize) -> DeviceError {
    let (lba, sectors) = sectors(offset, len_bytes);
    DeviceError::Failed { lba, sectors, status: error.raw_os_error().unwrap_or(-1) }
}

impl SharedRead for FileDisk {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let end = offset.saturating_add(buf.len() as u64).next_multiple_of(SECTOR_BYTES as u64);
        let first = offset / SECTOR_BYTES as u64 * SECTOR_BYTES as u64;
        check_range(self.len_bytes(), first / SECTOR_BYTES as u64, end - first)?;
        self.read_padded(offset, buf)
    }
}

impl BlockDevice for FileDisk {
    fn len_bytes(&self) -> u64 {
        self.file_bytes.next_multiple_of(SECTOR_BYTES as u64)
    }

    fn content_bytes(&self) -> u64 {
        self.file_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        self.read_padded(lba * SECTOR_BYTES as u64, buf)
    }

    fn write(&mut self, lba: u64, buf: &[u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        if self.read_only {
            return Err(DeviceError::ReadOnly { lba });
        }
        let offset = lba * SECTOR_BYTES as u64;
        self.file.write_all_at(buf, offset).map_err(|e| failed(&e, offset, buf.len()))
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| failed(&e, 0, 0))
    }

    fn stream(&mut self, lba: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, len_bytes)?;
        let disk = &*self;
        std::thread::scope(|scope| {
            // One chunk is read while `sink` works on another.
            let (used, empty) = mpsc::channel();
            let (full, chunks) = mpsc::sync_channel(STREAM_BUFFERS);
            (0..STREAM_BUFFERS).for_each(|_| used.send(Vec::new()).expect("the other end is open"));
            scope.spawn(move || {
                threads::work_beside_caller();
                let (mut at, end) = (lba * SECTOR_BYTES as u64, lba * SECTOR_BYTES as u64 + len_bytes);
                while at < end {
                    let Ok(mut chunk) = empty.recv() else { return };
                    chunk.resize((end - at).min(READ_BYTES) as usize, 0);
                    let outcome = disk.read_padded(at, &mut chunk);
                    at += chunk.len() as u64;
                    if full.send(outcome.map(|()| chunk)).is_err() {
                        return;
                    }
                }
            });
            for chunk in chunks {
                let chunk = chunk?;
                sink(&chunk);
                // A reader that is done waits for no more.
                let _ = used.send(chunk);
            }
            Ok(())
        })
    }

    fn shared(&self) -> Option<&dyn SharedRead> {
        Some(self)
    }

    /// One read after the other, by the calling thread.
    fn read_and_drop(&mut self, lba: u64, len_bytes: u64) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, len_bytes)?;
        let mut buf = vec![0; len_bytes.min(READ_BYTES) as usize];
        let (mut at, end) = (lba * SECTOR_BYTES as u64, lba * SECTOR_BYTES as u64 + len_bytes);
        while at < end {
            let part = &mut buf[..(end - at).min(READ_BYTES) as usize];
            self.read_padded(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_stream_gives_the_file_in_order_and_pads_the_last_sector() {
        let path = std::env::temp_dir().join(format!("bareflow-file-disk-{}", std::process::id()));
        let content: Vec<u8> = (0..5 * READ_BYTES as usize + 700).map(|i| (i * 7 + i / 251) as u8).collect();
        File::create(&path).unwrap().write_all(&content).unwrap();
        let mut disk = FileDisk::open(&path, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(disk.len_bytes(), 5 * READ_BYTES + 1024);
        let mut got = Vec::new();
        disk.stream(1, disk.len_bytes() - 512, &mut |chunk| got.extend_from_slice(chunk)).unwrap();
        assert_eq!(got[..content.len() - 512], content[512..]);
        assert!(got[content.len() - 512..].iter().all(|&b| b == 0));
        assert!(matches!(disk.write(0, &[0; 512]), Err(DeviceError::ReadOnly { lba: 0 })));
        let beyond = disk.len_bytes() / 512;
        assert!(matches!(disk.read(beyond, &mut [0; 512]), Err(DeviceError::OutOfRange { .. })));
    }
}
