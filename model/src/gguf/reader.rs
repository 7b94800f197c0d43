//! The architecture-free part of a GGUF header: version, metadata, tensor directory.

use super::metadata::{Metadata, Value, ValueType};
use super::{DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS};
use crate::cursor::Cursor;
use crate::error::ModelError;
use crate::order::order;
use crate::quant::{SUPPORTED_NAMES, TensorType};
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

/// Fewest bytes of a metadata entry: key length, type, one byte of value.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;
/// Fewest bytes of a tensor entry: name length, dimension count, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;
/// Largest accepted `general.alignment`.
const MAX_ALIGNMENT: u32 = 1 << 20;

/// One line of the tensor directory. Dimensions are innermost first, unused ones 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo<'a> {
    /// Name.
    pub name: &'a str,
    /// How many of `dims` the file gives.
    pub n_dims: usize,
    /// Dimensions, innermost first.
    pub dims: [u64; MAX_DIMS],
    /// Storage type.
    pub ty: TensorType,
    /// First byte, from the start of the file; a multiple of the alignment from the start of the data.
    pub offset: u64,
    /// Bytes, by dimensions and type; the end is inside the file.
    pub len_bytes: u64,
}

/// A parsed GGUF header.
#[derive(Clone, Debug)]
pub struct Header<'a> {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Metadata.
    pub metadata: Metadata<'a>,
    /// Tensor directory, in directory order.
    pub tensors: Vec<TensorInfo<'a>>,
    /// Alignment of tensor offsets.
    pub alignment: u64,
    /// Where tensor data begins, from the start of the file.
    pub data_offset: u64,
}

impl<'a> Header<'a> {
    /// Parses the beginning of a file of `file_bytes`.
    ///
    /// # Errors
    /// [`ModelError::Truncated`] when more of the file is needed; other variants are final.
    pub fn parse(bytes: &'a [u8], file_bytes: u64) -> Result<Self, ModelError> {
        let mut cursor = Cursor::new(bytes, file_bytes);
        let magic: [u8; 4] = cursor.array("the magic number")?;
        if magic != MAGIC {
            return Err(crate::formats::unknown(bytes));
        }
        let version = parse_version(&mut cursor)?;
        let n_tensors = cursor.u64("the tensor count")?;
        let n_entries = cursor.u64("the metadata count")?;

        cursor.require(n_entries.saturating_mul(MIN_ENTRY_BYTES), "the metadata")?;
        // Bounded by the bytes at hand divided by MIN_ENTRY_BYTES.
        let mut entries = Vec::with_capacity(n_entries as usize);
        for _ in 0..n_entries {
            let key = named(&mut cursor, "a metadata key")?;
            let id = cursor.u32("a metadata value type")?;
            let ty = ValueType::from_id(id)
                .ok_or_else(|| ModelError::UnknownValueType { key: key.to_string(), found: id })?;
            entries.push((key, Value::parse(&mut cursor, ty, key)?));
        }
        let metadata = Metadata::new(entries)?;
        let alignment = parse_alignment(&metadata)?;

        cursor.require(n_tensors.saturating_mul(MIN_TENSOR_BYTES), "the tensor directory")?;
        let mut tensors = Vec::with_capacity(n_tensors as usize);
        for _ in 0..n_tensors {
            tensors.push(parse_tensor(&mut cursor, alignment)?);
        }
        check_names(&tensors)?;
        // The header is in memory, so its length is far below u64::MAX.
        let data_offset = cursor.pos().next_multiple_of(alignment);
        for tensor in &mut tensors {
            tensor.offset = tensor.offset.saturating_add(data_offset);
            let end = tensor.offset.saturating_add(tensor.len_bytes);
            if end > file_bytes {
                let tensor_name = tensor.name.to_string();
                return Err(ModelError::OutsideFile { tensor: tensor_name, offset: tensor.offset, end, file_bytes });
            }
        }
        Ok(Header { version, metadata, tensors, alignment, data_offset })
    }
}

/// A text that has to say something: zeros, with which a disk fills up a file that was cut short, would say nothing.
fn named<'a>(cursor: &mut Cursor<'a>, what: &'static str) -> Result<&'a str, ModelError> {
    let at_byte = cursor.pos();
    match cursor.str(what)? {
        "" => Err(ModelError::NoName { what, at_byte }),
        name => Ok(name),
    }
}

fn parse_version(cursor: &mut Cursor<'_>) -> Result<u32, ModelError> {
    let version = cursor.u32("the format version")?;
    let unsupported = |found, advice| {
        Err(ModelError::UnsupportedVersion { format: "GGUF", found, supported: "2 and 3, little-endian", advice })
    };
    match version {
        2 | 3 => Ok(version),
        1 => unsupported(1, "convert the model again with a current converter"),
        v if (1..=3).contains(&v.swap_bytes()) => {
            unsupported(v.swap_bytes(), "this file is big-endian; convert it to little-endian")
        }
        v => unsupported(v, "the file is damaged or newer than this reader"),
    }
}

fn parse_alignment(metadata: &Metadata<'_>) -> Result<u64, ModelError> {
    const KEY: &str = "general.alignment";
    match metadata.u32(KEY)? {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => Ok(alignment.into()),
        Some(alignment) => Err(ModelError::InvalidValue {
            key: KEY.to_string(),
            found: alignment.to_string(),
            expected: format!("a power of two up to {MAX_ALIGNMENT}"),
        }),
    }
}

/// Reads one directory line; `offset` is still relative to the data section.
fn parse_tensor<'a>(cursor: &mut Cursor<'a>, alignment: u64) -> Result<TensorInfo<'a>, ModelError> {
    const WHAT: &str = "the tensor directory";
    let name = named(cursor, "a tensor name")?;
    let invalid = |what: &str, found: u64, expected: &str| ModelError::InvalidValue {
        key: format!("{what} of tensor {name}"),
        found: found.to_string(),
        expected: expected.to_string(),
    };
    let count = cursor.u32(WHAT)?;
    let n_dims = count as usize;
    if n_dims > MAX_DIMS {
        return Err(invalid("number of dimensions", count.into(), "at most 4"));
    }
    let mut dims = [1; MAX_DIMS];
    let mut elements = 1u64;
    for dim in dims.iter_mut().take(n_dims) {
        *dim = cursor.u64(WHAT)?;
        elements = match elements.checked_mul(*dim) {
            Some(product) if product > 0 => product,
            _ => return Err(invalid("dimension", *dim, "above 0, with a product below 2^64")),
        };
    }
    let id = cursor.u32(WHAT)?;
    let ty = TensorType::from_id(id).ok_or_else(|| ModelError::UnknownTensorType {
        tensor: name.to_string(),
        found: id,
        supported: SUPPORTED_NAMES,
    })?;
    let offset = cursor.u64(WHAT)?;
    if !offset.is_multiple_of(alignment) {
        return Err(ModelError::Misaligned { tensor: name.to_string(), offset, alignment });
    }
    let [row_len, ..] = dims;
    let row_bytes = ty.row_bytes(row_len).ok_or_else(|| ModelError::PartialBlock {
        tensor: name.to_string(),
        row_len,
        ty: ty.name(),
        block_len: ty.block_len(),
    })?;
    // A saturated length is refused when it is compared with the file.
    let len_bytes = row_bytes.saturating_mul(elements / row_len);
    Ok(TensorInfo { name, n_dims, dims, ty, offset, len_bytes })
}

fn check_names(tensors: &[TensorInfo<'_>]) -> Result<(), ModelError> {
    let by_name = order(tensors.len(), &|a, b| tensors[a].name.cmp(tensors[b].name));
    let mut names = by_name.iter().map(|&i| tensors[i].name);
    let mut last = names.next();
    match names.find(|&name| last.replace(name) == Some(name)) {
        Some(name) => Err(ModelError::Duplicate { what: "tensor", name: name.to_string() }),
        None => Ok(()),
    }
}
