//! Typed access to GGUF metadata, borrowed from the header bytes.

use crate::cursor::Cursor;
use crate::error::ModelError;
use crate::order::order;
use crate::scientific::Scientific;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Type ids of metadata values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    const BY_ID: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type with this id.
    pub fn from_id(id: u32) -> Option<Self> {
        usize::try_from(id).ok().and_then(|id| Self::BY_ID.get(id).copied())
    }

    /// Numeric id in the file.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// Name for messages.
    pub const fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "a u8",
            ValueType::I8 => "an i8",
            ValueType::U16 => "a u16",
            ValueType::I16 => "an i16",
            ValueType::U32 => "a u32",
            ValueType::I32 => "an i32",
            ValueType::F32 => "an f32",
            ValueType::Bool => "a bool",
            ValueType::String => "a string",
            ValueType::Array => "an array",
            ValueType::U64 => "a u64",
            ValueType::I64 => "an i64",
            ValueType::F64 => "an f64",
        }
    }

    /// Bytes of a value, or the fewest a string or array can take.
    const fn min_bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::String | ValueType::U64 | ValueType::I64 | ValueType::F64 => 8,
            ValueType::Array => 12,
        }
    }
}

/// An array value: its elements stay in the header bytes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Array<'a> {
    /// Type of every element.
    pub element: ValueType,
    /// Number of elements; the bytes are known to hold exactly that many.
    pub len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The elements as they are in the file.
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements as byte strings; `None` for another element type.
    pub fn strings(&self) -> Option<Strings<'a>> {
        (self.element == ValueType::String).then_some(Strings { bytes: self.bytes, left: self.len })
    }

    /// The elements as `f32`; `None` for another element type.
    pub fn f32s(&self) -> Option<Vec<f32>> {
        let (values, _) = self.bytes.as_chunks::<4>();
        (self.element == ValueType::F32).then(|| values.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// The elements as `i32` from `i32` or `u32` (wrapping); `None` for another element type.
    pub fn i32s(&self) -> Option<Vec<i32>> {
        let (values, _) = self.bytes.as_chunks::<4>();
        matches!(self.element, ValueType::I32 | ValueType::U32)
            .then(|| values.iter().map(|b| i32::from_le_bytes(*b)).collect())
    }
}

/// The elements of an array of strings; the parser has checked every length.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    bytes: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        let (len, rest) = self.bytes.split_first_chunk::<8>()?;
        let (string, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.bytes = rest;
        Some(string)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// One metadata value.
#[derive(Clone, Copy, PartialEq, Debug)]
#[allow(missing_docs)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(&'a str),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// Type and value in words, for messages.
    pub fn describe(&self) -> String {
        match self {
            Value::U8(v) => format!("a u8 ({v})"),
            Value::I8(v) => format!("an i8 ({v})"),
            Value::U16(v) => format!("a u16 ({v})"),
            Value::I16(v) => format!("an i16 ({v})"),
            Value::U32(v) => format!("a u32 ({v})"),
            Value::I32(v) => format!("an i32 ({v})"),
            Value::F32(v) => format!("an f32 ({})", Scientific((*v).into())),
            Value::Bool(v) => format!("a bool ({v})"),
            Value::String(v) => format!("a string (\"{}\")", v.chars().take(40).collect::<String>()),
            Value::Array(v) => format!("an array of {} values, each {}", v.len, v.element.name()),
            Value::U64(v) => format!("a u64 ({v})"),
            Value::I64(v) => format!("an i64 ({v})"),
            Value::F64(v) => format!("an f64 ({})", Scientific(*v)),
        }
    }

    fn as_integer(&self) -> Option<i128> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::I8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::I16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::I32(v) => Some(v.into()),
            Value::U64(v) => Some(v.into()),
            Value::I64(v) => Some(v.into()),
            _ => None,
        }
    }

    /// Reads one value of type `ty`; `key` is for messages.
    pub(super) fn parse(cursor: &mut Cursor<'a>, ty: ValueType, key: &str) -> Result<Self, ModelError> {
        const WHAT: &str = "a metadata value";
        Ok(match ty {
            ValueType::U8 => Value::U8(cursor.array(WHAT).map(u8::from_le_bytes)?),
            ValueType::I8 => Value::I8(cursor.array(WHAT).map(i8::from_le_bytes)?),
            ValueType::U16 => Value::U16(cursor.array(WHAT).map(u16::from_le_bytes)?),
            ValueType::I16 => Value::I16(cursor.array(WHAT).map(i16::from_le_bytes)?),
            ValueType::U32 => Value::U32(cursor.u32(WHAT)?),
            ValueType::I32 => Value::I32(cursor.array(WHAT).map(i32::from_le_bytes)?),
            ValueType::F32 => Value::F32(cursor.array(WHAT).map(f32::from_le_bytes)?),
            ValueType::Bool => match cursor.array::<1>(WHAT)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => {
                    return Err(ModelError::InvalidValue {
                        key: key.to_string(),
                        found: format!("the byte {other}"),
                        expected: "a bool, 0 or 1".to_string(),
                    });
                }
            },
            ValueType::String => Value::String(cursor.str("a metadata string")?),
            ValueType::U64 => Value::U64(cursor.u64(WHAT)?),
            ValueType::I64 => Value::I64(cursor.array(WHAT).map(i64::from_le_bytes)?),
            ValueType::F64 => Value::F64(cursor.array(WHAT).map(f64::from_le_bytes)?),
            ValueType::Array => Value::Array(Self::parse_array(cursor, key)?),
        })
    }

    fn parse_array(cursor: &mut Cursor<'a>, key: &str) -> Result<Array<'a>, ModelError> {
        const WHAT: &str = "a metadata array";
        let id = cursor.u32(WHAT)?;
        let element =
            ValueType::from_id(id).ok_or_else(|| ModelError::UnknownValueType { key: key.to_string(), found: id })?;
        let len = cursor.u64(WHAT)?;
        // A count that the rest of the file cannot hold is refused here, before any loop over it.
        let least = len.saturating_mul(element.min_bytes());
        cursor.require(least, WHAT)?;
        let bytes = match element {
            ValueType::Array => return Err(ModelError::NestedArray { key: key.to_string() }),
            ValueType::String => {
                let mut walker = cursor.clone();
                for _ in 0..len {
                    walker.string_bytes("a string in a metadata array")?;
                }
                cursor.take(walker.pos() - cursor.pos(), WHAT)?
            }
            _ => cursor.take(least, WHAT)?,
        };
        // `require` bounded `len` by the length of a slice.
        Ok(Array { element, len: len as usize, bytes })
    }
}

/// The metadata of one file, by key.
#[derive(Clone, Debug)]
pub struct Metadata<'a> {
    /// In file order.
    entries: Vec<(&'a str, Value<'a>)>,
    /// Indices into `entries`, by key.
    by_key: Vec<usize>,
}

impl<'a> Metadata<'a> {
    /// # Errors
    /// [`ModelError::Duplicate`].
    pub(super) fn new(entries: Vec<(&'a str, Value<'a>)>) -> Result<Self, ModelError> {
        let by_key = order(entries.len(), &|a, b| entries[a].0.cmp(entries[b].0));
        for (&a, &b) in by_key.iter().zip(by_key.iter().skip(1)) {
            if entries[a].0 == entries[b].0 {
                return Err(ModelError::Duplicate { what: "metadata key", name: entries[a].0.to_string() });
            }
        }
        Ok(Metadata { entries, by_key })
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, Value<'a>)> + '_ {
        self.entries.iter().copied()
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        let at = self.by_key.binary_search_by(|&i| self.entries[i].0.cmp(key)).ok()?;
        Some(self.entries[self.by_key[at]].1)
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || ModelError::WrongType { key: key.to_string(), expected, found: value.describe() };
        convert(value).map(Some).ok_or_else(wrong)
    }

    /// A count or id of any integer type, 0 to 2^32-1.
    ///
    /// # Errors
    /// [`ModelError::WrongType`].
    pub fn u32(&self, key: &str) -> Result<Option<u32>, ModelError> {
        self.typed(key, "an integer from 0 to 4294967295", |v| v.as_integer().and_then(|v| u32::try_from(v).ok()))
    }

    /// A floating-point number; f64 is accepted when f32 can hold it.
    ///
    /// # Errors
    /// [`ModelError::WrongType`].
    pub fn f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.typed(key, "an f32", |v| match v {
            Value::F32(v) => Some(v),
            Value::F64(v) if f64::from(v as f32) == v => Some(v as f32),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`ModelError::WrongType`].
    pub fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, "a bool", |v| if let Value::Bool(v) = v { Some(v) } else { None })
    }

    /// A string.
    ///
    /// # Errors
    /// [`ModelError::WrongType`].
    pub fn str(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.typed(key, "a string", |v| if let Value::String(v) = v { Some(v) } else { None })
    }

    /// An array of strings, as bytes.
    ///
    /// # Errors
    /// [`ModelError::WrongType`].
    pub fn strings(&self, key: &str) -> Result<Option<Strings<'a>>, ModelError> {
        self.typed(key, "an array of strings", |v| if let Value::Array(v) = v { v.strings() } else { None })
    }

    /// An array of f32.
    ///
    /// # Errors
    /// [`ModelError::WrongType`].
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, ModelError> {
        self.typed(key, "an array of f32", |v| if let Value::Array(v) = v { v.f32s() } else { None })
    }

    /// An array of i32; u32 is taken for it, wrapping.
    ///
    /// # Errors
    /// [`ModelError::WrongType`].
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, ModelError> {
        self.typed(key, "an array of i32", |v| if let Value::Array(v) = v { v.i32s() } else { None })
    }

    /// Turns an absent key into [`ModelError::MissingKey`].
    pub(super) fn required<T>(
        value: Result<Option<T>, ModelError>,
        key: &str,
        expected: &'static str,
    ) -> Result<T, ModelError> {
        value?.ok_or_else(|| ModelError::MissingKey { key: key.to_string(), expected })
    }
}
