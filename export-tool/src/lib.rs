//! Links converged kernels into a JIT-free native image and audits it.
//!
//! Data path: disk image -> newest snapshot slot -> kernels -> [`object_file`] -> the linker, with the compiler-free kernel
//! library -> native ELF -> [`audit`](mod@audit) -> stripped ELF and, on request, a bootable disk with it.
//!
//! What it does not do: compile anything. The kernels are the snapshot's bytes, unchanged, and the kernel library was
//! built without the `jit` feature.
//!
//! Architecture invariant: an image that fails its audit is not left behind.
#![forbid(unsafe_code)]

pub mod audit;
mod disk_image;
mod link;
mod object_file;

pub use audit::{Audit, Sizes};
pub use disk_image::DiskImageSpec;
pub use link::find_linker;

use crate::object_file::Exportable;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use snapshot_format::frozen::FrozenModel;
use snapshot_format::{DiskMedium, Identity, KeyRecord, Snapshot, StoredKernel};
use std::path::{Path, PathBuf};
use storage::MemoryDisk;

/// What to export.
#[derive(Clone, Debug)]
pub struct ExportSpec {
    /// Disk image with the snapshot.
    pub disk: PathBuf,
    /// The kernel as a static library, built without the compiler.
    pub kernel_library: PathBuf,
    /// The kernel's linker script.
    pub linker_script: PathBuf,
    /// Model file to put into the image.
    pub embed_model: Option<PathBuf>,
    /// The native ELF to write (stripped).
    pub out: PathBuf,
    /// A disk to make that boots it by itself.
    pub disk_image: Option<DiskImageSpec>,
    /// Keep the unstripped ELF beside it, as `OUT.debug`.
    pub keep_debug: bool,
    /// Export a snapshot that does not say it has converged.
    pub allow_unconverged: bool,
}

/// What was exported.
#[derive(Clone, Debug, Serialize)]
pub struct Exported {
    /// The native ELF.
    pub elf: PathBuf,
    /// Its sizes; with an embedded model these include it.
    pub sizes: Sizes,
    /// The disk that boots it, if one was asked for.
    pub disk_image: Option<PathBuf>,
    /// Bytes of the embedded model, 0 without one.
    pub embedded_model_bytes: u64,
    /// Kernels linked in, by name.
    pub kernels: Vec<String>,
    /// Products that ran for single tokens and have no kernel: the image says so at start and is slow in them.
    pub without_kernel: Vec<String>,
    /// Bytes of their machine code.
    pub kernel_bytes: u64,
    /// Snapshot generation they come from.
    pub generation: u64,
    /// The audit.
    pub audit: Audit,
}

impl Exported {
    /// A line for each product without a kernel.
    pub fn gaps(&self) -> impl Iterator<Item = String> {
        let why = "no variant was faster than the hand-written op, or none was tried";
        self.without_kernel
            .iter()
            .map(move |key| format!("no kernel for {key}: {why}; the native image will be slow there"))
    }
}

/// Exports.
///
/// # Errors
/// No usable snapshot, nothing to link, a linker error, or a failed audit; each says what to do.
pub fn export(spec: &ExportSpec) -> Result<Exported> {
    for out in std::iter::once(&spec.out).chain(spec.disk_image.as_ref().map(|image| &image.out)) {
        let inputs = [&spec.disk, &spec.kernel_library, &spec.linker_script].into_iter().chain(&spec.embed_model);
        bootimage::not_over(inputs, out)?;
    }
    let OnDisk { identity, generation, snapshot } = read_snapshot(&spec.disk)?;
    let kernels = kernels(&snapshot);
    if kernels.is_empty() {
        bail!(
            "the snapshot on {} (generation {generation}) holds no compiled kernel; boot the JIT image until it has tuned",
            spec.disk.display()
        );
    }
    if !spec.allow_unconverged && snapshot.boots.last().is_none_or(|boot| !boot.converged) {
        bail!(
            "the snapshot on {} has not converged: the report of its last boot says why; boot again, or pass --allow-unconverged",
            spec.disk.display()
        );
    }
    for Exportable { key, kernel, .. } in &kernels {
        jit::audit::audit(&kernel.code, kernel.variant.width).with_context(|| {
            format!(
                "{key} {} on {}: not a kernel this project makes; boot the JIT image, which will drop it",
                kernel.variant,
                spec.disk.display()
            )
        })?;
    }
    let model = match &spec.embed_model {
        Some(path) => Some(std::fs::read(path).with_context(|| format!("reading {}", path.display()))?),
        None => None,
    };
    let converged_with = FrozenModel { model_id: identity.model_id, model_file: snapshot.model_file };
    let object = object_file::build(converged_with, &kernels, model.as_deref())?;
    let linked = link::link(spec, &object)?;
    let audit = audit::audit(&linked.unstripped)?;
    if !audit.passed {
        bail!("the native image failed its audit and was not written:\n  {}", audit.findings.join("\n  "));
    }
    audit::same_image(&linked.unstripped, &linked.stripped)
        .context("what was audited is not what would be written; nothing was written")?;
    if audit.kernels != kernels.len() {
        bail!("{} kernels were exported but {} are in the linked image", kernels.len(), audit.kernels);
    }
    std::fs::write(&spec.out, &linked.stripped).with_context(|| format!("writing {}", spec.out.display()))?;
    if spec.keep_debug {
        let mut name = spec.out.clone().into_os_string();
        name.push(".debug");
        std::fs::write(&name, &linked.unstripped).with_context(|| format!("writing {}", Path::new(&name).display()))?;
    }
    if let Some(image) = &spec.disk_image {
        disk_image::build(image, &spec.out, &spec.disk)?;
    }
    Ok(Exported {
        elf: spec.out.clone(),
        disk_image: spec.disk_image.as_ref().map(|image| image.out.clone()),
        sizes: audit::sizes(&linked.unstripped).map(|s| Sizes { elf_bytes: linked.stripped.len() as u64, ..s })?,
        embedded_model_bytes: model.map_or(0, |m| m.len() as u64),
        kernels: kernels.iter().map(|e| format!("{} {}", e.key, e.kernel.variant)).collect(),
        without_kernel: without_kernel(&snapshot),
        kernel_bytes: kernels.iter().map(|e| e.kernel.code.len() as u64).sum(),
        generation,
        audit,
    })
}

/// A snapshot as it lies on a disk.
#[derive(Clone, Debug)]
pub struct OnDisk {
    /// Build, CPU and model it belongs to.
    pub identity: Identity,
    /// Which save it is.
    pub generation: u64,
    /// Its content.
    pub snapshot: Snapshot,
}

/// The newest whole snapshot on a disk image, whichever build, CPU and model it belongs to.
///
/// # Errors
/// No readable image, no boot volume on it, no whole snapshot.
pub fn read_snapshot(disk: &Path) -> Result<OnDisk> {
    let image = std::fs::read(disk).with_context(|| format!("reading {}", disk.display()))?;
    let mut device = MemoryDisk::new(image).with_read_only(true);
    let mut medium = DiskMedium::open(&mut device).with_context(|| format!("no boot volume on {}", disk.display()))?;
    match snapshot_format::open_any(&mut medium) {
        Ok((opened, identity)) => Ok(OnDisk { identity, generation: opened.generation, snapshot: opened.snapshot }),
        Err(cold) => bail!("no usable snapshot on {}: {cold}; boot the JIT image with it first", disk.display()),
    }
}

/// Keys of single tokens that were met and for which no kernel is kept.
fn without_kernel(snapshot: &Snapshot) -> Vec<String> {
    let open = snapshot.entries.iter().filter(|record| record.key.m == 1 && record.incumbent.is_none());
    open.map(|record| record.key.to_string()).collect()
}

fn kernels(snapshot: &Snapshot) -> Vec<Exportable> {
    let exportable = |record: &KeyRecord| {
        let kernel = record.incumbent.clone().filter(StoredKernel::is_intact)?;
        Some(Exportable { key: record.key, kernel, answer_sha256: record.answer_sha256 })
    };
    let mut out: Vec<_> = snapshot.entries.iter().filter_map(exportable).collect();
    out.sort_by_key(|exportable| exportable.key);
    out
}
