//! The linker: the one that comes with the Rust toolchain.

use crate::ExportSpec;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A linked image, with and without symbols.
pub(crate) struct Linked {
    pub(crate) unstripped: Vec<u8>,
    pub(crate) stripped: Vec<u8>,
}

/// Finds `rust-lld` in the toolchain's directory.
///
/// # Errors
/// When rustc does not answer or has no linker.
pub fn find_linker() -> Result<PathBuf> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output =
        Command::new(&rustc).args(["--print", "sysroot"]).output().context("asking rustc for its directory")?;
    let sysroot = String::from_utf8(output.stdout).context("rustc's directory is not UTF-8")?;
    let linker = Path::new(sysroot.trim()).join("lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-lld");
    if !linker.exists() {
        bail!("expected the toolchain's linker at {}; install a full Rust toolchain", linker.display());
    }
    Ok(linker)
}

pub(crate) fn link(spec: &ExportSpec, object: &[u8]) -> Result<Linked> {
    let dir = tempfile::tempdir().context("making a directory for the linker")?;
    let object_path = dir.path().join("kernels.o");
    std::fs::write(&object_path, object).context("writing kernels.o")?;
    let linker = find_linker()?;
    let run = |strip: bool| -> Result<Vec<u8>> {
        let out = dir.path().join(if strip { "stripped" } else { "unstripped" });
        let mut command = Command::new(&linker);
        // Functions with the same code are kept once: nothing compares their addresses.
        command.args(["-flavor", "gnu", "-static", "--gc-sections", "--icf=all", "--build-id=none"]);
        // Pages are laid out by the script. Loaders copy segments, so in the file they need not start at pages.
        command.args(["-zmax-page-size=64", "-zcommon-page-size=64"]);
        // Every member stays a candidate: the entry point is reached only through the linker script.
        command.arg("-T").arg(&spec.linker_script).arg("--whole-archive").arg(&spec.kernel_library);
        command.arg("--no-whole-archive").arg(&object_path).arg("-o").arg(&out);
        if strip {
            command.arg("--strip-all");
        }
        let output = command.output().with_context(|| format!("running {}", linker.display()))?;
        if !output.status.success() {
            bail!("linking the native image failed:\n{}", String::from_utf8_lossy(&output.stderr));
        }
        std::fs::read(&out).context("reading the linked image")
    };
    Ok(Linked { unstripped: run(false)?, stripped: run(true)? })
}
