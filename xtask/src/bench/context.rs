//! Decoding behind a long context beside decoding at its start: each engine both ways, in turn.

use crate::bench::document::{spread, table};
use crate::bench::models::ModelFile;
use crate::bench::ours::{Form, Job};
use crate::bench::peers::{Peer, PeerJob};
use anyhow::{Context, Result, ensure};
use qemu_runs::Spread;
use serde::Serialize;
use std::path::Path;

/// Context, tokens.
pub const CONTEXT: u32 = 2048;
/// How often the prompt is repeated to fill it: 122 tokens each time, and room for [`TOKENS`].
pub const REPEATS: usize = 16;
/// Tokens to generate.
const TOKENS: u32 = 49;
/// Types measured, of those asked for: little and much to read besides the cache.
pub const TYPES: [&str; 2] = ["Q4_1", "F32"];
/// Element type of the KV cache, that of llama.cpp.
pub const KV: &str = "f16";
/// Bytes of one element of it.
pub const KV_BYTES: u64 = 2;

/// An engine.
#[derive(Clone, Copy)]
pub enum Engine<'a> {
    /// BareFlow, with the kernels of a snapshot.
    Ours(Form, &'a Path),
    /// llama.cpp.
    Peer(&'a Peer),
}

impl Engine<'_> {
    fn name(self) -> &'static str {
        match self {
            Engine::Ours(form, _) => form.engine(),
            Engine::Peer(peer) => peer.flavour.engine(),
        }
    }
}

/// What the runs have in common.
#[derive(Clone, Copy)]
pub struct Prompts<'a> {
    /// Short one, and one that fills the context but for [`TOKENS`].
    pub texts: [&'a str; 2],
    /// Files that hold them.
    pub files: [&'a Path; 2],
}

/// One engine on one type and thread count.
#[derive(Clone, Debug, Serialize)]
pub struct ContextRow {
    dtype: String,
    threads: u32,
    engine: &'static str,
    /// Position of the middle token decoded behind the long prompt.
    position: u32,
    /// Tokens per second behind the short prompt.
    start_tok_s: Spread,
    /// Behind the long one.
    end_tok_s: Spread,
    /// The second over the first, of the same round.
    end_over_start: Spread,
    /// Bytes a token reads at the start over those at `position`: what bandwidth alone allows.
    bound: f64,
    /// Rate behind the long prompt over that of the last engine in the same round; `None` for that one.
    ratio: Option<Spread>,
}

/// Measures `engines`, the last of which is what the others are held against.
///
/// # Errors
/// When a run fails, or an engine sees another number of tokens in the prompts.
pub fn measure(
    model: &ModelFile,
    job: &Job<'_>,
    peer_job: &PeerJob<'_>,
    engines: &[Engine<'_>],
    prompts: Prompts<'_>,
    rounds: u32,
) -> Result<Vec<ContextRow>> {
    // By engine and round: rates behind both prompts.
    let mut rates: Vec<Vec<[f64; 2]>> = vec![Vec::new(); engines.len()];
    let mut lengths: Option<[u32; 2]> = None;
    for _ in 0..rounds {
        for (engine, rates) in engines.iter().zip(&mut rates) {
            let (mut found, mut rate) = ([0; 2], [0.0; 2]);
            for i in 0..2 {
                (found[i], rate[i]) = match engine {
                    Engine::Ours(form, snapshot) => {
                        let job = Job { prompt: prompts.texts[i], tokens: TOKENS, context: CONTEXT, kv: KV, ..*job };
                        let report = job.run(*form, Some(snapshot), 0)?;
                        (report.prompt_tokens, report.decode_tok_s)
                    }
                    Engine::Peer(peer) => {
                        let job = PeerJob { prompt: prompts.files[i], tokens: TOKENS, context: CONTEXT, ..*peer_job };
                        let run = peer.run(&job)?;
                        (run.prompt_tokens, run.decode_tok_s)
                    }
                };
            }
            let expected = *lengths.get_or_insert(found);
            ensure!(found == expected, "{} sees {found:?} tokens in the prompts, others {expected:?}", engine.name());
            rates.push(rate);
        }
    }
    let position = lengths.context("no rounds")?[1] + TOKENS / 2;
    let kv_bytes = u64::from(position) * model.position_elements * KV_BYTES;
    let last = rates.last().context("no engines")?;
    engines
        .iter()
        .zip(&rates)
        .enumerate()
        .map(|(at, (engine, own))| {
            let of = |value: &dyn Fn(&[f64; 2]) -> f64| Spread::of(own.iter().map(value)).context("no rounds");
            let ratios = own.iter().zip(last).map(|(own, last)| own[1] / last[1]);
            Ok(ContextRow {
                dtype: model.dtype.clone(),
                threads: job.threads,
                engine: engine.name(),
                position,
                start_tok_s: of(&|rate| rate[0])?,
                end_tok_s: of(&|rate| rate[1])?,
                end_over_start: of(&|rate| rate[1] / rate[0])?,
                bound: model.token_bytes as f64 / (model.token_bytes + kv_bytes) as f64,
                ratio: if at + 1 < engines.len() { Spread::of(ratios) } else { None },
            })
        })
        .collect()
}

/// One line for each engine, type and thread count.
pub fn context_table(rows: &[ContextRow]) -> String {
    let reference = rows.last().map_or("the last", |row| row.engine);
    let header = [
        "type".to_owned(),
        "threads".to_owned(),
        "engine".to_owned(),
        "tok/s at the start".to_owned(),
        format!("at position {}", rows.first().map_or(0, |row| row.position)),
        "of that at the start".to_owned(),
        "what bandwidth allows".to_owned(),
        format!("at that position / {reference}"),
    ];
    let ratio = |r: &Spread| format!("**{:.2}** ({:.2}-{:.2})", r.median, r.min, r.max);
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.dtype.clone(),
                row.threads.to_string(),
                row.engine.to_owned(),
                spread(&row.start_tok_s),
                spread(&row.end_tok_s),
                ratio(&row.end_over_start),
                format!("{:.2}", row.bound),
                row.ratio.as_ref().map_or_else(|| "-".into(), ratio),
            ]
        })
        .collect();
    table(&header, &lines)
}
