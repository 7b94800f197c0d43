//! What a model file is known by: its fingerprint, which every load makes, and its SHA-256, which one load makes for all.

use crate::error::RunError;
use crate::identity::hex;
use crate::load::Location;
use crate::options::ModelHash;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use engine::ReadAt;
use model::{Format, ModelDescription};
use sha2::{Digest, Sha256};
use snapshot_format::ModelFile;

/// One sample of [`SAMPLE_BYTES`] goes into the fingerprint from each stretch of this length.
const SAMPLE_EVERY_BYTES: u64 = 1 << 20;
const SAMPLE_BYTES: u64 = 512;
/// Files up to this length go into the fingerprint whole.
const WHOLE_BYTES: u64 = 4 << 20;
/// Alignment of GGUF files that state none.
const GGUF_ALIGNMENT: u64 = 32;
/// Identity of a model's content: SHA-256 over its length and samples spread evenly over the file (a small file: all of it).
///
/// Sampling keeps loading at memory speed; it tells models apart but does not prove integrity: `model.sha256=` with 64 digits does.
pub(crate) struct Fingerprint {
    hasher: Sha256,
    at: u64,
    /// Bytes of each stretch that are hashed.
    sample_bytes: u64,
}

impl Fingerprint {
    pub(crate) fn new(file_bytes: u64) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(file_bytes.to_le_bytes());
        let sample_bytes = if file_bytes <= WHOLE_BYTES { SAMPLE_EVERY_BYTES } else { SAMPLE_BYTES };
        Self { hasher, at: 0, sample_bytes }
    }

    /// Takes in the next bytes of the file.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let phase = self.at % SAMPLE_EVERY_BYTES;
            let inside = phase < self.sample_bytes;
            let until = if inside { self.sample_bytes } else { SAMPLE_EVERY_BYTES };
            let take = usize::try_from(until - phase).unwrap_or(usize::MAX).min(bytes.len());
            if inside {
                self.hasher.update(&bytes[..take]);
            }
            self.at += take as u64;
            bytes = &bytes[take..];
        }
    }

    /// Takes in the file's bytes up to `end`, of which `read` gives those that count: it fills a buffer from an offset on.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) fn sample<E>(&mut self, end: u64, read: &ReadAt<'_, E>) -> Result<(), E> {
        let mut buffer = vec![0; self.sample_bytes as usize];
        while self.at < end {
            let phase = self.at % SAMPLE_EVERY_BYTES;
            let sample = &mut buffer[..self.sample_bytes.saturating_sub(phase).min(end - self.at) as usize];
            if !sample.is_empty() {
                read(self.at, sample)?;
                self.hasher.update(sample);
            }
            self.at = end.min(self.at - phase + SAMPLE_EVERY_BYTES);
        }
        Ok(())
    }

    /// The identity.
    pub(crate) fn finish(self) -> [u8; 32] {
        self.hasher.finalize().into()
    }
}

/// SHA-256 of a file whose exact end a raw disk does not tell: at every end it can have, from that of the last tensor on.
pub(crate) struct FileHash {
    hasher: Sha256,
    at: u64,
    ends: Vec<u64>,
    hashes: Vec<(u64, [u8; 32])>,
}

impl FileHash {
    /// GGUF files are padded to their alignment, by default and nearly always [`GGUF_ALIGNMENT`].
    pub(crate) fn new(data_end: u64) -> Self {
        let ends = [1, GGUF_ALIGNMENT, 64, 128, 256].map(|alignment| data_end.next_multiple_of(alignment));
        Self { hasher: Sha256::new(), at: 0, ends: ends.to_vec(), hashes: Vec::new() }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while let Some(&end) = self.ends.first() {
            let left = usize::try_from(end - self.at).unwrap_or(usize::MAX);
            if left > bytes.len() {
                break;
            }
            let (before, after) = bytes.split_at(left);
            self.hasher.update(before);
            self.at = end;
            self.hashes.push((end, self.hasher.clone().finalize().into()));
            self.ends.remove(0);
            bytes = after;
        }
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
    }

    /// Lengths and hashes, the last of all bytes.
    pub(crate) fn finish(mut self) -> Vec<(u64, [u8; 32])> {
        self.hashes.push((self.at, self.hasher.finalize().into()));
        self.hashes
    }
}

/// The SHA-256 of a model file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileSha256 {
    /// It is not known; why.
    Unknown(&'static str),
    /// Computed while this boot loaded.
    Computed(ModelFile),
    /// Computed by an earlier boot, for a file of the same fingerprint.
    Remembered(ModelFile),
}

impl FileSha256 {
    /// The file, if its hash is known.
    pub fn file(&self) -> Option<&ModelFile> {
        match self {
            FileSha256::Computed(file) | FileSha256::Remembered(file) => Some(file),
            FileSha256::Unknown(_) => None,
        }
    }
}

impl fmt::Display for FileSha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileSha256::Unknown(why) => {
                return write!(f, "the model's SHA-256 is not known (model.sha256=show computes it): {why}");
            }
            FileSha256::Computed(file) | FileSha256::Remembered(file) => {
                write!(f, "SHA-256 of the model's {} bytes: {}", file.len_bytes, hex(&file.sha256))?;
            }
        }
        match self {
            FileSha256::Remembered(_) => f.write_str(" (of an earlier boot)"),
            _ => Ok(()),
        }
    }
}

/// What loading does about the hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HashWork {
    /// Nothing; why.
    None(&'static str),
    /// Computes it.
    Compute,
    /// Computes it and refuses a file with another one.
    Require([u8; 32]),
}

impl HashWork {
    /// What `option` asks for; `needless` says why it need not be computed only to be remembered, if so.
    pub(crate) fn new(option: ModelHash, needless: impl FnOnce() -> Option<&'static str>) -> Self {
        match option {
            ModelHash::Off => HashWork::None("model.sha256=off"),
            ModelHash::Auto => needless().map_or(HashWork::Compute, HashWork::None),
            ModelHash::Show => HashWork::Compute,
            ModelHash::Is(expected) => HashWork::Require(expected),
        }
    }
}

/// Which of the hashes is the file's: the one asked for; else that at the end which the file has or, on a raw disk, which
/// files of its format have.
pub(crate) fn chosen_hash(
    hashes: &[(u64, [u8; 32])],
    location: &Location,
    description: &ModelDescription,
    required: Option<[u8; 32]>,
) -> Result<FileSha256, RunError> {
    let known = |&(len_bytes, sha256): &(u64, [u8; 32])| FileSha256::Computed(ModelFile { len_bytes, sha256 });
    let end_is_known = matches!(location, Location::Volume(_)) || !matches!(description.format, Format::Gguf { .. });
    let usual = hashes.iter().find(|(len, _)| !end_is_known && len.is_multiple_of(GGUF_ALIGNMENT)).or(hashes.last());
    let usual = usual.map_or(FileSha256::Unknown("there is no file"), known);
    let Some(expected) = required else { return Ok(usual) };
    hashes.iter().find(|(_, hash)| *hash == expected).map(known).ok_or_else(|| {
        let found = usual.file().map(|file| hex(&file.sha256)).unwrap_or_default();
        RunError::WrongModelHash { expected: hex(&expected), found }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(bytes: &[u8], chunk: usize) -> [u8; 32] {
        let mut fingerprint = Fingerprint::new(bytes.len() as u64);
        bytes.chunks(chunk).for_each(|chunk| fingerprint.update(chunk));
        fingerprint.finish()
    }

    fn sampled(bytes: &[u8], piece: usize) -> [u8; 32] {
        let mut fingerprint = Fingerprint::new(bytes.len() as u64);
        let read = |at, buf: &mut [u8]| -> Result<(), ()> {
            buf.copy_from_slice(&bytes[at as usize..][..buf.len()]);
            Ok(())
        };
        let ends = (0..bytes.len()).step_by(piece).map(|at| bytes.len().min(at + piece));
        ends.for_each(|end| fingerprint.sample(end as u64, &read).unwrap());
        fingerprint.finish()
    }

    #[test]
    fn fingerprints_do_not_depend_on_chunks_and_see_every_byte_of_a_small_file() {
        let small: Vec<u8> = (0..100_000u32).map(|i| (i * 31 % 251) as u8).collect();
        let id = fingerprint(&small, 4096);
        assert_eq!(id, fingerprint(&small, 777));
        assert_eq!(id, sampled(&small, 4096));
        for at in [0, 5000, 99_999] {
            let mut other = small.clone();
            other[at] ^= 1;
            assert_ne!(id, fingerprint(&other, 4096), "byte {at}");
        }
        let large: Vec<u8> = (0..WHOLE_BYTES as u32 + 5000).map(|i| (i / 251) as u8).collect();
        let id = fingerprint(&large, 1 << 20);
        for piece in [1 << 20, 3000, large.len()] {
            assert_eq!(id, sampled(&large, piece), "pieces of {piece} bytes");
        }
        assert_eq!(id, fingerprint(&large, 100_001));
        let mut other = large.clone();
        other[3 << 20] ^= 1;
        assert_ne!(id, fingerprint(&other, 1 << 20));
        assert_ne!(id, fingerprint(&large[..large.len() - 1], 1 << 20), "the length counts");
    }

    #[test]
    fn a_file_hash_finds_the_end_that_the_source_hides() {
        let file: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        let mut disk = file.clone();
        disk.resize(1024, 0);
        for data_end in [1000, 980] {
            let mut hash = FileHash::new(data_end);
            disk.chunks(100).for_each(|chunk| hash.update(chunk));
            // Data up to 980 is padded to 992 or 1024, not to 1000: then nothing matches.
            let hashes = hash.finish();
            let found = hashes.contains(&(1000, Sha256::digest(&file).into()));
            assert_eq!(found, data_end == 1000);
            assert_eq!(hashes.last(), Some(&(1024, Sha256::digest(&disk).into())));
        }
    }
}
