//! What one boot said, and whether that and QEMU's exit code make a pass. Pure: no processes, no clocks.

use report::wire::WireError;
use report::{BootReport, ExitStatus, Fault, ImageKind, Level, Message, PROTOCOL, Stage, TestOutcome};
use std::time::Duration;

/// Everything a guest sent, in order of kind.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Transcript {
    /// Protocol, image and build from the first message.
    pub hello: Option<(u32, ImageKind, String)>,
    /// Stages that ended.
    pub stages: Vec<Stage>,
    /// Notes.
    pub notes: Vec<(Level, String)>,
    /// Token ids.
    pub token_ids: Vec<u32>,
    /// Self-tests and how they ended.
    pub tests: Vec<(String, TestOutcome)>,
    /// The report.
    pub report: Option<BootReport>,
    /// An unrecovered CPU fault.
    pub fault: Option<Fault>,
    /// Status and message count of the last message.
    pub end: Option<(ExitStatus, u32)>,
    /// Messages received before the end message.
    pub messages: u32,
    /// The first broken frame after the guest's first message, with the number of messages received before it.
    pub broken_frame: Option<(WireError, u32)>,
}

/// How the QEMU process ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProcessExit {
    /// With this code.
    Code(i32),
    /// By a signal, or in some other way without a code.
    NoCode(String),
}

/// Why a boot is not a pass.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum BootFailure {
    /// QEMU itself gave up before or instead of running the guest.
    #[error("QEMU could not run the machine (exit code {code}): {stderr}")]
    Qemu {
        /// Its exit code.
        code: i32,
        /// What it said.
        stderr: String,
    },
    /// Exit code 0: the guest reset the machine, usually by a triple fault.
    #[error("the guest reset the machine (triple fault) {after}")]
    Reset {
        /// Last sign of life.
        after: String,
    },
    /// Ended by a signal.
    #[error("QEMU was ended by {how} {after}{}", tail(stderr))]
    Killed {
        /// The signal.
        how: String,
        /// Last sign of life.
        after: String,
        /// What QEMU said.
        stderr: String,
    },
    /// An exit code no guest of ours gives.
    #[error(
        "QEMU exited with code {code}, which is none of 33 (pass), 35 (test failed), 37 (panic), 39 to 49 (refused) {after}{}",
        tail(stderr)
    )]
    UnknownExit {
        /// The code.
        code: i32,
        /// Last sign of life.
        after: String,
        /// What QEMU said.
        stderr: String,
    },
    /// The guest ended in order and reports a failure.
    #[error("the guest reports {status:?}: {why}")]
    Guest {
        /// Its status.
        status: ExitStatus,
        /// The reason it gave.
        why: String,
    },
    /// Another protocol.
    #[error("the guest speaks protocol {guest}, this host {PROTOCOL}; build both from the same commit")]
    Protocol {
        /// The guest's.
        guest: u32,
    },
    /// No first message.
    #[error("the guest exited with code 33 without saying hello on COM2")]
    NoHello,
    /// A frame was damaged.
    #[error("frame {after_messages} on COM2 is broken: {error}")]
    BrokenFrame {
        /// How.
        error: WireError,
        /// Whole messages before it.
        after_messages: u32,
    },
    /// The last frame has no end.
    #[error("COM2 ends inside a frame ({pending_bytes} bytes): the guest died while sending")]
    CutFrame {
        /// Bytes of the unfinished frame.
        pending_bytes: usize,
    },
    /// No end message.
    #[error("the guest exited with code 33 but never sent its end message {after}")]
    NoEnd {
        /// Last sign of life.
        after: String,
    },
    /// Status and exit code disagree.
    #[error("the guest's end message says {status:?}, but QEMU exited with code 33")]
    StatusMismatch {
        /// What the message says.
        status: ExitStatus,
    },
    /// Messages are missing.
    #[error("the guest sent {sent} messages, {received} arrived")]
    LostMessages {
        /// Count in the end message.
        sent: u32,
        /// Count here.
        received: u32,
    },
    /// Passed, without the report that was expected.
    #[error("the guest passed but sent no report; was it started with mode=smoke or mode=selftest?")]
    NoReport,
    /// The whole boot took too long.
    #[error("the boot did not end within {} s {after}; raise --timeout-s if the machine is slow", limit.as_secs_f64())]
    Timeout {
        /// The limit.
        limit: Duration,
        /// Last sign of life.
        after: String,
    },
    /// Nothing was heard for too long.
    #[error("nothing was heard from the guest for {} s {after}; raise --silence-s if the machine is slow", limit.as_secs_f64())]
    Silence {
        /// The limit.
        limit: Duration,
        /// Last sign of life.
        after: String,
    },
    /// The process or its files could not be handled.
    #[error("{what}: {message}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The system's reason.
        message: String,
    },
}

fn tail(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!("; it said: {stderr}") }
}

impl Transcript {
    /// Takes in what the decoder gives.
    pub fn accept(&mut self, item: Result<Message, WireError>) {
        let message = match item {
            Ok(message) => message,
            // Firmware may write to this port before the guest does; a hello lost to it still shows.
            Err(_) if self.hello.is_none() => return,
            Err(error) => {
                self.broken_frame.get_or_insert((error, self.messages));
                return;
            }
        };
        if !matches!(message, Message::End { .. }) {
            self.messages += 1;
        }
        match message {
            Message::Hello { protocol, image, build_id } => self.hello = Some((protocol, image, build_id)),
            Message::Stage(stage) => self.stages.push(stage),
            Message::Note { level, text } => self.notes.push((level, text)),
            Message::Tokens { ids } => self.token_ids.extend(ids),
            Message::Test { name, outcome } => self.tests.push((name, outcome)),
            Message::Report(report) => self.report = Some(report),
            Message::Fault(fault) => self.fault = Some(fault),
            Message::End { status, messages } => self.end = Some((status, messages)),
        }
    }

    /// The last sign of life, to end a sentence: `after stage load_model`.
    pub fn progress(&self) -> String {
        match (&self.hello, self.stages.last(), self.token_ids.len()) {
            (None, _, _) => "before its first message".into(),
            (_, None, 0) => "after saying hello".into(),
            (_, Some(stage), 0) => format!("after stage {}", stage.name),
            (_, stage, n) => {
                let stage = stage.map_or(String::new(), |s| format!(" and stage {}", s.name));
                format!("after {n} generated tokens{stage}")
            }
        }
    }

    /// The verdict on a boot that ended by itself. `pending_bytes`: what the decoder holds of an unfinished frame.
    ///
    /// # Errors
    /// The first [`BootFailure`] that applies, gravest first.
    pub fn verdict(&self, exit: &ProcessExit, pending_bytes: usize, stderr: &str) -> Result<(), BootFailure> {
        let after = self.progress();
        let stderr = stderr.trim().to_owned();
        let code = match exit {
            ProcessExit::NoCode(how) => return Err(BootFailure::Killed { how: how.clone(), after, stderr }),
            ProcessExit::Code(code) => *code,
        };
        match ExitStatus::from_qemu_exit_code(code) {
            None if code == 0 => return Err(BootFailure::Reset { after }),
            None if self.hello.is_none() && !stderr.is_empty() => return Err(BootFailure::Qemu { code, stderr }),
            None => return Err(BootFailure::UnknownExit { code, after, stderr }),
            Some(ExitStatus::Pass) => {}
            Some(status) => return Err(BootFailure::Guest { status, why: self.why() }),
        }
        match self.hello {
            Some((PROTOCOL, ..)) => {}
            Some((guest, ..)) => return Err(BootFailure::Protocol { guest }),
            None => return Err(BootFailure::NoHello),
        }
        if let Some((error, after_messages)) = self.broken_frame {
            return Err(BootFailure::BrokenFrame { error, after_messages });
        }
        if pending_bytes > 0 {
            return Err(BootFailure::CutFrame { pending_bytes });
        }
        match self.end {
            None => Err(BootFailure::NoEnd { after }),
            Some((ExitStatus::Pass, sent)) if sent == self.messages => Ok(()),
            Some((ExitStatus::Pass, sent)) => Err(BootFailure::LostMessages { sent, received: self.messages }),
            Some((status, _)) => Err(BootFailure::StatusMismatch { status }),
        }
    }

    /// The guest's own reason for a failure, from what it sent.
    fn why(&self) -> String {
        let mut reasons = Vec::new();
        for (name, outcome) in &self.tests {
            if let TestOutcome::Failed(failure) = outcome {
                reasons.push(format!("test {name}: {failure}"));
            }
        }
        if let Some(fault) = &self.fault {
            let trace: Vec<String> = fault.backtrace.iter().map(|a| format!("{a:#x}")).collect();
            reasons.push(format!(
                "CPU fault {} (error code {:#x}) at {:#x}, address {:#x}, called from {}",
                fault.vector,
                fault.error_code,
                fault.rip,
                fault.address,
                if trace.is_empty() { "-".to_owned() } else { trace.join(" ") }
            ));
        }
        reasons.extend(self.notes.iter().filter(|(level, _)| *level == Level::Error).map(|(_, text)| text.clone()));
        if reasons.is_empty() {
            format!("no reason was sent; see COM1 ({})", self.progress())
        } else {
            reasons.join("; ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Message {
        Message::Hello { protocol: PROTOCOL, image: ImageKind::Jit, build_id: "b".into() }
    }

    fn note(level: Level, text: &str) -> Message {
        Message::Note { level, text: text.into() }
    }

    fn end(status: ExitStatus, messages: u32) -> Message {
        Message::End { status, messages }
    }

    fn verdict(messages: Vec<Message>, code: i32) -> Result<(), BootFailure> {
        let mut transcript = Transcript::default();
        messages.into_iter().for_each(|m| transcript.accept(Ok(m)));
        transcript.verdict(&ProcessExit::Code(code), 0, "")
    }

    #[test]
    fn a_pass_needs_the_code_the_message_and_the_count() {
        use ExitStatus::{Fatal, Pass};
        assert_eq!(verdict(vec![hello(), note(Level::Info, "x"), end(Pass, 2)], 33), Ok(()));
        assert_eq!(verdict(vec![hello(), end(Pass, 2)], 33), Err(BootFailure::LostMessages { sent: 2, received: 1 }));
        assert_eq!(verdict(vec![hello()], 33), Err(BootFailure::NoEnd { after: "after saying hello".into() }));
        assert_eq!(verdict(vec![], 33), Err(BootFailure::NoHello));
        assert_eq!(verdict(vec![hello(), end(Fatal, 1)], 33), Err(BootFailure::StatusMismatch { status: Fatal }));
        assert_eq!(
            verdict(vec![hello(), end(Pass, 1)], 0),
            Err(BootFailure::Reset { after: "after saying hello".into() }),
            "0 is a triple fault, whatever was said before"
        );
        let other = Message::Hello { protocol: PROTOCOL + 1, image: ImageKind::Jit, build_id: String::new() };
        assert_eq!(verdict(vec![other, end(Pass, 1)], 33), Err(BootFailure::Protocol { guest: PROTOCOL + 1 }));
    }

    #[test]
    fn failures_carry_the_guests_own_reason() {
        use ExitStatus::{Fatal, Panic, TestFailed};
        let test = |name: &str, failure: Option<&str>| {
            let outcome = failure.map_or(TestOutcome::Passed, |why| TestOutcome::Failed(why.into()));
            Message::Test { name: name.into(), outcome }
        };
        let failed = verdict(vec![hello(), test("a", None), test("b", Some("1 != 2")), end(TestFailed, 3)], 35);
        assert_eq!(failed, Err(BootFailure::Guest { status: TestFailed, why: "test b: 1 != 2".into() }));
        let failed =
            verdict(vec![hello(), note(Level::Warning, "w"), note(Level::Error, "no disk"), end(Fatal, 3)], 39);
        assert_eq!(failed, Err(BootFailure::Guest { status: Fatal, why: "no disk".into() }));
        let fault = Fault { vector: 14, error_code: 2, rip: 0x1000, address: 0x20, backtrace: vec![0x30, 0x40] };
        let Err(BootFailure::Guest { status: Panic, why }) = verdict(vec![hello(), Message::Fault(fault)], 37) else {
            panic!("a panic is a failure even without an end message");
        };
        assert_eq!(why, "CPU fault 14 (error code 0x2) at 0x1000, address 0x20, called from 0x30 0x40");
    }

    #[test]
    fn other_exits_are_told_apart() {
        let empty = Transcript::default();
        let verdict = |exit: ProcessExit, stderr: &str| empty.verdict(&exit, 0, stderr).unwrap_err();
        assert_eq!(
            verdict(ProcessExit::Code(1), "no such device\n"),
            BootFailure::Qemu { code: 1, stderr: "no such device".into() }
        );
        let after = String::from("before its first message");
        assert_eq!(
            verdict(ProcessExit::Code(3), ""),
            BootFailure::UnknownExit { code: 3, after: after.clone(), stderr: String::new() }
        );
        assert_eq!(
            verdict(ProcessExit::NoCode("signal 6".into()), "failed to set MSR 0x10a\n"),
            BootFailure::Killed { how: "signal 6".into(), after, stderr: "failed to set MSR 0x10a".into() }
        );
    }

    #[test]
    fn what_firmware_writes_before_the_guest_is_no_failure() {
        let mut decoder = report::wire::Decoder::default();
        let mut bytes = b"UEFI\x1b[2J\0 console text".to_vec();
        bytes.extend([hello(), end(ExitStatus::Pass, 1)].iter().flat_map(report::wire::encode));
        let mut transcript = Transcript::default();
        decoder.push(&bytes).into_iter().for_each(|item| transcript.accept(item));
        assert_eq!(transcript.verdict(&ProcessExit::Code(33), decoder.pending_bytes(), ""), Ok(()));
    }

    #[test]
    fn broken_and_cut_frames_are_failures() {
        let mut transcript = Transcript::default();
        transcript.accept(Ok(hello()));
        transcript.accept(Err(WireError::Checksum));
        transcript.accept(Ok(end(ExitStatus::Pass, 1)));
        assert_eq!(
            transcript.verdict(&ProcessExit::Code(33), 0, ""),
            Err(BootFailure::BrokenFrame { error: WireError::Checksum, after_messages: 1 })
        );
        transcript.broken_frame = None;
        assert_eq!(transcript.verdict(&ProcessExit::Code(33), 0, ""), Ok(()));
        assert_eq!(transcript.verdict(&ProcessExit::Code(33), 7, ""), Err(BootFailure::CutFrame { pending_bytes: 7 }));
    }
}
