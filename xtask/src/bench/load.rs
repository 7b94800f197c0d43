//! Loading a model beside reading its file: both again and again in turn, in one process.

use crate::bench::document::{spread, table};
use crate::bench::models::ModelFile;
use crate::bench::ours::json;
use anyhow::{Context, Result};
use qemu_runs::Spread;
use report::BootReport;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;

/// Pairs of a reading and a load.
const PAIRS: u32 = 24;

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
    let mut command = Command::new(bareflow);
    // Two tokens: of one there is no rate.
    command.args(["generate", "--json", "--max-tokens", "2", "--ignore-eos", "--model"]).arg(&model.path);
    command.args(["--threads", &threads.to_string(), "--set", &format!("load.rounds={PAIRS}")]);
    let load = json::<Printed>(command)?.report.load.context("the run reports no load")?;
    let of = |value: &dyn Fn(&report::LoadRound) -> f64| Spread::of(load.rounds.iter().map(value)).context("no rounds");
    Ok(LoadRow {
        dtype: model.dtype.clone(),
        threads,
        load_gb_s: of(&|round| round.mb_s / 1e3)?,
        read_gb_s: of(&|round| round.raw_mb_s / 1e3)?,
        load_over_read: of(&|round| round.raw_mb_s / round.mb_s)?,
    })
}

/// One line for each type and thread count.
pub fn load_table(rows: &[LoadRow]) -> String {
    let header = ["type", "threads", "load, GB/s", "read, GB/s", "time of a load / of the reading before it"];
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let ratio = format!(
                "**{:.2}** ({:.2}-{:.2})",
                row.load_over_read.median, row.load_over_read.min, row.load_over_read.max
            );
            vec![row.dtype.clone(), row.threads.to_string(), spread(&row.load_gb_s), spread(&row.read_gb_s), ratio]
        })
        .collect();
    table(&header.map(str::to_owned), &lines)
}
