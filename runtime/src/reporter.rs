//! Says things twice: as text for people and as typed messages for the host.

use crate::platform::Platform;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use report::{ExitStatus, ImageKind, Level, Message, PROTOCOL, Stage, wire};

/// Sends messages, counts them, and times the stages of a boot.
pub struct Reporter {
    sent: u32,
    stages: Vec<Stage>,
    stage_start_tsc: u64,
    tsc_hz: u64,
}

impl Reporter {
    /// Starts the report of a boot whose clock began at `entry_tsc`, and says hello.
    pub fn start(platform: &mut dyn Platform, image: ImageKind) -> Self {
        let clock = platform.clock();
        let mut reporter = Self { sent: 0, stages: Vec::new(), stage_start_tsc: clock.entry_tsc, tsc_hz: clock.tsc_hz };
        reporter.send(platform, &Message::Hello { protocol: PROTOCOL, image, build_id: crate::BUILD_ID.into() });
        reporter
    }

    /// Sends one message.
    pub fn send(&mut self, platform: &mut dyn Platform, message: &Message) {
        platform.send(&wire::encode(message));
        self.sent += 1;
    }

    /// Ends the stage that began where the last one ended.
    pub fn stage(&mut self, platform: &mut dyn Platform, name: &str) {
        let now = engine::cycles();
        let ms = now.saturating_sub(self.stage_start_tsc) as f64 * 1e3 / self.tsc_hz as f64;
        self.stage_start_tsc = now;
        let stage = Stage { name: name.into(), ms };
        self.send(platform, &Message::Stage(stage.clone()));
        self.stages.push(stage);
    }

    /// A line worth keeping, on both channels.
    pub fn note(&mut self, platform: &mut dyn Platform, level: Level, text: impl Into<String>) {
        let text = text.into();
        let prefix = match level {
            Level::Info => "",
            Level::Warning => "warning: ",
            Level::Error => "error: ",
        };
        platform.print(&format!("{prefix}{text}\n"));
        self.send(platform, &Message::Note { level, text });
    }

    /// The stages so far.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Last message of the boot.
    pub fn end(mut self, platform: &mut dyn Platform, status: ExitStatus) -> ExitStatus {
        let messages = self.sent;
        self.send(platform, &Message::End { status, messages });
        status
    }
}
