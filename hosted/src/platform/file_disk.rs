//! A file as a disk: the model, or a FAT16 image that holds the snapshot.

use super::{memory, threads};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;
use storage::{BlockDevice, DeviceError, SECTOR_BYTES, check_range};

/// Bytes brought into memory by the reader thread at a time.
const CHUNK_BYTES: u64 = 8 << 20;
/// Bytes read at a time where they are dropped: a buffer that stays in the caches.
const READ_BYTES: u64 = 1 << 20;

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

    /// `len_bytes` bytes from `offset` on, or fewer, but not none: straight from the page cache where the file can be
    /// mapped, else read.
    fn chunk(&self, offset: u64, len_bytes: usize) -> std::io::Result<Chunk> {
        let in_file =
            self.file_bytes.saturating_sub(offset).min(len_bytes as u64) as usize / SECTOR_BYTES * SECTOR_BYTES;
        if in_file > 0
            && let Ok(mapped) = memory::map_file(&self.file, offset, in_file)
        {
            return Ok(Chunk::Mapped(mapped));
        }
        let mut bytes = vec![0; len_bytes];
        self.read_padded(offset, &mut bytes)?;
        Ok(Chunk::Read(bytes))
    }

    fn read_padded(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let have = self.file_bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        self.file.read_exact_at(&mut buf[..have], offset)?;
        buf[have..].fill(0);
        Ok(())
    }
}

/// A stretch of a file in memory.
enum Chunk {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Chunk::Mapped(mapped) => mapped,
            Chunk::Read(bytes) => bytes,
        }
    }
}

fn failed(error: &std::io::Error, lba: u64, len_bytes: u64) -> DeviceError {
    DeviceError::Failed { lba, sectors: len_bytes / SECTOR_BYTES as u64, status: error.raw_os_error().unwrap_or(-1) }
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
        self.read_padded(lba * SECTOR_BYTES as u64, buf).map_err(|e| failed(&e, lba, buf.len() as u64))
    }

    fn write(&mut self, lba: u64, buf: &[u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        if self.read_only {
            return Err(DeviceError::ReadOnly { lba });
        }
        self.file.write_all_at(buf, lba * SECTOR_BYTES as u64).map_err(|e| failed(&e, lba, buf.len() as u64))
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
            // One chunk is brought into memory while `sink` works on another.
            let (tx, rx) = mpsc::sync_channel::<Result<Chunk, DeviceError>>(1);
            scope.spawn(move || {
                threads::work_beside_caller();
                let (mut at, end) = (lba * SECTOR_BYTES as u64, lba * SECTOR_BYTES as u64 + len_bytes);
                while at < end {
                    let chunk = disk.chunk(at, (end - at).min(CHUNK_BYTES) as usize);
                    let len = chunk.as_ref().map_or(end - at, |chunk| chunk.len() as u64);
                    let chunk = chunk.map_err(|e| failed(&e, at / SECTOR_BYTES as u64, len));
                    at += len;
                    if tx.send(chunk).is_err() {
                        return;
                    }
                }
            });
            for chunk in rx {
                sink(&chunk?);
            }
            Ok(())
        })
    }

    /// Mapping a file, as [`FileDisk::stream`] does, reads none of it.
    fn read_and_drop(&mut self, lba: u64, len_bytes: u64) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, len_bytes)?;
        let mut buf = vec![0; len_bytes.min(READ_BYTES) as usize];
        let (mut at, end) = (lba * SECTOR_BYTES as u64, lba * SECTOR_BYTES as u64 + len_bytes);
        while at < end {
            let part = &mut buf[..(end - at).min(READ_BYTES) as usize];
            self.read_padded(at, part).map_err(|e| failed(&e, at / SECTOR_BYTES as u64, part.len() as u64))?;
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
        let content: Vec<u8> = (0..3 * CHUNK_BYTES as usize + 700).map(|i| (i * 7 + i / 251) as u8).collect();
        File::create(&path).unwrap().write_all(&content).unwrap();
        let mut disk = FileDisk::open(&path, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(disk.len_bytes(), 3 * CHUNK_BYTES + 1024);
        let mut got = Vec::new();
        disk.stream(1, disk.len_bytes() - 512, &mut |chunk| got.extend_from_slice(chunk)).unwrap();
        assert_eq!(got[..content.len() - 512], content[512..]);
        assert!(got[content.len() - 512..].iter().all(|&b| b == 0));
        assert!(matches!(disk.write(0, &[0; 512]), Err(DeviceError::ReadOnly { lba: 0 })));
        let beyond = disk.len_bytes() / 512;
        assert!(matches!(disk.read(beyond, &mut [0; 512]), Err(DeviceError::OutOfRange { .. })));
    }
}
