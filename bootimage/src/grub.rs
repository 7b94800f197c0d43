//! GRUB for both firmwares, made by the installed `grub-mkimage`: no `grub-install`, no root.
//!
//! Each core carries its whole configuration: find the volume that holds KERNEL.ELF, start it by Multiboot2.

use crate::{ImageError, PARTITION_OFFSET_BYTES};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// GRUB's files for an image.
pub(crate) struct Grub {
    /// `boot.img`: the code of sector 0.
    pub(crate) boot: Vec<u8>,
    /// `core.img`: sectors 1 and up.
    pub(crate) core: Vec<u8>,
    /// `BOOTX64.EFI`.
    pub(crate) efi: Vec<u8>,
}

const TOOLS: [&str; 2] = ["grub-mkimage", "grub2-mkimage"];
const LIBRARIES: [&str; 3] = ["/usr/lib/grub", "/usr/share/grub", "/usr/lib/grub2"];
const BIOS: (&str, &str) = ("i386-pc", "grub-pc-bin");
const EFI: (&str, &str) = ("x86_64-efi", "grub-efi-amd64-bin");
const MODULES: [&str; 10] =
    ["part_msdos", "fat", "multiboot2", "serial", "terminal", "search", "search_fs_file", "echo", "normal", "boot"];

/// What GRUB does, line by line; a failed line prints its error and the next one runs.
fn script(append: &str) -> String {
    format!(
        "\
serial --unit=0 --speed=115200
terminal_output serial console
search --no-floppy --file --set=root /KERNEL.ELF
multiboot2 /KERNEL.ELF {append}
boot
echo BareFlow: GRUB could not start /KERNEL.ELF, see the error above
"
    )
}

/// Checks that GRUB hands `append` to the kernel as it stands: its shell would take other characters for itself, and it
/// puts quotes of its own around what holds a space.
pub(crate) fn check_append(append: &str) -> Result<(), ImageError> {
    let passes = |c: char| c.is_ascii_alphanumeric() || " ._-=,:/+".contains(c);
    match append.chars().find(|&c| !passes(c)) {
        Some(found) => Err(ImageError::BadAppend { found }),
        None => Ok(()),
    }
}

/// Makes all three files; the kernel is started with the words `append`.
///
/// # Errors
/// What is missing, and the package that has it.
pub(crate) fn make(append: &str) -> Result<Grub, ImageError> {
    let script = script(append);
    let bios = library(BIOS)?;
    let efi = library(EFI)?;
    let boot_path = bios.join("boot.img");
    let boot = std::fs::read(&boot_path).ok().filter(|b| b.len() == 512).ok_or(ImageError::GrubFilesMissing {
        platform: BIOS.0,
        path: boot_path,
        package: BIOS.1,
    })?;
    let core = mkimage(BIOS.0, &bios, &script, &["biosdisk"])?;
    let room_bytes = PARTITION_OFFSET_BYTES as usize - 512;
    if core.len() > room_bytes {
        return Err(ImageError::GrubTooLarge { len_bytes: core.len(), room_bytes });
    }
    Ok(Grub { boot, core, efi: mkimage(EFI.0, &efi, &script, &[])? })
}

/// GRUB's modules for `platform` (`i386-pc` or `x86_64-efi`) are installed.
pub fn has_grub_modules(platform: &str) -> bool {
    find_library(platform).is_some()
}

fn find_library(platform: &str) -> Option<PathBuf> {
    LIBRARIES.iter().map(|root| Path::new(root).join(platform)).find(|path| path.join("kernel.img").exists())
}

fn library((platform, package): (&'static str, &'static str)) -> Result<PathBuf, ImageError> {
    let path = Path::new(LIBRARIES[0]).join(platform);
    find_library(platform).ok_or(ImageError::GrubFilesMissing { platform, path, package })
}

fn mkimage(platform: &'static str, library: &Path, text: &str, extra: &[&str]) -> Result<Vec<u8>, ImageError> {
    let failed = |message: String| ImageError::GrubFailed { platform, message };
    let directory = tempfile::tempdir().map_err(|e| failed(e.to_string()))?;
    let script = directory.path().join("script.cfg");
    let output = directory.path().join("core");
    std::fs::write(&script, text).map_err(|e| failed(e.to_string()))?;
    let arguments: Vec<&OsStr> = ["-O", platform, "-p", "/grub", "-d"]
        .map(OsStr::new)
        .into_iter()
        .chain([library.as_os_str(), OsStr::new("-c"), script.as_os_str(), OsStr::new("-o"), output.as_os_str()])
        .chain(extra.iter().chain(&MODULES).map(OsStr::new))
        .collect();
    for tool in TOOLS {
        match Command::new(tool).args(&arguments).output() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e.to_string())),
            Ok(run) if run.status.success() => return std::fs::read(&output).map_err(|e| failed(e.to_string())),
            Ok(run) => return Err(failed(String::from_utf8_lossy(&run.stderr).trim().to_owned())),
        }
    }
    Err(ImageError::GrubMissing)
}
