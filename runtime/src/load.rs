//! Finds the model, reads its header, and streams its weights into the arena once.

use crate::error::RunError;
use crate::hash::{FileHash, FileSha256, Fingerprint, HashWork, chosen_hash};
use crate::options::{DEFAULT_SIGNATURE, Options};
use crate::platform::{Platform, WhichDisk};
use crate::signature;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use engine::Loader;
use engine::workers::{Single, Workers};
use model::formats::{self, FileFormat, HeaderBytes};
use model::{ModelDescription, ModelError, gguf, llama2c};
use spin::Mutex;
use storage::{ByteSource, FatFile, FatVolume, FileSource, RawDisk, SECTOR_BYTES, StorageError};

/// Long files are streamed in pieces of this size, so that progress can be printed between them. At the end of a piece
/// nothing is in flight, which costs as much as reading another 3 MiB.
const PIECE_BYTES: u64 = 128 << 20;
/// Models up to this length load in a fraction of a second: a line of progress would only delay the answer.
const PROGRESS_FROM_BYTES: u64 = 512 << 20;
/// Longest tokenizer file.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Bytes of a signature file that are read: enough to say how long a wrong one is.
const MAX_SIGNATURE_BYTES: u64 = 64 << 10;
/// Bytes read to measure the raw device rate.
const RAW_RATE_BYTES: u64 = 64 << 20;
/// How often they are read.
const RAW_RATE_PASSES: usize = 3;

/// Where the model file is.
#[derive(Clone, Debug)]
pub enum Location {
    /// Byte 0 of the model disk is byte 0 of the file.
    RawDisk,
    /// A file of the boot volume.
    Volume(FatFile),
}

impl Location {
    /// The disk it is on.
    pub fn disk(&self) -> WhichDisk {
        match self {
            Location::RawDisk => WhichDisk::Model,
            Location::Volume(_) => WhichDisk::Boot,
        }
    }
}

/// Extensions that only model files on the boot volume have (8.3 names).
const MODEL_EXTENSIONS: [&str; 2] = ["GGU", "GGF"];

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
        .filter(|name| match name.rsplit_once('.') {
            // Snapshot slots and tokenizers of llama2.c have the same extension as its models.
            Some((stem, "BIN")) => !stem.starts_with("SNAP") && !stem.starts_with("TOK"),
            Some((_, extension)) => MODEL_EXTENSIONS.contains(&extension),
            None => false,
        })
        .collect();
    match names.as_slice() {
        [name] => Ok(Location::Volume(volume.find(disk, name)?)),
        _ => Err(RunError::NoModel { looked_for: String::new(), found: names }),
    }
}

/// Runs `work` on the model file's bytes, with the cores to work on.
fn with_source_and_workers<T>(
    platform: &mut dyn Platform,
    location: &Location,
    work: impl FnOnce(&mut dyn ByteSource, &dyn Workers) -> Result<T, StorageError>,
) -> Result<T, RunError> {
    let no_model = || RunError::NoModel { looked_for: String::new(), found: Vec::new() };
    let (disk, workers) = platform.disk(location.disk());
    let disk = disk.ok_or_else(no_model)?;
    Ok(match location {
        Location::RawDisk => work(&mut RawDisk::new(disk), workers)?,
        Location::Volume(file) => work(&mut FileSource::new(disk, file), workers)?,
    })
}

/// Runs `work` on the model file's bytes.
fn with_source<T>(
    platform: &mut dyn Platform,
    location: &Location,
    work: impl FnOnce(&mut dyn ByteSource) -> Result<T, StorageError>,
) -> Result<T, RunError> {
    with_source_and_workers(platform, location, |source, _| work(source))
}

/// What belongs to a model file and is not in it.
#[derive(Clone, Default, Debug)]
pub struct Companions {
    /// Content of a llama2.c tokenizer file.
    pub tokenizer: Option<Vec<u8>>,
    /// Content of the signature file.
    pub signature: Option<Vec<u8>>,
}

impl Companions {
    /// These, and from the boot volume what is missing and `options` name.
    ///
    /// # Errors
    /// Storage errors; a tokenizer that is named has to be there.
    pub fn or_from_volume(mut self, platform: &mut dyn Platform, options: &Options) -> Result<Self, RunError> {
        if self.tokenizer.is_none() && !options.tokenizer.is_empty() {
            let name = &options.tokenizer;
            if platform.boot_disk().is_none() {
                return Err(RunError::NoVolumeForTokenizer { name: name.clone() });
            }
            let missing = || StorageError::NotFound { path: name.clone() };
            self.tokenizer = Some(boot_file(platform, name, MAX_TOKENIZER_BYTES)?.ok_or_else(missing)?);
        }
        if self.signature.is_none() && options.model_public_key.is_some() {
            self.signature = boot_file(platform, &options.model_signature, MAX_SIGNATURE_BYTES)?;
        }
        Ok(self)
    }
}

/// Reads the header of the model at `location` and describes it; with a public key in `options`, after the signature of
/// the whole model held.
///
/// # Errors
/// Storage errors, those of the signature, or [`RunError::Model`] with what is wrong in the file.
pub fn describe(
    platform: &mut dyn Platform,
    location: &Location,
    options: &Options,
    companions: &Companions,
) -> Result<ModelDescription, RunError> {
    if let Some(key) = &options.model_public_key {
        if !signature::CAN_CHECK {
            return Err(RunError::NoSignatureCheck);
        }
        let no_signature = || RunError::NoSignature { name: options.model_signature.clone() };
        let signature = companions.signature.as_deref().ok_or_else(no_signature)?;
        check_signature(platform, location, key, signature)?;
    } else if companions.signature.is_some() || options.model_signature != DEFAULT_SIGNATURE {
        return Err(RunError::NoPublicKey);
    }
    with_source(platform, location, |source| Ok(describe_source(source, companions.tokenizer.as_deref())))?
}

/// Streams the model once and checks its signature: of a file on the volume, of exactly its bytes; of a raw disk, of all
/// its sectors.
fn check_signature(
    platform: &mut dyn Platform,
    location: &Location,
    key: &[u8; 32],
    signature: &[u8],
) -> Result<(), RunError> {
    let mut check = signature::Check::new(key, signature)?;
    let len_bytes = with_source(platform, location, |source| Ok(source.len_bytes()))?;
    pieces(platform, "checking the signature", len_bytes, &mut |platform, offset, piece| {
        with_source(platform, location, |source| source.stream(offset, piece, &mut |bytes| check.update(bytes)))
    })?;
    check.finish()
}

/// Does one piece: its offset and length.
type Piecework<'f> = dyn FnMut(&mut dyn Platform, u64, u64) -> Result<(), RunError> + 'f;

/// Calls `work(offset, length)` for the pieces of `len_bytes` bytes and says how far `what` is after each.
fn pieces(platform: &mut dyn Platform, what: &str, len_bytes: u64, work: &mut Piecework<'_>) -> Result<(), RunError> {
    let piece_bytes = if len_bytes > PROGRESS_FROM_BYTES { PIECE_BYTES } else { len_bytes };
    let mut offset = 0;
    while offset < len_bytes {
        let piece = piece_bytes.min(len_bytes - offset);
        work(platform, offset, piece)?;
        offset += piece;
        if len_bytes > PROGRESS_FROM_BYTES {
            platform.progress(what, offset, len_bytes);
        }
    }
    Ok(())
}

/// Reads the header of a model and describes it.
///
/// # Errors
/// As [`describe`].
pub fn describe_source(source: &mut dyn ByteSource, tokenizer: Option<&[u8]>) -> Result<ModelDescription, RunError> {
    let mut file_bytes = source.len_bytes();
    let mut len = HeaderBytes::of(file_bytes);
    let mut header = Vec::new();
    loop {
        if header.len() < len.len() {
            // The shorter one makes room first.
            drop(core::mem::take(&mut header));
            header = vec![0; len.len()];
            source.read_at(0, &mut header)?;
            // The device is idle while the header is parsed and memory is found.
            source.read_ahead();
        }
        match read_header(&header[..len.len()], file_bytes, tokenizer) {
            Err(RunError::Model(error)) if len.grow(&error) => {}
            // A raw disk is whole sectors: the last one holds up to 511 bytes that are not the file's.
            Err(RunError::Model(ModelError::TrailingBytes { expected_bytes, .. }))
                if expected_bytes < file_bytes
                    && expected_bytes.next_multiple_of(SECTOR_BYTES as u64) == file_bytes =>
            {
                file_bytes = expected_bytes;
                len = HeaderBytes::of(file_bytes);
            }
            // Zeros behind a file that was cut short are no header and no weights: of it counts what it says itself.
            result if source.content_bytes() < file_bytes && !ends_within(&result, source.content_bytes()) => {
                file_bytes = source.content_bytes();
                len = HeaderBytes::of(file_bytes);
            }
            other => return other,
        }
    }
}

/// A model was found, and all of it is in the first `len_bytes` bytes.
fn ends_within(result: &Result<ModelDescription, RunError>, len_bytes: u64) -> bool {
    result.as_ref().is_ok_and(|model| model.tensors.iter().all(|tensor| tensor.end() <= len_bytes))
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

/// What loading gave besides the weights.
pub struct Loaded {
    /// Content identity.
    pub fingerprint: [u8; 32],
    /// SHA-256 of the file.
    pub sha256: FileSha256,
    /// Bytes read.
    pub bytes: u64,
    /// Ticks of the whole load, packing included; not of what the device read ahead before, while it would have been idle.
    pub ticks: u64,
    /// The rounds of `load.rounds`.
    pub rounds: Vec<Round>,
}

/// Reading the model and loading it, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// Ticks of reading the bytes of a load without using them.
    pub raw_ticks: u64,
    /// Ticks of loading them again.
    pub ticks: u64,
}

/// Fills `loader` from the file, from the start. Where several cores can read it at once, each reads what it packs; else, and
/// where all bytes are to be hashed, it is streamed, and the hash is computed on a second core meanwhile, if there is one.
///
/// # Errors
/// Storage errors, or [`RunError::WrongModelHash`].
pub(crate) fn weights(
    platform: &mut dyn Platform,
    location: &Location,
    description: &ModelDescription,
    hash_work: HashWork,
    loader: &mut Loader<'_>,
) -> Result<Loaded, RunError> {
    // Bytes after the last tensor are padding, of a length that depends on where the file lies.
    let data_end = description.tensors.iter().map(|tensor| tensor.end()).max().unwrap_or(0);
    let hashed = !matches!(hash_work, HashWork::None(_));
    let len_bytes = if hashed { description.file_bytes } else { data_end };
    let start = engine::cycles();
    loader.rewind();
    let loading = Mutex::new((Fingerprint::new(data_end), loader, Ok(())));
    let hash = Mutex::new(FileHash::new(data_end));
    pieces(platform, "loading model", len_bytes, &mut |platform, offset, piece| {
        let mut at = offset;
        with_source_and_workers(platform, location, |source, workers| {
            let file = if cfg!(feature = "shared-read") { source.shared() } else { None };
            if let Some(file) = file.filter(|_| !hashed) {
                let (fingerprint, loader, _) = &mut *loading.lock();
                let read = |at, buf: &mut [u8]| Ok(file.read_at(at, buf)?);
                fingerprint.sample(offset + piece, &read)?;
                return loader.pull(offset + piece, workers, &read);
            }
            source.stream(offset, piece, &mut |bytes| {
                let take_in = |workers: &dyn Workers| {
                    let (fingerprint, loader, outcome) = &mut *loading.lock();
                    fingerprint.update(&bytes[..bytes.len().min(data_end.saturating_sub(at) as usize)]);
                    if outcome.is_ok() {
                        *outcome = loader.feed(at, bytes, workers);
                    }
                };
                match workers.count() {
                    _ if !hashed => take_in(workers),
                    1 => {
                        take_in(workers);
                        hash.lock().update(bytes);
                    }
                    _ => workers.run(&|worker| match worker {
                        0 => take_in(&Single),
                        1 => hash.lock().update(bytes),
                        _ => {}
                    }),
                }
                at += bytes.len() as u64;
            })
        })
    })?;
    let (fingerprint, _, outcome) = loading.into_inner();
    outcome?;
    let ticks = engine::cycles().saturating_sub(start);
    let hashes = hash.into_inner().finish();
    let sha256 = match hash_work {
        HashWork::None(why) => FileSha256::Unknown(why),
        HashWork::Compute => chosen_hash(&hashes, location, description, None)?,
        HashWork::Require(expected) => chosen_hash(&hashes, location, description, Some(expected))?,
    };
    Ok(Loaded { fingerprint: fingerprint.finish(), sha256, bytes: len_bytes, ticks, rounds: Vec::new() })
}

/// Ticks that reading the first `len_bytes` bytes of the file takes without using them.
///
/// # Errors
/// Storage errors.
pub fn raw_ticks(platform: &mut dyn Platform, location: &Location, len_bytes: u64) -> Result<u64, RunError> {
    with_source(platform, location, |source| {
        let start = engine::cycles();
        source.read_and_drop(len_bytes)?;
        Ok(engine::cycles().saturating_sub(start))
    })
}

/// [`raw_ticks`] of as many as `len_bytes` bytes, and how many they were. The median of several passes, where one is so short
/// that whatever else the host does shows in it.
///
/// # Errors
/// Storage errors.
pub fn raw_rate(platform: &mut dyn Platform, location: &Location, len_bytes: u64) -> Result<(u64, u64), RunError> {
    let len_bytes = len_bytes.min(RAW_RATE_BYTES);
    let mut passes = [0; RAW_RATE_PASSES];
    for pass in &mut passes {
        *pass = raw_ticks(platform, location, len_bytes)?;
    }
    passes.sort_unstable();
    Ok((len_bytes, passes[RAW_RATE_PASSES / 2]))
}
