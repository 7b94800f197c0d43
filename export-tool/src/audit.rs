//! Proves of an ELF that no compiler is in it and that nothing in it can be written and executed.

use anyhow::{Context, Result, anyhow, ensure};
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

/// Checks that a machine loads the same from both files: the audited one and its copy without symbols.
///
/// # Errors
/// The first difference, or that one of them is not a 64-bit ELF file.
pub fn same_image(audited: &[u8], written: &[u8]) -> Result<()> {
    let endian = Endianness::Little;
    let (a, b) = (parse(audited)?, parse(written)?);
    let entry = |file: &Elf<'_>| file.elf_header().e_entry.get(endian);
    ensure!(entry(&a) == entry(&b), "the entry points differ: {:#x} and {:#x}", entry(&a), entry(&b));
    let (a, b) = (a.elf_program_headers(), b.elf_program_headers());
    ensure!(a.len() == b.len(), "{} segments were audited, {} would be written", a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        let place = |h: &elf::ProgramHeader64<Endianness>| {
            (h.p_type(endian), h.p_flags(endian), h.p_vaddr(endian), h.p_paddr(endian), h.p_memsz(endian))
        };
        let at = a.p_vaddr(endian);
        ensure!(place(a) == place(b), "the segment at {at:#x} has another place, length or permission");
        let outside = |()| anyhow!("the segment at {at:#x} lies outside its file");
        let same = a.data(endian, audited).map_err(outside)? == b.data(endian, written).map_err(outside)?;
        ensure!(same, "the bytes of the segment at {at:#x} differ");
    }
    Ok(())
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
    for kernel in &table.kernels {
        let name = || format!("kernel {} {}", kernel.key, kernel.variant);
        let place = file_range(file, text.saturating_add(kernel.offset.into()), kernel.len_bytes.into(), true);
        let code = place.with_context(|| format!("{} is not in executable memory", name()))?;
        jit::audit::audit(&elf_bytes[code], kernel.variant.width).with_context(name)?;
    }
    Ok(table.kernels.len())
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
        let at = |inside: u64| usize::try_from(header.p_offset(endian).checked_add(inside)?).ok();
        // A damaged header can name more than the file has.
        Some(at(inside)?..at(end)?).filter(|range| range.end <= file.data().len())
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
    use snapshot_format::frozen::FrozenModel;
    use std::path::Path;

    /// An image of nothing but `kernels`, and a model file that is only words.
    fn image(kernels: &[Exportable], model: &[u8]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let (object, out) = (dir.path().join("kernels.o"), dir.path().join("image"));
        std::fs::write(&object, object_file::build(FrozenModel::default(), kernels, Some(model)).unwrap()).unwrap();
        linked(&object, &out, &["-e", "bareflow_kernels_text"])
    }

    fn linked(object: &Path, out: &Path, arguments: &[&str]) -> Vec<u8> {
        let linker = crate::find_linker().unwrap();
        let status = std::process::Command::new(linker)
            .args(["-flavor", "gnu", "-static", "--build-id=none"])
            .args(arguments)
            .args([Path::new("-o"), out, object])
            .status()
            .unwrap();
        assert!(status.success());
        std::fs::read(out).unwrap()
    }

    /// `ret` after `vzeroupper`.
    const GOOD: [u8; 4] = [0xc5, 0xf8, 0x77, 0xc3];

    fn kernel(n: u32, code: &[u8]) -> Exportable {
        let variant: Variant = "w256_r1_c32_s2_u1_pf1024".parse().unwrap();
        Exportable {
            key: format!("qkv_q4_1_m1_n{n}_k576").parse().unwrap(),
            kernel: StoredKernel::new(variant, code.to_vec()),
            answer_sha256: None,
        }
    }

    fn findings(elf: &[u8]) -> Vec<String> {
        let audit = audit(elf).unwrap();
        assert_eq!(audit.passed, audit.findings.is_empty());
        audit.findings
    }

    #[test]
    fn segments_beyond_the_end_of_the_file_are_no_pass_and_no_panic() {
        let good = image(&[kernel(32, &GOOD)], b"weights");
        let headers = u64::from_le_bytes(*good[32..].first_chunk().unwrap()) as usize;
        let count = usize::from(u16::from_le_bytes(*good[56..].first_chunk().unwrap()));
        for header in (0..count).map(|i| headers + 56 * i) {
            for offset in [good.len() as u64 - 1, u64::MAX - 1] {
                let mut damaged = good.clone();
                damaged[header + 8..header + 16].copy_from_slice(&offset.to_le_bytes());
                damaged[header + 32..header + 40].copy_from_slice(&(1u64 << 40).to_le_bytes());
                let is_loaded = good[header..header + 4] == elf::PT_LOAD.to_le_bytes();
                let passed = audit(&damaged).is_ok_and(|audit| audit.passed && audit.kernels == 1);
                assert!(!(is_loaded && good[header + 4] & 1 != 0 && passed), "the kernels' segment at {header}");
            }
        }
    }

    #[test]
    fn kernels_are_counted_and_audited_by_where_they_lie_and_a_model_may_say_anything() {
        let kernels = [kernel(32, &GOOD), kernel(64, &GOOD)];
        let passed = audit(&image(&kernels, b"cranelift and regalloc are compilers, says the model")).unwrap();
        assert!(passed.passed && passed.kernels == 2, "{passed:?}");
        let forged = [kernel(32, &GOOD), kernel(64, &[0x0f, 0x05, 0xc5, 0xf8, 0x77, 0xc3])];
        let failed = audit(&image(&forged, b"")).unwrap();
        assert!(!failed.passed && failed.findings[0].contains("kernel qkv_q4_1_m1_n64_k576"), "{failed:?}");
    }

    #[test]
    fn a_segment_that_is_writable_and_executable_is_found() {
        let mut elf = image(&[kernel(32, &GOOD)], b"");
        assert_eq!(findings(&elf), [""; 0]);
        // One header after the other, and both bits: either alone is allowed.
        let (first, size) = (u64_at(&elf, 32) as usize, 56);
        let count = usize::from(u16::from_le_bytes([elf[56], elf[57]]));
        let mut tried = 0;
        for header in (0..count).map(|i| first + i * size) {
            if u32_at(&elf, header) != elf::PT_LOAD {
                continue;
            }
            let (flags, address) = (u32_at(&elf, header + 4), u64_at(&elf, header + 16));
            elf[header + 4] |= (elf::PF_W | elf::PF_X) as u8;
            assert_eq!(findings(&elf), [format!("segment at {address:#x} is writable and executable")]);
            elf[header + 4] = flags as u8;
            tried += 1;
        }
        assert!(tried >= 2, "{tried} loadable segments");
    }

    #[test]
    fn a_file_without_symbols_or_without_anything_to_load_does_not_pass() {
        let dir = tempfile::tempdir().unwrap();
        let (object, out) = (dir.path().join("kernels.o"), dir.path().join("image"));
        std::fs::write(&object, object_file::build(FrozenModel::default(), &[kernel(32, &GOOD)], None).unwrap())
            .unwrap();
        let stripped = linked(&object, &out, &["-e", "bareflow_kernels_text", "--strip-all"]);
        assert_eq!(findings(&stripped), ["no symbols: the audit needs the unstripped file"]);
        // The object itself: symbols, but no program headers. Its kernels lie nowhere in memory.
        let found = findings(&std::fs::read(&object).unwrap());
        assert!(found.contains(&"no loadable segment".to_owned()), "{found:?}");
    }

    #[test]
    fn a_copy_that_would_load_something_else_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (object, out) = (dir.path().join("kernels.o"), dir.path().join("image"));
        std::fs::write(
            &object,
            object_file::build(FrozenModel::default(), &[kernel(32, &GOOD)], Some(b"weights")).unwrap(),
        )
        .unwrap();
        // As the kernel's own script does it: no segment holds the file's header, which says where the symbols are.
        let script = dir.path().join("link.ld");
        let segments = "PHDRS { text PT_LOAD FLAGS(5); rodata PT_LOAD FLAGS(4); }";
        let sections = "SECTIONS { . = 0x100000; .text : { *(.text.*) } :text .rodata : { *(.rodata.*) } :rodata }";
        std::fs::write(&script, format!("{segments} {sections}")).unwrap();
        let arguments = ["-e", "bareflow_kernels_text", "-T", script.to_str().unwrap(), "--strip-all"];
        let audited = linked(&object, &out, &arguments[..4]);
        let written = linked(&object, &out, &arguments);
        assert!(written.len() < audited.len());
        same_image(&audited, &written).unwrap();
        let error = |written: &[u8]| format!("{:#}", same_image(&audited, written).unwrap_err());
        let code = written.windows(4).position(|bytes| bytes == GOOD).unwrap();
        // A byte of the code, the entry point, a permission of a segment, the number of segments.
        for (at, word) in [(code, "bytes of the segment"), (24, "entry points"), (68, "permission"), (56, "segments")] {
            let mut other = written.clone();
            other[at] ^= 1;
            assert!(error(&other).contains(word), "byte {at}: {}", error(&other));
        }
        assert!(error(&written[..code]).contains("ELF"), "{}", error(&written[..code]));
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }
}
