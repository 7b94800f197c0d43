//! `cargo xtask test`: everything, in the order that fails fastest.

use crate::{kernel_build, packages, scenarios};
use anyhow::{Result, bail};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Runs every test; prints what ran.
///
/// # Errors
/// The first step that failed.
pub fn run(workspace: &Path) -> Result<()> {
    packages::ensure(&packages::SCENARIOS)?;
    let start = Instant::now();
    let mut steps = Steps { done: Vec::new() };
    steps.command("format", cargo(workspace, &["fmt", "--all", "--check"]))?;
    steps.command(
        "lints, host",
        cargo(workspace, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    )?;
    for (name, features) in [("lints, JIT image", "bare-metal,jit,signature"), ("lints, native image", "bare-metal")] {
        let mut clippy = kernel_build::cargo(workspace, "clippy")?;
        clippy.args(["--no-default-features", "--features", features, "--", "-D", "warnings"]);
        steps.command(name, clippy)?;
    }
    steps.command("tests, host", cargo(workspace, &["test", "--workspace", "--no-fail-fast"]))?;
    // By itself it has no compiler and no check of signatures, as the native image.
    steps.command("tests, runtime of the native image", cargo(workspace, &["test", "--package", "runtime"]))?;
    let fuzz = workspace.join("fuzz/Cargo.toml");
    let mut fuzz_tests = cargo(workspace, &["test", "--manifest-path"]);
    fuzz_tests.arg(fuzz).args(["--target-dir", "target/fuzz", "--", "--nocapture"]);
    steps.command("fuzz targets, a second each", fuzz_tests)?;
    let kernel = steps.work("build of the JIT image", || kernel_build::jit_image(workspace))?;
    let library = steps.work("build of the native library", || kernel_build::native_library(workspace))?;
    let scenarios = || scenarios::run(&kernel, &library, workspace, &workspace.join("out/scenarios"), "");
    let passed = steps.work("scenarios under QEMU", scenarios)?;
    println!("\nall steps passed in {:.0} s:", start.elapsed().as_secs_f64());
    for (name, seconds) in &steps.done {
        println!("  {seconds:>6.1} s  {name}");
    }
    println!("{passed} passed, 0 failed");
    Ok(())
}

/// Runs `cases` damaged inputs through each of `targets` (all when empty).
///
/// # Errors
/// A target that panicked or hung; its input is left in the current directory.
pub fn fuzz(workspace: &Path, cases: u64, seed: u64, targets: &[String]) -> Result<()> {
    let mut command = cargo(workspace, &["run", "--release", "--target-dir", "target/fuzz", "--manifest-path"]);
    command.arg(workspace.join("fuzz/Cargo.toml")).arg("--");
    command.args(["--cases", &cases.to_string(), "--seed", &seed.to_string()]).args(targets);
    let status = command.status()?;
    if !status.success() {
        bail!("fuzzing failed ({status}); the lines above say which input did it");
    }
    Ok(())
}

struct Steps {
    done: Vec<(String, f64)>,
}

impl Steps {
    fn work<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("== {name}");
        let start = Instant::now();
        let value = work()?;
        self.done.push((name.to_owned(), start.elapsed().as_secs_f64()));
        Ok(value)
    }

    fn command(&mut self, name: &str, mut command: Command) -> Result<()> {
        self.work(name, || {
            let status = command.status()?;
            if !status.success() {
                bail!("step `{name}` failed ({status}): {command:?}");
            }
            Ok(())
        })
    }
}

fn cargo(workspace: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace).args(args);
    command
}
