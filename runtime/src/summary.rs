//! The report of a boot, out of what ran and what was measured.

use crate::boot::TuningWork;
use crate::generate::{Generated, median};
use crate::hash::FileSha256;
use crate::identity::{BUILD_ID, hex};
use crate::load::{self, Loaded, Location};
use crate::options::Options;
use crate::platform::Platform;
use alloc::string::ToString;
use alloc::vec::Vec;
use engine::Engine;
use engine::simd::limits::Limits;
use model::Isa;
use model::ModelDescription;
use profiler::{Part, Profile};
use report::{
    BootReport, Convergence, ImageKind, KernelRow, LoadFacts, LoadRound, MemoryRow, ModelFacts, PartRow, SnapshotStatus,
};

/// A boot that has done its work.
pub struct Ran<'a> {
    /// Which image.
    pub image: ImageKind,
    /// Boots of the snapshot, this one included.
    pub boot: u32,
    /// What was asked for.
    pub options: &'a Options,
    /// Instruction sets in use.
    pub isa: Isa,
    /// Cores in use.
    pub threads: usize,
    /// Where the model is.
    pub location: &'a Location,
    /// What it is.
    pub description: &'a ModelDescription,
    /// How it was loaded.
    pub loaded: &'a Loaded,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The answer.
    pub generated: Generated,
    /// The engine, with what its parts took.
    pub engine: &'a Engine<'a>,
    /// What the machine can do.
    pub limits: &'a Limits,
    /// The kernel table.
    pub rows: Vec<KernelRow>,
    /// Kernels that were there already.
    pub kernels_loaded: u32,
    /// What the search did.
    pub work: TuningWork,
    /// What became of the snapshot.
    pub snapshot: SnapshotStatus,
    /// Whether the search is over.
    pub convergence: Convergence,
}

/// The report of `ran`, without its stages: they are not over.
pub fn boot_report(platform: &mut dyn Platform, ran: Ran<'_>) -> BootReport {
    let load = load_facts(platform, ran.location, ran.loaded);
    let clock = platform.clock();
    let per_second = |count: usize, ticks: u64| count as f64 * clock.tsc_hz as f64 / ticks.max(1) as f64;
    let ms = |ticks: u64| ticks as f64 * 1e3 / clock.tsc_hz as f64;
    let giga = |per_cycle: f64| clock.trusted.then(|| per_cycle * clock.tsc_hz as f64 / 1e9);
    let Ran { engine, limits, work, generated, .. } = ran;
    let decoded = generated.decode_ticks.len();
    BootReport {
        boot: ran.boot,
        image: ran.image,
        build_id: BUILD_ID.into(),
        hypervisor: platform.cpu().hypervisor.clone().unwrap_or_else(|| "none".into()),
        cpu: platform.cpu().brand.clone(),
        isa: ran.isa.name().into(),
        threads: ran.threads as u32,
        tsc_hz: clock.tsc_hz,
        clock_trusted: clock.trusted,
        unix_time: platform.unix_time(),
        model: model_facts(ran.description, ran.loaded),
        prompt: ran.options.prompt.clone(),
        prompt_tokens: ran.prompt_tokens as u32,
        ttft_ms: ms(generated.first_token_tsc.saturating_sub(clock.entry_tsc)),
        prefill_tok_s: per_second(ran.prompt_tokens, generated.prefill_ticks),
        // Not a number: nothing was decoded, so nothing is known.
        decode_tok_s: if decoded > 0 { per_second(decoded, generated.decode_ticks.iter().sum()) } else { f64::NAN },
        token_ms_median: median(&generated.decode_ticks).map_or(f64::NAN, ms),
        token_ids: generated.tokens,
        text: generated.text,
        stages: Vec::new(),
        read_gb_s: giga(limits.read_bytes_per_cycle),
        peak_gflop_s: giga(limits.fma_flops_per_cycle),
        interrupted: Some(limits.interrupted),
        load,
        profiler_overhead: profiler_overhead(engine),
        parts: part_rows(engine, decoded, clock.tsc_hz),
        memory: platform
            .memory()
            .into_iter()
            .map(|m| MemoryRow { name: m.name.into(), used_bytes: m.used_bytes, capacity_bytes: m.capacity_bytes })
            .collect(),
        kernels: ran.rows,
        trials: work.trials,
        kernels_loaded: ran.kernels_loaded,
        kernels_compiled: work.compiled,
        kernels_changed: work.changed,
        compile_ms_total: work.compile_ms,
        snapshot: ran.snapshot,
        convergence: ran.convergence,
    }
}

/// Load rate beside the raw rate of the same device; `None` when the device cannot be read again.
fn load_facts(platform: &mut dyn Platform, location: &Location, loaded: &Loaded) -> Option<LoadFacts> {
    let clock = platform.clock();
    let (raw_bytes, raw_ticks) = load::raw_rate(platform, location, loaded.bytes).ok()?;
    let mb_s = |bytes: u64, ticks: u64| bytes as f64 * clock.tsc_hz as f64 / ticks.max(1) as f64 / 1e6;
    let rounds = loaded.rounds.iter().map(|round| LoadRound {
        mb_s: mb_s(loaded.bytes, round.ticks),
        raw_mb_s: mb_s(loaded.bytes, round.raw_ticks),
    });
    Some(LoadFacts {
        bytes: loaded.bytes,
        mb_s: mb_s(loaded.bytes, loaded.ticks),
        raw_mb_s: mb_s(raw_bytes, raw_ticks),
        rounds: rounds.collect(),
    })
}

/// Cost of two time-stamps and one record, measured here and now, as a share of the time in kernels.
fn profiler_overhead(engine: &Engine<'_>) -> Option<f64> {
    engine.table().profile().overhead(Profile::measure_record_cycles(engine::cycles))
}

/// Where the prompt's time and that of `decoded` tokens went.
fn part_rows(engine: &Engine<'_>, decoded: usize, tsc_hz: u64) -> Vec<PartRow> {
    let (prefill, decode) = (engine.prefill_parts(), engine.decode_parts());
    let row = |part: Part| PartRow {
        name: part.name().into(),
        prefill_share: prefill.share(part),
        decode_share: decode.share(part),
        decode_us: (decoded > 0).then(|| decode.ticks(part) as f64 * 1e6 / tsc_hz as f64 / decoded as f64),
    };
    Part::ALL.into_iter().map(row).collect()
}

fn model_facts(description: &ModelDescription, loaded: &Loaded) -> ModelFacts {
    let config = &description.config;
    ModelFacts {
        name: description.name.clone(),
        architecture: config.architecture.to_string(),
        file_bytes: loaded.bytes,
        fingerprint: hex(&loaded.fingerprint),
        sha256: loaded.sha256.file().map(|file| hex(&file.sha256)),
        sha256_remembered: matches!(loaded.sha256, FileSha256::Remembered(_)),
        n_layers: config.n_layers,
        dim: config.dim,
        vocab_size: config.vocab_size,
        dtypes: description.dtypes(),
    }
}
