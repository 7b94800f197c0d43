//! `bootimage` on volumes and disks that are too small, and with outputs that cannot be written: an exit code of 1, a
//! reason, and nothing left behind.
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Command, Output};

/// A directory with a file that passes for a kernel.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut kernel = b"\x7fELF\x02".to_vec();
    kernel.resize(100_000, 7);
    std::fs::write(folder.path().join("kernel.elf"), kernel).unwrap();
    folder
}

fn bootimage(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bootimage"));
    command.current_dir(folder);
    command
}

fn refused(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("bootimage: "), "{stderr}");
    stderr
}

#[test]
fn a_volume_that_is_too_small_is_refused_with_what_it_would_take() {
    let folder = folder();
    let build = ["build", "--kernel", "kernel.elf", "--out", "disk.img", "--size-mib", "8"];
    let error = refused(&bootimage(folder.path()).args(build).output().unwrap());
    assert!(error.contains("8 MiB") && error.contains("11"), "{error}");
    assert!(!folder.path().join("disk.img").exists());
}

#[test]
fn a_full_disk_is_said_and_nothing_is_left_on_it() {
    let folder = folder();
    let mount = "mkdir small && mount -t tmpfs -o size=4096k none small";
    let in_a_namespace = |script: &str| {
        let program = env!("CARGO_BIN_EXE_bootimage");
        Command::new("unshare").args(["-rm", "sh", "-c", script, program]).current_dir(folder.path()).output()
    };
    if !in_a_namespace(mount).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no file system can be mounted here without being root");
        return;
    }
    std::fs::remove_dir(folder.path().join("small")).unwrap();
    let build = "\"$0\" build --kernel kernel.elf --out small/disk.img";
    let script = format!(
        "{mount} || exit 99; {build}; code=$?; ls -A small >&2; \
         echo before > small/disk.img; {build} --force; cat small/disk.img; ls -A small; exit $code"
    );
    let output = in_a_namespace(&script).unwrap();
    let error = refused(&output);
    assert_eq!(error.lines().count(), 2, "something was left behind: {error}");
    for line in error.lines() {
        assert!(line.contains("small/disk.img") && line.contains("No space left on device"), "{error}");
    }
    // The image that was there is still there, and nothing else.
    assert_eq!(String::from_utf8_lossy(&output.stdout), "before\ndisk.img\n");
}

#[test]
fn outputs_that_cannot_be_written_are_named() {
    let folder = folder();
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let build = ["build", "--kernel", "kernel.elf", "--out", "disk.img"];
    let error = refused(&bootimage(folder.path()).args(build).stdout(full()).output().unwrap());
    assert!(error.contains("standard output") && error.contains("No space left on device"), "{error}");
    // The image was there before the list of its files was printed.
    for args in [&["list", "disk.img"][..], &["get", "disk.img", "REPORT.TXT", "-"]] {
        let error = refused(&bootimage(folder.path()).args(args).stdout(full()).output().unwrap());
        assert!(error.contains("standard output") && error.contains("No space left on device"), "{error}");
    }
    let get = ["get", "disk.img", "REPORT.TXT", "/dev/full"];
    let error = refused(&bootimage(folder.path()).args(get).output().unwrap());
    assert!(error.contains("cannot write /dev/full") && error.contains("No space left on device"), "{error}");
}
