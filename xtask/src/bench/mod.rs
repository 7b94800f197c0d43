//! `cargo xtask bench`: BareFlow against llama.cpp on the same files, cores and prompt, in the same minutes.
//!
//! Data path: [`models`] (one GGUF file a type) + [`ours`] (tuned snapshots) + [`peers`] (built from source) -> rounds of runs,
//! each engine once a round in an order that changes -> [`rows`] (ratios inside a round, then medians) -> JSON, plots and
//! the generated parts of `docs/BENCHMARKS.md` ([`document`]). [`load`] holds loading against reading, [`context`] the end of a long
//! context against its start, [`guest`] compares the two bodies of the runtime, [`micro`] looks at single kernels.
//!
//! Architecture invariant: outputs are checked before anything is timed and in every timed run of our own, and only ratios taken inside one round are
//! ratios: read bandwidth of shared machines changes by a factor of two within minutes.

mod chart;
mod context;
mod document;
mod guest;
mod load;
mod machine;
mod micro;
mod models;
pub mod ours;
pub mod peers;
mod rows;

use crate::{demo, packages};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use machine::MachineFacts;
use models::ModelFile;
use ours::{Form, Job, TuneLimits, Tuning};
use peers::{Flavour, Peer, PeerJob, PeerStatus};
use qemu_runs::Spread;
use rows::{EngineFacts, Phase, Row, Run, Work};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The prompt: 122 tokens of SmolLM2's vocabulary.
const PROMPT: &str = include_str!("prompt.txt");
/// Context of every engine, tokens.
const CONTEXT: u32 = 512;
/// Greedy ids that must be the same on F32, where no engine rounds activations: after some dozens, near-ties part them.
const SAME_PREFIX: usize = 16;
const TYPES: [&str; 5] = ["Q4_1", "Q4_0", "Q8_0", "F16", "F32"];
const MIB: f64 = (1 << 20) as f64;
/// Fewer rounds are too few to quote.
const MIN_ROUNDS: u32 = 6;

/// What a user can choose.
#[derive(Args)]
pub struct BenchArgs {
    /// Measured rounds; every engine runs once in each.
    #[arg(long, default_value_t = 6)]
    rounds: u32,
    /// Two rounds, three tuning boots, half the tokens: to see that it works, not to quote. The document is then written
    /// under --out, as it is with fewer rounds than six and where a type, one thread or llama.cpp with AVX2 is left out.
    #[arg(long)]
    quick: bool,
    /// Thread counts.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<u32>,
    /// Weight types.
    #[arg(long, value_delimiter = ',', default_value = "Q4_1,Q4_0,Q8_0,F16,F32")]
    types: Vec<String>,
    /// Measure BareFlow alone.
    #[arg(long)]
    no_peers: bool,
    /// Tuning boots of each snapshot at most.
    #[arg(long, default_value_t = 10)]
    boots: u32,
    /// Trials in one tuning boot, ms.
    #[arg(long, default_value_t = 10_000)]
    tune_ms: u64,
    /// Also time every hot kernel by itself, every variant of its search space, and a square f32 product.
    #[arg(long)]
    micro: bool,
    /// Leave out the guest under KVM.
    #[arg(long)]
    no_guest: bool,
    /// Take the snapshots that an earlier run left in --out, where there are any.
    #[arg(long)]
    keep_snapshots: bool,
    /// Also write the result here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Directory for snapshots and logs.
    #[arg(long, default_value = "out/bench")]
    out: PathBuf,
}

/// Everything one invocation found: the JSON file.
#[derive(Serialize)]
struct Results {
    schema: u32,
    command: String,
    machine: MachineFacts,
    prompt_tokens: u32,
    decoded_tokens: u32,
    context: u32,
    rounds: u32,
    peers: Vec<PeerStatus>,
    models: Vec<ModelFile>,
    tuning: Vec<Tuning>,
    agreement: Vec<Agreement>,
    /// Read bandwidth over the whole run, GB/s, by thread count.
    read_gb_s: Vec<(u32, Spread)>,
    rows: Vec<Row>,
    runs: Vec<Run>,
    /// Loading beside reading.
    load: Vec<load::LoadRow>,
    /// The end of a long context beside its start.
    long_context: Vec<context::ContextRow>,
    guest: GuestResults,
    /// `bareflow tune --json` of every type and form, and the `gemm` example's figures; absent without `--micro`.
    micro: Option<Value>,
}

/// The guest beside the hosted process.
#[derive(Default, Serialize)]
struct GuestResults {
    /// Why it was not measured; `None` when it was.
    skipped: Option<String>,
    /// Which accelerator, and why.
    accel: Option<String>,
    rows: Vec<Row>,
    runs: Vec<Run>,
}

/// How long the greedy output of a peer is the same as ours.
#[derive(Clone, Debug, Serialize)]
struct Agreement {
    dtype: String,
    peer: &'static str,
    /// Ids from the start that are equal.
    same_ids: usize,
    /// Ids generated.
    of: usize,
    /// Our text.
    text: String,
}

/// Runs the benchmark.
///
/// # Errors
/// A missing tool, a failed run, or outputs that are not what they must be. A peer that cannot be built is left out and
/// said in the results.
pub fn run(workspace: &Path, args: &BenchArgs) -> Result<()> {
    for dtype in &args.types {
        ensure!(TYPES.contains(&dtype.as_str()), "unknown type `{dtype}`: expected one of {}", TYPES.join(" "));
    }
    packages::ensure(&[&packages::TASKSET])?;
    let machine = MachineFacts::read(workspace)?;
    let most = *args.threads.iter().max().context("--threads names no thread count")?;
    if most as usize > machine.cores.len() || args.threads.contains(&0) {
        bail!("--threads: from 1 to {}, the cores this process may use; found {most}", machine.cores.len());
    }
    let cache = workspace.join(".cache");
    let out = workspace.join(&args.out);
    std::fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;

    let bareflow = ours::build(workspace)?;
    let (peers, mut peer_status) =
        if args.no_peers { (Vec::new(), Vec::new()) } else { peers::obtain(&cache.join("peers"), &machine) };
    let models: Vec<ModelFile> =
        args.types.iter().map(|dtype| models::obtain(&cache, &bareflow, dtype)).collect::<Result<_>>()?;
    let mut bench = Bench {
        bareflow,
        driver: workspace.join("xtask/src/bench/peer.py"),
        prompt: workspace.join("xtask/src/bench/prompt.txt"),
        out,
        forms: forms(&machine),
        tokens: if args.quick { 33 } else { 65 },
        rounds: if args.quick { 2 } else { args.rounds },
        machine,
        peers,
        own_ids: BTreeMap::new(),
    };

    let (agreement, prompt_tokens) = bench.check_outputs(&models, &mut peer_status)?;
    let limits = TuneLimits { max_boots: if args.quick { 3 } else { args.boots }, budget_ms: args.tune_ms };
    let tuning = bench.tune(&models, &args.threads, limits, args.keep_snapshots)?;
    let runs = bench.measure(&models, &args.threads)?;

    let load = bench.load(&models, &args.threads)?;
    let long_context = bench.long_context(&models, &args.threads)?;
    let guest = bench.guest(workspace, &models, args)?;
    let micro = if args.micro { Some(bench.micro(workspace, &models, &args.threads)?) } else { None };

    let references = ["llama_cpp_avx2", "llama_cpp_avx512", "ours_baseline"];
    let work = |dtype: &str| {
        let model = models.iter().find(|m| m.dtype == dtype)?;
        Some(Work { token_bytes: model.token_bytes, layer_ops: model.layer_ops })
    };
    let rows = rows::rows("generate", &runs, &bench.engine_facts(&peer_status), &references, &work);
    let bandwidth = args.threads.iter().filter_map(|&threads| {
        let of = runs.iter().filter(|run| run.threads == threads).map(|run| run.limits.read_gb_s);
        Some((threads, Spread::of(of)?))
    });
    let words = std::iter::once("cargo xtask".to_owned()).chain(std::env::args().skip(1));
    let results = Results {
        schema: 1,
        command: words.collect::<Vec<_>>().join(" "),
        prompt_tokens,
        decoded_tokens: bench.tokens - 1,
        context: CONTEXT,
        rounds: bench.rounds,
        peers: peer_status,
        models,
        tuning,
        agreement,
        read_gb_s: bandwidth.collect(),
        rows,
        runs,
        load,
        long_context,
        guest,
        micro: micro.as_ref().map(|(kernels, gemm)| micro::both(kernels, gemm)),
        machine: bench.machine,
    };
    let docs = if is_whole(args, &results.peers) { workspace.join("docs") } else { bench.out };
    write(workspace, &docs, &results, micro.as_ref())?;
    if let Some(file) = &args.json {
        std::fs::write(file, serde_json::to_string_pretty(&results)?)
            .with_context(|| format!("writing {}", file.display()))?;
    }
    for phase in Phase::ALL {
        println!(
            "\n{}, tokens per second, median (least-most):\n{}",
            phase.name(),
            document::rates(&results.rows, phase)
        );
    }
    println!("results  {}", docs.join("BENCHMARKS.md").display());
    Ok(())
}

/// Whether a run is to replace the document: what is not worth quoting, or is only a part, does not.
fn is_whole(args: &BenchArgs, peers: &[PeerStatus]) -> bool {
    let all = |wanted: &[&str], found: &mut dyn Iterator<Item = &str>| {
        let found: Vec<&str> = found.collect();
        wanted.iter().all(|name| found.contains(name))
    };
    let built = peers.iter().filter(|peer| peer.failure.is_none());
    !args.quick
        && args.rounds >= MIN_ROUNDS
        && args.threads.contains(&1)
        && all(&TYPES, &mut args.types.iter().map(String::as_str))
        && all(&["llama_cpp_avx2"], &mut built.map(|peer| peer.engine))
}

/// The forms that differ on this machine.
fn forms(machine: &MachineFacts) -> Vec<Form> {
    if machine.isa.contains(&"avx512f") || machine.isa.contains(&"avx_vnni") {
        vec![Form::Avx2, Form::Unrestricted, Form::Baseline]
    } else {
        eprintln!("no `ours` beside `ours_avx2`: this CPU has nothing beyond AVX2, so they would be the same");
        vec![Form::Avx2, Form::Baseline]
    }
}

/// What stays the same from run to run.
struct Bench {
    bareflow: PathBuf,
    /// What runs llama.cpp.
    driver: PathBuf,
    /// The file of [`PROMPT`].
    prompt: PathBuf,
    out: PathBuf,
    forms: Vec<Form>,
    peers: Vec<Peer>,
    tokens: u32,
    rounds: u32,
    machine: MachineFacts,
    /// For each weight type the tokens that all of our own forms have to give.
    own_ids: BTreeMap<String, Vec<u32>>,
}

/// An engine of the rounds.
enum Engine<'a> {
    Ours(Form),
    Peer(&'a Peer),
}

impl Engine<'_> {
    /// Leaves AVX-512 and VNNI unused.
    fn is_avx2_only(&self) -> bool {
        match self {
            Engine::Ours(form) => *form != Form::Unrestricted,
            Engine::Peer(peer) => peer.flavour == Flavour::Avx2,
        }
    }
}

impl Bench {
    fn job<'a>(&'a self, model: &'a ModelFile, threads: u32) -> Job<'a> {
        Job {
            bareflow: &self.bareflow,
            cores: &self.machine.cores,
            model: &model.path,
            prompt: PROMPT,
            threads,
            tokens: self.tokens,
            context: CONTEXT,
            kv: "auto",
        }
    }

    fn peer_job<'a>(&'a self, model: &'a ModelFile, threads: u32) -> PeerJob<'a> {
        PeerJob {
            driver: &self.driver,
            prompt: &self.prompt,
            cores: &self.machine.cores,
            model: &model.path,
            threads,
            tokens: self.tokens,
            context: CONTEXT,
        }
    }

    fn snapshot(&self, form: Form, dtype: &str, threads: u32) -> PathBuf {
        self.out.join(format!("{}-{dtype}-t{threads}.img", form.engine()))
    }

    fn engine_facts(&self, peers: &[PeerStatus]) -> Vec<EngineFacts> {
        let commit = self.machine.commit.clone().unwrap_or_else(|| "unknown".into());
        let own = self.forms.iter().map(|form| EngineFacts {
            engine: form.engine(),
            version: commit.clone(),
            isa: if *form == Form::Unrestricted { "auto".into() } else { "avx2".into() },
        });
        let others = self.peers.iter().map(|peer| EngineFacts {
            engine: peer.flavour.engine(),
            version: peers
                .iter()
                .find(|p| p.engine == peer.flavour.engine())
                .map_or_else(String::new, |p| p.package.clone()),
            isa: peer.flavour.isa().into(),
        });
        own.chain(others).collect()
    }

    /// Every engine once on every model, untimed: the same ids from all of our own forms, which every later run is held to,
    /// and on F32 the same first ids from the peers. Returns how far the peers agree, and the tokens of the prompt.
    fn check_outputs(&mut self, models: &[ModelFile], statuses: &mut [PeerStatus]) -> Result<(Vec<Agreement>, u32)> {
        let mut agreement = Vec::new();
        let mut prompt_tokens = None;
        let mut own_ids = BTreeMap::new();
        for model in models {
            let job = self.job(model, 1);
            let mut own: Option<(Vec<u32>, String)> = None;
            for form in &self.forms {
                let report = job.run(*form, None, 0)?;
                prompt_tokens = Some(report.prompt_tokens);
                match &own {
                    Some((ids, _)) => ensure!(
                        *ids == report.token_ids,
                        "{} on {}: {} gives other tokens than {}; nothing is measured",
                        model.name,
                        model.dtype,
                        form.engine(),
                        self.forms[0].engine()
                    ),
                    None => own = Some((report.token_ids, report.text)),
                }
            }
            let Some((ids, text)) = own else { bail!("no form of ours to run") };
            own_ids.insert(model.dtype.clone(), ids.clone());
            println!("{:<5} {:?}", model.dtype, text.chars().take(110).collect::<String>());
            for peer in &self.peers {
                let run = peer.run(&self.peer_job(model, 1))?;
                let engine = peer.flavour.engine();
                let same_ids = ids.iter().zip(&run.token_ids).take_while(|(a, b)| a == b).count();
                ensure!(
                    Some(run.prompt_tokens) == prompt_tokens,
                    "{engine} sees {} tokens in the prompt, BareFlow {prompt_tokens:?}",
                    run.prompt_tokens
                );
                ensure!(
                    model.dtype != "F32" || same_ids >= SAME_PREFIX,
                    "{engine} and BareFlow must agree on the first {SAME_PREFIX} ids of F32, and do on {same_ids}:\n  ours  {text:?}\n  theirs {:?}",
                    run.text
                );
                println!("      {engine}: the first {same_ids} of {} ids are the same", ids.len());
                if let Some(status) = statuses.iter_mut().find(|s| s.engine == engine) {
                    status.system_info = Some(run.system_info);
                }
                let dtype = model.dtype.clone();
                agreement.push(Agreement { dtype, peer: engine, same_ids, of: ids.len(), text: text.clone() });
            }
        }
        self.own_ids = own_ids;
        Ok((agreement, prompt_tokens.context("no model to check")?))
    }

    /// Tunes a snapshot for every tuned form, type and thread count.
    fn tune(&self, models: &[ModelFile], threads: &[u32], limits: TuneLimits, keep: bool) -> Result<Vec<Tuning>> {
        let tuned: Vec<Form> = self.forms.iter().copied().filter(|form| form.is_tuned()).collect();
        let bar = Progress::new(models.len() * threads.len() * tuned.len(), "tuning");
        let mut out = Vec::new();
        for model in models {
            for &threads in threads {
                for &form in &tuned {
                    let snapshot = self.snapshot(form, &model.dtype, threads);
                    bar.say(&format!("{} {} {threads} threads", form.engine(), model.dtype));
                    if !keep && snapshot.exists() {
                        std::fs::remove_file(&snapshot).with_context(|| format!("removing {}", snapshot.display()))?;
                    }
                    let tuning = ours::tune(&self.job(model, threads), form, &model.dtype, &snapshot, limits)?;
                    bar.line(&format!(
                        "tuned {:<9} {:<4} {threads} threads: {} boots, {} variants; {}",
                        form.engine(),
                        model.dtype,
                        tuning.boots,
                        tuning.trials,
                        tuning.reason
                    ));
                    bar.step();
                    out.push(tuning);
                }
            }
        }
        Ok(out)
    }

    /// The rounds.
    fn measure(&self, models: &[ModelFile], threads: &[u32]) -> Result<Vec<Run>> {
        let mut engines: Vec<Engine<'_>> = self.forms.iter().map(|form| Engine::Ours(*form)).collect();
        engines.extend(self.peers.iter().map(Engine::Peer));
        let bar = Progress::new(self.rounds as usize * models.len() * threads.len() * engines.len(), "runs");
        let mut runs = Vec::new();
        // Every run at once: a benchmark that is interrupted after an hour leaves what it measured.
        let log = self.out.join("runs.jsonl");
        let mut lines = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        for round in 1..=self.rounds {
            for model in models {
                for &threads in threads {
                    for index in order(engines.len(), round) {
                        let run = self.measure_one(&engines[index], model, threads, round)?;
                        bar.say(&format!(
                            "round {round} {} {threads} threads {}: {:.1} tok/s at {:.1} GB/s",
                            run.dtype, run.engine, run.decode_tok_s, run.limits.read_gb_s
                        ));
                        bar.step();
                        writeln!(lines, "{}", serde_json::to_string(&run)?)?;
                        runs.push(run);
                    }
                }
            }
            bar.line(&format!("round {round} of {} done", self.rounds));
        }
        Ok(runs)
    }

    /// Loading beside reading, for each type and thread count.
    fn load(&self, models: &[ModelFile], threads: &[u32]) -> Result<Vec<load::LoadRow>> {
        let bar = Progress::new(models.len() * threads.len(), "loads");
        let mut out = Vec::new();
        for model in models {
            for &threads in threads {
                out.push(load::measure(&self.bareflow, model, threads)?);
                bar.step();
            }
        }
        Ok(out)
    }

    /// The end of a long context beside its start, ours with AVX2 and llama.cpp likewise, where it was built.
    fn long_context(&self, models: &[ModelFile], threads: &[u32]) -> Result<Vec<context::ContextRow>> {
        let models: Vec<&ModelFile> = models.iter().filter(|m| context::TYPES.contains(&m.dtype.as_str())).collect();
        let bar = Progress::new(models.len() * threads.len(), "long contexts");
        let long = PROMPT.repeat(context::REPEATS);
        let short = "Once upon a time";
        let files = [self.out.join("short.txt"), self.out.join("long.txt")];
        for (file, text) in files.iter().zip([short, &long]) {
            std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
        }
        let prompts = context::Prompts { texts: [short, &long], files: [&files[0], &files[1]] };
        let rounds = self.rounds.div_ceil(2);
        let mut out = Vec::new();
        for model in models {
            for &threads in threads {
                bar.say(&format!("{} {threads} threads", model.dtype));
                let snapshot = self.snapshot(Form::Avx2, &model.dtype, threads);
                let mut engines = vec![context::Engine::Ours(Form::Avx2, &snapshot)];
                let peer = self.peers.iter().find(|peer| peer.flavour == Flavour::Avx2);
                engines.extend(peer.map(context::Engine::Peer));
                let (job, peer_job) = (self.job(model, threads), self.peer_job(model, threads));
                out.extend(context::measure(model, &job, &peer_job, &engines, prompts, rounds)?);
                bar.step();
            }
        }
        Ok(out)
    }

    /// Guest and hosted in turn on the first type, for each thread count; why not, where it cannot be done.
    fn guest(&self, workspace: &Path, models: &[ModelFile], args: &BenchArgs) -> Result<GuestResults> {
        let skipped = |why: String| {
            println!("guest and hosted are not compared: {why}");
            Ok(GuestResults { skipped: Some(why), ..GuestResults::default() })
        };
        if args.no_guest || args.quick {
            return skipped("left out by --no-guest or --quick".into());
        }
        let Some(model) = models.first() else { bail!("--types names no type") };
        let memory_mib = demo::memory_mib(&model.path)?;
        let most = args.threads.iter().copied().max().unwrap_or(1);
        let guest = match guest::Guest::obtain(workspace, &self.out, memory_mib, most) {
            Ok(guest) => guest,
            Err(error) => return skipped(format!("{error:#}")),
        };
        let form = if self.forms.contains(&Form::Unrestricted) { Form::Unrestricted } else { Form::Avx2 };
        let (mut runs, mut failed) = (Vec::new(), Vec::new());
        for &threads in &args.threads {
            println!("guest and hosted in turn, {} with {threads} threads", model.dtype);
            let (boots, tune_ms, rounds) = (args.boots, args.tune_ms, self.rounds);
            let plan = guest::Plan { dtype: &model.dtype, memory_mib, boots, tune_ms, rounds };
            let snapshot = self.snapshot(form, &model.dtype, threads);
            match guest.compare(&self.job(model, threads), form, &snapshot, &plan) {
                Ok(more) => runs.extend(more),
                // What was measured before this is worth its time all the same.
                Err(error) => {
                    eprintln!("guest with {threads} threads: {error:#}");
                    failed.push(format!("with {threads} threads: {error:#}"));
                }
            }
        }
        let skipped = (!failed.is_empty()).then(|| failed.join("; "));
        let version = self.machine.commit.clone().unwrap_or_else(|| "unknown".into());
        let facts = |engine| EngineFacts { engine, version: version.clone(), isa: "auto".into() };
        let rows = rows::rows("guest_vs_hosted", &runs, &[facts("guest"), facts("hosted")], &["hosted"], &|_| None);
        Ok(GuestResults { skipped, accel: Some(guest.accel), rows, runs })
    }

    /// Every hot kernel of every type by itself, and one square product, on one core.
    fn micro(&self, workspace: &Path, models: &[ModelFile], threads: &[u32]) -> Result<(Vec<Value>, Value)> {
        ensure!(threads.contains(&1), "--micro measures kernels tuned for one thread: add 1 to --threads");
        let micro = micro::Micro {
            workspace,
            bareflow: &self.bareflow,
            cores: &self.machine.cores,
            prompt: PROMPT,
            context: CONTEXT,
        };
        let tuned: Vec<Form> = self.forms.iter().copied().filter(|form| form.is_tuned()).collect();
        let bar = Progress::new(models.len() * tuned.len() + 1, "kernels");
        let mut kernels = Vec::new();
        for model in models {
            for &form in &tuned {
                bar.say(&format!("{} {}", form.engine(), model.dtype));
                kernels.push(micro.kernels(model, form, &self.snapshot(form, &model.dtype, 1), true)?);
                bar.step();
            }
        }
        bar.say("gemm");
        let gemm = micro.gemm()?;
        Ok((kernels, gemm))
    }

    fn measure_one(&self, engine: &Engine<'_>, model: &ModelFile, threads: u32, round: u32) -> Result<Run> {
        let job = self.job(model, threads);
        let limits = job.limits(engine.is_avx2_only())?;
        let dtype = model.dtype.clone();
        Ok(match engine {
            Engine::Ours(form) => {
                let snapshot = self.snapshot(*form, &dtype, threads);
                let report = job.run(*form, form.is_tuned().then_some(snapshot.as_path()), 0)?;
                let expected = self.own_ids.get(&dtype);
                ensure!(
                    expected == Some(&report.token_ids),
                    "{} on {dtype}: with its tuned kernels {} gives other tokens than the hand-written ops, {:?} and {expected:?}",
                    model.name,
                    form.engine(),
                    report.token_ids
                );
                let peak = report.memory.iter().find(|m| m.name == "process").map_or(0, |m| m.used_bytes);
                Run {
                    round,
                    engine: form.engine(),
                    dtype,
                    threads,
                    limits,
                    prefill_tok_s: report.prefill_tok_s,
                    decode_tok_s: report.decode_tok_s,
                    ttft_ms: report.ttft_ms,
                    peak_rss_mib: peak as f64 / MIB,
                    interrupted: report.interrupted,
                }
            }
            Engine::Peer(peer) => {
                let run = peer.run(&self.peer_job(model, threads))?;
                Run {
                    round,
                    engine: peer.flavour.engine(),
                    dtype,
                    threads,
                    limits,
                    prefill_tok_s: run.prefill_tok_s,
                    decode_tok_s: run.decode_tok_s,
                    ttft_ms: run.ttft_ms,
                    peak_rss_mib: run.peak_rss_mib,
                    interrupted: None,
                }
            }
        })
    }
}

/// Order of `count` engines in a round: it starts one engine later in every round, and runs backwards in every other, so
/// that no engine is always first and none always follows the same other.
fn order(count: usize, round: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    if round.is_multiple_of(2) {
        order.reverse();
    }
    order.rotate_left((round as usize - 1) / 2 % count.max(1));
    order
}

/// Writes JSON, plots and the document's generated parts under `docs`.
fn write(workspace: &Path, docs: &Path, results: &Results, micro: Option<&(Vec<Value>, Value)>) -> Result<()> {
    let plots = docs.join("benchmarks");
    std::fs::create_dir_all(&plots).with_context(|| format!("creating {}", plots.display()))?;
    std::fs::write(plots.join("generate.json"), serde_json::to_string_pretty(results)? + "\n")?;
    let reference =
        if results.rows.iter().any(|r| r.engine == "llama_cpp_avx2") { "llama_cpp_avx2" } else { "ours_baseline" };
    let template = workspace.join("docs/BENCHMARKS.md");
    let mut text = std::fs::read_to_string(&template).with_context(|| format!("reading {}", template.display()))?;
    text = document::replace(&text, "conditions", &conditions(results))?;
    for phase in Phase::ALL {
        let mut section = document::command(&results.command) + &document::rates(&results.rows, phase);
        for (threads, _) in &results.read_gb_s {
            let name = format!("{}-t{threads}.svg", phase.name());
            std::fs::write(plots.join(&name), document::chart(&results.rows, phase, *threads, reference))?;
            section +=
                &format!("\n![{} relative to {reference}, {threads} threads](benchmarks/{name})\n", phase.name());
        }
        text = document::replace(&text, phase.name(), &section)?;
    }
    let resources = document::command(&results.command) + &document::resources(&results.rows);
    text = document::replace(&text, "resources", &resources)?;
    let loads = document::command(&results.command) + &load::load_table(&results.load);
    text = document::replace(&text, "load", &loads)?;
    let contexts = document::command(&results.command) + &context::context_table(&results.long_context);
    text = document::replace(&text, "context", &contexts)?;
    // What this invocation did not measure keeps what an earlier one found.
    if let GuestResults { skipped: None, accel: Some(accel), rows, .. } = &results.guest {
        let tables = Phase::ALL.map(|phase| format!("{}:\n\n{}\n", phase.name(), document::rates(rows, phase)));
        let head = document::command(&results.command) + &format!("Accelerator: {accel}.\n\n");
        let section = head + &tables.concat() + &document::interruptions(rows);
        text = document::replace(&text, "guest", &section)?;
    }
    if let Some((kernels, gemm)) = micro {
        let command = document::command(&results.command);
        text = document::replace(&text, "kernels", &(command.clone() + &micro::kernel_table(kernels)))?;
        text = document::replace(&text, "gemm", &(command + &micro::gemm_table(gemm)))?;
    }
    std::fs::write(docs.join("BENCHMARKS.md"), text)?;
    Ok(())
}

/// Machine, versions, what was pinned, drift.
fn conditions(results: &Results) -> String {
    let m = &results.machine;
    let or_unknown = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".into());
    let mut lines = vec![
        format!(
            "machine: {}{}, cores {:?}, {} of last-level cache, {} MiB, Linux {}, governor {}, load {} at the start",
            or_unknown(&m.cpu),
            if m.virtual_machine { " (a virtual machine)" } else { "" },
            m.cores,
            or_unknown(&m.last_level_cache),
            m.memory_mib.map_or_else(|| "unknown".into(), |mib| mib.to_string()),
            or_unknown(&m.kernel),
            or_unknown(&m.governor),
            m.load_before.map_or_else(|| "unknown".into(), |load| format!("{load:.2}")),
        ),
        format!("instruction sets: {}", m.isa.join(" ")),
        format!("BareFlow: commit {}", or_unknown(&m.commit)),
        format!(
            "work: {} prompt tokens, then {} decoded one by one, greedy, context {}; {} rounds",
            results.prompt_tokens, results.decoded_tokens, results.context, results.rounds
        ),
    ];
    for peer in &results.peers {
        lines.push(match (&peer.failure, &peer.system_info) {
            (Some(why), _) => format!("{}: not measured: {why}", peer.engine),
            (None, info) => format!("{}: {}; {}", peer.engine, peer.package, or_unknown(info).trim()),
        });
    }
    for model in &results.models {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (file, token) = (mb(model.file_bytes), mb(model.token_bytes));
        lines.push(format!(
            "{}: {} ({}), {file:.0} MB, {token:.0} MB read for each token",
            model.dtype, model.name, model.stored
        ));
    }
    for (threads, gb_s) in &results.read_gb_s {
        lines.push(format!(
            "read bandwidth with {threads} threads during the run: {} GB/s, a factor of {:.2} between least and most",
            document::spread(gb_s),
            gb_s.max / gb_s.min
        ));
    }
    for agreement in &results.agreement {
        let Agreement { dtype, peer, same_ids, of, .. } = agreement;
        lines.push(format!("{dtype}: the first {same_ids} of {of} greedy ids of {peer} are ours"));
    }
    let boots = |t: &Tuning| {
        let state = if t.converged { "converged" } else { "not converged" };
        format!("{} {} {} threads: {} boots, {} variants, {state}", t.engine, t.dtype, t.threads, t.boots, t.trials)
    };
    lines.extend(results.tuning.iter().map(|t| format!("tuning, {}", boots(t))));
    lines.iter().map(|line| format!("- {line}\n")).collect()
}

/// A bar on a terminal, plain lines elsewhere.
struct Progress {
    bar: ProgressBar,
    plain: bool,
    start: Instant,
}

impl Progress {
    fn new(steps: usize, what: &str) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
        let template = format!("{what} {{bar:24}} {{pos}}/{{len}} {{elapsed}} (left {{eta}})  {{wide_msg}}");
        bar.set_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, plain, start: Instant::now() }
    }

    fn say(&self, message: &str) {
        self.bar.set_message(message.to_owned());
    }

    fn line(&self, line: &str) {
        if self.plain {
            eprintln!("{:>6.0} s  {line}", self.start.elapsed().as_secs_f64());
        } else {
            self.bar.println(line);
        }
    }

    fn step(&self) {
        self.bar.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: BenchArgs,
    }

    #[test]
    fn only_a_whole_run_replaces_the_document() {
        let peer = |engine, failure: Option<&str>| PeerStatus {
            engine,
            package: String::new(),
            commands: Vec::new(),
            failure: failure.map(str::to_owned),
            system_info: None,
        };
        let whole = |words: &str, peers: &[PeerStatus]| {
            is_whole(&Command::parse_from(std::iter::once("bench").chain(words.split_whitespace())).args, peers)
        };
        let built = [peer("llama_cpp_avx2", None), peer("llama_cpp_avx512", Some("no compiler"))];
        assert!(whole("", &built));
        assert!(whole("--micro --no-guest --threads 1 --rounds 7", &built));
        for part in ["--quick", "--rounds 5", "--threads 2", "--types Q4_1,F32"] {
            assert!(!whole(part, &built), "{part}");
        }
        assert!(!whole("--no-peers", &[]));
        assert!(!whole("", &[peer("llama_cpp_avx2", Some("no compiler"))]));
    }

    #[test]
    fn every_engine_runs_once_a_round_and_each_is_first_and_last() {
        for count in 1..6 {
            let rounds = 1..=2 * count as u32;
            let (first, last): (Vec<_>, Vec<_>) =
                rounds.clone().map(|round| (order(count, round)[0], order(count, round)[count - 1])).unzip();
            assert!((0..count).all(|engine| first.contains(&engine) && last.contains(&engine)), "{first:?} {last:?}");
            for round in rounds {
                let mut now = order(count, round);
                now.sort_unstable();
                assert_eq!(now, (0..count).collect::<Vec<_>>());
            }
        }
        assert_eq!(order(3, 1), [0, 1, 2]);
        assert_eq!(order(3, 2), [2, 1, 0]);
        assert_eq!(order(3, 3), [1, 2, 0]);
    }

    #[test]
    fn the_committed_document_has_every_section() {
        let text = include_str!("../../../docs/BENCHMARKS.md");
        for section in ["conditions", "prefill", "decode", "resources", "load", "context", "guest", "kernels", "gemm"] {
            document::replace(text, section, "x").unwrap();
        }
    }
}
