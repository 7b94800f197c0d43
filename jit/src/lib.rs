//! Kernel key and variant in, audited machine code out.
//!
//! ```text
//! KernelKey + Variant
//!   -> plan      refuse what cannot be; regions, loop counts, where accumulators live
//!   -> nest      loops: regions of panels -> panels -> column tiles -> row tiles -> k
//!      blocked   the same for long prompts: panels -> blocks of k -> row tiles -> column tiles -> k
//!      matmul_float, matmul_quant   one step of k        fuse   residual, silu(gate) * up
//!      clif      the vector vocabulary they are written in (CLIF, with carriers)
//!   -> Cranelift 128-bit code, opt_level=none
//!   -> widen     decode, allow-list, re-encode at 128, 256 or 512 bits
//!      table     the allow-list          fold, prefetch, encode
//!   -> audit     decode again and prove: only listed instructions, memory by argument or frame, no way out but `ret`
//! = CompiledKernel { code, stats }
//! ```
//!
//! [`compiler::Compiler`] runs that path; [`space`] says which variants of a key are worth trying, best guess first;
//! [`disasm`] shows the result.
//!
//! Architecture invariant: every variant of a key gives bit-identical results ([`model::numerics`]): lanes are output columns,
//! each output has one accumulator, `k` ascends. Nothing in this crate reorders a sum.
//! Architecture invariant: nothing here makes memory executable or runs code, and a refusal is a typed error, never a
//! silent substitute.
//! Architecture invariant: the widening pass and the audit know nothing of the kernels; a bug in the emitters is either
//! refused by them or caught by the caller's comparison with the reference.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod audit;
mod blocked;
pub mod clif;
pub mod compiler;
mod disasm;
mod error;
mod fuse;
mod matmul_float;
mod matmul_quant;
mod nest;
mod plan;
pub mod space;
pub mod widen;

pub use compiler::{CompileStats, CompiledKernel, Compiler};
pub use disasm::disassemble;
pub use error::{JitError, Refusals};
