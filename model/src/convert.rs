//! Rewriting a GGUF file with its weights in another storage type.
//!
//! Input: header bytes and a reader callback -> dequantise and quantise row by row ([`crate::quant`]) -> a writer callback
//! that receives the new file in order. Metadata is copied (only `general.file_type` and
//! `general.quantization_version` change), norms and biases stay F32, working memory is about [`CHUNK_BYTES`] times three.
//! Not here: importance matrices and mixed recipes; the embedding and head may have their own type, that is all.

use crate::description::Role;
use crate::error::ModelError;
use crate::gguf::{self, Header, Value, WriteError, Writer};
use crate::quant::{QuantError, SUPPORTED_NAMES, TensorType, dequantise, quantise};
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// Most bytes of f32 values held at once (one row, where a row is longer).
pub const CHUNK_BYTES: usize = 1 << 20;

/// Storage types of the new file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Every matrix but those below.
    pub matrices: TensorType,
    /// Token embedding and output head.
    pub embedding: TensorType,
}

impl Target {
    /// Every matrix in one type.
    pub fn uniform(ty: TensorType) -> Self {
        Target { matrices: ty, embedding: ty }
    }

    fn type_of(&self, role: Role) -> TensorType {
        match role {
            role if role.is_vector() => TensorType::F32,
            Role::TokenEmbedding | Role::Output => self.embedding,
            _ => self.matrices,
        }
    }
}

/// What was done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Summary {
    /// Tensors in a new type.
    pub converted: usize,
    /// Tensors copied byte for byte: they were in that type already, or are norms.
    pub copied: usize,
    /// Tensors that keep their old type because their rows are not whole blocks of the new one.
    pub kept: Vec<String>,
    /// Length of the new file.
    pub written_bytes: u64,
}

/// Why a conversion failed; `E` is the error of the caller's callbacks.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum ConvertError<E> {
    /// The source is not a model that can be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// No way to write this type.
    #[error("cannot convert to {ty}; supported: {SUPPORTED_NAMES}")]
    Target {
        /// The type.
        ty: TensorType,
    },
    /// The new file cannot be laid out.
    #[error(transparent)]
    Layout(#[from] WriteError),
    /// A weight could not be converted.
    #[error("tensor `{tensor}`: {source}")]
    Quant {
        /// Tensor.
        tensor: String,
        /// Cause.
        source: QuantError,
    },
    /// A callback failed.
    #[error("{0}")]
    Io(E),
}

/// Fills the buffer from the source file at an offset.
pub type ReadAt<'f, E> = dyn FnMut(u64, &mut [u8]) -> Result<(), E> + 'f;
/// Receives the next bytes of the new file.
pub type Append<'f, E> = dyn FnMut(&[u8]) -> Result<(), E> + 'f;

/// Writes the model in `header` (a file of `file_bytes`) again with its weights as `target` says.
///
/// # Errors
/// [`ConvertError::Model`] holds [`ModelError::Truncated`] when `header` is too short, before anything was written.
pub fn convert<E>(
    header: &[u8],
    file_bytes: u64,
    target: Target,
    read: &mut ReadAt<'_, E>,
    write: &mut Append<'_, E>,
) -> Result<Summary, ConvertError<E>> {
    for ty in [target.matrices, target.embedding] {
        if !ty.is_supported() {
            return Err(ConvertError::Target { ty });
        }
    }
    let source = Header::parse(header, file_bytes)?;
    // Reading the whole description refuses what could not be run afterwards.
    gguf::read(header, file_bytes)?;

    let mut summary = Summary { converted: 0, copied: 0, kept: Vec::new(), written_bytes: 0 };
    let mut writer = new_metadata(&source, target)?;
    let mut types = Vec::with_capacity(source.tensors.len());
    for tensor in &source.tensors {
        let wanted = Role::from_tensor_name(tensor.name).map_or(tensor.ty, |(role, _)| target.type_of(role));
        let [row_len, ..] = tensor.dims;
        let ty = if wanted.row_bytes(row_len).is_some() { wanted } else { tensor.ty };
        if ty != wanted {
            summary.kept.push(tensor.name.to_string());
        } else if ty == tensor.ty {
            summary.copied += 1;
        } else {
            summary.converted += 1;
        }
        writer.tensor(tensor.name, &tensor.dims[..tensor.n_dims], ty)?;
        types.push(ty);
    }

    let mut write = |bytes: &[u8]| {
        summary.written_bytes += bytes.len() as u64;
        write(bytes).map_err(ConvertError::Io)
    };
    write(&writer.header())?;
    for (index, (tensor, &ty)) in source.tensors.iter().zip(&types).enumerate() {
        let rewrite = Rewrite { tensor, ty };
        rewrite.run(read, &mut write)?;
        write(&vec![0; writer.padding_after(index)])?;
    }
    Ok(summary)
}

/// The source's metadata with the two keys that name the storage type brought up to date.
fn new_metadata(source: &Header<'_>, target: Target) -> Result<Writer, WriteError> {
    const FILE_TYPE: &str = "general.file_type";
    const QUANTIZATION_VERSION: &str = "general.quantization_version";
    const ALIGNMENT: &str = "general.alignment";
    let mut writer = match source.metadata.get(ALIGNMENT) {
        // The parser accepts powers of two up to 2^20 only.
        Some(_) => Writer::new().with_alignment(source.alignment as u32)?,
        None => Writer::new(),
    };
    for (key, value) in source.metadata.iter() {
        if ![FILE_TYPE, QUANTIZATION_VERSION, ALIGNMENT].contains(&key) {
            writer.set(key, value)?;
        }
    }
    if let Some(file_type) = file_type(target.matrices) {
        writer.set(FILE_TYPE, Value::U32(file_type))?;
    }
    writer.set(QUANTIZATION_VERSION, Value::U32(2))?;
    Ok(writer)
}

/// llama.cpp's `llama_ftype` for "mostly" this type.
fn file_type(ty: TensorType) -> Option<u32> {
    Some(match ty {
        TensorType::F32 => 0,
        TensorType::F16 => 1,
        TensorType::Q4_0 => 2,
        TensorType::Q4_1 => 3,
        TensorType::Q8_0 => 7,
        TensorType::Q5_0 => 8,
        TensorType::Q5_1 => 9,
        TensorType::Q2_K => 10,
        // The small mixtures: those of this type alone.
        TensorType::Q3_K => 11,
        TensorType::Q4_K => 14,
        TensorType::Q5_K => 16,
        TensorType::Q6_K => 18,
        TensorType::BF16 => 32,
        _ => return None,
    })
}

/// One tensor on its way from the source to the new file.
struct Rewrite<'t, 'a> {
    tensor: &'t gguf::TensorInfo<'a>,
    ty: TensorType,
}

impl Rewrite<'_, '_> {
    fn run<E>(&self, read: &mut ReadAt<'_, E>, write: &mut Append<'_, ConvertError<E>>) -> Result<(), ConvertError<E>> {
        let from = self.tensor.ty;
        let [row_len, ..] = self.tensor.dims;
        // Both products fit: the description bounded rows to 2^24 elements, and the parser the tensor to the file.
        let row_bytes = from.row_bytes(row_len).unwrap_or(self.tensor.len_bytes).max(1);
        let rows_per_chunk = (CHUNK_BYTES as u64 / (4 * row_len)).max(1);
        let mut rows_left = self.tensor.len_bytes / row_bytes;
        let mut offset = self.tensor.offset;
        let quant = |source| ConvertError::Quant { tensor: self.tensor.name.to_string(), source };
        let (mut bytes, mut values, mut out) = (Vec::new(), Vec::new(), Vec::new());
        while rows_left > 0 {
            let rows = rows_left.min(rows_per_chunk);
            bytes.resize((rows * row_bytes) as usize, 0);
            read(offset, &mut bytes).map_err(ConvertError::Io)?;
            if from == self.ty {
                write(&bytes)?;
            } else {
                values.resize((rows * row_len) as usize, 0.0);
                dequantise(from, &bytes, &mut values).map_err(quant)?;
                out.clear();
                quantise(self.ty, &values, &mut out).map_err(quant)?;
                write(&out)?;
            }
            offset += rows * row_bytes;
            rows_left -= rows;
        }
        Ok(())
    }
}
