//! One boot as it reads: options, model, kernels, generation, tuning, snapshot, report.

use crate::error::RunError;
use crate::generate::{Generated, generate, median};
use crate::identity::{BUILD_ID, hex, identity};
use crate::kernels::{LinkedKernel, RunningKernels, install_linked, restore};
use crate::load::{self, Loaded, Location};
use crate::options::{IsaLimit, Options, Tier};
use crate::platform::Platform;
use crate::reporter::Reporter;
use crate::rows::kernel_rows;
#[cfg(feature = "jit")]
use crate::rows::limit_fraction;
#[cfg(feature = "jit")]
use crate::tune::Tuner;
use crate::{platform::Clock, prompt};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use engine::simd::limits;
use engine::workers::Workers;
use engine::{Engine, Isa, Loader, Plan, Session};
use model::ModelDescription;
use profiler::Profile;
use profiler::convergence::{BootEvidence, ConvergenceConfig, decide};
use report::{
    BootReport, Convergence, ExitStatus, ImageKind, Level, LoadFacts, MemoryRow, Message, ModelFacts, SnapshotOutcome,
    SnapshotStatus, TrialRow, screen,
};
use snapshot_format::{BootLine, CodeUse, DiskMedium, Identity, SlotReason, Snapshot};
use storage::{FatVolume, write_in_place};

/// Name of the settings file on the boot volume.
pub const CONFIG_FILE: &str = "BAREFLOW.CFG";
/// Name of the file on the boot volume that takes the report screen.
pub const REPORT_FILE: &str = "REPORT.TXT";
/// Longest settings file.
const MAX_CONFIG_BYTES: u64 = 64 << 10;
/// Longest tokenizer file.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Context when neither the options nor the model ask for less.
const DEFAULT_CONTEXT: usize = 2048;
/// Standard deviation of normal noise, in median absolute deviations.
const MAD_TO_DEVIATION: f64 = 1.4826;

/// What is to be run.
pub struct Request<'a> {
    /// Which image asks.
    pub image: ImageKind,
    /// Settings that override the boot volume's file.
    pub settings: Settings<'a>,
    /// Kernels linked into the image.
    pub linked: &'a [LinkedKernel],
    /// Content of a llama2.c tokenizer file, when it is not on the boot volume.
    pub tokenizer: Option<Vec<u8>>,
}

/// Where settings come from.
pub enum Settings<'a> {
    /// `BAREFLOW.CFG` on the boot volume, then this command line.
    CommandLine(&'a str),
    /// These, and no file.
    Given(Options),
}

/// How a run ended.
pub struct Outcome {
    /// Status for the exit code.
    pub status: ExitStatus,
    /// The report, when the work was done.
    pub report: Option<BootReport>,
    /// Why the work was not done.
    pub error: Option<RunError>,
}

/// Runs one boot from the first message to the last.
pub fn run(platform: &mut dyn Platform, request: Request<'_>) -> Outcome {
    let mut reporter = Reporter::start(platform, request.image);
    reporter.stage(platform, "platform");
    match work(platform, &mut reporter, request) {
        Ok(report) => {
            reporter.send(platform, &Message::Report(report.clone()));
            let status = reporter.end(platform, ExitStatus::Pass);
            Outcome { status, report: Some(report), error: None }
        }
        Err(error) => {
            reporter.note(platform, Level::Error, error.to_string());
            let status = reporter.end(platform, ExitStatus::Fatal);
            Outcome { status, report: None, error: Some(error) }
        }
    }
}

fn work(platform: &mut dyn Platform, reporter: &mut Reporter, request: Request<'_>) -> Result<BootReport, RunError> {
    let options = match request.settings {
        Settings::Given(options) => options,
        Settings::CommandLine(text) => read_options(platform, text)?,
    };
    let isa = limited(platform.cpu().isa, options.isa);
    if !isa.avx2 {
        let text = "no AVX2, FMA and F16C (CPU or isa=): the portable ops run, and no kernels are compiled";
        reporter.note(platform, Level::Warning, text);
    }

    let location = load::locate(platform, &options)?;
    let tokenizer = match request.tokenizer {
        Some(bytes) => Some(bytes),
        None if !options.tokenizer.is_empty() => load::boot_file(platform, &options.tokenizer, MAX_TOKENIZER_BYTES)?,
        None => None,
    };
    let description = load::describe(platform, &location, tokenizer.as_deref())?;
    let context = context(&options, &description);
    let prompt_tokens = prompt::encode(&description, &options, context)?;
    reporter.stage(platform, "model_header");

    let threads = threads(&options, platform.workers());
    let (mut engine, loaded) = load_engine(platform, &location, &description, &options, isa, threads)?;
    let session_bytes = Session::memory_bytes(&description.config, context, threads);
    let mut session = Session::in_zeroed(&engine, context, platform.arena("session", session_bytes)?)?;
    reporter.stage(platform, "load_model");

    let identity = identity(platform.cpu(), loaded.fingerprint);
    let mut history = History::open(platform, reporter, &options, request.image, &identity);
    let boot = history.snapshot.boot_count.saturating_add(1);
    history.snapshot.boot_count = boot;
    #[cfg(feature = "jit")]
    let mut tuner = match options.tier {
        Tier::Compiled if request.image != ImageKind::Native => Tuner::start(platform, reporter, &options, boot, isa),
        _ => None,
    };
    let mut running = RunningKernels::none(engine.table().len());
    if options.tier == Tier::Compiled && isa.avx2 {
        if request.linked.is_empty() {
            let snapshot = &mut history.snapshot;
            #[cfg(feature = "jit")]
            let mut rebuild = |record: &snapshot_format::KeyRecord| {
                let variant = record.incumbent.as_ref()?.variant;
                tuner.as_mut()?.rebuild(&record.key, &variant)
            };
            #[cfg(not(feature = "jit"))]
            let mut rebuild = |_: &snapshot_format::KeyRecord| None;
            running = restore(platform, reporter, &mut engine, snapshot, &mut rebuild);
        } else {
            running = install_linked(platform, reporter, &mut engine, request.linked);
        }
    }
    if request.image == ImageKind::Native && running.count() == 0 && isa.avx2 {
        return Err(RunError::NoLinkedKernel { model: description.name.clone() });
    }
    history.status.kernels_restored = running.count() as u32;
    reporter.stage(platform, "restore_kernels");

    let out = generate(platform, reporter, &mut engine, &mut session, &description, &options, &prompt_tokens)?;

    let limits = limits::measure(engine.weights(), engine.table().level(), isa, platform.workers(), threads);
    reporter.stage(platform, "measure_limits");
    record_profile(&engine, &running, &mut history.snapshot);
    // Before tuning: the table below shows what this boot ran with, not what it found.
    let clock = platform.clock();
    let trusted_hz = clock.trusted.then_some(clock.tsc_hz);
    let rows_running = running.clone();
    #[cfg(not(feature = "jit"))]
    let work_done = TuningWork::default();
    #[cfg(feature = "jit")]
    let mut work_done = TuningWork::default();
    #[cfg(feature = "jit")]
    if let Some(tuner) = tuner.take()
        && options.tune_budget_ms > 0
    {
        let fractions: Vec<Option<f64>> = (0..engine.table().len())
            .map(|slot| trusted_hz.and_then(|_| limit_fraction(&engine, &limits, slot)))
            .collect();
        let fraction = |slot: usize| fractions.get(slot).copied().flatten();
        let snapshot = &mut history.snapshot;
        let tuned = tuner.run(platform, reporter, &mut engine, snapshot, &mut running, &fraction);
        work_done = TuningWork {
            trials: tuned.trials,
            compiled: tuned.compiled,
            changed: tuned.changed,
            compile_ms: tuned.compile_ms,
        };
        reporter.stage(platform, "tune");
    }

    #[cfg(feature = "jit")]
    let target = crate::tune::target(isa);
    #[cfg(feature = "jit")]
    let variants_total =
        |key: &model::kernel::KernelKey| crate::tune::space_len(&options, jit::space::variants(key, target).len());
    #[cfg(not(feature = "jit"))]
    let variants_total = |_: &model::kernel::KernelKey| 0;
    let kernels = kernel_rows(&engine, &limits, &history.snapshot, &rows_running, trusted_hz, &variants_total);
    // Summed from 0.0: the sum of no floats is -0.0.
    let settled_share = kernels.iter().filter(|row| row.settled).fold(0.0, |sum, row| sum + row.time_share);
    let line = boot_line(&clock, &out, boot, &work_done, settled_share, &history, threads, platform.unix_time());
    history.snapshot.push_boot(line);
    let mut convergence = convergence(&options, &clock, &history.snapshot);
    if request.image == ImageKind::Native {
        convergence.reason = "a native image does not tune: its kernels are part of it".into();
    }
    history.save(platform, reporter, &identity);
    reporter.stage(platform, "save_snapshot");
    let load = load_facts(platform, &clock, &location, &loaded);

    let decode_ticks: u64 = out.decode_ticks.iter().sum();
    let per_second = |count: usize, ticks: u64| count as f64 * clock.tsc_hz as f64 / ticks.max(1) as f64;
    let ms = |ticks: u64| ticks as f64 * 1e3 / clock.tsc_hz as f64;
    let gigahertz = clock.tsc_hz as f64 / 1e9;
    let mut report = BootReport {
        boot,
        image: request.image,
        build_id: BUILD_ID.into(),
        hypervisor: platform.cpu().hypervisor.clone().unwrap_or_else(|| "none".into()),
        cpu: platform.cpu().brand.clone(),
        isa: isa.name().into(),
        threads: threads as u32,
        tsc_hz: clock.tsc_hz,
        clock_trusted: clock.trusted,
        unix_time: platform.unix_time(),
        model: model_facts(&description, &loaded),
        prompt: options.prompt.clone(),
        prompt_tokens: prompt_tokens.len() as u32,
        token_ids: out.tokens,
        text: out.text,
        stages: reporter.stages().to_vec(),
        ttft_ms: ms(out.first_token_tsc.saturating_sub(clock.entry_tsc)),
        prefill_tok_s: per_second(prompt_tokens.len(), out.prefill_ticks),
        decode_tok_s: per_second(out.decode_ticks.len(), decode_ticks),
        token_ms_median: median(&out.decode_ticks).map_or(0.0, ms),
        read_gb_s: trusted_hz.map(|_| limits.read_bytes_per_cycle * gigahertz),
        peak_gflop_s: trusted_hz.map(|_| limits.fma_flops_per_cycle * gigahertz),
        load,
        profiler_overhead: profiler_overhead(&engine),
        memory: platform
            .memory()
            .into_iter()
            .map(|m| MemoryRow { name: m.name.into(), used_bytes: m.used_bytes, capacity_bytes: m.capacity_bytes })
            .collect(),
        kernels,
        trials: work_done.trials,
        kernels_loaded: history.status.kernels_restored,
        kernels_compiled: work_done.compiled,
        kernels_changed: work_done.changed,
        compile_ms_total: work_done.compile_ms,
        snapshot: history.status,
        convergence,
    };
    if options.report {
        let text = screen::boot_screen(&report);
        platform.print(&text);
        if history_writable(request.image) {
            write_report(platform, &text);
        }
    }
    report.stages = reporter.stages().to_vec();
    Ok(report)
}

/// What the tuner of this boot did; all zero where there is none.
#[derive(Default)]
struct TuningWork {
    trials: Vec<TrialRow>,
    compiled: u32,
    changed: u32,
    compile_ms: f64,
}

fn read_options(platform: &mut dyn Platform, command_line: &str) -> Result<Options, RunError> {
    let mut options = Options::default();
    if let Some(bytes) = load::boot_file(platform, CONFIG_FILE, MAX_CONFIG_BYTES)? {
        options.apply(&String::from_utf8_lossy(&bytes))?;
    }
    options.apply(command_line)?;
    Ok(options)
}

/// What may be used of what the CPU has.
fn limited(isa: Isa, limit: IsaLimit) -> Isa {
    match limit {
        IsaLimit::Auto | IsaLimit::Avx512 => isa,
        IsaLimit::Avx2 => Isa { avx512: false, avx512_vnni: false, avx_vnni: false, ..isa },
        IsaLimit::Portable => Isa::PORTABLE,
    }
}

fn threads(options: &Options, workers: &dyn Workers) -> usize {
    match options.threads as usize {
        0 => workers.count(),
        n => n.min(workers.count()),
    }
}

fn context(options: &Options, description: &ModelDescription) -> usize {
    let model = description.config.seq_len as usize;
    match options.context as usize {
        0 => model.min(DEFAULT_CONTEXT),
        asked => asked.min(model),
    }
}

/// Plans the model, streams it into the weights arena, and freezes the arena.
fn load_engine(
    platform: &mut dyn Platform,
    location: &Location,
    description: &ModelDescription,
    options: &Options,
    isa: Isa,
    threads: usize,
) -> Result<(Engine<'static>, Loaded), RunError> {
    let tier = if options.tier == Tier::Reference { engine::Tier::Reference } else { engine::Tier::Baseline };
    let plan = Plan::new(description, threads)?;
    let arena = platform.arena("weights", plan.arena_bytes())?;
    let mut loader = Loader::new(plan, engine::simd::Level::new(isa), arena)?;
    let mut failure = None;
    let loaded = load::stream(platform, location, description, options, &mut |offset, bytes| {
        if failure.is_none() {
            failure = loader.feed(offset, bytes).err();
        }
    })?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    let model = loader.finish()?;
    let weights = platform.freeze(arena);
    Ok((Engine::new(model, weights, isa, tier)?, loaded))
}

/// The snapshot of this machine: what earlier boots left, and what became of it.
struct History {
    snapshot: Snapshot,
    status: SnapshotStatus,
    writable: bool,
}

/// Only the self-optimising images learn; a native image leaves the volume as it is.
fn history_writable(image: ImageKind) -> bool {
    image != ImageKind::Native
}

impl History {
    fn open(
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        options: &Options,
        image: ImageKind,
        identity: &Identity,
    ) -> Self {
        let mut history = Self {
            snapshot: Snapshot::default(),
            status: SnapshotStatus {
                outcome: SnapshotOutcome::Disabled,
                reason: None,
                generation_loaded: None,
                generation_saved: None,
                saved_bytes: None,
                kernels_restored: 0,
            },
            writable: false,
        };
        if !options.snapshot || !history_writable(image) {
            let reason = if options.snapshot { "a native image learns nothing" } else { "switched off (snapshot=)" };
            history.status.reason = Some(reason.into());
            return history;
        }
        let Some(disk) = platform.boot_disk() else {
            history.status.reason = Some("there is no boot volume: nothing learnt is kept".into());
            return history;
        };
        let mut medium = match DiskMedium::open(disk) {
            Ok(medium) => medium,
            Err(error) => {
                let reason = format!("the boot volume cannot be used: {error}");
                reporter.note(platform, Level::Warning, reason.clone());
                history.status.reason = Some(reason);
                return history;
            }
        };
        history.writable = true;
        let opened = snapshot_format::open(&mut medium, identity);
        match opened {
            Ok(opened) => {
                history.status.generation_loaded = Some(opened.generation);
                let mut reasons: Vec<String> = Vec::new();
                history.status.outcome = match &opened.code {
                    CodeUse::Full => SnapshotOutcome::Loaded,
                    CodeUse::ProfileOnly(why) => {
                        reasons.push(why.to_string());
                        SnapshotOutcome::ProfileOnly
                    }
                };
                // The other slot is empty until the second save: not worth a word.
                if let Some(why) = opened.passed_over.filter(|why| !matches!(why, SlotReason::Empty)) {
                    reasons.push(format!("the other slot was passed over: {why}"));
                }
                for reason in &reasons {
                    reporter.note(platform, Level::Warning, format!("snapshot: {reason}"));
                }
                history.status.reason = (!reasons.is_empty()).then(|| reasons.join("; "));
                history.snapshot = opened.snapshot;
            }
            Err(cold) => {
                history.status.outcome = SnapshotOutcome::Cold;
                let text = cold.to_string();
                history.status.reason = Some(text.trim_start_matches("cold start: ").into());
                reporter.note(platform, Level::Info, text);
            }
        }
        history
    }

    fn save(&mut self, platform: &mut dyn Platform, reporter: &mut Reporter, identity: &Identity) {
        if !self.writable {
            return;
        }
        let Some(disk) = platform.boot_disk() else { return };
        let saved = match DiskMedium::open(disk) {
            Ok(mut medium) => snapshot_format::save(&mut medium, identity, &self.snapshot).map_err(|e| e.to_string()),
            Err(error) => Err(format!("snapshot not saved: {error}")),
        };
        match saved {
            Ok(saved) => {
                self.status.generation_saved = Some(saved.generation);
                self.status.saved_bytes = Some(saved.payload_bytes);
            }
            Err(reason) => reporter.note(platform, Level::Warning, reason),
        }
    }
}

/// Keeps this boot's medians, and the hand-written kernel's where it ran.
fn record_profile(engine: &Engine<'_>, running: &RunningKernels, snapshot: &mut Snapshot) {
    for hot in engine.table().profile().hot_list() {
        let median = engine.table().profile().stats(hot.slot).median_cycles();
        let record = snapshot.record_mut(hot.key);
        record.last_median_cycles = median;
        if running.variant(hot.slot).is_none() && record.baseline_median_cycles.is_none() {
            record.baseline_median_cycles = median;
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn boot_line(
    clock: &Clock,
    out: &Generated,
    boot: u32,
    work: &TuningWork,
    settled_share: f64,
    history: &History,
    threads: usize,
    unix_time: Option<u64>,
) -> BootLine {
    let us = |ticks: u64| (ticks as f64 * 1e6 / clock.tsc_hz as f64) as f32;
    let middle = median(&out.decode_ticks).unwrap_or(0);
    let away: Vec<u64> = out.decode_ticks.iter().map(|ticks| ticks.abs_diff(middle)).collect();
    let ticks: u64 = out.decode_ticks.iter().sum();
    BootLine {
        boot,
        unix_time,
        token_us_median: us(middle),
        token_us_mad: us(median(&away).unwrap_or(0)),
        reference_us: median(&out.reference_ticks).map(us),
        decode_tok_s: (out.decode_ticks.len() as f64 * clock.tsc_hz as f64 / ticks.max(1) as f64) as f32,
        ttft_ms: us(out.first_token_tsc.saturating_sub(clock.entry_tsc)) / 1e3,
        kernels_changed: work.changed,
        settled_share: settled_share as f32,
        generation: history.status.generation_loaded.unwrap_or(0),
        threads: threads as u32,
        clock_trusted: clock.trusted,
    }
}

fn convergence(options: &Options, clock: &Clock, snapshot: &Snapshot) -> Convergence {
    let config = ConvergenceConfig {
        window: options.converge_window,
        settled_share: options.converge_coverage,
        max_variation: options.converge_max_variance,
        variation_required: clock.trusted,
    };
    let boots: Vec<BootEvidence> = snapshot
        .boots
        .iter()
        .map(|line| BootEvidence {
            settled_share: f64::from(line.settled_share),
            kernels_changed: line.kernels_changed,
            token_time: (line.token_us_median > 0.0).then(|| f64::from(line.token_us_median)),
            token_spread: (line.token_us_median > 0.0)
                .then(|| MAD_TO_DEVIATION * f64::from(line.token_us_mad) / f64::from(line.token_us_median)),
            reference_time: line.reference_us.map(f64::from),
        })
        .collect();
    let decided = decide(&config, &boots);
    Convergence {
        converged: decided.converged,
        settled_share: decided.settled_share,
        unchanged_boots: decided.unchanged_boots,
        window: decided.window,
        token_time_variation: decided.token_time_variation,
        machine_variation: decided.machine_variation,
        max_variation: decided.max_variation,
        variation_required: decided.variation_required,
        reason: decided.reason,
    }
}

/// Load rate beside the raw rate of the same device; `None` when the device cannot be read again.
fn load_facts(platform: &mut dyn Platform, clock: &Clock, location: &Location, loaded: &Loaded) -> Option<LoadFacts> {
    let (raw_bytes, raw_ticks) = load::raw_rate(platform, location).ok()?;
    let mb_s = |bytes: u64, ticks: u64| bytes as f64 * clock.tsc_hz as f64 / ticks.max(1) as f64 / 1e6;
    Some(LoadFacts {
        bytes: loaded.bytes,
        mb_s: mb_s(loaded.bytes, loaded.ticks),
        raw_mb_s: mb_s(raw_bytes, raw_ticks),
    })
}

/// Cost of two time-stamps and one record, measured here and now, as a share of the time in kernels.
fn profiler_overhead(engine: &Engine<'_>) -> f64 {
    engine.table().profile().overhead(Profile::measure_record_cycles(engine::cycles)).unwrap_or(0.0)
}

fn model_facts(description: &ModelDescription, loaded: &Loaded) -> ModelFacts {
    let config = &description.config;
    let mut types: Vec<&str> = Vec::new();
    for tensor in description.tensors.iter().filter(|tensor| !tensor.role.is_norm()) {
        if !types.contains(&tensor.ty.name()) {
            types.push(tensor.ty.name());
        }
    }
    ModelFacts {
        name: description.name.clone(),
        architecture: config.architecture.to_string(),
        file_bytes: loaded.bytes,
        fingerprint: hex(&loaded.fingerprint),
        sha256: loaded.sha256.map(|hash| hex(&hash)),
        n_layers: config.n_layers,
        dim: config.dim,
        vocab_size: config.vocab_size,
        dtypes: types.join("+"),
    }
}

/// Leaves the screen in the preallocated report file, if the volume has one. Not worth failing over.
fn write_report(platform: &mut dyn Platform, text: &str) {
    let Some(disk) = platform.boot_disk() else { return };
    if disk.read_only() {
        return;
    }
    let Ok(volume) = FatVolume::open(disk) else { return };
    let Ok(file) = volume.find(disk, REPORT_FILE) else { return };
    let Ok(len) = usize::try_from(file.len_bytes) else { return };
    // The file's length is fixed: blank out what an earlier, longer report left.
    let mut bytes = vec![b' '; len];
    let taken = text.len().min(len);
    bytes[..taken].copy_from_slice(&text.as_bytes()[..taken]);
    let _ = write_in_place(disk, &file, 0, &bytes);
}
