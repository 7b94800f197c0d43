//! `bareflow tune`: how good the kernels in a snapshot are, measured again on the model's own weights and inputs.
//!
//! For each hot key the snapshot's choice is timed beside the hand-written op and the reference; with `--exhaustive` beside
//! every variant of the search space, and the fastest of those then meets the choice in trials of their own. All of it takes
//! turns call by call, on weights that are in no cache. Nothing is written to the snapshot.

use crate::BadFlag;
use crate::workbench::Workbench;
use anyhow::{Context, Result, ensure};
use engine::{EngineError, Runs};
use indicatif::{ProgressBar, ProgressDrawTarget};
use jit::{Compiler, space};
use model::kernel::{KernelKey, Variant};
use profiler::HotKey;
use profiler::trial::{Side, Trial, TrialConfig};
use runtime::Options;
use runtime::load::Companions;
use runtime::tune::MIN_SHARE;
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::Path;

/// Calls of the reference: a hundred times slower than the rest and needed only for its order of magnitude.
const REFERENCE_ROUNDS: usize = 3;
/// Rounds after which variants far behind the best are dropped, and how far behind that is.
const CUT_ROUNDS: usize = 3;
const CUT_RATIO: f64 = 1.2;
/// Trials between the choice and the fastest variant, all keys taking turns.
const DUELS: usize = 3;

/// What to measure.
pub struct Request<'a> {
    /// Model file.
    pub model: &'a Path,
    /// What belongs to it: tokenizer, signature.
    pub companions: Companions,
    /// Snapshot image whose choices are judged.
    pub snapshot: Option<&'a Path>,
    /// Try every variant of the space.
    pub exhaustive: bool,
    /// Only keys whose name contains this.
    pub filter: &'a str,
    /// Calls of each candidate; at least one.
    pub rounds: usize,
    /// Print JSON.
    pub json: bool,
}

/// Measures and prints.
///
/// # Errors
/// What stops a boot; a snapshot that is not this model's or this CPU's.
pub fn run(request: &Request<'_>, options: &Options) -> Result<()> {
    let mut bench = Workbench::open(request.model, request.companions.clone(), request.snapshot, options)?;
    let mut compiler = Compiler::new(bench.isa)?;
    let hot: Vec<HotKey> = bench.hot(MIN_SHARE);
    let names: Vec<String> = hot.iter().map(|h| h.key.to_string()).collect();
    let hot: Vec<HotKey> = hot.into_iter().filter(|h| h.key.to_string().contains(request.filter)).collect();
    let nothing =
        || BadFlag(format!("--keys {}: none of the hot keys has that in it: {}", request.filter, names.join(" ")));
    ensure!(!hot.is_empty(), nothing());
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(hot.len() as u64), target);
    let mut keys = Vec::new();
    for hot in &hot {
        bar.set_message(hot.key.to_string());
        keys.push(measure(&mut bench, &mut compiler, hot, request)?);
        bar.inc(1);
    }
    // Spread over time: what a neighbour does lasts longer than one trial.
    for _ in 0..DUELS {
        for key in &mut keys {
            if let Some(finalist) = &mut key.fastest {
                finalist.choice_over.push(duel(&mut bench, key.hot.slot, key.chosen.runs, finalist.runs)?);
            }
        }
    }
    bar.finish_and_clear();
    let distances: Vec<(f64, f64)> = keys.iter().filter_map(|k| Some((k.hot.share, k.distance()?))).collect();
    let plain = mean(distances.iter().map(|(_, d)| (1.0, *d)));
    let weighted = mean(distances.iter().copied());
    if request.json {
        let value = json!({
            "model": request.model.display().to_string(),
            "snapshot": request.snapshot.map(|s| s.display().to_string()),
            "isa": bench.isa.name(),
            "threads": bench.engine.plan().threads(),
            "exhaustive": request.exhaustive,
            "rounds": request.rounds,
            "keys": keys.iter().map(Measured::json).collect::<Vec<_>>(),
            "chosen_over_best": {"geometric_mean": plain, "weighted_by_time": weighted, "keys": distances.len()},
        });
        print_line!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    print_line!(
        "{:<38} {:>6}  {:<26} {:>10} {:>6} {:>9} {:>10}{}",
        "key",
        "time",
        "runs",
        "cycles",
        "limit",
        "vs avx2",
        "vs ref",
        if request.exhaustive { "  best of the space, and the choice's time over it" } else { "" }
    );
    for key in &keys {
        print_line!("{}", key.line());
    }
    if let (Some(plain), Some(weighted)) = (plain, weighted) {
        print_line!(
            "\nthe choices take {:.1} % longer than the best of their space (geometric mean of {} keys; {:.1} % weighted by time)",
            100.0 * (plain - 1.0),
            distances.len(),
            100.0 * (weighted - 1.0)
        );
    }
    Ok(())
}

/// Weighted geometric mean of `(weight, value)`; `None` of nothing.
fn mean(values: impl Iterator<Item = (f64, f64)>) -> Option<f64> {
    let (weights, logs) = values.fold((0.0, 0.0), |(w, l), (weight, value)| (w + weight, l + weight * value.ln()));
    (weights > 0.0).then(|| (logs / weights).exp())
}

/// One way to compute a key, and its times.
struct Candidate {
    name: String,
    variant: Option<Variant>,
    runs: Runs,
    cycles: Vec<u64>,
}

impl Candidate {
    fn median(&self) -> Option<f64> {
        median(self.cycles.iter().map(|&c| c as f64))
    }

    /// Median over rounds of this one's time over the other's of the same round.
    fn over(&self, other: &Candidate) -> Option<f64> {
        median(self.cycles.iter().zip(&other.cycles).map(|(a, b)| *a as f64 / *b as f64))
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    Some((upper + sorted[(sorted.len() - 1) / 2]) / 2.0)
}

/// What was found about one key.
struct Measured {
    hot: HotKey,
    limit_cycles: Option<f64>,
    chosen: Candidate,
    /// Chosen over hand-written, of the same rounds.
    over_baseline: Option<f64>,
    baseline_cycles: Option<f64>,
    reference_cycles: Option<f64>,
    /// Every other variant that could be measured, fastest first, with its time over the hand-written op's.
    variants: Vec<(Variant, Option<f64>, Option<f64>)>,
    /// Variants that could not, and why.
    refused: Vec<(Variant, String)>,
    /// The fastest of the rest of the space; absent where that was not measured.
    fastest: Option<Finalist>,
}

/// A variant that may be faster than the choice.
struct Finalist {
    variant: Variant,
    runs: Runs,
    /// The choice's time over its time, one for each trial.
    choice_over: Vec<f64>,
}

impl Measured {
    /// The best of the space, and the choice's time over its time: the choice itself where nothing is faster. A hand-written op
    /// is no variant of the space: one that is faster than all of it is below 1.
    fn best(&self) -> Option<(Variant, f64)> {
        let finalist = self.fastest.as_ref()?;
        let over = median(finalist.choice_over.iter().copied())?;
        match self.chosen.variant {
            Some(chosen) if over <= 1.0 => Some((chosen, 1.0)),
            _ => Some((finalist.variant, over)),
        }
    }

    /// Time of the choice over the time of the best; at least 1.
    fn distance(&self) -> Option<f64> {
        self.best().map(|(_, over)| over.max(1.0))
    }

    fn line(&self) -> String {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let cycles = self.chosen.median();
        let fraction = self.limit_cycles.zip(cycles).map(|(limit, cycles)| format!("{:.0} %", 100.0 * limit / cycles));
        let over_reference = cycles.zip(self.reference_cycles).map(|(c, r)| format!("{:.3}", c / r));
        let best = self.best().map(|(variant, over)| format!("  {variant} {over:.3}"));
        format!(
            "{:<38} {:>4.1} %  {:<26} {:>10} {:>6} {:>9} {:>10}{}",
            self.hot.key.to_string(),
            100.0 * self.hot.share,
            self.chosen.name,
            or_dash(cycles.map(|c| format!("{c:.0}"))),
            or_dash(fraction),
            or_dash(self.over_baseline.map(|r| format!("{r:.3}"))),
            or_dash(over_reference),
            best.unwrap_or_default()
        )
    }

    fn json(&self) -> Value {
        let cycles = self.chosen.median();
        json!({
            "key": self.hot.key.to_string(),
            "share": self.hot.share,
            "limit_cycles": self.limit_cycles,
            "bound": bound(&self.hot.key),
            "chosen": {"runs": self.chosen.name, "cycles": cycles},
            "limit_fraction": self.limit_cycles.zip(cycles).map(|(l, c)| l / c),
            "baseline_cycles": self.baseline_cycles,
            "reference_cycles": self.reference_cycles,
            "chosen_over_baseline": self.over_baseline,
            "best": self.best().map(|(variant, over)| json!({"variant": variant.to_string(), "chosen_over_best": over})),
            "variants": self.variants.iter().map(|(variant, cycles, over)| json!({
                "variant": variant.to_string(), "cycles": cycles, "over_baseline": over,
            })).collect::<Vec<_>>(),
            "refused": self.refused.iter().map(|(variant, why)| json!({
                "variant": variant.to_string(), "why": why,
            })).collect::<Vec<_>>(),
        })
    }
}

/// What a key's time is compared with: one row reads weights, many rows compute.
fn bound(key: &KernelKey) -> &'static str {
    if key.m == 1 { "read bandwidth" } else { "the larger of read bandwidth and multiply-add peak" }
}

fn measure(bench: &mut Workbench, compiler: &mut Compiler, hot: &HotKey, request: &Request<'_>) -> Result<Measured> {
    let slot = hot.slot;
    let chosen = bench.running.variant(slot);
    let installed = bench.engine.table().runs(slot).context("a hot key has a slot")?;
    let own = bench.engine.table().own_name();
    let candidate = |name: String, variant, runs| Candidate { name, variant, runs, cycles: Vec::new() };
    let mut candidates = vec![
        candidate(chosen.map_or_else(|| own.to_owned(), |v| v.to_string()), chosen, installed),
        candidate("avx2".into(), None, Runs::Baseline),
    ];
    let mut refused = Vec::new();
    if request.exhaustive {
        for variant in space::variants(&hot.key, compiler.isa()) {
            if Some(variant) == chosen {
                continue;
            }
            match bench.prepare(compiler, slot, &variant) {
                Ok(runs) => candidates.push(candidate(variant.to_string(), Some(variant), runs)),
                Err(error) => refused.push((variant, format!("{error:#}"))),
            }
        }
    }
    take_turns(bench, slot, &mut candidates, CUT_ROUNDS.min(request.rounds))?;
    let least = candidates.iter().filter_map(Candidate::median).fold(f64::MAX, f64::min);
    let (mut kept, cut): (Vec<_>, Vec<_>) = candidates
        .into_iter()
        .enumerate()
        .partition(|(i, c)| *i < 2 || c.median().is_some_and(|median| median <= CUT_RATIO * least));
    let mut kept: Vec<Candidate> = kept.drain(..).map(|(_, c)| c).collect();
    take_turns(bench, slot, &mut kept, request.rounds.saturating_sub(CUT_ROUNDS))?;

    let mut reference = Vec::new();
    for _ in 0..REFERENCE_ROUNDS {
        reference.push(bench.time(slot, Runs::Reference)? as f64);
    }
    let baseline = &kept[1];
    let over_baseline = kept[0].over(baseline);
    let fastest = fastest(&kept);
    let mut variants: Vec<(Variant, Option<f64>, Option<f64>)> = kept
        .iter()
        .chain(cut.iter().map(|(_, c)| c))
        .filter_map(|c| Some((c.variant?, c.median(), c.over(baseline))))
        .collect();
    variants.sort_by(|a, b| a.1.unwrap_or(f64::MAX).total_cmp(&b.1.unwrap_or(f64::MAX)));
    Ok(Measured {
        hot: *hot,
        limit_cycles: bench.limit_cycles(&hot.key),
        over_baseline,
        baseline_cycles: baseline.median(),
        reference_cycles: median(reference.into_iter()),
        variants,
        refused,
        fastest,
        chosen: kept.swap_remove(0),
    })
}

/// Calls every candidate once a round, starting with another one in each.
fn take_turns(
    bench: &mut Workbench,
    slot: usize,
    candidates: &mut [Candidate],
    rounds: usize,
) -> Result<(), EngineError> {
    let count = candidates.len();
    for round in 0..rounds {
        for i in 0..count {
            let candidate = &mut candidates[(i + round) % count];
            let cycles = bench.time(slot, candidate.runs)?;
            candidate.cycles.push(cycles);
        }
    }
    Ok(())
}

/// The fastest compiled candidate but the choice.
fn fastest(candidates: &[Candidate]) -> Option<Finalist> {
    let compiled = candidates.iter().skip(2).filter_map(|c| Some((c, c.median()?)));
    let (fastest, _) = compiled.min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(Finalist { variant: fastest.variant?, runs: fastest.runs, choice_over: Vec::new() })
}

/// The choice's time over that of `finalist`, by a trial between these two alone: the fastest of many noisy medians looks
/// faster than it is.
fn duel(bench: &mut Workbench, slot: usize, choice: Runs, finalist: Runs) -> Result<f64, EngineError> {
    let mut trial = Trial::new(TrialConfig::default());
    loop {
        let mut time = |side| bench.time(slot, if side == Side::Incumbent { choice } else { finalist });
        if let Some(verdict) = trial.pair(&mut time)? {
            return Ok(1.0 / verdict.ratio);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_geometric_and_weighted() {
        assert_eq!(mean(std::iter::empty()), None);
        assert!((mean([(1.0, 2.0), (1.0, 8.0)].into_iter()).unwrap() - 4.0).abs() < 1e-12);
        assert!((mean([(3.0, 1.0), (1.0, 16.0)].into_iter()).unwrap() - 2.0).abs() < 1e-12);
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let candidate = |cycles: &[u64]| Candidate {
            name: String::new(),
            variant: None,
            runs: Runs::Baseline,
            cycles: cycles.to_vec(),
        };
        // The machine slows down; each round's ratio is 2.
        let (slow, fast) = (candidate(&[20, 40, 80]), candidate(&[10, 20, 40]));
        assert_eq!(slow.over(&fast), Some(2.0));
        assert_eq!(fast.median(), Some(20.0));
        assert_eq!(candidate(&[]).median(), None);
    }
}
