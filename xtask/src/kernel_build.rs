//! Builds the guest images: the kernel has flags, a profile and a target directory of its own, so that nothing of it
//! reaches build scripts or host crates.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Cargo profile of the JIT image.
pub const JIT_PROFILE: &str = "image";
/// Cargo profile of the native image.
pub const NATIVE_PROFILE: &str = "native";

/// Compiler flags of the guest; the linker script's path is filled in, and where crates lie on this machine is left out of
/// messages, so that an image does not depend on who built it.
///
/// # Errors
/// When `kernel/rustflags.txt` cannot be read.
pub fn rustflags(workspace: &Path) -> Result<String> {
    let file = workspace.join("kernel/rustflags.txt");
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let script = workspace.join("kernel/link.ld");
    let mut flags: Vec<String> = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .map(|line| line.replace("{link.ld}", &script.display().to_string()))
        .collect();
    flags.extend(registries().iter().map(|registry| format!("--remap-path-prefix={}/=", registry.display())));
    // cargo separates encoded flags by the unit separator, so that paths may hold spaces.
    Ok(flags.join("\x1f"))
}

/// Where cargo keeps the sources of crates, a directory for each registry. Crates of this program lie there, too, so the
/// directories exist before the guest's are fetched.
fn registries() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let sources = home.and_then(|home| std::fs::read_dir(home.join("registry/src")).ok());
    let mut registries: Vec<PathBuf> = sources.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    registries.sort();
    registries
}

fn target_dir(workspace: &Path) -> PathBuf {
    // A directory of its own inside the usual one, so that `cargo clean` removes it too.
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from).join("guest")
}

/// A cargo command with the guest's flags: `cargo VERB -p kernel ...`.
///
/// # Errors
/// When the flags cannot be read.
pub fn cargo(workspace: &Path, verb: &str) -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(workspace)
        .arg(verb)
        .args(["--locked", "--package", "kernel", "--target", TARGET, "--target-dir"])
        .arg(target_dir(workspace))
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(workspace)?)
        .env_remove("RUSTFLAGS");
    Ok(command)
}

/// Builds the self-optimising image and returns its ELF.
///
/// # Errors
/// When the build fails.
pub fn jit_image(workspace: &Path) -> Result<PathBuf> {
    let mut command = cargo(workspace, "build")?;
    command.args(["--profile", JIT_PROFILE, "--features", "bare-metal,jit,signature", "--bin", "bareflow"]);
    run(&mut command, "the JIT image")?;
    Ok(target_dir(workspace).join(TARGET).join(JIT_PROFILE).join("bareflow"))
}

/// Builds the compiler-free kernel as a static library for `export-tool` and returns it.
///
/// # Errors
/// When the build fails.
pub fn native_library(workspace: &Path) -> Result<PathBuf> {
    let mut command = cargo(workspace, "rustc")?;
    command.args(["--profile", NATIVE_PROFILE, "--no-default-features", "--features", "bare-metal"]);
    command.args(["--lib", "--crate-type", "staticlib"]);
    // What the engine's speed costs in bytes is won back where equal runs of instructions are put into functions, and those of
    // what is left, which does not reach the inner loops (decision 0010).
    command.args(["--", "-Cllvm-args=-enable-machine-outliner=always -machine-outliner-reruns=3"]);
    run(&mut command, "the native kernel library")?;
    Ok(target_dir(workspace).join(TARGET).join(NATIVE_PROFILE).join("libkernel.a"))
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let status = command.status().with_context(|| format!("starting cargo for {what}"))?;
    if !status.success() {
        bail!("building {what} failed ({status}); the lines above say why");
    }
    Ok(())
}
