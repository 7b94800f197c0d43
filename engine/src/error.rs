//! Everything that can go wrong in this crate, by cause.

use alloc::string::String;
use model::kernel::KernelKey;

/// Why the engine refuses.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EngineError {
    /// More threads than an output can be cut for, or none.
    #[error("cannot run on {threads} cores: use 1 to {max}")]
    Threads {
        /// Asked for.
        threads: usize,
        /// Most.
        max: usize,
    },
    /// The description lacks a tensor that its configuration needs.
    #[error("the model has no tensor {name}")]
    MissingTensor {
        /// GGUF name.
        name: String,
    },
    /// A weight type that no op reads.
    #[error("tensor {name} has type {found}, which no kernel reads; supported: {}", model::quant::SUPPORTED_NAMES)]
    UnsupportedType {
        /// GGUF name.
        name: String,
        /// Type found.
        found: &'static str,
    },
    /// A row that is no whole number of blocks, or a length that is not rows x row bytes.
    #[error("tensor {name}: {n} rows of {k} elements do not make {len_bytes} bytes")]
    Shape {
        /// GGUF name.
        name: String,
        /// Rows.
        n: u32,
        /// Elements of a row.
        k: u32,
        /// Bytes in the file.
        len_bytes: u64,
    },
    /// The weights do not fit in the arena given.
    #[error("packed weights need {need_bytes} bytes, the arena has {have_bytes}")]
    ArenaTooSmall {
        /// Needed, alignment included.
        need_bytes: usize,
        /// Given.
        have_bytes: usize,
    },
    /// The arena given to run on is not the one that was loaded into.
    #[error("the weights arena is not the one the model was loaded into")]
    ArenaMoved,
    /// A chunk of the model file came too early: bytes in front of it are missing.
    #[error("model bytes from {expected} on are needed next, but the chunk starts at {found}")]
    OutOfOrder {
        /// First byte still missing.
        expected: u64,
        /// First byte of the chunk.
        found: u64,
    },
    /// The file ended before all weights were seen.
    #[error("tensor {name} is incomplete: {have_bytes} of {need_bytes} bytes; the file is truncated")]
    Incomplete {
        /// GGUF name of the first incomplete tensor.
        name: String,
        /// Its length.
        need_bytes: u64,
        /// Bytes seen.
        have_bytes: u64,
    },
    /// The memory for a session is too small.
    #[error("a session of {context} tokens needs {need_bytes} bytes, {have_bytes} given; use a shorter context")]
    SessionMemory {
        /// Context length in tokens.
        context: usize,
        /// Needed.
        need_bytes: usize,
        /// Given.
        have_bytes: usize,
    },
    /// The context is used up.
    #[error(
        "the context of {context} tokens is full: position {pos} plus {tokens} more; start anew or set a longer context"
    )]
    ContextFull {
        /// Context length in tokens.
        context: usize,
        /// Tokens already in it.
        pos: usize,
        /// Tokens to add.
        tokens: usize,
    },
    /// A session made for another model's shapes or another number of cores.
    #[error("this session belongs to another model or number of cores")]
    ForeignSession,
    /// Nothing to run.
    #[error("no tokens given: a prompt needs at least one")]
    NoTokens,
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    Token {
        /// The id.
        token: u32,
        /// Vocabulary size.
        vocab_size: u32,
    },
    /// A kernel for another problem than the slot's.
    #[error("the kernel computes {kernel}, the slot needs {slot}")]
    KeyMismatch {
        /// The slot's key.
        slot: KernelKey,
        /// The kernel's key.
        kernel: KernelKey,
    },
    /// No such slot of the kernel table.
    #[error("the kernel table has {slots} slots, there is no slot {slot}")]
    NoSlot {
        /// Asked for.
        slot: usize,
        /// Slots.
        slots: usize,
    },
    /// No such matrix for this slot.
    #[error("{key} has {instances} matrices, there is no matrix {instance}")]
    NoInstance {
        /// The slot's key.
        key: KernelKey,
        /// Asked for.
        instance: usize,
        /// Matrices.
        instances: usize,
    },
}
