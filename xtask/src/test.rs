//! `cargo xtask test`: everything, in the order that fails fastest.

use crate::kernel_build::{self, JIT_PROFILE, NATIVE_PROFILE};
use crate::{packages, real_model, scenarios};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
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
    steps.command("lints, host", lint(cargo(workspace, &["clippy", "--workspace", "--all-targets"])))?;
    // By itself it has no compiler and no check of signatures, as the native image.
    let native = lint(cargo(workspace, &["clippy", "--package", "runtime", "--all-targets"]));
    steps.command("lints, runtime of the native image", native)?;
    for (name, profile, features) in [
        ("lints, JIT image", JIT_PROFILE, "bare-metal,jit,signature"),
        ("lints, native image", NATIVE_PROFILE, "bare-metal"),
    ] {
        let mut clippy = kernel_build::cargo(workspace, "clippy")?;
        clippy.args(["--profile", profile, "--no-default-features", "--features", features]);
        steps.command(name, lint(clippy))?;
    }
    let host_tests = steps.tests(
        "tests, host, and a second of each fuzz target",
        cargo(workspace, &["test", "--workspace", "--no-fail-fast"]),
    )?;
    let native = cargo(workspace, &["test", "--package", "runtime"]);
    let host_tests = host_tests + steps.tests("tests, runtime of the native image", native)?;
    let real = steps.work("the demo model in F32", || real_model::run(workspace))?.unwrap_or(0);
    let kernel = steps.work("build of the JIT image", || kernel_build::jit_image(workspace))?;
    let library = steps.work("build of the native library", || kernel_build::native_library(workspace))?;
    let scenarios = || scenarios::run(&kernel, &library, workspace, &workspace.join("out/scenarios"), "");
    let scenarios = steps.work("scenarios under QEMU", scenarios)?;
    println!("\nall steps passed in {:.0} s:", start.elapsed().as_secs_f64());
    for (name, seconds) in &steps.done {
        println!("  {seconds:>6.1} s  {name}");
    }
    println!("{host_tests} host tests, {real} prompts of the demo model, {scenarios} scenarios");
    println!("{} passed, 0 failed", host_tests + real + scenarios);
    Ok(())
}

/// Runs `cases` inputs through each of `targets` (all when empty).
///
/// # Errors
/// A target that panicked or hung; its input is left in the current directory.
pub fn fuzz(workspace: &Path, cases: u64, seed: u64, targets: &[String]) -> Result<()> {
    let mut command = cargo(workspace, &["run", "--profile", "fuzz", "--package", "fuzz", "--"]);
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

    /// Runs a `cargo test` and returns how many tests passed.
    fn tests(&mut self, name: &str, mut command: Command) -> Result<usize> {
        self.work(name, || {
            let mut child = command.stdout(Stdio::piped()).spawn()?;
            let mut count = 0;
            for line in BufReader::new(child.stdout.take().context("no output of cargo")?).lines() {
                let line = line?;
                count += passed(&line).unwrap_or(0);
                println!("{line}");
            }
            let status = child.wait()?;
            if !status.success() {
                bail!("step `{name}` failed ({status}): {command:?}");
            }
            if count == 0 {
                bail!("step `{name}` ran no test: {command:?}");
            }
            Ok(count)
        })
    }
}

/// Tests that passed, of the line that sums up a test binary: `test result: ok. 12 passed; 0 failed; ...`.
fn passed(line: &str) -> Option<usize> {
    line.strip_prefix("test result: ok. ")?.split_once(" passed;")?.0.parse().ok()
}

/// A clippy that takes no warning.
fn lint(mut clippy: Command) -> Command {
    clippy.args(["--", "-D", "warnings"]);
    clippy
}

/// `cargo VERB ...` in the workspace, with the versions of `Cargo.lock`.
fn cargo(workspace: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let (verb, args) = args.split_first().unwrap_or((&"", &[]));
    command.current_dir(workspace).arg(verb);
    // What formats resolves nothing, and does not know the flag.
    if *verb != "fmt" {
        command.arg("--locked");
    }
    command.args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted_by_what_the_harness_says() {
        let line = "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.02s";
        assert_eq!(passed(line), Some(12));
        assert_eq!(passed("test result: ok. 0 passed; 0 failed; 9 ignored; 0 measured; 0 filtered out"), Some(0));
        assert_eq!(passed("test result: FAILED. 11 passed; 1 failed; 0 ignored; 0 measured"), None);
        assert_eq!(passed("test tests::passed ... ok"), None);
    }

    #[test]
    fn a_step_without_a_test_fails() {
        let says = |text: &str| {
            let mut command = Command::new("printf");
            command.arg(text);
            Steps { done: Vec::new() }.tests("made up", command)
        };
        let result = |n: u32| format!("running {n} tests\ntest result: ok. {n} passed; 0 failed; 0 ignored\n");
        assert_eq!(says(&(result(3) + &result(0) + &result(4))).unwrap(), 7);
        let error = says(&(result(0) + &result(0))).unwrap_err().to_string();
        assert!(error.contains("`made up` ran no test"), "{error}");
    }
}
