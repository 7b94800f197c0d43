//! System packages: installs what is missing when run as root, else prints the exact command and stops.

use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// A file whose presence shows that a Debian package is installed.
pub struct Package {
    /// Debian package name.
    pub name: &'static str,
    /// A file it brings.
    pub file: &'static str,
}

/// The emulator.
pub const QEMU: Package = Package { name: "qemu-system-x86", file: "/usr/bin/qemu-system-x86_64" };
/// `pip`, for the demo model.
pub const PIP: Package = Package { name: "python3-pip", file: "/usr/bin/pip3" };

/// `taskset`, to pin benchmark runs to cores.
pub const TASKSET: Package = Package { name: "util-linux", file: "/usr/bin/taskset" };

/// Makes sure every package is there.
///
/// # Errors
/// When a package is missing and cannot be installed; the message holds the command to run.
pub fn ensure(packages: &[&Package]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().filter(|p| !Path::new(p.file).exists()).map(|p| p.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let command = format!("apt-get update && apt-get install --yes --no-install-recommends {list}");
    if !is_root() || !Path::new("/usr/bin/apt-get").exists() {
        bail!("system packages are missing: {list}\nInstall them and run this again:\n    sudo sh -c '{command}'");
    }
    eprintln!("installing system packages: {list}");
    let status = Command::new("sh")
        .args(["-c", &command])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(std::io::stderr())
        .status()
        .context("running apt-get")?;
    if !status.success() {
        bail!("`{command}` failed ({status}); the lines above say why");
    }
    Ok(())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0")
}
