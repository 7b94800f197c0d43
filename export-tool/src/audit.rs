//! Proves of an ELF that no compiler is in it and that nothing in it can be written and executed.

use anyhow::{Context, Result};
use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SectionKind, elf};
use serde::Serialize;
use snapshot_format::frozen;
use std::ops::Range;

/// Names that only occur with a compiler or assembler linked in.
const COMPILER_NAMES: [&str; 5] = ["cranelift", "regalloc", "iced_x86", "iced-x86", "target_lexicon"];
/// The symbol of the JIT arena in the self-optimising kernel.
const JIT_ARENA_SYMBOL: &str = "bareflow_jit_arena";

/// What the audit found.
#[derive(Clone, Debug, Serialize)]
pub struct Audit {
    /// No finding.
    pub passed: bool,
    /// Each violation, for people.
    pub findings: Vec<String>,
    /// Symbols looked at.
    pub symbols: usize,
    /// Loadable segments looked at.
    pub segments: usize,
    /// Kernels linked in: those of the table, each audited where it lies.
    pub kernels: usize,
}

/// Sizes of an image.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sizes {
    /// Bytes of the file.
    pub elf_bytes: u64,
    /// Bytes of executable sections.
    pub text_bytes: u64,
}

/// Audits an unstripped ELF.
///
/// # Errors
/// When `elf` is not a 64-bit ELF file.
pub fn audit(elf_bytes: &[u8]) -> Result<Audit> {
    let file = parse(elf_bytes)?;
    let mut findings = Vec::new();
    let mut symbols = 0;
    for symbol in file.symbols() {
        symbols += 1;
        let name = symbol.name().unwrap_or_default();
        if COMPILER_NAMES.iter().any(|bad| name.contains(bad)) {
            findings.push(format!("compiler symbol `{name}`"));
        }
        if name == JIT_ARENA_SYMBOL {
            findings.push(format!("a JIT arena (`{name}`)"));
        }
    }
    if symbols == 0 {
        findings.push("no symbols: the audit needs the unstripped file".to_owned());
    }
    // An embedded model may talk of compilers.
    let model = between(&file, "bareflow_model", "bareflow_model_end").unwrap_or(0..0);
    for bad in COMPILER_NAMES {
        let parts = [&elf_bytes[..model.start], &elf_bytes[model.end..]];
        if parts.into_iter().any(|part| find(part, bad.as_bytes())) {
            findings.push(format!("the string `{bad}`"));
        }
    }
    let kernels = match kernels(&file, elf_bytes) {
        Ok(count) => count,
        Err(error) => {
            findings.push(format!("{error:#}"));
            0
        }
    };
    let endian = Endianness::Little;
    let mut segments = 0;
    for header in file.elf_program_headers() {
        if header.p_type(endian) != elf::PT_LOAD {
            continue;
        }
        segments += 1;
        let flags = header.p_flags(endian);
        if flags & elf::PF_W != 0 && flags & elf::PF_X != 0 {
            findings.push(format!("segment at {:#x} is writable and executable", header.p_vaddr(endian)));
        }
    }
    if segments == 0 {
        findings.push("no loadable segment".to_owned());
    }
    findings.sort();
    findings.dedup();
    Ok(Audit { passed: findings.is_empty(), findings, symbols, segments, kernels })
}

/// Sizes of an ELF file.
///
/// # Errors
/// When `elf` is not a 64-bit ELF file.
pub fn sizes(elf_bytes: &[u8]) -> Result<Sizes> {
    let file = parse(elf_bytes)?;
    let text_bytes = file.sections().filter(|s| s.kind() == SectionKind::Text).map(|s| s.size()).sum();
    Ok(Sizes { elf_bytes: elf_bytes.len() as u64, text_bytes })
}

/// Counts the kernels of the linked table, 0 where there is none; each must lie in executable memory and be one the compiler
/// could have made.
fn kernels(file: &Elf<'_>, elf_bytes: &[u8]) -> Result<usize> {
    let Some(table) = between(file, "bareflow_kernels_table", "bareflow_kernels_table_end") else { return Ok(0) };
    let table = frozen::decode(&elf_bytes[table])?;
    let text = address(file, "bareflow_kernels_text").context("a kernel table, but no `bareflow_kernels_text`")?;
    for kernel in &table {
        let name = || format!("kernel {} {}", kernel.key, kernel.variant);
        let place = file_range(file, text + u64::from(kernel.offset), kernel.len_bytes.into(), true);
        let code = place.with_context(|| format!("{} is not in executable memory", name()))?;
        jit::audit::audit(&elf_bytes[code], kernel.variant.width).with_context(name)?;
    }
    Ok(table.len())
}

fn address(file: &Elf<'_>, symbol: &str) -> Option<u64> {
    file.symbols().find(|s| s.name() == Ok(symbol)).map(|s| s.address())
}

/// Bytes of the file between two symbols.
fn between(file: &Elf<'_>, start: &str, end: &str) -> Option<Range<usize>> {
    let (start, end) = (address(file, start)?, address(file, end)?);
    file_range(file, start, end.checked_sub(start)?, false)
}

/// Where in the file the `len_bytes` bytes that are loaded at `address` stand.
fn file_range(file: &Elf<'_>, address: u64, len_bytes: u64, executable: bool) -> Option<Range<usize>> {
    let endian = Endianness::Little;
    file.elf_program_headers().iter().find_map(|header| {
        let is_usable =
            header.p_type(endian) == elf::PT_LOAD && (!executable || header.p_flags(endian) & elf::PF_X != 0);
        let inside = address.checked_sub(header.p_vaddr(endian)).filter(|_| is_usable)?;
        let end = inside.checked_add(len_bytes).filter(|&end| end <= header.p_filesz(endian))?;
        let offset = header.p_offset(endian);
        Some(usize::try_from(offset + inside).ok()?..usize::try_from(offset + end).ok()?)
    })
}

type Elf<'data> = ElfFile64<'data, Endianness>;

fn parse(bytes: &[u8]) -> Result<Elf<'_>> {
    ElfFile64::parse(bytes).context("expected a 64-bit ELF image")
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window.eq_ignore_ascii_case(needle))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object_file::{self, Exportable};
    use model::kernel::Variant;
    use snapshot_format::StoredKernel;

    /// An image of nothing but `kernels`, and a model file that is only words.
    fn image(kernels: &[Exportable], model: &[u8]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let (object, out) = (dir.path().join("kernels.o"), dir.path().join("image"));
        std::fs::write(&object, object_file::build(kernels, Some(model)).unwrap()).unwrap();
        let linker = crate::find_linker().unwrap();
        let status = std::process::Command::new(linker)
            .args(["-flavor", "gnu", "-static", "--build-id=none", "-e", "bareflow_kernels_text"])
            .args([std::path::Path::new("-o"), &out, &object])
            .status()
            .unwrap();
        assert!(status.success());
        std::fs::read(&out).unwrap()
    }

    #[test]
    fn kernels_are_counted_and_audited_by_where_they_lie_and_a_model_may_say_anything() {
        // `ret` after `vzeroupper`, and a name that other symbols could have, too.
        let variant: Variant = "w256_r1_c32_s2_u1_pf1024".parse().unwrap();
        let kernel = |n: u32, code: &[u8]| Exportable {
            key: format!("qkv_q4_1_m1_n{n}_k576").parse().unwrap(),
            kernel: StoredKernel::new(variant, code.to_vec()),
            answer_sha256: None,
        };
        let good = [0xc5, 0xf8, 0x77, 0xc3];
        let kernels = [kernel(32, &good), kernel(64, &good)];
        let passed = audit(&image(&kernels, b"cranelift and regalloc are compilers, says the model")).unwrap();
        assert!(passed.passed && passed.kernels == 2, "{passed:?}");
        let forged = [kernel(32, &good), kernel(64, &[0x0f, 0x05, 0xc5, 0xf8, 0x77, 0xc3])];
        let failed = audit(&image(&forged, b"")).unwrap();
        assert!(!failed.passed && failed.findings[0].contains("kernel qkv_q4_1_m1_n64_k576"), "{failed:?}");
    }
}
