//! Why a model file was refused: one enum for every reader of this crate.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

/// Names listed in [`ModelError::MissingTensors`] at most; the count is always exact.
pub(crate) const MAX_NAMES_LISTED: usize = 24;

/// Why a model file cannot be used. Each message says what was expected, what was found and what to do.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum ModelError {
    /// The header slice ends too early, the file does not: read at least `need_bytes` from the start and try again.
    #[error(
        "header slice too short: {need_bytes} bytes are needed to go on from byte {at_byte}, {have_bytes} were given; read more of the file"
    )]
    Truncated {
        /// Bytes from the start of the file that the next attempt needs at least.
        need_bytes: u64,
        /// Bytes given.
        have_bytes: u64,
        /// Where reading stopped.
        at_byte: u64,
    },
    /// The file itself ends inside something it promised.
    #[error(
        "the file ends early: {what} at byte {at_byte} needs the file to be at least {need_bytes} bytes long, it has {file_bytes}; download it again"
    )]
    FileEnds {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        at_byte: u64,
        /// Smallest length the file would need.
        need_bytes: u64,
        /// Its real length.
        file_bytes: u64,
    },
    /// More bytes than the header accounts for.
    #[error(
        "{what} is {found_bytes} bytes long but its header accounts for {expected_bytes}; the file is damaged or belongs to another model"
    )]
    TrailingBytes {
        /// Which file.
        what: &'static str,
        /// Length by the header.
        expected_bytes: u64,
        /// Real length.
        found_bytes: u64,
    },
    /// A file of no bytes.
    #[error("the model file is empty (0 bytes): expected a GGUF file or a llama2.c .bin; download it again")]
    Empty,
    /// Neither GGUF nor llama2.c.
    #[error(
        "not a model file: it starts with {first_bytes:02x?}; expected a GGUF file (`GGUF`) or a llama2.c .bin (version 0: seven small integers; versions 1 and 2: `ak42`)"
    )]
    UnknownFormat {
        /// The first bytes.
        first_bytes: [u8; 8],
    },
    /// A format version this reader does not know.
    #[error("{format} version {found} is not supported, only {supported}; {advice}")]
    UnsupportedVersion {
        /// Format name.
        format: &'static str,
        /// Version in the file.
        found: u32,
        /// Versions read.
        supported: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// Text that is not UTF-8 where the format requires it.
    #[error("{what} at byte {at_byte} is not UTF-8; the file is damaged")]
    NotUtf8 {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        at_byte: u64,
    },
    /// A key or name of no bytes.
    #[error("{what} at byte {at_byte} is empty; the file is damaged or was cut short: download it again")]
    NoName {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        at_byte: u64,
    },
    /// A metadata value type id outside the format.
    #[error(
        "metadata key `{key}`: value type {found} does not exist in GGUF (0 to 12); the file is damaged or newer than this reader"
    )]
    UnknownValueType {
        /// Key.
        key: String,
        /// Type id found.
        found: u32,
    },
    /// Arrays of arrays.
    #[error(
        "metadata key `{key}` is an array of arrays, which no known model uses; the file is damaged or newer than this reader"
    )]
    NestedArray {
        /// Key.
        key: String,
    },
    /// The same metadata key or tensor name twice.
    #[error("{what} `{name}` appears twice; write the file again with a sound converter")]
    Duplicate {
        /// Metadata key or tensor.
        what: &'static str,
        /// Name.
        name: String,
    },
    /// A required metadata key is absent.
    #[error("metadata key `{key}` is missing; expected {expected}; convert the model again with a current converter")]
    MissingKey {
        /// Key.
        key: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A metadata key holds a value of another type.
    #[error("metadata key `{key}` holds {found}; expected {expected}")]
    WrongType {
        /// Key.
        key: String,
        /// Type expected.
        expected: &'static str,
        /// Type found.
        found: String,
    },
    /// A metadata value that the format or the architecture does not allow.
    #[error("`{key}` is {found}; expected {expected}")]
    InvalidValue {
        /// Key or field.
        key: String,
        /// Value found.
        found: String,
        /// What is allowed.
        expected: String,
    },
    /// An architecture this project does not run.
    #[error("model architecture `{found}` is not supported; supported: {supported}")]
    UnsupportedArchitecture {
        /// Architecture in the file.
        found: String,
        /// Architectures that run.
        supported: &'static str,
    },
    /// A feature of the architecture that would change the results and is not implemented.
    #[error("the model uses {feature} (`{key}` = {found}), which is not supported; use a model without it")]
    UnsupportedFeature {
        /// Feature in words.
        feature: &'static str,
        /// Key that says so.
        key: String,
        /// Its value.
        found: String,
    },
    /// A tensor type id that ggml does not define.
    #[error(
        "tensor `{tensor}` has type id {found}, which this reader does not know; requantise the model to one of {supported}"
    )]
    UnknownTensorType {
        /// Tensor name.
        tensor: String,
        /// Type id.
        found: u32,
        /// Types that run.
        supported: &'static str,
    },
    /// A tensor of a known type that cannot be run.
    #[error("tensor `{tensor}` is stored as {found}; supported here: {supported}; requantise the model")]
    UnsupportedTensorType {
        /// Tensor name.
        tensor: String,
        /// Type name.
        found: &'static str,
        /// Types that are allowed for this tensor.
        supported: &'static str,
    },
    /// A tensor whose name has no meaning in this architecture; ignoring it could change the results.
    #[error(
        "tensor `{tensor}` has no place in architecture `{architecture}` as implemented here; the model needs a feature that is not supported"
    )]
    UnexpectedTensor {
        /// Tensor name.
        tensor: String,
        /// Architecture.
        architecture: &'static str,
    },
    /// Tensors that the configuration calls for and the file lacks.
    #[error("{count} tensors are missing: {}{}; the file is incomplete", names.join(", "), if *count > names.len() as u64 { ", ..." } else { "" })]
    MissingTensors {
        /// Their names, at most 24.
        names: Vec<String>,
        /// How many there are.
        count: u64,
    },
    /// Dimensions that disagree with the configuration.
    #[error("tensor `{tensor}` has dimensions {found:?} (innermost first); the configuration calls for {expected:?}")]
    WrongShape {
        /// Tensor name.
        tensor: String,
        /// Dimensions expected, innermost first.
        expected: Vec<u64>,
        /// Dimensions found.
        found: Vec<u64>,
    },
    /// A row that does not consist of whole blocks.
    #[error("tensor `{tensor}`: rows of {row_len} elements cannot be stored as {ty}, whose blocks hold {block_len}")]
    PartialBlock {
        /// Tensor name.
        tensor: String,
        /// Elements in a row.
        row_len: u64,
        /// Type name.
        ty: &'static str,
        /// Elements in a block.
        block_len: u32,
    },
    /// A tensor's length in bytes is not what its dimensions and type give.
    #[error("tensor `{tensor}` is {found_bytes} bytes long; its dimensions and type give {expected_bytes}")]
    WrongLength {
        /// Tensor name.
        tensor: String,
        /// Length expected.
        expected_bytes: u64,
        /// Length found.
        found_bytes: u64,
    },
    /// A tensor offset that breaks the file's own alignment.
    #[error("tensor `{tensor}` starts at data offset {offset}, not a multiple of the file's alignment {alignment}")]
    Misaligned {
        /// Tensor name.
        tensor: String,
        /// Offset from the start of the data section.
        offset: u64,
        /// Alignment.
        alignment: u64,
    },
    /// A tensor that ends behind the end of the file.
    #[error("tensor `{tensor}` covers bytes {offset}..{end} but the file has {file_bytes}; download it again")]
    OutsideFile {
        /// Tensor name.
        tensor: String,
        /// First byte.
        offset: u64,
        /// Byte after the last.
        end: u64,
        /// File length.
        file_bytes: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors `{first}` and `{second}` overlap at byte {at_byte}; the file is damaged")]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The other.
        second: String,
        /// First shared byte.
        at_byte: u64,
    },
    /// The tokenizer part of the file cannot be used.
    #[error("tokenizer: {0}")]
    Tokenizer(Box<crate::tokenizer::TokenizerError>),
}

impl From<crate::tokenizer::TokenizerError> for ModelError {
    fn from(error: crate::tokenizer::TokenizerError) -> Self {
        ModelError::Tokenizer(Box::new(error))
    }
}
