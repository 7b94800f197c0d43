//! Writing GGUF files: metadata and tensor directory first, then the data of each tensor in the same order.

use super::metadata::{Value, ValueType};
use super::{DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS};
use crate::architecture::Positions;
use crate::config::Config;
use crate::quant::TensorType;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// A file that cannot be written as asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WriteError {
    /// The same key or tensor twice.
    #[error("{what} `{name}` was given twice")]
    Duplicate {
        /// Metadata key or tensor.
        what: &'static str,
        /// Name.
        name: String,
    },
    /// Dimensions that cannot be stored.
    #[error("tensor `{name}` has dimensions {dims:?}; expected 1 to 4, none 0, and rows of whole {ty} blocks ({} elements)", ty.block_len())]
    Shape {
        /// Tensor.
        name: String,
        /// Dimensions, innermost first.
        dims: Vec<u64>,
        /// Storage type.
        ty: TensorType,
    },
    /// Data of another length than the directory says.
    #[error("tensor `{name}` needs {expected_bytes} bytes of data, {found_bytes} were given")]
    Data {
        /// Tensor.
        name: String,
        /// Length by dimensions and type.
        expected_bytes: u64,
        /// Length given.
        found_bytes: u64,
    },
}

#[derive(Clone, Debug)]
struct Planned {
    name: String,
    dims: Vec<u64>,
    ty: TensorType,
    len_bytes: u64,
}

/// Plans a GGUF file; [`Writer::header`] and then each tensor's data with [`Writer::padding_after`] make it up.
#[derive(Clone, Debug)]
pub struct Writer {
    version: u32,
    alignment: u64,
    entries: Vec<u8>,
    keys: BTreeSet<String>,
    tensors: Vec<Planned>,
}

impl Default for Writer {
    fn default() -> Self {
        Writer::new()
    }
}

impl Writer {
    /// A version 3 file without content, aligned to 32 bytes.
    pub fn new() -> Self {
        Writer {
            version: 3,
            alignment: DEFAULT_ALIGNMENT,
            entries: Vec::new(),
            keys: BTreeSet::new(),
            tensors: Vec::new(),
        }
    }

    /// Writes version 2, whose little-endian layout is the same.
    pub fn with_version_2(mut self) -> Self {
        self.version = 2;
        self
    }

    /// Sets the alignment and the key that states it.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`] when `general.alignment` is set already.
    ///
    /// # Panics
    /// When `alignment` is not a power of two.
    pub fn with_alignment(mut self, alignment: u32) -> Result<Self, WriteError> {
        assert!(alignment.is_power_of_two(), "alignment {alignment} is not a power of two");
        self.set("general.alignment", Value::U32(alignment))?;
        self.alignment = alignment.into();
        Ok(self)
    }

    fn begin(&mut self, key: &str, ty: ValueType) -> Result<(), WriteError> {
        if !self.keys.insert(key.to_string()) {
            return Err(WriteError::Duplicate { what: "metadata key", name: key.to_string() });
        }
        put_string(&mut self.entries, key.as_bytes());
        self.entries.extend(ty.id().to_le_bytes());
        Ok(())
    }

    fn begin_array(&mut self, key: &str, element: ValueType, len: usize) -> Result<(), WriteError> {
        self.begin(key, ValueType::Array)?;
        self.entries.extend(element.id().to_le_bytes());
        self.entries.extend((len as u64).to_le_bytes());
        Ok(())
    }

    /// Adds a metadata entry.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`].
    pub fn set(&mut self, key: &str, value: Value<'_>) -> Result<(), WriteError> {
        self.begin(key, value.ty())?;
        value.put(&mut self.entries);
        Ok(())
    }

    /// Adds the architecture, `name`, and what `config` says, except for scaled rotary frequencies.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`].
    pub fn set_config(&mut self, name: &str, config: &Config) -> Result<(), WriteError> {
        let architecture = config.architecture.name();
        self.set("general.architecture", Value::String(architecture))?;
        self.set("general.name", Value::String(name))?;
        for (key, value) in [
            ("block_count", config.n_layers),
            ("context_length", config.seq_len),
            ("embedding_length", config.dim),
            ("feed_forward_length", config.hidden_dim),
            ("attention.head_count", config.n_heads),
            ("attention.head_count_kv", config.n_kv_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
            ("rope.dimension_count", config.rope_dim),
            ("vocab_size", config.vocab_size),
            ("attention.sliding_window", config.window),
        ] {
            // What is 0 does not apply.
            if value > 0 {
                self.set(&format!("{architecture}.{key}"), Value::U32(value))?;
            }
        }
        let blueprint = config.architecture.blueprint();
        if blueprint.positions != Positions::Learned {
            self.set(&format!("{architecture}.rope.freq_base"), Value::F32(config.rope_base))?;
        }
        self.set(&format!("{architecture}.{}", blueprint.norm_eps_key()), Value::F32(config.norm_eps))
    }

    /// Adds an array of strings.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`].
    pub fn set_strings<S: AsRef<[u8]>>(&mut self, key: &str, values: &[S]) -> Result<(), WriteError> {
        self.begin_array(key, ValueType::String, values.len())?;
        values.iter().for_each(|value| put_string(&mut self.entries, value.as_ref()));
        Ok(())
    }

    /// Adds an array of f32.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`].
    pub fn set_f32s(&mut self, key: &str, values: &[f32]) -> Result<(), WriteError> {
        self.begin_array(key, ValueType::F32, values.len())?;
        self.entries.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    }

    /// Adds an array of i32.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`].
    pub fn set_i32s(&mut self, key: &str, values: &[i32]) -> Result<(), WriteError> {
        self.begin_array(key, ValueType::I32, values.len())?;
        self.entries.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    }

    /// Adds a tensor to the directory and returns its index. `dims` are innermost first.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`], [`WriteError::Shape`].
    pub fn tensor(&mut self, name: &str, dims: &[u64], ty: TensorType) -> Result<usize, WriteError> {
        if self.tensors.iter().any(|t| t.name == name) {
            return Err(WriteError::Duplicate { what: "tensor", name: name.to_string() });
        }
        let len_bytes = match dims {
            [row_len, rest @ ..] if dims.len() <= MAX_DIMS && !dims.contains(&0) => {
                rest.iter().try_fold(ty.row_bytes(*row_len), |bytes, &dim| Some(bytes?.checked_mul(dim))).flatten()
            }
            _ => None,
        };
        let shape = || WriteError::Shape { name: name.to_string(), dims: dims.to_vec(), ty };
        let len_bytes = len_bytes.ok_or_else(shape)?;
        self.tensors.push(Planned { name: name.to_string(), dims: dims.to_vec(), ty, len_bytes });
        Ok(self.tensors.len() - 1)
    }

    /// Everything before the first tensor's data, padding included.
    pub fn header(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.len() + 64 * self.tensors.len() + 64);
        out.extend(MAGIC);
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        out.extend_from_slice(&self.entries);
        let mut offset = 0;
        for (index, tensor) in self.tensors.iter().enumerate() {
            put_string(&mut out, tensor.name.as_bytes());
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(tensor.ty.id().to_le_bytes());
            out.extend(u64::to_le_bytes(offset));
            offset += tensor.len_bytes + self.padding_after(index) as u64;
        }
        let padded = (out.len() as u64).next_multiple_of(self.alignment);
        out.resize(padded as usize, 0);
        out
    }

    /// Bytes of data of a tensor in the directory.
    pub fn tensor_bytes(&self, index: usize) -> u64 {
        self.tensors[index].len_bytes
    }

    /// Zero bytes that follow the data of a tensor in the directory.
    pub fn padding_after(&self, index: usize) -> usize {
        let len_bytes = self.tensors[index].len_bytes;
        // Less than the alignment, which is a u32.
        (len_bytes.next_multiple_of(self.alignment) - len_bytes) as usize
    }

    /// The whole file; `data` gives each tensor's bytes by its index.
    ///
    /// # Errors
    /// [`WriteError::Data`].
    pub fn file<'d>(&self, data: impl Fn(usize) -> &'d [u8]) -> Result<Vec<u8>, WriteError> {
        let mut out = self.header();
        for (index, tensor) in self.tensors.iter().enumerate() {
            let bytes = data(index);
            let (expected_bytes, found_bytes) = (tensor.len_bytes, bytes.len() as u64);
            if expected_bytes != found_bytes {
                return Err(WriteError::Data { name: tensor.name.clone(), expected_bytes, found_bytes });
            }
            out.extend_from_slice(bytes);
            out.resize(out.len() + self.padding_after(index), 0);
        }
        Ok(out)
    }
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text);
}

impl Value<'_> {
    /// Type of the value.
    pub fn ty(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Value::U8(v) => out.extend(v.to_le_bytes()),
            Value::I8(v) => out.extend(v.to_le_bytes()),
            Value::U16(v) => out.extend(v.to_le_bytes()),
            Value::I16(v) => out.extend(v.to_le_bytes()),
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push(u8::from(*v)),
            Value::String(v) => put_string(out, v.as_bytes()),
            Value::Array(v) => {
                out.extend(v.element.id().to_le_bytes());
                out.extend((v.len as u64).to_le_bytes());
                out.extend_from_slice(v.bytes());
            }
            Value::U64(v) => out.extend(v.to_le_bytes()),
            Value::I64(v) => out.extend(v.to_le_bytes()),
            Value::F64(v) => out.extend(v.to_le_bytes()),
        }
    }
}
