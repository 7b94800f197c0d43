//! Rewriting a GGUF file with its weights in another storage type, and a llama2.c file as GGUF.
//!
//! Input: header bytes and a reader callback -> dequantise and quantise row by row ([`crate::quant`]) -> a writer callback
//! that receives the new file in order. Metadata is copied (only `general.file_type` and
//! `general.quantization_version` change) or, for a llama2.c model, made from its header and tokenizer file
//! ([`convert_llama2c`]). Norms and biases stay F32, working memory is about [`CHUNK_BYTES`] times three.
//! Not here: importance matrices and mixed recipes; the embedding and head may have their own type, that is all.

mod from_llama2c;

pub use from_llama2c::convert_llama2c;

use crate::description::Role;
use crate::error::ModelError;
use crate::gguf::{self, Header, Value, WriteError, Writer};
use crate::quant::{QuantError, SUPPORTED_NAMES, TensorType, dequantise, f32_to_f16, quantise};
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

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

    fn check<E>(&self) -> Result<(), ConvertError<E>> {
        match [self.matrices, self.embedding].into_iter().find(|ty| !ty.is_supported()) {
            Some(ty) => Err(ConvertError::Target { ty }),
            None => Ok(()),
        }
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
    target.check()?;
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

    let rewrite = |(tensor, ty): (&gguf::TensorInfo<'_>, TensorType)| {
        let [row_len, ..] = tensor.dims;
        // The product fits: the description bounded rows to 2^24 elements.
        let row_bytes = tensor.ty.row_bytes(row_len).unwrap_or(tensor.len_bytes).max(1);
        let (name, rows, offset) = (tensor.name.to_string(), tensor.len_bytes / row_bytes, tensor.offset);
        Rewrite { name, row_len, rows, offset, from: Stored::Rows { ty: tensor.ty, row_bytes }, ty }
    };
    let tensors: Vec<Rewrite> = source.tensors.iter().zip(types).map(rewrite).collect();
    summary.written_bytes = write_file(&writer, &tensors, read, write)?;
    Ok(summary)
}

/// Writes the file that `writer` plans, `tensors` being those of its directory; returns its length.
fn write_file<E>(
    writer: &Writer,
    tensors: &[Rewrite],
    read: &mut ReadAt<'_, E>,
    write: &mut Append<'_, E>,
) -> Result<u64, ConvertError<E>> {
    let mut written_bytes = 0;
    let mut write = |bytes: &[u8]| {
        written_bytes += bytes.len() as u64;
        write(bytes).map_err(ConvertError::Io)
    };
    write(&writer.header())?;
    for (index, tensor) in tensors.iter().enumerate() {
        tensor.run(read, &mut write)?;
        write(&vec![0; writer.padding_after(index)])?;
    }
    Ok(written_bytes)
}

/// The source's metadata with the two keys that name the storage type brought up to date.
fn new_metadata(source: &Header<'_>, target: Target) -> Result<Writer, WriteError> {
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
    set_file_type(&mut writer, target.matrices)?;
    Ok(writer)
}

const FILE_TYPE: &str = "general.file_type";
const QUANTIZATION_VERSION: &str = "general.quantization_version";

/// Sets the two keys for a file whose matrices are mostly of type `matrices`.
fn set_file_type(writer: &mut Writer, matrices: TensorType) -> Result<(), WriteError> {
    if let Some(file_type) = file_type(matrices) {
        writer.set(FILE_TYPE, Value::U32(file_type))?;
    }
    writer.set(QUANTIZATION_VERSION, Value::U32(2))
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
struct Rewrite {
    name: String,
    row_len: u64,
    rows: u64,
    /// Its first byte in the source.
    offset: u64,
    from: Stored,
    ty: TensorType,
}

/// How the source stores a tensor.
#[derive(Clone, Copy)]
enum Stored {
    /// Rows of whole blocks.
    Rows { ty: TensorType, row_bytes: u64 },
    /// llama2.c's int8: all codes, then an f32 scale for each `group_len` of them. With `keep_codes` they are written as
    /// Q8_0 blocks as they are, which takes groups of whole blocks and scales that are f16 numbers.
    Groups { group_len: u64, keep_codes: bool },
}

impl Rewrite {
    fn run<E>(&self, read: &mut ReadAt<'_, E>, write: &mut Append<'_, ConvertError<E>>) -> Result<(), ConvertError<E>> {
        let rows_per_chunk = (CHUNK_BYTES as u64 / (4 * self.row_len)).max(1);
        let quant = |source| ConvertError::Quant { tensor: self.name.clone(), source };
        let (mut bytes, mut scales, mut values, mut out) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut done = 0;
        while done < self.rows {
            let rows = (self.rows - done).min(rows_per_chunk);
            let (first, count) = (done * self.row_len, rows * self.row_len);
            out.clear();
            values.resize(count as usize, 0.0);
            match self.from {
                Stored::Rows { ty, row_bytes } => {
                    bytes.resize((rows * row_bytes) as usize, 0);
                    read(self.offset + done * row_bytes, &mut bytes).map_err(ConvertError::Io)?;
                    if ty == self.ty {
                        out.extend_from_slice(&bytes);
                    } else {
                        dequantise(ty, &bytes, &mut values).map_err(quant)?;
                        quantise(self.ty, &values, &mut out).map_err(quant)?;
                    }
                }
                Stored::Groups { group_len, keep_codes } => {
                    bytes.resize(count as usize, 0);
                    read(self.offset + first, &mut bytes).map_err(ConvertError::Io)?;
                    let groups = first / group_len..(first + count).div_ceil(group_len);
                    self.scales(groups.clone(), read, &mut scales)?;
                    let scale = |i: usize| {
                        let group = (first + i as u64) / group_len - groups.start;
                        scales.get(group as usize).copied().unwrap_or_default()
                    };
                    if keep_codes {
                        for (block, codes) in bytes.chunks(Q8_0_LEN).enumerate() {
                            out.extend(f32_to_f16(scale(block * Q8_0_LEN)).to_le_bytes());
                            out.extend_from_slice(codes);
                        }
                    } else {
                        for (i, (value, code)) in values.iter_mut().zip(&bytes).enumerate() {
                            *value = f32::from(code.cast_signed()) * scale(i);
                        }
                        quantise(self.ty, &values, &mut out).map_err(quant)?;
                    }
                }
            }
            write(&out)?;
            done += rows;
        }
        Ok(())
    }

    /// Reads the scales of `groups` of a tensor of [`Stored::Groups`].
    fn scales<E>(
        &self,
        groups: Range<u64>,
        read: &mut ReadAt<'_, E>,
        scales: &mut Vec<f32>,
    ) -> Result<(), ConvertError<E>> {
        let codes_bytes = self.rows * self.row_len;
        let mut bytes = vec![0; 4 * (groups.end - groups.start) as usize];
        read(self.offset + codes_bytes + 4 * groups.start, &mut bytes).map_err(ConvertError::Io)?;
        scales.clear();
        scales.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        Ok(())
    }
}

/// Weights in a block of Q8_0.
const Q8_0_LEN: usize = TensorType::Q8_0.block_len() as usize;
