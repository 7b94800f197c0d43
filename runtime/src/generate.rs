//! Prompt in, tokens out, timed.

use crate::error::RunError;
use crate::options::Options;
use crate::platform::Platform;
use crate::reporter::Reporter;
use alloc::string::String;
use alloc::vec::Vec;
use engine::sampler::Sampler;
use engine::{Engine, Session};
use model::ModelDescription;
use model::order::sorted_by_key;
use model::tokenizer::{StopStrings, TextStream};
use profiler::Part;
use report::{Level, Message};

/// Bytes of weights read between two tokens to see how fast the machine is at that moment.
const REFERENCE_BYTES: usize = 1 << 20;

/// How long tokens wait to be said together. Under a hypervisor each byte on a serial port is an exit, which takes microseconds
/// at best and 40 on the page-table kind of KVM: said one by one, tokens took a fifth of the time there.
const SAY_EVERY_MS: u64 = 50;

/// Positions that a context which shifts needs behind the tokens it keeps.
pub const SHIFT_ROOM: usize = 2;

/// What a generation gave.
pub struct Generated {
    /// New tokens.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Ticks of the prefill, up to the first logits.
    pub prefill_ticks: u64,
    /// TSC when the first token was known.
    pub first_token_tsc: u64,
    /// Ticks of each decode step.
    pub decode_ticks: Vec<u64>,
    /// Ticks of a fixed read of memory beside each decode step: what the machine, not the kernels, cost.
    pub reference_ticks: Vec<u64>,
}

/// Tokens on their way to who waits for them: people get the text, the host the ids.
struct Answer {
    text: String,
    ids: Vec<u32>,
    /// TSC at which they were last said.
    said_tsc: u64,
    /// Ticks between two times.
    every_ticks: u64,
}

impl Answer {
    fn new(platform: &dyn Platform) -> Self {
        let every_ticks = platform.clock().tsc_hz * SAY_EVERY_MS / 1000;
        Self { text: String::new(), ids: Vec::new(), said_tsc: 0, every_ticks }
    }

    /// Says what there is if the last time is long ago: the first token at once.
    fn say_in_time(&mut self, platform: &mut dyn Platform, reporter: &mut Reporter) {
        let now = engine::cycles();
        if now.saturating_sub(self.said_tsc) >= self.every_ticks {
            self.said_tsc = now;
            self.say(platform, reporter);
        }
    }

    /// Says what there is.
    fn say(&mut self, platform: &mut dyn Platform, reporter: &mut Reporter) {
        if !self.text.is_empty() {
            platform.print(&self.text);
            self.text.clear();
        }
        if !self.ids.is_empty() {
            reporter.send(platform, &Message::Tokens { ids: core::mem::take(&mut self.ids) });
        }
    }
}

/// Runs `prompt` and generates up to the configured number of tokens.
///
/// # Errors
/// [`RunError::Engine`].
pub fn generate(
    platform: &mut dyn Platform,
    reporter: &mut Reporter,
    engine: &mut Engine<'static>,
    session: &mut Session<'_>,
    description: &ModelDescription,
    options: &Options,
    prompt: &[u32],
) -> Result<Generated, RunError> {
    let level = engine.table().level();
    let mut sampler = Sampler::new(level, options.sampling.clone());
    let mut history = prompt.to_vec();
    // What the session holds: the history, without what a shift dropped.
    let mut window = prompt.to_vec();
    let mut stream = TextStream::default();
    let mut stops = StopStrings::new(&options.stop);
    let mut out = Generated {
        tokens: Vec::new(),
        text: String::new(),
        prefill_ticks: 0,
        first_token_tsc: 0,
        decode_ticks: Vec::new(),
        reference_ticks: Vec::new(),
    };
    let mut answer = Answer::new(platform);
    let mut shifted = false;
    let start = engine::cycles();
    let logits = session.prefill(engine, platform.workers(), prompt)?;
    let mut token = sampler.sample(logits, &history);
    engine.lap(Part::Sample);
    out.first_token_tsc = engine::cycles();
    out.prefill_ticks = out.first_token_tsc.saturating_sub(start);
    reporter.stage(platform, "prefill");
    loop {
        let ends = !options.ignore_eos && description.tokenizer.is_eog(token);
        if ends || out.tokens.len() >= options.max_tokens as usize {
            break;
        }
        out.tokens.push(token);
        history.push(token);
        let bytes = description.tokenizer.decode_bytes(token);
        let (text, is_stopped) = stops.push(&stream.push(bytes));
        out.text.push_str(&text);
        answer.text.push_str(&text);
        answer.ids.push(token);
        answer.say_in_time(platform, reporter);
        if is_stopped {
            break;
        }
        if out.tokens.len() >= options.max_tokens as usize {
            break;
        }
        window.push(token);
        let is_full = session.pos() >= session.context();
        let start = engine::cycles();
        let logits = match options.context_shift {
            _ if !is_full => session.decode(engine, platform.workers(), token)?,
            Some(keep) => {
                let dropped = shift(&mut window, keep as usize);
                if !shifted {
                    let text = shift_text(session.context(), keep as usize, dropped);
                    answer.text.push('\n');
                    answer.say(platform, reporter);
                    reporter.note(platform, Level::Info, text);
                    shifted = true;
                }
                // The first tokens are where they were, the rest has other positions and never saw what was dropped.
                session.truncate(keep as usize);
                session.prefill(engine, platform.workers(), &window[keep as usize..])?
            }
            None => {
                let text = alloc::format!(
                    "the context of {} tokens is full; stopping here (context.shift= would go on)",
                    session.context()
                );
                answer.text.push('\n');
                answer.say(platform, reporter);
                reporter.note(platform, Level::Warning, text);
                break;
            }
        };
        token = sampler.sample(logits, &history);
        engine.lap(Part::Sample);
        let decoded = engine::cycles();
        out.decode_ticks.push(decoded.saturating_sub(start));
        // An image that learns nothing has no use for it.
        if cfg!(feature = "jit") {
            engine.read_weights(REFERENCE_BYTES, out.decode_ticks.len());
            out.reference_ticks.push(engine::cycles().saturating_sub(decoded));
        }
    }
    let (mut rest, _) = stops.push(&stream.finish());
    rest.push_str(&stops.finish());
    out.text.push_str(&rest);
    answer.text.push_str(&rest);
    answer.text.push('\n');
    answer.say(platform, reporter);
    reporter.stage(platform, "decode");
    Ok(out)
}

/// Drops the older half of what `window` holds behind its first `keep` tokens, its last token not counted; returns how many.
fn shift(window: &mut Vec<u32>, keep: usize) -> usize {
    let dropped = window.len().saturating_sub(1 + keep).div_ceil(2);
    window.drain(keep..keep + dropped);
    dropped
}

fn shift_text(context: usize, keep: usize, dropped: usize) -> String {
    alloc::format!(
        "the context of {context} tokens is full: tokens {keep} to {} are dropped, the {} behind them run again; so every {dropped} tokens from here on",
        keep + dropped - 1,
        context - keep - dropped,
    )
}

/// Median of ticks; `None` of none.
pub fn median(ticks: &[u64]) -> Option<u64> {
    sorted_by_key(ticks, |&ticks| ticks).get(ticks.len() / 2).copied()
}
