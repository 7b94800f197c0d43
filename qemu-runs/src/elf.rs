//! Size of an ELF image and of the code in it.

use object::{Object, ObjectSection, SectionKind};
use std::path::Path;

/// Sizes of an image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct ImageBytes {
    /// The whole file.
    pub elf_bytes: u64,
    /// Its executable sections.
    pub text_bytes: u64,
}

/// Sizes of the ELF file at `path`.
///
/// # Errors
/// The system's reason, or `InvalidData` when the file is not an object file.
pub fn image_bytes(path: &Path) -> std::io::Result<ImageBytes> {
    let bytes = std::fs::read(path)?;
    let invalid =
        |e: object::Error| std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{}: {e}", path.display()));
    let file = object::File::parse(bytes.as_slice()).map_err(invalid)?;
    let text_bytes = file.sections().filter(|s| s.kind() == SectionKind::Text).map(|s| s.size()).sum();
    Ok(ImageBytes { elf_bytes: bytes.len() as u64, text_bytes })
}
