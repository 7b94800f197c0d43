//! Finds the model, reads its header, and streams its weights into the arena once.

use crate::error::RunError;
use crate::identity::hex;
use crate::options::Options;
use crate::platform::Platform;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use model::formats::{self, FileFormat, HeaderBytes};
use model::{ModelDescription, ModelError, gguf, llama2c};
use sha2::{Digest, Sha256};
use storage::{ByteSource, FatFile, FatVolume, FileSource, RawDisk, SECTOR_BYTES, StorageError};

/// Weights are streamed in pieces of this size, so that progress can be printed between them.
const PIECE_BYTES: u64 = 64 << 20;
/// One sample of [`SAMPLE_BYTES`] goes into the fingerprint from each stretch of this length.
const SAMPLE_EVERY_BYTES: u64 = 1 << 20;
const SAMPLE_BYTES: u64 = 4 << 10;
/// Files up to this length go into the fingerprint whole.
const WHOLE_BYTES: u64 = 4 << 20;
/// Bytes read to measure the raw device rate.
const RAW_RATE_BYTES: u64 = 64 << 20;

/// Where the model file is.
#[derive(Clone, Debug)]
pub enum Location {
    /// Byte 0 of the model disk is byte 0 of the file.
    RawDisk,
    /// A file of the boot volume.
    Volume(FatFile),
}

/// Extensions that a model file on the boot volume can have (8.3 names).
const MODEL_EXTENSIONS: [&str; 3] = ["GGU", "GGF", "BIN"];

/// Finds the model: the file named by `model=`, else the model disk, else the only model file on the boot volume.
///
/// # Errors
/// [`RunError::NoModel`] and storage errors.
pub fn locate(platform: &mut dyn Platform, options: &Options) -> Result<Location, RunError> {
    if options.model.is_empty() && platform.model_disk().is_some() {
        return Ok(Location::RawDisk);
    }
    let Some(disk) = platform.boot_disk() else {
        return Err(RunError::NoModel { looked_for: options.model.clone(), found: Vec::new() });
    };
    let volume = FatVolume::open(disk)?;
    if !options.model.is_empty() {
        return Ok(Location::Volume(volume.find(disk, &options.model)?));
    }
    let names: Vec<String> = volume
        .list(disk, "")?
        .into_iter()
        .filter(|entry| !entry.is_dir)
        .map(|entry| entry.name.to_string())
        .filter(|name| {
            MODEL_EXTENSIONS.iter().any(|e| name.strip_suffix(e).is_some_and(|stem| stem.ends_with('.')))
                && !name.starts_with("SNAP")
                && !name.starts_with("TOK")
        })
        .collect();
    match names.as_slice() {
        [name] => Ok(Location::Volume(volume.find(disk, name)?)),
        _ => Err(RunError::NoModel { looked_for: String::new(), found: names }),
    }
}

/// Runs `work` on the model file's bytes.
fn with_source<T>(
    platform: &mut dyn Platform,
    location: &Location,
    work: impl FnOnce(&mut dyn ByteSource) -> Result<T, StorageError>,
) -> Result<T, RunError> {
    let no_model = || RunError::NoModel { looked_for: String::new(), found: Vec::new() };
    Ok(match location {
        Location::RawDisk => work(&mut RawDisk::new(platform.model_disk().ok_or_else(no_model)?))?,
        Location::Volume(file) => work(&mut FileSource::new(platform.boot_disk().ok_or_else(no_model)?, file))?,
    })
}

/// Reads the header of the model at `location` and describes it. `tokenizer` is the content of a llama2.c tokenizer file.
///
/// # Errors
/// Storage errors, or [`RunError::Model`] with what is wrong in the file.
pub fn describe(
    platform: &mut dyn Platform,
    location: &Location,
    tokenizer: Option<&[u8]>,
) -> Result<ModelDescription, RunError> {
    with_source(platform, location, |source| Ok(describe_source(source, tokenizer)))?
}

/// Reads the header of a model and describes it.
///
/// # Errors
/// As [`describe`].
pub fn describe_source(source: &mut dyn ByteSource, tokenizer: Option<&[u8]>) -> Result<ModelDescription, RunError> {
    let mut file_bytes = source.len_bytes();
    let mut len = HeaderBytes::of(file_bytes);
    loop {
        let mut header = vec![0; len.len()];
        source.read_at(0, &mut header)?;
        match read_header(&header, file_bytes, tokenizer) {
            Err(RunError::Model(error)) if len.grow(&error) => {}
            // A raw disk is whole sectors: the last one holds up to 511 bytes that are not the file's.
            Err(RunError::Model(ModelError::TrailingBytes { expected_bytes, .. }))
                if expected_bytes < file_bytes
                    && expected_bytes.next_multiple_of(SECTOR_BYTES as u64) == file_bytes =>
            {
                file_bytes = expected_bytes;
                len = HeaderBytes::of(file_bytes);
            }
            other => return other,
        }
    }
}

fn read_header(header: &[u8], file_bytes: u64, tokenizer: Option<&[u8]>) -> Result<ModelDescription, RunError> {
    Ok(match formats::sniff(header, file_bytes)? {
        FileFormat::Gguf => gguf::read(header, file_bytes)?,
        FileFormat::Llama2c => llama2c::read(header, file_bytes, tokenizer.ok_or(RunError::NoTokenizer)?)?,
    })
}

/// A file of the boot volume, whole; `None` when there is no boot volume or no such file.
///
/// # Errors
/// Storage errors other than a missing file; [`RunError::FileTooLong`] for one of more than `max_bytes`.
pub fn boot_file(platform: &mut dyn Platform, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, RunError> {
    let Some(disk) = platform.boot_disk() else { return Ok(None) };
    let volume = FatVolume::open(disk)?;
    let file = match volume.find(disk, name) {
        Ok(file) => file,
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if file.len_bytes > max_bytes {
        return Err(RunError::FileTooLong { name: name.into(), len_bytes: file.len_bytes, max_bytes });
    }
    let mut bytes = vec![0; file.len_bytes as usize];
    FileSource::new(disk, &file).read_at(0, &mut bytes)?;
    Ok(Some(bytes))
}

/// Identity of a model's content: SHA-256 over its length and samples spread evenly over the file (a small file: all of it).
///
/// Sampling keeps loading at memory speed; it tells models apart but does not prove integrity: `model.sha256=` does.
pub struct Fingerprint {
    hasher: Sha256,
    at: u64,
    /// Bytes of each stretch that are hashed.
    sample_bytes: u64,
}

impl Fingerprint {
    fn new(file_bytes: u64) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(file_bytes.to_le_bytes());
        let sample_bytes = if file_bytes <= WHOLE_BYTES { SAMPLE_EVERY_BYTES } else { SAMPLE_BYTES };
        Self { hasher, at: 0, sample_bytes }
    }

    /// Takes in the next bytes of the file.
    fn update(&mut self, mut bytes: &[u8]) {
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
}

/// SHA-256 of a file whose exact end a raw disk does not tell: at the end of the last tensor, at GGUF's padding
/// behind it, and at the end of the source.
struct FileHash {
    hasher: Sha256,
    at: u64,
    ends: Vec<u64>,
    hashes: Vec<[u8; 32]>,
}

impl FileHash {
    fn new(data_end: u64) -> Self {
        Self { hasher: Sha256::new(), at: 0, ends: vec![data_end, data_end.next_multiple_of(32)], hashes: Vec::new() }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while let Some(&end) = self.ends.first() {
            let left = usize::try_from(end - self.at).unwrap_or(usize::MAX);
            if left > bytes.len() {
                break;
            }
            let (before, after) = bytes.split_at(left);
            self.hasher.update(before);
            self.at = end;
            self.hashes.push(self.hasher.clone().finalize().into());
            self.ends.remove(0);
            bytes = after;
        }
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
    }

    fn finish(mut self) -> Vec<[u8; 32]> {
        self.hashes.push(self.hasher.finalize().into());
        self.hashes
    }
}

/// What loading gave besides the weights.
pub struct Loaded {
    /// Content identity.
    pub fingerprint: [u8; 32],
    /// SHA-256 of the file, when it was asked for.
    pub sha256: Option<[u8; 32]>,
    /// Bytes read.
    pub bytes: u64,
    /// Ticks of the whole load, packing included.
    pub ticks: u64,
}

/// Streams the file once and hands every byte to `feed` with its offset.
///
/// # Errors
/// Storage errors, or [`RunError::WrongModelHash`].
pub fn stream(
    platform: &mut dyn Platform,
    location: &Location,
    description: &ModelDescription,
    options: &Options,
    feed: &mut dyn FnMut(u64, &[u8]),
) -> Result<Loaded, RunError> {
    // Bytes after the last tensor are padding, of a length that depends on where the file lies.
    let data_end = description.tensors.iter().map(|tensor| tensor.end()).max().unwrap_or(0);
    let len_bytes = if options.model_sha256.is_some() { description.file_bytes } else { data_end };
    let start = engine::cycles();
    let mut fingerprint = Fingerprint::new(data_end);
    let mut whole = options.model_sha256.map(|_| FileHash::new(data_end));
    let mut offset = 0;
    while offset < len_bytes {
        let piece = PIECE_BYTES.min(len_bytes - offset);
        let mut at = offset;
        with_source(platform, location, |source| {
            source.stream(offset, piece, &mut |bytes| {
                fingerprint.update(&bytes[..bytes.len().min(data_end.saturating_sub(at) as usize)]);
                if let Some(hasher) = &mut whole {
                    hasher.update(bytes);
                }
                feed(at, bytes);
                at += bytes.len() as u64;
            })
        })?;
        offset += piece;
        if offset < len_bytes {
            let text = alloc::format!("loading model: {} of {} MiB\n", offset >> 20, len_bytes >> 20);
            platform.print(&text);
        }
    }
    let ticks = engine::cycles().saturating_sub(start);
    let sha256 = match (whole.map(FileHash::finish), options.model_sha256) {
        (Some(found), Some(expected)) if !found.contains(&expected) => {
            let found = found.last().map(|hash| hex(hash)).unwrap_or_default();
            return Err(RunError::WrongModelHash { expected: hex(&expected), found });
        }
        (_, expected) => expected,
    };
    Ok(Loaded { fingerprint: fingerprint.hasher.finalize().into(), sha256, bytes: len_bytes, ticks })
}

/// Ticks that reading the file's first bytes takes without using them, and how many bytes those were.
///
/// # Errors
/// Storage errors.
pub fn raw_rate(platform: &mut dyn Platform, location: &Location) -> Result<(u64, u64), RunError> {
    with_source(platform, location, |source| {
        let len_bytes = source.len_bytes().min(RAW_RATE_BYTES);
        let start = engine::cycles();
        source.stream(0, len_bytes, &mut |_| {})?;
        Ok((len_bytes, engine::cycles().saturating_sub(start)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(bytes: &[u8], chunk: usize) -> [u8; 32] {
        let mut fingerprint = Fingerprint::new(bytes.len() as u64);
        bytes.chunks(chunk).for_each(|chunk| fingerprint.update(chunk));
        fingerprint.hasher.finalize().into()
    }

    #[test]
    fn fingerprints_do_not_depend_on_chunks_and_see_every_byte_of_a_small_file() {
        let small: Vec<u8> = (0..100_000u32).map(|i| (i * 31 % 251) as u8).collect();
        let id = fingerprint(&small, 4096);
        assert_eq!(id, fingerprint(&small, 777));
        for at in [0, 5000, 99_999] {
            let mut other = small.clone();
            other[at] ^= 1;
            assert_ne!(id, fingerprint(&other, 4096), "byte {at}");
        }
        let large = vec![7u8; WHOLE_BYTES as usize + 5000];
        let id = fingerprint(&large, 1 << 20);
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
            // Data up to 980 is padded to 992, not to 1000: then only the end of the source could match.
            let found = hash.finish().contains(&Sha256::digest(&file).into());
            assert_eq!(found, data_end == 1000);
        }
    }
}
