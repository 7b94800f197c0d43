//! The search for better kernels: hottest unsettled keys first, one untried variant after another, within a budget.
//!
//! A variant goes compile -> publish -> verify -> paired trial against the incumbent on the model's own weights. A few of a
//! key are compiled at once: a trial empties the caches of what the compiler works with, which costs the next one a fifth. All
//! variants give the same bits, so nothing here can change a token. Whatever a trial comes to is written into the
//! snapshot's history, so no boot repeats another's work; only what was not clear, or nearly as fast, is tried again in a later
//! boot, and the kernel in use is held against the hand-written one once more.

use crate::boot::TuningWork;
use crate::kernels::{Rejected, RunningKernels, reference_answer, verify};
use crate::options::Options;
use crate::platform::Platform;
use crate::reporter::Reporter;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use engine::dispatch::Kernel;
use engine::{Engine, Runs};
use jit::{Compiler, JitError, space};
use model::Isa;
use model::kernel::{KernelKey, Variant};
use profiler::Settled;
use profiler::trial::{Side, Trial as PairedTrial, TrialConfig, Verdict};
use report::{Level, TrialOutcome as Shown, TrialRow};
use snapshot_format::{KeyRecord, Snapshot, StoredKernel, Trial, TrialOutcome};

/// Keys below this share of the boot's kernel cycles are left alone.
pub const MIN_SHARE: f64 = 0.001;

/// Variants of one key compiled at once and tried before the next key's turn: enough to share the reference output they are
/// checked with, few enough that every key gets its best guesses early.
const VARIANTS_IN_A_ROW: usize = 6;

/// A trial that has taken this long ends with its verdict on the pairs it has, once these are enough to tell anything.
const LONGEST_TRIAL_US: f64 = 120_000.0;
const ENOUGH_PAIRS: usize = 12;

/// The tuner of one boot.
pub struct Tuner<'a> {
    compiler: Compiler,
    options: &'a Options,
    boot: u32,
    end_tsc: u64,
    tsc_hz: u64,
    changed_keys: Vec<KernelKey>,
    /// Compiled, and not tried yet.
    compiled: Vec<Compiled>,
    work: TuningWork,
}

impl<'a> Tuner<'a> {
    /// A tuner; `None`, with a note, where no kernel can be compiled for this CPU. Its budget starts with [`Tuner::run`].
    pub fn start(
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        options: &'a Options,
        boot: u32,
        isa: model::Isa,
    ) -> Option<Self> {
        if !isa.avx2 {
            return None;
        }
        let compiler = match Compiler::new(isa) {
            Ok(compiler) => compiler,
            Err(error) => {
                reporter.note(platform, Level::Warning, format!("kernels are not compiled: {error}"));
                return None;
            }
        };
        let tsc_hz = platform.clock().tsc_hz;
        Some(Self {
            compiler,
            options,
            boot,
            end_tsc: 0,
            tsc_hz,
            changed_keys: Vec::new(),
            compiled: Vec::new(),
            work: TuningWork::default(),
        })
    }

    /// Compiles a kernel of an earlier boot again whose code could not be used.
    ///
    /// # Errors
    /// Why the compiler of this build refuses it.
    pub fn rebuild(&mut self, key: &KernelKey, variant: &Variant) -> Result<StoredKernel, String> {
        let code = self.compile(key, variant).code.map_err(|error| error.to_string())?;
        Ok(StoredKernel::new(*variant, code))
    }

    /// Tries variants until the budget is spent or every hot key is settled.
    pub fn run(
        mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        engine: &mut Engine,
        snapshot: &mut Snapshot,
        running: &mut RunningKernels,
        limit_fraction: &dyn Fn(usize) -> Option<f64>,
    ) -> TuningWork {
        let budget_ticks = self.options.tune_budget_ms.saturating_mul(self.tsc_hz / 1000);
        self.end_tsc = engine::cycles().saturating_add(budget_ticks);
        let hot: Vec<(usize, KernelKey)> = engine
            .table()
            .profile()
            .hot_list()
            .into_iter()
            .filter(|hot| hot.share >= MIN_SHARE)
            .map(|hot| (hot.slot, hot.key))
            .collect();
        loop {
            let mut progressed = false;
            for &(slot, key) in &hot {
                for _ in 0..VARIANTS_IN_A_ROW {
                    if self.spent() {
                        return self.finish();
                    }
                    let record = snapshot.record_mut(key);
                    let unconfirmed = match engine.table().runs(slot) {
                        Some(Runs::Compiled(kernel)) if record.wants_confirmation(self.boot) => Some(kernel),
                        _ => None,
                    };
                    let untried = untried(record, self.options, self.compiler.isa(), self.boot);
                    let exhausted = unconfirmed.is_none() && untried.is_empty();
                    if Settled::of(exhausted, limit_fraction(slot)).is_settled() {
                        break;
                    }
                    if let Some(kernel) = unconfirmed {
                        if !self.confirm(platform, engine, record, slot, kernel) {
                            return self.finish();
                        }
                    } else if let Some(compiled) = self.take_compiled(&key, &untried) {
                        self.try_variant(platform, reporter, engine, record, running, slot, compiled);
                    }
                    progressed = true;
                }
            }
            if !progressed {
                return self.finish();
            }
        }
    }

    /// What was done so far, to the end.
    pub fn finish(mut self) -> TuningWork {
        self.work.changed = self.changed_keys.len() as u32;
        self.work
    }

    fn spent(&self) -> bool {
        engine::cycles() >= self.end_tsc || self.work.trials.len() >= self.options.tune_max_trials as usize
    }

    fn us_since(&self, start: u64) -> f64 {
        engine::cycles().saturating_sub(start) as f64 * 1e6 / self.tsc_hz as f64
    }

    fn compile(&mut self, key: &KernelKey, variant: &Variant) -> Compiled {
        let start = engine::cycles();
        let code = self.compiler.compile(key, variant).map(|kernel| kernel.code);
        let us = self.us_since(start);
        self.work.compile_ms += us / 1e3;
        self.work.compiled += u32::from(code.is_ok());
        Compiled { key: *key, variant: *variant, code, us }
    }

    /// The first of `next`, variants of `key` in the order of their turns. Where it is not compiled yet it is now, and so are as
    /// many of the others as can have a turn within the budget.
    fn take_compiled(&mut self, key: &KernelKey, next: &[Variant]) -> Option<Compiled> {
        let find =
            |all: &[Compiled], variant: &Variant| all.iter().position(|c| (&c.key, &c.variant) == (key, variant));
        let first = next.first()?;
        if find(&self.compiled, first).is_none() {
            let turns = (self.options.tune_max_trials as usize).saturating_sub(self.work.trials.len());
            for variant in next.iter().take(turns.min(VARIANTS_IN_A_ROW)) {
                if find(&self.compiled, variant).is_none() {
                    let compiled = self.compile(key, variant);
                    self.compiled.push(compiled);
                }
                if self.spent() {
                    break;
                }
            }
        }
        find(&self.compiled, first).map(|at| self.compiled.swap_remove(at))
    }

    #[allow(clippy::too_many_arguments)]
    fn try_variant(
        &mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        engine: &mut Engine,
        record: &mut KeyRecord,
        running: &mut RunningKernels,
        slot: usize,
        Compiled { key, variant, code, us: compile_us }: Compiled,
    ) {
        let incumbent = running.variant(slot);
        let contest = Contest { key, variant, incumbent };
        let attempt = self.attempt(platform, reporter, engine, slot, &contest, code);
        let Some(Attempt { ended, code }) = attempt else { return };
        let code_bytes = code.len() as u32;
        let (outcome, ratio) = match ended {
            Ended::Refused(why) => {
                reporter.note(platform, Level::Info, format!("{key} {variant}: refused: {why}"));
                (TrialOutcome::Refused, None)
            }
            Ended::Rejected(rejected) => {
                reporter.note(platform, Level::Warning, format!("{key} {variant}: {rejected}; quarantined"));
                record.quarantined.push(variant);
                (rejected.outcome(), None)
            }
            Ended::Measured(kernel, verdict) => {
                // A key without a compiled kernel cannot be exported: it takes the first that looks as fast as the hand-written
                // op. To show that two equal times are equal would take hundreds of pairs.
                let wins = verdict.significant || (incumbent.is_none() && verdict.undecided);
                let outcome = if wins && engine.table_mut().install(slot, kernel).is_ok() {
                    running.set(slot, variant);
                    self.keep(engine, record, slot, StoredKernel::new(variant, code));
                    TrialOutcome::Kept
                } else if verdict.undecided {
                    TrialOutcome::Undecided
                } else {
                    TrialOutcome::Slower
                };
                (outcome, Some(verdict.ratio))
            }
        };
        let trial = Trial {
            variant,
            incumbent,
            ratio: ratio.map(|r| r as f32),
            outcome,
            boot: self.boot,
            compile_us: compile_us as u32,
            code_bytes,
        };
        self.note(engine, record, trial, Some(compile_us));
    }

    /// Holds `kernel`, which is in use, against the hand-written one. Nothing but the record of trials changes: where it is
    /// slower now, those it beat are no longer far behind it and get another trial. False when the budget ended before there
    /// was a verdict.
    fn confirm(
        &mut self,
        platform: &dyn Platform,
        engine: &mut Engine,
        record: &mut KeyRecord,
        slot: usize,
        kernel: Kernel,
    ) -> bool {
        let Some(StoredKernel { variant, code, .. }) = &record.incumbent else { return false };
        let (variant, code_bytes) = (*variant, code.len() as u32);
        let contest = Contest { key: record.key, variant, incumbent: None };
        let Some(verdict) = self.measure(platform, engine, slot, kernel, &contest) else { return false };
        let holds = verdict.ratio <= self.config(&contest).most();
        let trial = Trial {
            variant,
            incumbent: None,
            ratio: Some(verdict.ratio as f32),
            outcome: if holds { TrialOutcome::Confirmed } else { TrialOutcome::Slower },
            boot: self.boot,
            compile_us: 0,
            code_bytes,
        };
        self.note(engine, record, trial, None);
        true
    }

    /// Adds `trial` to the record of its key and to the report; `compile_us` where it was compiled for it.
    fn note(&mut self, engine: &Engine, record: &mut KeyRecord, trial: Trial, compile_us: Option<f64>) {
        record.trials.push(trial);
        self.work.trials.push(TrialRow {
            key: record.key.to_string(),
            variant: trial.variant.to_string(),
            incumbent: trial.incumbent.map_or_else(|| String::from(engine.table().own_name()), |v| v.to_string()),
            ratio: trial.ratio.map(f64::from),
            outcome: shown(trial.outcome),
            compile_us,
            code_bytes: (trial.code_bytes > 0).then_some(trial.code_bytes),
        });
    }

    /// Makes `kernel`, which is installed in `slot`, the one the snapshot keeps.
    fn keep(&mut self, engine: &Engine, record: &mut KeyRecord, slot: usize, kernel: StoredKernel) {
        record.incumbent = Some(kernel);
        record.changed_at_boot = self.boot;
        if record.answer_sha256.is_none() {
            record.answer_sha256 = reference_answer(engine, slot);
        }
        if !self.changed_keys.contains(&record.key) {
            self.changed_keys.push(record.key);
        }
    }

    /// Publishes, checks and measures what was compiled; `None` where room or time ran out before it was measured, which leaves
    /// it untried for another boot.
    fn attempt(
        &mut self,
        platform: &mut dyn Platform,
        reporter: &mut Reporter,
        engine: &mut Engine,
        slot: usize,
        contest: &Contest,
        code: Result<Vec<u8>, JitError>,
    ) -> Option<Attempt> {
        let code = match code {
            Ok(code) => code,
            Err(error) => return Some(Attempt { ended: Ended::Refused(error.to_string()), code: Vec::new() }),
        };
        let kernel = match platform.publish(contest.key, &code) {
            Ok(kernel) => kernel,
            Err(full) => {
                reporter.note(platform, Level::Warning, format!("tuning stops: {full}"));
                self.end_tsc = 0;
                return None;
            }
        };
        let ended = match verify(platform, engine, slot, kernel, code.len()) {
            Ok(()) => Ended::Measured(kernel, self.measure(platform, engine, slot, kernel, contest)?),
            Err(rejected) => Ended::Rejected(rejected),
        };
        Some(Attempt { ended, code })
    }

    /// What the candidate of `contest` has to show.
    fn config(&self, contest: &Contest) -> TrialConfig {
        let config = TrialConfig { max_pairs: self.options.tune_pairs as usize, ..TrialConfig::default() };
        let weight = contest.variant.weight();
        match contest.incumbent {
            None => config.match_is_enough().weighing(weight),
            Some(incumbent) => config.weighing(weight / incumbent.weight()),
        }
    }

    /// Pairs of candidate and incumbent on the weights of one layer after another; `None` when the budget ended before
    /// there was a verdict.
    fn measure(
        &mut self,
        platform: &dyn Platform,
        engine: &mut Engine,
        slot: usize,
        candidate: Kernel,
        contest: &Contest,
    ) -> Option<Verdict> {
        let incumbent = match contest.incumbent {
            None => Runs::Baseline,
            Some(_) => engine.table().runs(slot)?,
        };
        let mut trial = PairedTrial::new(self.config(contest));
        let instances = engine.instances(slot).max(1);
        let candidate = Runs::Compiled(candidate);
        let mut instance = 0;
        let start = engine::cycles();
        loop {
            let verdict = trial.pair(|side| {
                // Each call reads weights that the last one did not leave in a cache.
                instance = (instance + 1) % instances;
                let runs = if side == Side::Incumbent { incumbent } else { candidate };
                engine.replay(platform.workers(), slot, runs, instance)
            });
            match verdict {
                Ok(None) => {}
                Ok(Some(verdict)) => return Some(verdict),
                // A slot of the table always has a matrix and takes its own kernel; without pairs nothing is significant.
                Err(_) => return Some(trial.verdict()),
            }
            if trial.pairs() >= ENOUGH_PAIRS && self.us_since(start) > LONGEST_TRIAL_US {
                return Some(trial.verdict());
            }
            // The first trial of a boot goes on to its end: however small the budget, the search gets there.
            if engine::cycles() >= self.end_tsc && !self.work.trials.is_empty() {
                return None;
            }
        }
    }
}

/// A candidate, and what it has to beat.
struct Contest {
    key: KernelKey,
    variant: Variant,
    /// `None` is the hand-written op.
    incumbent: Option<Variant>,
}

/// How a variant's trial ended.
enum Ended {
    /// The compiler refused it; why.
    Refused(String),
    /// It may not run.
    Rejected(Rejected),
    /// It was measured.
    Measured(Kernel, Verdict),
}

/// A variant that was tried.
struct Attempt {
    ended: Ended,
    /// Machine code; empty where there is none.
    code: Vec<u8>,
}

/// A variant that was compiled, or why it was refused.
struct Compiled {
    key: KernelKey,
    variant: Variant,
    code: Result<Vec<u8>, JitError>,
    /// Microseconds it took.
    us: f64,
}

/// Whatever boot will ask.
const ANY_BOOT: u32 = u32::MAX;

/// Whether nothing is left to do for a key, in this boot or a later one, with these options and `isa`.
pub fn is_exhausted(record: &KeyRecord, options: &Options, isa: Isa) -> bool {
    let runs_here = record.incumbent.as_ref().is_some_and(|kernel| isa.missing(&kernel.variant).is_none());
    let unconfirmed = runs_here && record.wants_confirmation(ANY_BOOT);
    !unconfirmed && untried(record, options, isa, ANY_BOOT).is_empty()
}

/// Variants of a key to try in boot `boot`, the next one first; none when all that are in the search with these options and `isa`
/// were tried as often as it takes. Never stored: another boot may search with other instruction sets or limits.
fn untried(record: &KeyRecord, options: &Options, isa: Isa, boot: u32) -> Vec<Variant> {
    let incumbent = record.incumbent.as_ref().map(|kernel| kernel.variant);
    let mut variants = space::variants(&record.key, isa);
    variants.truncate(space_len(options, variants.len()));
    variants.retain(|variant| Some(*variant) != incumbent && !record.knows(variant, boot));
    // In the order of the search; those that were tried before come last.
    variants.sort_by_key(|variant| record.trials_of(variant));
    variants
}

/// Variants of a key that are in the search, of `available`.
pub fn space_len(options: &Options, available: usize) -> usize {
    match options.tune_max_variants {
        0 => available,
        limit => available.min(limit as usize),
    }
}

fn shown(outcome: TrialOutcome) -> Shown {
    match outcome {
        TrialOutcome::Kept => Shown::Kept,
        TrialOutcome::Slower => Shown::Slower,
        TrialOutcome::Refused => Shown::Refused,
        TrialOutcome::Wrong => Shown::Wrong,
        TrialOutcome::Faulted => Shown::Faulted,
        TrialOutcome::Undecided => Shown::Undecided,
        TrialOutcome::Confirmed => Shown::Confirmed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    /// A record of a key of which every variant for `isa` was tried.
    fn tried(isa: Isa) -> KeyRecord {
        let mut record = KeyRecord::new("matmul_q4_0_m1_n576_k576".parse().unwrap());
        for variant in space::variants(&record.key, isa) {
            record.trials.push(Trial {
                variant,
                incumbent: None,
                ratio: Some(1.5),
                outcome: TrialOutcome::Slower,
                boot: 1,
                compile_us: 1,
                code_bytes: 1,
            });
        }
        record
    }

    #[test]
    fn a_space_is_exhausted_for_the_options_of_this_boot_only() {
        let avx2 = Isa::AVX2;
        let avx512 = Isa { avx512: true, avx512_vnni: true, ..avx2 };
        let (few, all) = (Options { tune_max_variants: 2, ..Options::default() }, Options::default());
        let mut record = tried(avx2);
        assert_eq!(untried(&record, &all, avx2, ANY_BOOT).first(), None);
        let wider = *untried(&record, &all, avx512, 1).first().expect("AVX-512 has variants of its own");
        assert!(avx2.missing(&wider).is_some() && avx512.missing(&wider).is_none());
        record.trials.truncate(2);
        assert_eq!(untried(&record, &few, avx2, ANY_BOOT).first(), None);
        assert!(!untried(&record, &all, avx2, 1).is_empty());

        // What was not clear is tried again in later boots, after what was never tried, until it was tried three times.
        let again = record.trials[0].variant;
        record.trials[0].outcome = TrialOutcome::Undecided;
        assert_eq!(untried(&record, &few, avx2, 1).first(), None);
        assert_ne!(untried(&record, &all, avx2, 2).first(), Some(&again));
        assert_eq!(untried(&record, &few, avx2, 2).first(), Some(&again));
        record.trials.push(Trial { boot: 2, ..record.trials[0] });
        assert_eq!(untried(&record, &few, avx2, 3).first(), Some(&again));
        record.trials.push(Trial { boot: 3, ..record.trials[0] });
        assert_eq!((untried(&record, &few, avx2, ANY_BOOT).first(), record.variants_tried()), (None, 2));
    }

    #[test]
    fn what_was_nearly_as_fast_is_tried_again_in_a_later_boot() {
        let all = Options::default();
        let mut record = tried(Isa::AVX2);
        let code = |variant| Some(StoredKernel::new(variant, vec![0xc3]));
        // One variant was kept, at half the hand-written op's time; the others followed, measured against it.
        let kept = record.trials[0].variant;
        record.trials[0] = Trial { ratio: Some(0.5), outcome: TrialOutcome::Kept, ..record.trials[0] };
        record.incumbent = code(kept);
        for trial in &mut record.trials[1..] {
            trial.incumbent = Some(kept);
        }
        let near = record.trials[3].variant;
        record.trials[3].ratio = Some(1.04 / near.weight() as f32);
        assert_eq!(untried(&record, &all, Isa::AVX2, 1).first(), None, "not in the same boot");
        assert_eq!(untried(&record, &all, Isa::AVX2, 2).first(), Some(&near));
        assert!(!untried(&record, &all, Isa::AVX2, ANY_BOOT).is_empty(), "the key is not settled before");
        // A better kernel was found since: against that it is not near.
        let mut found = record.clone();
        let better = found.trials[5].variant;
        found.trials[5] = Trial { ratio: Some(0.45), outcome: TrialOutcome::Kept, incumbent: None, ..found.trials[5] };
        found.incumbent = code(better);
        assert_eq!(untried(&found, &all, Isa::AVX2, 2).first(), None);
        // Three times are enough.
        record.trials.push(Trial { boot: 2, ..record.trials[3] });
        assert_eq!(untried(&record, &all, Isa::AVX2, 3).first(), Some(&near));
        record.trials.push(Trial { boot: 3, ..record.trials[3] });
        assert_eq!(untried(&record, &all, Isa::AVX2, ANY_BOOT).first(), None);
    }

    #[test]
    fn a_kernel_in_use_is_confirmed_in_a_later_boot_and_where_it_fails_others_are_asked_again() {
        let (all, isa) = (Options::default(), Isa::AVX2);
        let mut record = tried(isa);
        assert!(is_exhausted(&record, &all, isa));
        let (kept, beaten) = (record.trials[0].variant, record.trials[1].variant);
        record.trials[0] = Trial { ratio: Some(0.8), outcome: TrialOutcome::Kept, ..record.trials[0] };
        record.incumbent = Some(StoredKernel::new(kept, vec![0xc3]));
        record.changed_at_boot = 1;
        record.trials[1] = Trial { ratio: Some(1.2), incumbent: Some(kept), ..record.trials[1] };
        assert_eq!((record.wants_confirmation(1), record.wants_confirmation(2)), (false, true));
        assert!(!is_exhausted(&record, &all, isa), "the key is not settled before");
        assert!(is_exhausted(&record, &all, Isa::default()), "a CPU that cannot run it need not confirm it");

        let measured = |ratio, outcome| Trial { ratio: Some(ratio), outcome, boot: 2, ..record.trials[0] };
        let mut holds = record.clone();
        holds.trials.push(measured(0.85, TrialOutcome::Confirmed));
        assert!(!holds.wants_confirmation(3) && is_exhausted(&holds, &all, isa));
        let mut fails = record.clone();
        fails.trials.push(measured(1.6, TrialOutcome::Slower));
        assert!(!fails.wants_confirmation(3), "once is enough");
        assert_eq!(
            untried(&fails, &all, isa, 2).first(),
            Some(&beaten),
            "0.8 * 1.2 of the hand-written op's time is near 1.6"
        );
    }
}
