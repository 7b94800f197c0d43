//! A disk that boots the native image by itself: GRUB, the image as KERNEL.ELF, settings, and the files it needs.

use anyhow::{Context, Result};
use bootimage::{FileSpec, ImageSpec};
use std::path::{Path, PathBuf};

/// How models and tokenizers end.
const FILES: [&str; 3] = [".GGU", ".GGF", ".BIN"];

/// A disk to make.
#[derive(Clone, Debug)]
pub struct DiskImageSpec {
    /// The disk image to write; one that is there is replaced.
    pub out: PathBuf,
    /// Text of BAREFLOW.CFG; `None` takes that of the disk with the snapshot.
    pub config: Option<String>,
}

/// Makes the disk of `spec` for the image `elf`. What the settings may name, models and tokenizers, comes from the volume of
/// `source`. A native image writes nothing, so the slots that every volume has are as small as they can be.
pub(crate) fn build(spec: &DiskImageSpec, elf: &Path, source: &Path) -> Result<()> {
    let reading = || format!("reading the boot volume on {}", source.display());
    let config = match &spec.config {
        Some(text) => text.clone(),
        None => {
            let bytes = bootimage::read_file(source, "BAREFLOW.CFG").with_context(reading)?;
            String::from_utf8(bytes).with_context(|| format!("BAREFLOW.CFG on {} is not UTF-8", source.display()))?
        }
    };
    let dir = tempfile::tempdir().context("making a directory for the files of the volume")?;
    let mut files = Vec::new();
    for entry in bootimage::list(source).with_context(reading)? {
        // What bootimage makes itself is made anew, and whatever else lies on the volume is of no use to the image.
        let is_wanted = FILES.iter().any(|extension| entry.path.ends_with(extension));
        if !is_wanted || entry.path.contains('/') || bootimage::OWN_NAMES.contains(&entry.path.as_str()) {
            continue;
        }
        let path = dir.path().join(&entry.path);
        std::fs::write(&path, bootimage::read_file(source, &entry.path).with_context(reading)?)
            .with_context(|| format!("copying {} from {}", entry.path, source.display()))?;
        files.push(FileSpec { name: entry.path, path });
    }
    let image = ImageSpec { config, files, bootable: true, overwrite: true, slot_mib: 1, ..ImageSpec::new(elf) };
    bootimage::build(&image, &spec.out)
        .map(drop)
        .with_context(|| format!("the native image is at {}, but its disk was not made", elf.display()))
}
