//! Loading a model beside reading its file: both again and again in turn, in one process, and as they are in a fresh one.

use crate::bench::document::{spread, table};
use crate::bench::models::ModelFile;
use crate::bench::ours::json;
use anyhow::{Context, Result};
use qemu_runs::Spread;
use report::BootReport;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Pairs of a reading and a load in one process.
const PAIRS: u32 = 24;
/// Pairs of a whole reading and a fresh process.
const FRESH_PAIRS: usize = 7;

/// What one type and thread count gave.
#[derive(Clone, Debug, Serialize)]
pub struct LoadRow {
    dtype: String,
    threads: u32,
    /// Loading: reading, packing and writing to the arena.
    load_gb_s: Spread,
    /// `read` into a small buffer, from the page cache.
    read_gb_s: Spread,
    /// Time of a load over that of the reading just before it.
    load_over_read: Spread,
    /// Of a fresh process: to find and touch the memory of the model, and to load it.
    fresh_ms: Spread,
    /// `read` of the whole file into memory that was just allocated.
    whole_read_ms: Spread,
    /// The first over the second, in pairs.
    fresh_over_whole_read: Spread,
}

/// Measures `model`. On all CPUs of the process, since a thread reads beside those that compute.
///
/// # Errors
/// When the program fails, with what it wrote.
pub fn measure(bareflow: &Path, model: &ModelFile, threads: u32) -> Result<LoadRow> {
    #[derive(Deserialize)]
    struct Printed {
        report: BootReport,
    }
    let generate = |rounds: u32| -> Result<BootReport> {
        let mut command = Command::new(bareflow);
        // Two tokens: of one there is no rate.
        command.args(["generate", "--json", "--max-tokens", "2", "--ignore-eos", "--model"]).arg(&model.path);
        command.args(["--threads", &threads.to_string(), "--set", &format!("load.rounds={rounds}")]);
        Ok(json::<Printed>(command)?.report)
    };
    let load = generate(PAIRS)?.load.context("the run reports no load")?;
    let of = |value: &dyn Fn(&report::LoadRound) -> f64| Spread::of(load.rounds.iter().map(value)).context("no rounds");
    let (mut fresh, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..FRESH_PAIRS {
        let start = Instant::now();
        let bytes = std::fs::read(&model.path).with_context(|| format!("reading {}", model.path.display()))?;
        whole.push(start.elapsed().as_secs_f64() * 1e3);
        drop(std::hint::black_box(bytes));
        let stages = generate(0)?.stages;
        fresh.push(stages.iter().filter(|s| ["memory", "load_model"].contains(&s.name.as_str())).map(|s| s.ms).sum());
    }
    let ratios = fresh.iter().zip(&whole).map(|(fresh, whole): (&f64, &f64)| fresh / whole);
    let spread_of = |values: &[f64]| Spread::of(values.iter().copied()).context("no pairs");
    Ok(LoadRow {
        dtype: model.dtype.clone(),
        threads,
        load_gb_s: of(&|round| round.mb_s / 1e3)?,
        read_gb_s: of(&|round| round.raw_mb_s / 1e3)?,
        load_over_read: of(&|round| round.raw_mb_s / round.mb_s)?,
        fresh_ms: spread_of(&fresh)?,
        whole_read_ms: spread_of(&whole)?,
        fresh_over_whole_read: Spread::of(ratios).context("no pairs")?,
    })
}

/// One line for each type and thread count.
pub fn load_table(rows: &[LoadRow]) -> String {
    let header = [
        "type",
        "threads",
        "load, GB/s",
        "read, GB/s",
        "time of a load / of the reading before it",
        "memory and load in a fresh process, ms",
        "whole file into new memory, ms",
        "ratio",
    ];
    let ratio = |r: &Spread| format!("**{:.2}** ({:.2}-{:.2})", r.median, r.min, r.max);
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.dtype.clone(),
                row.threads.to_string(),
                spread(&row.load_gb_s),
                spread(&row.read_gb_s),
                ratio(&row.load_over_read),
                spread(&row.fresh_ms),
                spread(&row.whole_read_ms),
                ratio(&row.fresh_over_whole_read),
            ]
        })
        .collect();
    table(&header.map(str::to_owned), &lines)
}
