//! System packages: installs what is missing when run as root, else prints the exact command and stops.

use anyhow::{Context, Result, bail};
use qemu_runs::{Firmware, Qemu};
use std::path::Path;
use std::process::Command;

/// A Debian package.
pub struct Package {
    /// Its name.
    pub name: &'static str,
    /// What it brings is there, from wherever it came.
    is_there: fn() -> bool,
}

/// The emulator.
pub const QEMU: Package = Package { name: "qemu-system-x86", is_there: || Qemu::find().is_ok() };
/// `pip`, for the demo model.
pub const PIP: Package = Package { name: "python3-pip", is_there: || on_path("pip3") };
/// `taskset`, to pin benchmark runs to cores.
pub const TASKSET: Package = Package { name: "util-linux", is_there: || on_path("taskset") };
/// What makes a disk bootable for both firmwares: `grub-mkimage` and its modules.
const GRUB: Package = Package { name: "grub-common", is_there: || on_path("grub-mkimage") || on_path("grub2-mkimage") };
const GRUB_BIOS: Package = Package { name: "grub-pc-bin", is_there: || bootimage::has_grub_modules("i386-pc") };
const GRUB_EFI: Package =
    Package { name: "grub-efi-amd64-bin", is_there: || bootimage::has_grub_modules("x86_64-efi") };
/// UEFI firmware for QEMU.
const OVMF: Package = Package { name: "ovmf", is_there: || Firmware::Ovmf.is_there() };

/// What the scenarios need.
pub const SCENARIOS: [&Package; 5] = [&QEMU, &GRUB, &GRUB_BIOS, &GRUB_EFI, &OVMF];

/// A program of that name is in a directory of `PATH`.
fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Makes sure every package is there.
///
/// # Errors
/// When a package is missing and cannot be installed; the message holds the command to run.
pub fn ensure(packages: &[&Package]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().filter(|p| !(p.is_there)()).map(|p| p.name).collect();
    let may_install = is_root() && Path::new("/usr/bin/apt-get").exists();
    let Some(command) = install_command(&missing, may_install)? else { return Ok(()) };
    eprintln!("installing system packages: {}", missing.join(" "));
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

/// The command that installs what is `missing`, if anything is.
///
/// # Errors
/// When it is not for us to run; the message holds it.
fn install_command(missing: &[&str], may_install: bool) -> Result<Option<String>> {
    if missing.is_empty() {
        return Ok(None);
    }
    let list = missing.join(" ");
    let command = format!("apt-get update && apt-get install --yes --no-install-recommends {list}");
    if !may_install {
        bail!("system packages are missing: {list}\nInstall them and run this again:\n    sudo sh -c '{command}'");
    }
    Ok(Some(command))
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_install_is_told_the_command() {
        let missing = ["qemu-system-x86", "ovmf"];
        let command = "apt-get update && apt-get install --yes --no-install-recommends qemu-system-x86 ovmf";
        assert_eq!(install_command(&missing, true).unwrap().as_deref(), Some(command));
        let told = install_command(&missing, false).unwrap_err().to_string();
        assert!(told.contains(&format!("sudo sh -c '{command}'")), "{told}");
        assert!(install_command(&[], false).unwrap().is_none(), "nothing is missing: nobody needs to be root");
    }

    #[test]
    fn programs_are_looked_for_where_they_would_be_started_from() {
        assert!(on_path("sh") && !on_path("no-such-program-anywhere"));
        // The same search as the one that starts it: never "missing" where it would run.
        assert_eq!((QEMU.is_there)(), Qemu::find().is_ok());
    }
}
