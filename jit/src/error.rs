//! Why a kernel was not produced: typed, with numbers, and counted.

use crate::audit::AuditError;
use alloc::string::String;
use core::fmt;
use iced_x86::Code;
use model::kernel::{KernelKey, Variant};

/// A refusal to produce a kernel. Nothing is ever produced silently in another way instead.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum JitError {
    /// No variant can compute this key.
    #[error("{key}: {reason}")]
    Shape {
        /// The key asked for.
        key: KernelKey,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// This variant cannot compute this key; another one can.
    #[error("{key} as {variant}: {reason}; take a variant from space::variants")]
    Variant {
        /// The key asked for.
        key: KernelKey,
        /// The variant asked for.
        variant: Variant,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The machine lacks instructions the variant needs.
    #[error("{variant} needs {needs}, which this machine does not have")]
    Isa {
        /// The variant asked for.
        variant: Variant,
        /// The missing instruction set.
        needs: &'static str,
    },
    /// Cranelift could not compile the function.
    #[error("code generator: {message}")]
    Codegen {
        /// What it said.
        message: String,
    },
    /// The generated code refers to something outside itself.
    #[error("generated code has {count} relocations; kernels must have none")]
    Relocation {
        /// Number of relocations.
        count: usize,
    },
    /// Bytes that are not an instruction, such as a constant pool, at `offset`.
    #[error("byte {offset} of the generated code is not an instruction (constant pool?)")]
    Undecodable {
        /// Offset from the first byte.
        offset: usize,
    },
    /// A vector load from the code itself.
    #[error("instruction at byte {offset} ({code:?}) reads a constant pool")]
    ConstantPool {
        /// Offset from the first byte.
        offset: usize,
        /// The instruction.
        code: Code,
    },
    /// The register allocator ran out of vector registers: 128 bits are saved, not the whole vector.
    #[error("instruction at byte {offset} ({code:?}) spills a vector register")]
    Spill {
        /// Offset from the first byte.
        offset: usize,
        /// The instruction.
        code: Code,
    },
    /// An instruction the widening table does not list, in this form.
    #[error("instruction at byte {offset} ({code:?}) is not on the allow-list")]
    Unlisted {
        /// Offset from the first byte.
        offset: usize,
        /// The instruction.
        code: Code,
    },
    /// A listed instruction that does not exist at the width asked for.
    #[error("instruction at byte {offset} ({code:?}) has no {bits}-bit form")]
    NoWidth {
        /// Offset from the first byte.
        offset: usize,
        /// The instruction.
        code: Code,
        /// Vector width asked for.
        bits: u32,
    },
    /// An instruction could not be encoded.
    #[error("encoder: {message}")]
    Encode {
        /// What the encoder said.
        message: String,
    },
    /// The finished code broke an invariant.
    #[error("audit of the finished code: {0}")]
    Audit(#[from] AuditError),
}

/// How many kernels were refused, by cause.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Refusals {
    /// [`JitError::Shape`].
    pub shape: u32,
    /// [`JitError::Variant`].
    pub variant: u32,
    /// [`JitError::Isa`].
    pub isa: u32,
    /// [`JitError::Codegen`] and [`JitError::Encode`].
    pub codegen: u32,
    /// [`JitError::Relocation`].
    pub relocation: u32,
    /// [`JitError::Undecodable`] and [`JitError::ConstantPool`].
    pub constant_pool: u32,
    /// [`JitError::Spill`].
    pub spill: u32,
    /// [`JitError::Unlisted`] and [`JitError::NoWidth`].
    pub unlisted: u32,
    /// [`JitError::Audit`].
    pub audit: u32,
}

impl Refusals {
    /// Counts `error`.
    pub fn count(&mut self, error: &JitError) {
        let counter = match error {
            JitError::Shape { .. } => &mut self.shape,
            JitError::Variant { .. } => &mut self.variant,
            JitError::Isa { .. } => &mut self.isa,
            JitError::Codegen { .. } | JitError::Encode { .. } => &mut self.codegen,
            JitError::Relocation { .. } => &mut self.relocation,
            JitError::Undecodable { .. } | JitError::ConstantPool { .. } => &mut self.constant_pool,
            JitError::Spill { .. } => &mut self.spill,
            JitError::Unlisted { .. } | JitError::NoWidth { .. } => &mut self.unlisted,
            JitError::Audit(_) => &mut self.audit,
        };
        *counter = counter.saturating_add(1);
    }

    /// All refusals.
    pub fn total(&self) -> u32 {
        [
            self.shape,
            self.variant,
            self.isa,
            self.codegen,
            self.relocation,
            self.constant_pool,
            self.spill,
            self.unlisted,
            self.audit,
        ]
        .iter()
        .fold(0, |sum, n| sum.saturating_add(*n))
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "shape {}, variant {}, isa {}, codegen {}, relocation {}, constant pool {}, spill {}, unlisted {}, audit {}",
            self.shape,
            self.variant,
            self.isa,
            self.codegen,
            self.relocation,
            self.constant_pool,
            self.spill,
            self.unlisted,
            self.audit
        )
    }
}
