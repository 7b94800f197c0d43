//! A running QEMU: its two serial ports, its deadlines, its end.

use crate::machine::{Machine, MachineError, Qemu};
use crate::transcript::{BootFailure, ProcessExit, Transcript};
use report::Message;
use report::wire::{Decoder, WireError};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a boot may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deadlines {
    /// The whole boot.
    pub boot: Duration,
    /// The longest time without a byte on either serial port.
    pub silence: Duration,
}

/// What a session reports while it runs.
#[derive(Debug)]
pub enum Event<'a> {
    /// Bytes of COM1: text for people.
    Console(&'a [u8]),
    /// A message on COM2.
    Message(&'a Message),
    /// A frame on COM2 that is none.
    BrokenFrame(WireError),
}

/// A boot that passed.
#[derive(Clone, PartialEq, Debug)]
pub struct Boot {
    /// What the guest said.
    pub transcript: Transcript,
    /// From QEMU's start to its end, on the host's clock.
    pub wall: Duration,
}

/// A boot that did not pass.
#[derive(Debug, thiserror::Error)]
#[error("{failure}{}", console_note(console_tail.as_deref()))]
pub struct BootError {
    /// Why.
    pub failure: BootFailure,
    /// What the guest had said until then.
    pub transcript: Box<Transcript>,
    /// The last lines of COM1, where they are what explains it.
    pub console_tail: Option<String>,
}

fn console_note(tail: Option<&str>) -> String {
    let Some(tail) = tail else { return String::new() };
    if tail.is_empty() {
        return "\n(COM1 stayed empty)".into();
    }
    let lines: Vec<String> = tail.lines().map(|l| format!("\n  | {l}")).collect();
    format!("\nlast lines of COM1:{}", lines.concat())
}

impl From<MachineError> for BootError {
    fn from(error: MachineError) -> Self {
        Self::host("the machine", error)
    }
}

impl BootError {
    fn host(what: &'static str, error: impl std::fmt::Display) -> Self {
        let failure = BootFailure::Host { what, message: error.to_string() };
        Self { failure, transcript: Box::default(), console_tail: None }
    }
}

/// How often COM1's file is looked at.
const CONSOLE_POLL: Duration = Duration::from_millis(20);
/// Bytes of COM1 kept for error messages.
const CONSOLE_TAIL_BYTES: usize = 4096;
/// Lines of COM1 shown in error messages.
const CONSOLE_TAIL_LINES: usize = 20;
/// Bytes of QEMU's standard error kept.
const STDERR_BYTES: usize = 16 << 10;

enum Bytes {
    Console(Vec<u8>),
    Frames(Vec<u8>),
}

/// QEMU, killed when dropped.
pub struct Session {
    child: Child,
    bytes: Receiver<Bytes>,
    stderr: Option<JoinHandle<String>>,
    started: Instant,
    /// Holds COM1's file when the caller did not ask for it elsewhere.
    _directory: Option<tempfile::TempDir>,
}

impl Session {
    /// Starts QEMU. COM1 is also written to `console`, or to a temporary file.
    ///
    /// # Errors
    /// [`BootFailure::Host`] when the machine's files or QEMU cannot be used.
    pub fn start(qemu: &Qemu, machine: &Machine, console: Option<&Path>) -> Result<Self, BootError> {
        let (directory, console): (_, PathBuf) = match console {
            Some(path) => (None, path.to_owned()),
            None => {
                let directory = tempfile::tempdir().map_err(|e| BootError::host("a temporary directory", e))?;
                let path = directory.path().join("console.log");
                (Some(directory), path)
            }
        };
        let of_console =
            |why: &dyn std::fmt::Display| BootError::host("the file for COM1", format!("{}: {why}", console.display()));
        let console_file = File::create(&console).and_then(|_| File::open(&console)).map_err(|e| of_console(&e))?;
        // QEMU writes it and this reads it back, which a device or a pipe does not do as a file does.
        if !console_file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Err(of_console(&"expected a regular file, or none; this is a device, a pipe or a directory"));
        }
        let mut child = Command::new(qemu.program())
            .args(machine.arguments(qemu, &console)?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| BootError::host("QEMU did not start", e))?;
        let started = Instant::now();
        let (sender, bytes) = channel();
        let ended = Arc::new(AtomicBool::new(false));
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        {
            let (sender, ended) = (sender.clone(), ended.clone());
            std::thread::spawn(move || {
                if let Some(stdout) = stdout {
                    forward(stdout, &sender, Bytes::Frames);
                }
                ended.store(true, Ordering::Release);
            });
        }
        std::thread::spawn(move || follow(console_file, &sender, &ended));
        let stderr = stderr.map(|stderr| std::thread::spawn(move || collect(stderr)));
        Ok(Self { child, bytes, stderr, started, _directory: directory })
    }

    /// Listens until the guest ends or a deadline passes, and judges.
    ///
    /// # Errors
    /// [`BootError`] unless the boot passed.
    pub fn run(mut self, deadlines: Deadlines, watch: &mut dyn FnMut(Event<'_>)) -> Result<Boot, BootError> {
        let mut transcript = Transcript::default();
        let mut decoder = Decoder::default();
        let mut console: Vec<u8> = Vec::new();
        let mut heard = self.started;
        let outcome = loop {
            let now = Instant::now();
            let whole_left = deadlines.boot.saturating_sub(now.duration_since(self.started));
            let silence_left = deadlines.silence.saturating_sub(now.duration_since(heard));
            match self.bytes.recv_timeout(whole_left.min(silence_left)) {
                Ok(Bytes::Console(bytes)) => {
                    heard = Instant::now();
                    watch(Event::Console(&bytes));
                    console.extend(bytes);
                    let excess = console.len().saturating_sub(CONSOLE_TAIL_BYTES);
                    console.drain(..excess);
                }
                Ok(Bytes::Frames(bytes)) => {
                    heard = Instant::now();
                    for item in decoder.push(&bytes) {
                        match &item {
                            Ok(message) => watch(Event::Message(message)),
                            Err(error) => watch(Event::BrokenFrame(*error)),
                        }
                        transcript.accept(item);
                    }
                }
                // Both ports are closed: QEMU has ended or is about to.
                Err(RecvTimeoutError::Disconnected) => break self.wait(&transcript, decoder.pending_bytes()),
                Err(RecvTimeoutError::Timeout) => {
                    let after = transcript.progress();
                    if self.started.elapsed() >= deadlines.boot {
                        break Err(BootFailure::Timeout { limit: deadlines.boot, after });
                    }
                    if heard.elapsed() >= deadlines.silence {
                        break Err(BootFailure::Silence { limit: deadlines.silence, after });
                    }
                }
            }
        };
        let wall = self.started.elapsed();
        match outcome {
            Ok(()) => Ok(Boot { transcript, wall }),
            Err(failure) => {
                Err(BootError { failure, transcript: Box::new(transcript), console_tail: Some(last_lines(&console)) })
            }
        }
    }

    fn wait(&mut self, transcript: &Transcript, pending_bytes: usize) -> Result<(), BootFailure> {
        let status =
            self.child.wait().map_err(|e| BootFailure::Host { what: "waiting for QEMU", message: e.to_string() })?;
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        transcript.verdict(&process_exit(status), pending_bytes, &stderr)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // An error here means that QEMU has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn process_exit(status: ExitStatus) -> ProcessExit {
    match status.code() {
        Some(code) => ProcessExit::Code(code),
        None => ProcessExit::NoCode(status.to_string()),
    }
}

fn forward(mut from: impl Read, to: &Sender<Bytes>, wrap: fn(Vec<u8>) -> Bytes) {
    let mut buffer = [0; 16 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            // The receiver is gone when the session was dropped.
            Ok(n) if to.send(wrap(buffer[..n].to_vec())).is_err() => return,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Forwards what is appended to COM1's file, until QEMU has ended and the file is read to its end.
fn follow(mut console: File, to: &Sender<Bytes>, ended: &AtomicBool) {
    loop {
        let last_round = ended.load(Ordering::Acquire);
        forward(&mut console, to, Bytes::Console);
        if last_round {
            return;
        }
        std::thread::sleep(CONSOLE_POLL);
    }
}

fn collect(mut from: impl Read) -> String {
    let mut kept = Vec::new();
    // Read to the end even beyond what is kept, so that QEMU never blocks on a full pipe.
    let _ = from.by_ref().take(STDERR_BYTES as u64).read_to_end(&mut kept);
    let _ = std::io::copy(&mut from, &mut std::io::sink());
    String::from_utf8_lossy(&kept).into_owned()
}

fn last_lines(console: &[u8]) -> String {
    let text = String::from_utf8_lossy(console);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(CONSOLE_TAIL_LINES);
    lines[from..].join("\n")
}
