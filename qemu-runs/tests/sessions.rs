//! Sessions, probes and runs against a process that plays QEMU: it writes frames made here and exits as told.
#![cfg(target_os = "linux")]

mod made_up;

use made_up::{made_up_boot, made_up_run};
use qemu_runs::accel::{AccelChoice, probe};
use qemu_runs::runs::{Phase, Progress, RunSpec, converge};
use qemu_runs::{Accel, BootError, BootFailure, Deadlines, Environment, Event, Machine, Qemu, Session};
use report::wire::{WireError, encode};
use report::{ExitStatus, ImageKind, Level, Message, PROTOCOL, Stage};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LONG: Deadlines = Deadlines { boot: Duration::from_secs(60), silence: Duration::from_secs(60) };

fn fake_qemu() -> Qemu {
    Qemu::at(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-qemu")).unwrap()
}

/// A directory with the script that plays the guest, and the frames it sends.
struct Guest {
    directory: tempfile::TempDir,
}

impl Guest {
    /// In `script`, `$dir` is the directory.
    fn new(script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = format!("dir='{}'\n{script}\n", directory.path().display());
        std::fs::write(directory.path().join("guest.sh"), script).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn frames(self, name: &str, messages: &[Message]) -> Self {
        let bytes: Vec<u8> = messages.iter().flat_map(encode).collect();
        self.bytes(name, &bytes)
    }

    fn bytes(self, name: &str, bytes: &[u8]) -> Self {
        std::fs::write(self.path(name), bytes).unwrap();
        self
    }

    fn machine(&self) -> Machine {
        Machine::with_kernel(Accel::Tcg, self.path("guest.sh"), "")
    }

    fn boot(&self, deadlines: Deadlines) -> Result<qemu_runs::Boot, BootError> {
        Session::start(&fake_qemu(), &self.machine(), None)?.run(deadlines, &mut |_| {})
    }
}

fn hello() -> Message {
    Message::Hello { protocol: PROTOCOL, image: ImageKind::Jit, build_id: "b".into() }
}

fn whole_boot() -> Vec<Message> {
    vec![
        hello(),
        Message::Stage(Stage { name: "platform".into(), ms: 1.5 }),
        Message::Tokens { ids: vec![7] },
        Message::Tokens { ids: vec![8, 9] },
        Message::End { status: ExitStatus::Pass, messages: 4 },
    ]
}

#[test]
fn a_boot_that_ends_in_order_passes_and_both_ports_are_heard() {
    let guest =
        Guest::new("echo 'BareFlow boots' > \"$console\"; cat \"$dir/f\"; echo 'last words' >> \"$console\"; exit 33")
            .frames("f", &whole_boot());
    let (mut console, mut stages, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    let log = guest.path("com1.log");
    let session = Session::start(&fake_qemu(), &guest.machine(), Some(&log)).unwrap();
    let boot = session
        .run(LONG, &mut |event| match event {
            Event::Console(bytes) => console.extend_from_slice(bytes),
            Event::Message(Message::Stage(stage)) => stages.push(stage.name.clone()),
            Event::Message(Message::Tokens { ids }) => tokens.extend_from_slice(ids),
            Event::Message(_) => {}
            Event::BrokenFrame(error) => panic!("{error}"),
        })
        .unwrap();
    assert_eq!(String::from_utf8(console).unwrap(), "BareFlow boots\nlast words\n");
    assert_eq!(std::fs::read_to_string(log).unwrap(), "BareFlow boots\nlast words\n");
    assert_eq!((stages.as_slice(), tokens.as_slice()), (["platform".to_owned()].as_slice(), [7, 8, 9].as_slice()));
    assert_eq!((boot.transcript.messages, boot.transcript.token_ids.as_slice()), (4, [7, 8, 9].as_slice()));
}

#[test]
fn every_lost_message_is_noticed() {
    let all = whole_boot();
    for lost in 1..all.len() - 1 {
        let mut kept = all.clone();
        kept.remove(lost);
        let guest = Guest::new("cat \"$dir/f\"; exit 33").frames("f", &kept);
        let failure = guest.boot(LONG).unwrap_err().failure;
        assert_eq!(failure, BootFailure::LostMessages { sent: 4, received: 3 }, "message {lost}");
    }
    let guest = Guest::new("cat \"$dir/f\"; exit 33").frames("f", &all[1..]);
    assert_eq!(guest.boot(LONG).unwrap_err().failure, BootFailure::NoHello);
    let guest = Guest::new("cat \"$dir/f\"; exit 33").frames("f", &all[..4]);
    let failure = guest.boot(LONG).unwrap_err().failure;
    assert_eq!(failure, BootFailure::NoEnd { after: "after 3 generated tokens and stage platform".into() });
}

#[test]
fn damaged_frames_are_noticed() {
    let bytes: Vec<u8> = whole_boot().iter().flat_map(encode).collect();
    let hello_len = encode(&hello()).len();
    let mut changed = bytes.clone();
    changed[hello_len + 4] ^= 0x40;
    let guest = Guest::new("cat \"$dir/f\"; exit 33").bytes("f", &changed);
    let failure = guest.boot(LONG).unwrap_err().failure;
    assert_eq!(failure, BootFailure::BrokenFrame { error: WireError::Checksum, after_messages: 1 });
    let guest = Guest::new("cat \"$dir/f\"; exit 33").bytes("f", &bytes[..bytes.len() - 1]);
    assert!(matches!(guest.boot(LONG).unwrap_err().failure, BootFailure::CutFrame { pending_bytes: 1.. }));
}

#[test]
fn exit_codes_decide_and_zero_is_never_a_pass() {
    for (code, expected) in [
        (0, "the guest reset the machine (triple fault) after 3 generated tokens and stage platform"),
        (35, "the guest reports TestFailed"),
        (37, "the guest reports Panic"),
        (39, "the guest reports Fatal"),
        (1, "QEMU exited with code 1, which is none of 33"),
        (34, "QEMU exited with code 34"),
    ] {
        let guest = Guest::new(&format!("cat \"$dir/f\"; exit {code}")).frames("f", &whole_boot());
        let error = guest.boot(LONG).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{code}: {error}");
        assert_eq!(error.transcript.token_ids, [7, 8, 9], "what was said before is kept");
    }
    let guest = Guest::new("echo 'no such machine' >&2; exit 1");
    let failure = guest.boot(LONG).unwrap_err().failure;
    assert_eq!(failure, BootFailure::Qemu { code: 1, stderr: "no such machine".into() });
    let guest = Guest::new("kill -9 $$");
    assert!(matches!(guest.boot(LONG).unwrap_err().failure, BootFailure::Killed { .. }));
}

#[test]
fn failures_show_the_end_of_the_console() {
    let guest = Guest::new(
        "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21; do echo line $i.; done > \"$console\"; exit 37",
    );
    let text = guest.boot(LONG).unwrap_err().to_string();
    assert!(text.contains("\n  | line 21."), "{text}");
    assert!(text.contains("\n  | line 2.") && !text.contains("line 1.\n"), "{text}");
}

/// The process of `pid` has ended (and was reaped).
fn ended(pid: &Path) -> bool {
    let pid = std::fs::read_to_string(pid).unwrap();
    !Path::new("/proc").join(pid.trim()).exists()
}

#[test]
fn a_silent_guest_is_killed() {
    let guest = Guest::new("echo $$ > \"$dir/pid\"; cat \"$dir/f\"; exec sleep 1000").frames("f", &whole_boot()[..2]);
    let deadlines = Deadlines { silence: Duration::from_secs(4), ..LONG };
    let failure = guest.boot(deadlines).unwrap_err().failure;
    let BootFailure::Silence { limit, after } = failure else { panic!("{failure:?}") };
    assert_eq!((limit, after.as_str()), (deadlines.silence, "after stage platform"));
    assert!(ended(&guest.path("pid")));
}

#[test]
fn a_guest_that_only_talks_is_killed_too() {
    let guest = Guest::new("echo $$ > \"$dir/pid\"; while :; do echo more >> \"$console\"; sleep 0.05; done");
    let deadlines = Deadlines { boot: Duration::from_millis(1500), ..LONG };
    let failure = guest.boot(deadlines).unwrap_err().failure;
    assert!(matches!(failure, BootFailure::Timeout { limit, .. } if limit == deadlines.boot), "{failure:?}");
    assert!(ended(&guest.path("pid")));
}

#[test]
fn a_dropped_session_leaves_no_process() {
    let guest = Guest::new("echo $$ > \"$dir/pid\"; echo ready > \"$console\"; exec sleep 1000");
    let console = guest.path("console");
    let session = Session::start(&fake_qemu(), &guest.machine(), Some(&console)).unwrap();
    while std::fs::read(&console).unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(session);
    assert!(ended(&guest.path("pid")));
}

const SMOKE: &str = "[ \"$append\" = mode=smoke ] || exit 39\n";

#[test]
fn the_probe_boots_the_kernel_and_says_why_it_falls_back() {
    let smoke = [hello(), Message::End { status: ExitStatus::Pass, messages: 1 }];
    let works = Guest::new(&format!("{SMOKE}cat \"$dir/f\"; exit 33")).frames("f", &smoke);
    let found = probe(&fake_qemu(), &works.path("guest.sh"), AccelChoice::Tcg, 256, 1, LONG.boot).unwrap();
    assert_eq!(found.accel, Accel::Tcg);
    assert!(found.reason().starts_with("tcg (tcg: smoke boot passed in"), "{}", found.reason());

    // Under KVM this guest resets; where there is no /dev/kvm, that is the reason instead.
    let only_tcg =
        Guest::new(&format!("{SMOKE}[ $accel = kvm ] && exit 0; cat \"$dir/f\"; exit 33")).frames("f", &smoke);
    let found = probe(&fake_qemu(), &only_tcg.path("guest.sh"), AccelChoice::Auto, 256, 1, LONG.boot).unwrap();
    assert_eq!(found.accel, Accel::Tcg);
    let why = found.attempts[0].outcome.clone().unwrap_err();
    assert!(why.contains("triple fault") || why.contains("/dev/kvm cannot be opened"), "{why}");

    // A native image: it runs here, and has no smoke boot.
    let refusal = [
        Message::Note { level: Level::Error, text: "a native image only generates".into() },
        Message::End { status: ExitStatus::Fatal, messages: 1 },
    ];
    let native = Guest::new("cat \"$dir/f\"; exit 39").frames("f", &refusal);
    let found = probe(&fake_qemu(), &native.path("guest.sh"), AccelChoice::Tcg, 256, 1, LONG.boot).unwrap();
    assert_eq!(found.accel, Accel::Tcg);
    // The code alone shows nothing.
    let silent = Guest::new("exit 39");
    probe(&fake_qemu(), &silent.path("guest.sh"), AccelChoice::Tcg, 256, 1, LONG.boot).unwrap_err();

    let never = Guest::new("exit 37");
    let error = probe(&fake_qemu(), &never.path("guest.sh"), AccelChoice::Auto, 256, 1, LONG.boot).unwrap_err();
    assert_eq!(error.attempts.len(), 2);
    assert!(error.to_string().contains("tcg: smoke boot failed: the guest reports Panic"), "{error}");
}

fn spec(guest: &Guest, max_boots: u32) -> RunSpec {
    RunSpec {
        machine: guest.machine(),
        deadlines: LONG,
        max_boots,
        accel_reason: "tcg (test)".into(),
        logs: Some(guest.directory.path().to_owned()),
        native: None,
        environment: Environment::default(),
    }
}

/// A guest whose n-th boot sends the frames in `fN`; `end` is run after them.
fn counting_guest(boots: u32, end: &str) -> Guest {
    let script = format!(
        "n=$(($(cat \"$dir/n\") + 1)); echo $n > \"$dir/n\"; echo boot $n > \"$console\"; cat \"$dir/f$n\"; {end}; exit 33"
    );
    let mut guest = Guest::new(&script).bytes("n", b"0\n");
    for boot in 1..=boots {
        let mut report = made_up_boot(boot);
        report.convergence.converged = boot == 3;
        report.clock_trusted = false;
        let messages = [hello(), Message::Report(report), Message::End { status: ExitStatus::Pass, messages: 2 }];
        guest = guest.frames(&format!("f{boot}"), &messages);
    }
    guest
}

#[test]
fn a_run_boots_until_the_guest_has_converged() {
    let guest = counting_guest(5, "true");
    let mut seen = Vec::new();
    let run = converge(&fake_qemu(), &spec(&guest, 5), &mut |progress| match progress {
        Progress::Started(phase) => seen.push((phase, 0)),
        Progress::Passed(phase, record) => seen.push((phase, record.report.boot)),
        Progress::Event(_) => {}
    });
    assert_eq!(run.failure, None);
    assert_eq!((run.boots.len(), run.converged_at), (3, Some(3)));
    let expected: Vec<_> = (1..=3).flat_map(|n| [(Phase::Converge(n), 0), (Phase::Converge(n), n)]).collect();
    assert_eq!(seen, expected);
    assert!(!run.hardware_times);
    assert_eq!(run.boots[1].report, {
        let mut report = made_up_boot(2);
        report.clock_trusted = false;
        report
    });
    assert_eq!(std::fs::read_to_string(guest.path("boot-02.log")).unwrap(), "boot 2\n");
    assert_eq!(run.environment.qemu, "fake QEMU for tests");
    assert!(run.environment.machine.contains("-machine q35,accel=tcg"), "{}", run.environment.machine);
    // The same shape as a run put together by hand.
    let keys = |json: String| {
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        value.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(keys(run.to_json()), keys(made_up_run(1, Accel::Tcg).to_json()));
}

#[test]
fn a_run_stops_at_its_limit() {
    let run = converge(&fake_qemu(), &spec(&counting_guest(5, "true"), 2), &mut |_| {});
    assert_eq!((run.boots.len(), run.converged_at, run.failure), (2, None, None));
}

#[test]
fn a_failed_boot_ends_the_run_and_keeps_what_was_found() {
    let run = converge(&fake_qemu(), &spec(&counting_guest(5, "[ $n = 2 ] && exit 37"), 5), &mut |_| {});
    assert_eq!((run.boots.len(), run.converged_at), (1, None));
    let failure = run.failure.unwrap();
    assert!(failure.starts_with("boot-02: the guest reports Panic"), "{failure}");
    assert!(failure.contains("| boot 2"), "{failure}");
}

#[test]
fn a_boot_without_a_report_is_no_measurement() {
    let guest = Guest::new("cat \"$dir/f\"; exit 33").frames("f", &whole_boot());
    let run = converge(&fake_qemu(), &spec(&guest, 2), &mut |_| {});
    let failure = run.failure.unwrap();
    assert!(failure.starts_with("boot-01: the guest passed but sent no report"), "{failure}");
}
