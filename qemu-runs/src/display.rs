//! What a person sees while boots run: a progress bar on a terminal, plain lines elsewhere.

use crate::run_report::BootRecord;
use crate::runs::{Phase, Progress};
use crate::session::Event;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use report::{ImageKind, Message, TrialOutcome};
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// A bar on a terminal, plain lines elsewhere.
pub struct Display {
    bar: Option<ProgressBar>,
}

impl Display {
    /// A display for at most `max_boots` boots.
    pub fn new(max_boots: u32) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(u64::from(max_boots)), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} boot {pos}/{len} {elapsed}  {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar }
    }

    /// Takes in what a run tells.
    pub fn show(&mut self, progress: Progress<'_>) {
        match progress {
            Progress::Started(phase) => self.say(format!("{}: starting", name(phase))),
            Progress::Event(Event::Message(Message::Stage(stage))) => self.say(format!("{} done", stage.name)),
            Progress::Event(_) => {}
            Progress::Passed(phase, record) => {
                self.line(&passed(phase, record));
                if let (Some(bar), Phase::Converge(_)) = (&self.bar, phase) {
                    bar.inc(1);
                }
            }
        }
    }

    fn say(&self, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message);
        }
    }

    fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // Nobody may be reading; the run goes on.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// However a run ends, what it prints then starts on a line of its own.
impl Drop for Display {
    fn drop(&mut self) {
        self.finish();
    }
}

fn name(phase: Phase) -> String {
    match phase {
        Phase::Converge(n) => format!("boot {n}"),
        Phase::Native(n) => format!("native boot {n}"),
        Phase::Interleaved(n) => format!("boot in between {n}"),
        Phase::Load => "load boot".to_owned(),
        Phase::NativeLoad => "native load boot".to_owned(),
    }
}

fn passed(phase: Phase, record: &BootRecord) -> String {
    let b = &record.report;
    format!(
        "{:<10} {:>5.1} s: decode {:.1} tok/s, prefill {:.1} tok/s, {} kernels loaded, {} variants tried, {} kept; {}",
        name(phase),
        record.wall_s,
        b.decode_tok_s,
        b.prefill_tok_s,
        b.kernels_loaded,
        b.trials.len(),
        record.trials_with(TrialOutcome::Kept),
        if b.image == ImageKind::Native {
            "no compiler in it"
        } else if b.convergence.converged {
            "converged"
        } else {
            b.convergence.reason.as_str()
        },
    )
}
