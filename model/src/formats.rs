//! Which format a file is in, from its first bytes.

use crate::error::ModelError;
use crate::{gguf, llama2c};

/// A file format this crate reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileFormat {
    /// GGUF: [`gguf::read`].
    Gguf,
    /// llama2.c `.bin`: [`llama2c::read`], with a tokenizer file.
    Llama2c,
}

/// Bytes [`sniff`] needs.
pub const SNIFF_BYTES: usize = llama2c::VERSIONED_FIELDS_BYTES;

/// Tells the format of a file of `file_bytes` that begins with `header` (at least [`SNIFF_BYTES`] where the file has them).
///
/// # Errors
/// [`ModelError::Empty`], [`ModelError::Truncated`], [`ModelError::UnsupportedVersion`] for newer llama2.c files, [`ModelError::UnknownFormat`].
pub fn sniff(header: &[u8], file_bytes: u64) -> Result<FileFormat, ModelError> {
    if file_bytes == 0 {
        return Err(ModelError::Empty);
    }
    if header.starts_with(&gguf::MAGIC) {
        return Ok(FileFormat::Gguf);
    }
    llama2c::Header::parse(header, file_bytes).map(|_| FileFormat::Llama2c)
}

/// The error for bytes of no known format.
pub(crate) fn unknown(bytes: &[u8]) -> ModelError {
    let mut first_bytes = [0; 8];
    for (to, from) in first_bytes.iter_mut().zip(bytes) {
        *to = *from;
    }
    ModelError::UnknownFormat { first_bytes }
}
