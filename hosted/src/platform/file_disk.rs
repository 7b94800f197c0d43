//! A file as a disk: the model, or a FAT16 image that holds the snapshot.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;
use storage::{BlockDevice, DeviceError, SECTOR_BYTES, check_range};

/// Bytes read by the reader thread at a time.
const CHUNK_BYTES: usize = 4 << 20;

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
        // Seeking, unlike metadata, also sizes block special files.
        let file_bytes = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
        Ok(Self { file, file_bytes, read_only: !writable })
    }

    fn read_padded(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let have = self.file_bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        self.file.read_exact_at(&mut buf[..have], offset)?;
        buf[have..].fill(0);
        Ok(())
    }
}

fn failed(error: &std::io::Error, lba: u64, len_bytes: u64) -> DeviceError {
    DeviceError::Failed { lba, sectors: len_bytes / SECTOR_BYTES as u64, status: error.raw_os_error().unwrap_or(-1) }
}

impl BlockDevice for FileDisk {
    fn len_bytes(&self) -> u64 {
        self.file_bytes.next_multiple_of(SECTOR_BYTES as u64)
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
            // Two buffers go round: one is being filled while `sink` works on the other.
            let (full_tx, full_rx) = mpsc::sync_channel::<Result<Vec<u8>, DeviceError>>(2);
            let (free_tx, free_rx) = mpsc::channel::<Vec<u8>>();
            for _ in 0..2 {
                free_tx.send(vec![0; CHUNK_BYTES.min(len_bytes as usize)]).expect("the receiver is alive");
            }
            scope.spawn(move || {
                let mut done = 0;
                while done < len_bytes {
                    let Ok(mut buf) = free_rx.recv() else { return };
                    buf.truncate((len_bytes - done).min(CHUNK_BYTES as u64) as usize);
                    let at = lba * SECTOR_BYTES as u64 + done;
                    let result = disk.read_padded(at, &mut buf);
                    done += buf.len() as u64;
                    let failure = result.err().map(|e| failed(&e, at / SECTOR_BYTES as u64, buf.len() as u64));
                    if full_tx.send(failure.map_or(Ok(buf), Err)).is_err() {
                        return;
                    }
                }
            });
            for chunk in full_rx {
                let chunk = chunk?;
                sink(&chunk);
                // The reader has ended after the last chunk and no longer takes buffers back.
                let _ = free_tx.send(chunk);
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_stream_gives_the_file_in_order_and_pads_the_last_sector() {
        let path = std::env::temp_dir().join(format!("bareflow-file-disk-{}", std::process::id()));
        let content: Vec<u8> = (0..3 * CHUNK_BYTES + 700).map(|i| (i * 7 + i / 251) as u8).collect();
        File::create(&path).unwrap().write_all(&content).unwrap();
        let mut disk = FileDisk::open(&path, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(disk.len_bytes(), (3 * CHUNK_BYTES + 1024) as u64);
        let mut got = Vec::new();
        disk.stream(1, disk.len_bytes() - 512, &mut |chunk| got.extend_from_slice(chunk)).unwrap();
        assert_eq!(got[..content.len() - 512], content[512..]);
        assert!(got[content.len() - 512..].iter().all(|&b| b == 0));
        assert!(matches!(disk.write(0, &[0; 512]), Err(DeviceError::ReadOnly { lba: 0 })));
        let beyond = disk.len_bytes() / 512;
        assert!(matches!(disk.read(beyond, &mut [0; 512]), Err(DeviceError::OutOfRange { .. })));
    }
}
