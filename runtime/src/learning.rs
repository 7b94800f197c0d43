//! What a self-optimising image does with kernels: starts from what earlier boots learnt, searches on, decides whether it
//! has converged, and leaves what it knows for the next boot. `frozen` is the counterpart of images without a compiler.

use crate::boot::{BootFigures, Remembered, TuningWork};
use crate::error::RunError;
use crate::generate::median;
use crate::hash::FileSha256;
use crate::kernels::{Linked, RunningKernels, restore};
use crate::options::{Options, Tier};
use crate::platform::{Clock, Platform};
use crate::reporter::Reporter;
use crate::rows::limit_fraction;
use crate::tune::{Tuner, is_exhausted, space_len};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use engine::Engine;
use engine::simd::limits::Limits;
use jit::space;
use model::Isa;
use model::kernel::KernelKey;
use profiler::convergence::{BootEvidence, ConvergenceConfig, decide};
use report::{Convergence, Level, SnapshotOutcome, SnapshotStatus};
use snapshot_format::{BootLine, CodeUse, DiskMedium, Identity, KeyRecord, SlotReason, Snapshot, newest_model_file};

/// Standard deviation of normal noise, in median absolute deviations.
const MAD_TO_DEVIATION: f64 = 1.4826;

/// The kernels of one boot.
pub struct Kernels<'a> {
    options: &'a Options,
    isa: Isa,
    identity: Identity,
    snapshot: Snapshot,
    status: SnapshotStatus,
    writable: bool,
    tuner: Option<Tuner<'a>>,
    running: RunningKernels,
    /// Kernels of the snapshot that this boot could not use and dropped from it.
    lost: u32,
    /// Why this boot teaches nothing and leaves the snapshot as it is: what it measures is not what the search is about.
    no_lesson: Option<String>,
}

impl<'a> Kernels<'a> {
    /// Why this boot need not compute the model's SHA-256 for the snapshot to remember, if so. Asked before the load, when it is
    /// not known yet whether the snapshot is of this model.
    pub(crate) fn hash_needless(platform: &mut dyn Platform, options: &Options, isa: Isa) -> Option<&'static str> {
        const NO_SNAPSHOT: &str = "no snapshot would remember it";
        if no_lesson(options.tier, isa).is_some() {
            return Some(NO_SNAPSHOT);
        }
        let disk = platform.boot_disk().filter(|disk| options.snapshot && !disk.read_only());
        let Some(mut medium) = disk.and_then(|disk| DiskMedium::open(disk).ok()) else { return Some(NO_SNAPSHOT) };
        newest_model_file(&mut medium)
            .map(|_| "the snapshot that has one is damaged or of another model; the next boot computes it")
    }

    /// The model's hash as `found` while loading, which the snapshot then keeps, or else as the snapshot has it.
    pub(crate) fn remember_hash(&mut self, found: FileSha256) -> FileSha256 {
        if let FileSha256::Computed(file) = found {
            self.snapshot.model_file = Some(file);
            return found;
        }
        self.snapshot.model_file.map_or(found, FileSha256::Remembered)
    }

    /// Opens the snapshot and makes the tuner, whose budget runs from [`Kernels::improve`] on.
    pub fn start(
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        options: &'a Options,
        isa: Isa,
        identity: Identity,
        _linked: Linked<'a>,
    ) -> Self {
        let mut kernels = Self {
            options,
            isa,
            identity,
            snapshot: Snapshot::default(),
            status: SnapshotStatus::disabled(),
            writable: false,
            tuner: None,
            running: RunningKernels::none(0),
            lost: 0,
            no_lesson: no_lesson(options.tier, isa),
        };
        kernels.open(platform, reporter);
        kernels.snapshot.boot_count = kernels.snapshot.boot_count.saturating_add(1);
        if kernels.no_lesson.is_none() {
            kernels.tuner = Tuner::start(platform, reporter, options, kernels.snapshot.boot_count, isa);
        }
        kernels
    }

    /// Installs what the snapshot brought, each kernel after it was audited and gave the answer that goes with it.
    ///
    /// # Errors
    /// None: what cannot be used is noted and left out.
    pub fn install(
        &mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        engine: &mut Engine<'_>,
    ) -> Result<(), RunError> {
        self.running = RunningKernels::none(engine.table().len());
        if self.no_lesson.is_none() {
            let tuner = &mut self.tuner;
            let mut rebuild = |key: &KernelKey, variant: &model::kernel::Variant| match tuner {
                Some(tuner) => tuner.rebuild(key, variant),
                None => Err("there is no compiler for this CPU".into()),
            };
            let restored = restore(platform, reporter, engine, &mut self.snapshot, self.isa, &mut rebuild);
            self.running = restored.running;
            self.lost = restored.lost;
            if restored.left_out > 0 {
                self.no_lesson = Some(format!("isa= leaves out {} of the snapshot's kernels", restored.left_out));
            }
        }
        self.status.kernels_restored = self.running.count() as u32;
        Ok(())
    }

    /// Which variant runs in each slot.
    pub fn running(&self) -> &RunningKernels {
        &self.running
    }

    /// Number of this boot, from 1, over the life of the snapshot.
    pub fn boot(&self) -> u32 {
        self.snapshot.boot_count
    }

    /// Kernels that were there before this boot compiled any.
    pub fn restored(&self) -> u32 {
        self.status.kernels_restored
    }

    /// What is known of `key`.
    pub fn remembered(&self, key: &KernelKey) -> Remembered {
        let record = self.snapshot.record(key);
        let isa = self.isa;
        let mut space = space::variants(key, isa);
        space.truncate(space_len(self.options, space.len()));
        // Of the variants that this boot could try: others had other instruction sets or limits.
        let tried = |record: &KeyRecord| space.iter().filter(|variant| record.trials_of(variant) > 0).count();
        Remembered {
            baseline_cycles: record.and_then(|record| record.baseline_median_cycles),
            tried: record.map_or(0, tried) as u32,
            variants: space.len() as u32,
            // Without AVX2 there is no space at all, and nothing was searched.
            exhausted: isa.avx2 && record.is_some_and(|record| is_exhausted(record, self.options, isa)),
        }
    }

    /// Searches within the budget of this boot. Also keeps the medians the boot ran with, which must be read before.
    pub fn improve(
        &mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        engine: &mut Engine<'_>,
        limits: &Limits,
    ) -> TuningWork {
        let tuner = self.tuner.take();
        if self.no_lesson.is_some() {
            return tuner.map_or_else(TuningWork::default, Tuner::finish);
        }
        self.record_profile(engine);
        // What was compiled again counts where nothing is tuned, too.
        let tuner = match tuner {
            Some(tuner) if self.options.tune_budget_ms > 0 => tuner,
            tuner => return tuner.map_or_else(TuningWork::default, Tuner::finish),
        };
        let trusted = platform.clock().trusted;
        let fractions: Vec<Option<f64>> = (0..engine.table().len())
            .map(|slot| if trusted { limit_fraction(engine, limits, slot) } else { None })
            .collect();
        let fraction = |slot: usize| fractions.get(slot).copied().flatten();
        let work = tuner.run(platform, reporter, engine, &mut self.snapshot, &mut self.running, &fraction);
        reporter.stage(platform, "tune");
        work
    }

    /// Decides convergence and saves the snapshot.
    pub fn conclude(
        &mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        figures: &BootFigures<'_>,
    ) -> (Convergence, SnapshotStatus) {
        if let Some(why) = self.no_lesson.clone() {
            if self.writable {
                self.add_reason(&format!("left as it is: {why}"));
            }
            let reason = format!("does not count for convergence: {why}");
            return (Convergence::undecided(figures.settled_share, reason), self.status.clone());
        }
        let clock = platform.clock();
        let line = self.boot_line(&clock, figures, platform.unix_time());
        self.snapshot.push_boot(line);
        let convergence = self.convergence(&clock);
        if let Some(line) = self.snapshot.boots.last_mut() {
            line.converged = convergence.converged;
        }
        self.save(platform, reporter);
        (convergence, self.status.clone())
    }

    fn open(&mut self, platform: &mut dyn Platform, reporter: &mut Reporter) {
        if !self.options.snapshot {
            self.status.reason = Some("switched off (snapshot=)".into());
            return;
        }
        let Some(disk) = platform.boot_disk() else {
            self.status.reason = Some("there is no boot volume: nothing learnt is kept".into());
            return;
        };
        let mut medium = match DiskMedium::open(disk) {
            Ok(medium) => medium,
            Err(error) => {
                let reason = format!("the boot volume cannot be used: {error}");
                reporter.note(platform, Level::Warning, reason.clone());
                self.status.reason = Some(reason);
                return;
            }
        };
        self.writable = true;
        let opened = snapshot_format::open(&mut medium, &self.identity);
        match opened {
            Ok(opened) => {
                self.status.generation_loaded = Some(opened.generation);
                let mut reasons: Vec<String> = Vec::new();
                self.status.outcome = match &opened.code {
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
                self.status.reason = (!reasons.is_empty()).then(|| reasons.join("; "));
                self.snapshot = opened.snapshot;
            }
            Err(cold) => {
                self.status.outcome = SnapshotOutcome::Cold;
                let text = cold.to_string();
                self.status.reason = Some(text.trim_start_matches("cold start: ").into());
                reporter.note(platform, Level::Info, text);
            }
        }
    }

    fn save(&mut self, platform: &mut dyn Platform, reporter: &mut Reporter) {
        if !self.writable {
            return;
        }
        let Some(disk) = platform.boot_disk() else { return };
        let saved = match DiskMedium::open(disk) {
            Ok(mut medium) => {
                snapshot_format::save(&mut medium, &self.identity, &self.snapshot).map_err(|e| e.to_string())
            }
            Err(error) => Err(format!("snapshot not saved: {error}")),
        };
        match saved {
            Ok(saved) => {
                self.status.generation_saved = Some(saved.generation);
                self.status.saved_bytes = Some(saved.payload_bytes);
            }
            Err(reason) => {
                self.add_reason(reason.trim_start_matches("snapshot "));
                reporter.note(platform, Level::Warning, reason);
            }
        }
    }

    fn add_reason(&mut self, why: &str) {
        let before = self.status.reason.take().map_or_else(String::new, |reason| reason + "; ");
        self.status.reason = Some(before + why);
    }

    /// Keeps this boot's medians, and the hand-written kernel's where it ran.
    fn record_profile(&mut self, engine: &Engine<'_>) {
        let profile = engine.table().profile();
        for hot in profile.hot_list() {
            let median = profile.stats(hot.slot).median_cycles();
            let record = self.snapshot.record_mut(hot.key);
            record.last_median_cycles = median;
            let hand_written = self.running.variant(hot.slot).is_none() && engine.table().has_hand_written();
            if hand_written && record.baseline_median_cycles.is_none() {
                record.baseline_median_cycles = median;
            }
        }
    }

    fn boot_line(&self, clock: &Clock, figures: &BootFigures<'_>, unix_time: Option<u64>) -> BootLine {
        let us = |ticks: u64| (ticks as f64 * 1e6 / clock.tsc_hz as f64) as f32;
        let out = figures.generated;
        let middle = median(&out.decode_ticks).unwrap_or(0);
        let away: Vec<u64> = out.decode_ticks.iter().map(|ticks| ticks.abs_diff(middle)).collect();
        let ticks: u64 = out.decode_ticks.iter().sum();
        BootLine {
            boot: self.boot(),
            unix_time,
            token_us_median: us(middle),
            token_us_mad: us(median(&away).unwrap_or(0)),
            reference_us: median(&out.reference_ticks).map(us),
            decode_tok_s: (out.decode_ticks.len() as f64 * clock.tsc_hz as f64 / ticks.max(1) as f64) as f32,
            ttft_ms: us(out.first_token_tsc.saturating_sub(clock.entry_tsc)) / 1e3,
            kernels_changed: figures.kernels_changed + self.lost,
            settled_share: figures.settled_share as f32,
            generation: self.status.generation_loaded.unwrap_or(0),
            threads: figures.threads as u32,
            clock_trusted: clock.trusted,
            // Decided from this line and those before it.
            converged: false,
        }
    }

    fn convergence(&self, clock: &Clock) -> Convergence {
        let config = ConvergenceConfig {
            window: self.options.converge_window,
            settled_share: self.options.converge_coverage,
            max_variation: self.options.converge_max_variance,
            variation_required: clock.trusted,
        };
        let boots: Vec<BootEvidence> = self
            .snapshot
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
            allowed_variation: decided.allowed_variation,
            variation_required: decided.variation_required,
            reason: decided.reason,
        }
    }
}

/// Why a boot of `tier` on `isa` teaches nothing.
fn no_lesson(tier: Tier, isa: Isa) -> Option<String> {
    match tier {
        Tier::Compiled if isa.avx2 => None,
        Tier::Compiled => Some("without AVX2 (CPU or isa=) no kernels are compiled".into()),
        Tier::Baseline => Some("tier=baseline runs no compiled kernels".into()),
        Tier::Reference => Some("tier=reference runs no compiled kernels".into()),
    }
}
