//! Size of an ELF image and of the code in it.

use object::{Object, ObjectSection, SectionKind};
use std::path::Path;

/// Sizes of an image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct ImageBytes {
    /// The file without symbols and debug information, as `--strip-all` would leave it.
    pub elf_bytes: u64,
    /// Its executable sections.
    pub text_bytes: u64,
}

/// Sizes of the ELF file at `path`; one with symbols counts as if it had none, so that images compare.
///
/// # Errors
/// The system's reason, or `InvalidData` when the file is not an object file.
pub fn image_bytes(path: &Path) -> std::io::Result<ImageBytes> {
    let bytes = std::fs::read(path)?;
    let invalid =
        |e: object::Error| std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{}: {e}", path.display()));
    let file = object::File::parse(bytes.as_slice()).map_err(invalid)?;
    let text_bytes = file.sections().filter(|s| s.kind() == SectionKind::Text).map(|s| s.size()).sum();
    let symbols: u64 = file.sections().filter_map(|s| stripped_bytes(&s)).sum();
    Ok(ImageBytes { elf_bytes: bytes.len() as u64 - symbols, text_bytes })
}

/// Bytes that go with a section that stripping removes: its content, its header, its name; `None` for one that stays.
fn stripped_bytes<'data>(section: &impl ObjectSection<'data>) -> Option<u64> {
    const SECTION_HEADER_BYTES: u64 = 64;
    let name = section.name().ok()?;
    let goes = matches!(name, ".symtab" | ".strtab") || name.starts_with(".debug_");
    let content = section.file_range().map_or(0, |(_, len)| len);
    goes.then(|| content + SECTION_HEADER_BYTES + name.len() as u64 + 1)
}
