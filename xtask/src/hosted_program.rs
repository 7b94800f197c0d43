//! The hosted program as the workspace's tests build it.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds `bareflow` in the profile and with the features of `cargo test --workspace`, and returns it. Building the package
/// alone would resolve other features, with which Cranelift is compiled a second time.
///
/// # Errors
/// When the build fails.
pub fn of_tests(workspace: &Path) -> Result<PathBuf> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // A test of the `hosted` package: cargo builds the programs of a package for its tests.
    command.current_dir(workspace).args([
        "test",
        "--quiet",
        "--locked",
        "--workspace",
        "--no-run",
        "--test",
        "commands",
    ]);
    let status = command.status().context("starting cargo")?;
    ensure!(status.success(), "{command:?} failed ({status}); the lines above say why");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    Ok(target.join("debug/bareflow"))
}
