//! Proves of an ELF that no compiler is in it and that nothing in it can be written and executed.

use anyhow::{Context, Result};
use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SectionKind, elf};
use serde::Serialize;

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
    /// Kernels linked in (symbols between `bareflow_kernels_text` and the end of its section).
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
    let mut kernels = 0;
    for symbol in file.symbols() {
        symbols += 1;
        let name = symbol.name().unwrap_or_default();
        if COMPILER_NAMES.iter().any(|bad| name.contains(bad)) {
            findings.push(format!("compiler symbol `{name}`"));
        }
        if name == JIT_ARENA_SYMBOL {
            findings.push(format!("a JIT arena (`{name}`)"));
        }
        // Kernel symbols are named KEY_VARIANT; the variant part is unmistakable.
        if name.contains("_pf") && name.contains("_k") && name.contains("_w") {
            kernels += 1;
        }
    }
    if symbols == 0 {
        findings.push("no symbols: the audit needs the unstripped file".to_owned());
    }
    for bad in COMPILER_NAMES {
        if find(elf_bytes, bad.as_bytes()) {
            findings.push(format!("the string `{bad}`"));
        }
    }
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

fn parse(bytes: &[u8]) -> Result<ElfFile64<'_, Endianness>> {
    ElfFile64::parse(bytes).context("expected a 64-bit ELF image")
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window.eq_ignore_ascii_case(needle))
}
