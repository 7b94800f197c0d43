//! `qemu-runs` without a QEMU, without KVM, and with outputs that cannot be written: an exit code of 1 and a reason.
#![cfg(target_os = "linux")]

mod made_up;

use made_up::made_up_boot;
use report::wire::encode;
use report::{ExitStatus, ImageKind, Message, PROTOCOL};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};

const FAKE_QEMU: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake-qemu");

/// A directory with a guest for the fake QEMU (`guest.sh`) that passes, unless it is run under KVM; and a disk.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut report = made_up_boot(1);
    report.convergence.converged = true;
    let messages = [
        Message::Hello { protocol: PROTOCOL, image: ImageKind::Jit, build_id: "b".into() },
        Message::Report(report),
        Message::End { status: ExitStatus::Pass, messages: 2 },
    ];
    let frames: Vec<u8> = messages.iter().flat_map(encode).collect();
    std::fs::write(folder.path().join("frames"), frames).unwrap();
    let script = format!("[ $accel = kvm ] && exit 0; cat '{}/frames'; exit 33\n", folder.path().display());
    std::fs::write(folder.path().join("guest.sh"), script).unwrap();
    std::fs::write(folder.path().join("disk.img"), [0; 512]).unwrap();
    folder
}

fn qemu_runs(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qemu-runs"));
    command.args(args).current_dir(folder);
    command
}

fn refused(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("qemu-runs: "), "{stderr}");
    stderr
}

const BOOT: [&str; 7] = ["boot", "--kernel", "./guest.sh", "--accel", "tcg", "--qemu", FAKE_QEMU];
const CONVERGE: [&str; 9] =
    ["converge", "--kernel", "./guest.sh", "--disk", "disk.img", "--accel", "tcg", "--qemu", FAKE_QEMU];

#[test]
fn without_a_qemu_the_command_that_installs_it_is_told() {
    let folder = folder();
    let boot = ["boot", "--kernel", "./guest.sh"];
    let converge = ["converge", "--kernel", "./guest.sh", "--disk", "disk.img"];
    let probe = ["probe", "--kernel", "./guest.sh"];
    for args in [&boot[..], &converge, &probe] {
        // Nothing at all is in this PATH.
        let error = refused(&qemu_runs(folder.path(), args).env("PATH", folder.path()).output().unwrap());
        let said = "qemu-system-x86_64 was not found; install it with: apt-get install qemu-system-x86";
        assert!(error.contains(said), "{args:?}: {error}");
        let args = [args, &["--qemu", "/nowhere/qemu"]].concat();
        let error = refused(&qemu_runs(folder.path(), &args).output().unwrap());
        assert!(error.contains("/nowhere/qemu was not found"), "{args:?}: {error}");
    }
}

/// Where there is a /dev/kvm the guest resets under it, and otherwise that is the reason.
#[test]
fn a_kvm_that_cannot_be_used_is_an_error_where_it_was_asked_for_and_else_a_reason_for_tcg() {
    let folder = folder();
    let run = |choice: &str| {
        let args = ["boot", "--kernel", "./guest.sh", "--accel", choice, "--qemu", FAKE_QEMU];
        qemu_runs(folder.path(), &args).output().unwrap()
    };
    let error = refused(&run("kvm"));
    assert!(error.contains("no accelerator boots the kernel:\n  kvm: "), "{error}");
    assert!(error.contains("/dev/kvm cannot be opened: ") || error.contains("triple fault"), "{error}");
    assert!(error.contains("use --accel tcg: software emulation, whose times mean nothing"), "{error}");
    let output = run("auto");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("accel: tcg (kvm: "), "{stderr}");
}

#[test]
fn outputs_on_a_full_device_are_named() {
    let folder = folder();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let error = refused(&qemu_runs(folder.path(), &[&BOOT[..], &["--json", "/dev/full"]].concat()).output().unwrap());
    assert!(error.contains("cannot write /dev/full: No space left on device"), "{error}");
    let to_stdout = qemu_runs(folder.path(), &[&BOOT[..], &["--json", "-"]].concat()).stdout(full()).output().unwrap();
    let error = refused(&to_stdout);
    assert!(error.contains("cannot write to standard output: No space left on device"), "{error}");
    // What cannot be read back as a file is.
    let error = refused(&qemu_runs(folder.path(), &[&BOOT[..], &["--log", "/dev/full"]].concat()).output().unwrap());
    assert!(error.contains("the file for COM1") && error.contains("expected a regular file"), "{error}");

    let out = [&CONVERGE[..], &["--out", "out"]].concat();
    let error = refused(&qemu_runs(folder.path(), &out).stdout(full()).output().unwrap());
    assert!(error.contains("cannot write to standard output: No space left on device"), "{error}");
    let report = std::fs::read_to_string(folder.path().join("out/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["boots"].as_array().unwrap().len(), 1, "the report was written all the same");
    let error =
        refused(&qemu_runs(folder.path(), &[&CONVERGE[..], &["--out", "guest.sh/out"]].concat()).output().unwrap());
    assert!(error.contains("cannot make the directory guest.sh/out"), "{error}");
}

#[test]
fn a_report_that_does_not_fit_its_disk_is_printed_all_the_same() {
    let folder = folder();
    let in_a_namespace = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script, env!("CARGO_BIN_EXE_qemu-runs")]).args(CONVERGE);
        command.current_dir(folder.path()).output()
    };
    let mount = "mkdir -p small && mount -t tmpfs -o size=16k none small";
    if !in_a_namespace(mount).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no file system can be mounted here without being root");
        return;
    }
    let output = in_a_namespace(&format!("{mount} || exit 99; \"$0\" \"$@\" --out small/out")).unwrap();
    let error = refused(&output);
    assert!(error.contains("cannot write the report to small/out: No space left on device"), "{error}");
    assert!(!output.stdout.is_empty(), "the result of the run is lost");
}

#[test]
fn what_is_booted_is_not_written_over() {
    let folder = folder();
    std::os::unix::fs::symlink("guest.sh", folder.path().join("link")).unwrap();
    let before = std::fs::read(folder.path().join("guest.sh")).unwrap();
    for (flag, file) in [("--json", "guest.sh"), ("--log", "link"), ("--log", "disk.img")] {
        let args = [&BOOT[..], &["--disk", "disk.img", flag, file]].concat();
        let error = refused(&qemu_runs(folder.path(), &args).output().unwrap());
        assert!(error.contains(&format!("{file}: input and output are the same file")), "{error}");
    }
    assert_eq!(std::fs::read(folder.path().join("guest.sh")).unwrap(), before);
}
