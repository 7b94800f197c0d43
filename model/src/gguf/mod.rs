//! GGUF, versions 2 and 3, little-endian: reading the header, and writing whole files.
//!
//! Input: the first bytes of a file (a few MB at most; tensor data is never needed) -> [`read`] ->
//! [`ModelDescription`]. [`Header`] is the layer below: typed metadata and the tensor directory without any
//! knowledge of an architecture. [`Writer`] makes files for `convert`, tests and the synthetic models.
//! Not here: big-endian files, split files, and tensors that the architecture does not name (they are errors).
//!
//! # Source
//! `docs/gguf.md` of the ggml project.

mod describe;
mod metadata;
mod reader;
mod writer;

pub use metadata::{Array, Metadata, Strings, Value, ValueType};
pub use reader::{Header, TensorInfo};
pub use writer::{WriteError, Writer};

use crate::description::ModelDescription;
use crate::error::ModelError;

/// The four bytes a GGUF file starts with.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data when `general.alignment` is absent.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Most dimensions of a tensor.
pub const MAX_DIMS: usize = 4;

/// Reads the beginning of a GGUF file of `file_bytes`.
///
/// # Errors
/// [`ModelError::Truncated`] when `header` ends before the tensor directory does: read at least `need_bytes` (better:
/// twice what was given) and call again. Any other error is final.
pub fn read(header: &[u8], file_bytes: u64) -> Result<ModelDescription, ModelError> {
    let header = Header::parse(header, file_bytes)?;
    describe::describe(&header, file_bytes)
}
