//! Kernels as a relocatable ELF object: what the linker takes in place of a compiler.
//!
//! ```text
//! .text.bareflow_kernels           bareflow_kernels_text, then one symbol per kernel, each 64-byte aligned
//! .rodata.bareflow_kernels_table   bareflow_kernels_table .. bareflow_kernels_table_end: frozen::encode's bytes
//! .rodata.bareflow_model           bareflow_model .. bareflow_model_end: the model file, empty unless embedded
//! ```
//! Kernels have no relocations (the compiler guarantees it), so the object has none either.

use anyhow::{Context, Result};
use model::kernel::KernelKey;
use object::write::{Object, SectionId, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};
use snapshot_format::StoredKernel;
use snapshot_format::frozen::{self, FrozenKernel, FrozenModel, FrozenTable};

/// Alignment of every kernel, one cache line.
const KERNEL_ALIGN: u64 = 64;

/// A kernel of a snapshot.
pub struct Exportable {
    /// What it computes.
    pub key: KernelKey,
    /// The kernel.
    pub kernel: StoredKernel,
    /// As [`snapshot_format::KeyRecord::answer_sha256`].
    pub answer_sha256: Option<[u8; 32]>,
}

/// The object file for `kernels`, which converged with the model `converged_with`; with a model file embedded when given.
///
/// # Errors
/// When the object cannot be written.
pub fn build(converged_with: FrozenModel, kernels: &[Exportable], embedded: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let text = object.add_section(Vec::new(), b".text.bareflow_kernels".to_vec(), SectionKind::Text);
    object.append_section_data(text, &[], KERNEL_ALIGN);
    symbol(&mut object, "bareflow_kernels_text", text, 0, 0, SymbolKind::Label);
    let mut table = FrozenTable { model: converged_with, kernels: Vec::new() };
    for Exportable { key, kernel, answer_sha256 } in kernels {
        let offset = object.append_section_data(text, &kernel.code, KERNEL_ALIGN);
        let name = format!("{key}_{}", kernel.variant);
        symbol(&mut object, &name, text, offset, kernel.code.len() as u64, SymbolKind::Text);
        table.kernels.push(FrozenKernel {
            key: *key,
            variant: kernel.variant,
            offset: u32::try_from(offset).context("more than 4 GiB of kernels")?,
            len_bytes: u32::try_from(kernel.code.len()).context("a kernel of more than 4 GiB")?,
            answer_sha256: *answer_sha256,
        });
    }
    blob(&mut object, "bareflow_kernels_table", &frozen::encode(&table), 8);
    let embedded = embedded.unwrap_or_default();
    blob(&mut object, "bareflow_model", embedded, if embedded.is_empty() { 1 } else { 4096 });
    object.write().context("writing the kernel object file")
}

fn blob(object: &mut Object<'_>, name: &str, data: &[u8], align: u64) {
    let section_name = format!(".rodata.{name}").into_bytes();
    let section = object.add_section(Vec::new(), section_name, SectionKind::ReadOnlyData);
    object.append_section_data(section, data, align);
    symbol(object, name, section, 0, data.len() as u64, SymbolKind::Data);
    symbol(object, &format!("{name}_end"), section, data.len() as u64, 0, SymbolKind::Data);
}

fn symbol(object: &mut Object<'_>, name: &str, section: SectionId, value: u64, size: u64, kind: SymbolKind) {
    let kind = if kind == SymbolKind::Label { SymbolKind::Text } else { kind };
    object.add_symbol(Symbol {
        name: name.as_bytes().to_vec(),
        value,
        size,
        kind,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
}
