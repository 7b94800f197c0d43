//! From single runs to rows: medians with spread, and ratios that were taken inside one round.

use crate::bench::ours::Limits;
use qemu_runs::Spread;
use serde::Serialize;
use std::collections::BTreeMap;

/// One run of one engine.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Round, from 1.
    pub round: u32,
    /// Engine name.
    pub engine: &'static str,
    /// Weight type.
    pub dtype: String,
    /// Threads.
    pub threads: u32,
    /// What its cores could do just before, with the instructions it was allowed.
    #[serde(flatten)]
    pub limits: Limits,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
    /// Generated tokens per second.
    pub decode_tok_s: f64,
    /// Program start (peer: library load) to first token, ms.
    pub ttft_ms: f64,
    /// Peak memory, MiB.
    pub peak_rss_mib: f64,
    /// Share of time in which a core of it did not run, measured just after; absent for peers.
    pub interrupted: Option<f64>,
}

/// Half of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The prompt.
    Prefill,
    /// One token after another.
    Decode,
}

impl Phase {
    /// Both.
    pub const ALL: [Phase; 2] = [Phase::Prefill, Phase::Decode];

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }

    fn rate(self, run: &Run) -> f64 {
        match self {
            Phase::Prefill => run.prefill_tok_s,
            Phase::Decode => run.decode_tok_s,
        }
    }
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured: `generate`, or `guest_vs_hosted`.
    pub what: &'static str,
    /// Engine name.
    pub engine: &'static str,
    /// Its version: commit, or package version.
    pub version: String,
    /// Weight type.
    pub dtype: String,
    /// Instruction set it was allowed.
    pub isa: String,
    /// Threads.
    pub threads: u32,
    /// Prefill or decode.
    pub phase: Phase,
    /// Tokens per second.
    pub tok_s: Spread,
    /// This engine's rate over the other's of the same round, by the other's name.
    pub ratio_to: BTreeMap<&'static str, Spread>,
    /// Decode: bytes of weights per second over the read bandwidth measured just before; absent for prefill.
    pub fraction_of_bandwidth: Option<Spread>,
    /// The same over what plain reading sustained just before, which is less than it reached at best.
    pub fraction_of_sustained_bandwidth: Option<Spread>,
    /// Prefill: operations of the layers' products per second over the multiply-add peak measured just before, of f32 for
    /// float types and of exact int8 for quantised ones; absent for decode.
    pub fraction_of_arithmetic: Option<Spread>,
    /// Program start (peer: library load) to first token, ms.
    pub ttft_ms: Spread,
    /// That over the other engine's of the same round, by the other's name.
    pub ttft_ratio_to: BTreeMap<&'static str, Spread>,
    /// Peak memory, MiB.
    pub peak_rss_mib: Spread,
    /// Share of time in which a core of it did not run; absent for peers.
    pub interrupted: Option<Spread>,
}

/// What a model of some weight type takes of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Bytes that a decoded token reads.
    pub token_bytes: u64,
    /// Operations of the layers' products for a token of a prompt.
    pub layer_ops: u64,
}

/// What is known about an engine besides its runs.
#[derive(Clone, Debug)]
pub struct EngineFacts {
    /// Engine name.
    pub engine: &'static str,
    /// Commit or package version.
    pub version: String,
    /// Instruction set it was allowed.
    pub isa: String,
}

/// Rows of `runs`: every engine, type, thread count and phase that was measured, in the order of `engines`.
/// `references` are the engines that ratios are taken to; `work` gives what a model of a type takes.
pub fn rows(
    what: &'static str,
    runs: &[Run],
    engines: &[EngineFacts],
    references: &[&'static str],
    work: &dyn Fn(&str) -> Option<Work>,
) -> Vec<Row> {
    let mut cases: Vec<(&str, u32)> = Vec::new();
    for run in runs {
        if !cases.contains(&(run.dtype.as_str(), run.threads)) {
            cases.push((&run.dtype, run.threads));
        }
    }
    let mut out = Vec::new();
    for (dtype, threads) in cases {
        for phase in Phase::ALL {
            for facts in engines {
                let of = |engine: &str| -> Vec<&Run> {
                    let same = |r: &&Run| r.dtype == dtype && r.threads == threads && r.engine == engine;
                    runs.iter().filter(same).collect()
                };
                let own = of(facts.engine);
                let ratios = |value: &dyn Fn(&Run) -> f64| -> BTreeMap<&'static str, Spread> {
                    let ratio = |other: &'static str| {
                        let others = of(other);
                        let pairs = own.iter().filter_map(|run| {
                            let other = others.iter().find(|o| o.round == run.round)?;
                            Some(value(run) / value(other))
                        });
                        Some((other, Spread::of(pairs)?))
                    };
                    references.iter().filter(|r| **r != facts.engine).filter_map(|r| ratio(r)).collect()
                };
                let of_bandwidth = |gb_s: fn(&Limits) -> f64| {
                    let bytes = work(dtype).filter(|_| phase == Phase::Decode).map(|work| work.token_bytes as f64);
                    let fraction = |bytes: f64, run: &&Run| run.decode_tok_s * bytes / (gb_s(&run.limits) * 1e9);
                    Spread::of(own.iter().filter_map(|run| Some(fraction(bytes?, run))))
                };
                let of_arithmetic = |run: &&Run| {
                    let ops = work(dtype).filter(|_| phase == Phase::Prefill)?.layer_ops;
                    let peak = if dtype.starts_with('Q') { run.limits.int8_gop_s } else { run.limits.f32_gflop_s };
                    Some(run.prefill_tok_s * ops as f64 / (peak * 1e9))
                };
                let spread = |value: fn(&Run) -> f64| Spread::of(own.iter().map(|run| value(run)));
                let (Some(tok_s), Some(ttft_ms), Some(peak_rss_mib)) = (
                    Spread::of(own.iter().map(|run| phase.rate(run))),
                    spread(|run| run.ttft_ms),
                    spread(|run| run.peak_rss_mib),
                ) else {
                    continue;
                };
                out.push(Row {
                    what,
                    engine: facts.engine,
                    version: facts.version.clone(),
                    dtype: dtype.to_owned(),
                    isa: facts.isa.clone(),
                    threads,
                    phase,
                    tok_s,
                    ratio_to: ratios(&|run| phase.rate(run)),
                    fraction_of_bandwidth: of_bandwidth(|limits| limits.read_gb_s),
                    fraction_of_sustained_bandwidth: of_bandwidth(|limits| limits.sustained_read_gb_s),
                    fraction_of_arithmetic: Spread::of(own.iter().filter_map(of_arithmetic)),
                    ttft_ms,
                    ttft_ratio_to: ratios(&|run| run.ttft_ms),
                    peak_rss_mib,
                    interrupted: Spread::of(own.iter().filter_map(|run| run.interrupted)),
                });
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(round: u32, engine: &'static str, decode_tok_s: f64) -> Run {
        Run {
            round,
            engine,
            dtype: "F32".into(),
            threads: 1,
            limits: Limits { read_gb_s: 10.0, sustained_read_gb_s: 8.0, f32_gflop_s: 50.0, int8_gop_s: 200.0 },
            prefill_tok_s: 100.0,
            decode_tok_s,
            ttft_ms: 5.0,
            peak_rss_mib: 1.0,
            interrupted: Some(0.01),
        }
    }

    #[test]
    fn ratios_are_taken_inside_a_round_and_survive_drift() {
        // The machine gets three times slower from round to round; the ratio stays 2, and a missing run is left out.
        let runs = [run(1, "a", 90.0), run(1, "b", 45.0), run(2, "b", 15.0), run(2, "a", 30.0), run(3, "a", 10.0)];
        let facts = |engine| EngineFacts { engine, version: "v".into(), isa: "avx2".into() };
        let work = Work { token_bytes: 1_000_000, layer_ops: 200_000_000 };
        let rows = rows("generate", &runs, &[facts("a"), facts("b"), facts("absent")], &["b"], &|_| Some(work));
        assert_eq!(rows.len(), 4, "two engines, two phases");
        let a = rows.iter().find(|r| r.engine == "a" && r.phase == Phase::Decode).unwrap();
        assert_eq!(a.ratio_to["b"], Spread { median: 2.0, min: 2.0, max: 2.0, n: 2 });
        assert_eq!(a.tok_s.n, 3);
        // 30 tokens of 1 MB each of 10 GB/s.
        assert!((a.fraction_of_bandwidth.unwrap().median - 0.003).abs() < 1e-12);
        assert!((a.fraction_of_sustained_bandwidth.unwrap().median - 0.00375).abs() < 1e-12);
        assert!(a.fraction_of_arithmetic.is_none());
        assert_eq!(a.ttft_ratio_to["b"], Spread { median: 1.0, min: 1.0, max: 1.0, n: 2 });
        let b = rows.iter().find(|r| r.engine == "b" && r.phase == Phase::Prefill).unwrap();
        assert!(b.ratio_to.is_empty() && b.fraction_of_bandwidth.is_none());
        // 100 tokens of 200 Mop each of 50 Gop/s.
        assert!((b.fraction_of_arithmetic.unwrap().median - 0.4).abs() < 1e-12);
    }
}
