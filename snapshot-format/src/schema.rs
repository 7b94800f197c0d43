//! What a snapshot remembers: kernels, what was tried, and one line per boot.
//!
//! The payload is this schema in postcard encoding. It has no self-description: any change to these types, or to
//! [`KernelKey`] and [`Variant`], is a new [`FORMAT_VERSION`](crate::FORMAT_VERSION). A test pins the encoding.

use alloc::vec::Vec;
use model::kernel::{KernelKey, Variant};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Boot lines kept: enough for the longest convergence window in use, and few enough to be read at every boot.
pub const MAX_BOOT_LINES: usize = 1024;

/// Records of a snapshot that is taken: a model has some tens of keys.
const MAX_ENTRIES: usize = 1024;
/// Trials of one key, and quarantined variants: a search space has some hundreds, each tried a few times.
const MAX_TRIALS: usize = 4096;
/// Bytes of one kernel's code: a few thousand, as a rule.
const MAX_CODE_BYTES: usize = 256 * 1024;

/// Trials after which a variant gets no other, whatever came of them.
const TRIALS_OF_A_VARIANT: usize = 3;
/// A variant that takes at most so much of the time of the kernel in use may be faster at another time.
const NEAR: f64 = 1.05;

/// Everything one boot leaves to the next.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Boots so far, the one that wrote this included.
    pub boot_count: u32,
    /// One record per key ever profiled.
    pub entries: Vec<KeyRecord>,
    /// The model file whole, once a boot has computed its hash.
    pub model_file: Option<ModelFile>,
    /// One line per boot, oldest first, at most [`MAX_BOOT_LINES`] when added by [`Snapshot::push_boot`].
    pub boots: Vec<BootLine>,
}

/// A model file, every byte of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModelFile {
    /// Its length; not 0.
    pub len_bytes: u64,
    /// Its SHA-256.
    #[serde(with = "serde_bytes")]
    pub sha256: [u8; 32],
}

/// What is known about one key.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct KeyRecord {
    /// The key.
    pub key: KernelKey,
    /// The compiled kernel in use; `None` while the hand-written one is.
    pub incumbent: Option<StoredKernel>,
    /// Median cycles of one call of the hand-written kernel, on the first boot that measured it.
    pub baseline_median_cycles: Option<u64>,
    /// Median cycles of one call in the last boot.
    pub last_median_cycles: Option<u64>,
    /// Variants tried, oldest first.
    pub trials: Vec<Trial>,
    /// Variants that faulted or gave a wrong result: never tried again.
    pub quarantined: Vec<Variant>,
    /// Boot in which the incumbent last changed; 0 is never.
    pub changed_at_boot: u32,
    /// SHA-256 of what the reference makes of fixed operands and this model's weights: what a kernel has to give. `None`
    /// until a kernel was kept.
    #[serde(with = "serde_bytes")]
    pub answer_sha256: Option<[u8; 32]>,
}

impl KeyRecord {
    /// The record of a key that was just met.
    pub fn new(key: KernelKey) -> Self {
        Self {
            key,
            incumbent: None,
            baseline_median_cycles: None,
            last_median_cycles: None,
            trials: Vec::new(),
            quarantined: Vec::new(),
            changed_at_boot: 0,
            answer_sha256: None,
        }
    }

    /// True when `variant` needs no trial in boot `boot`: it is quarantined, was tried [`TRIALS_OF_A_VARIANT`] times, or is clearly
    /// slower than the kernel now in use. One that is nearly as fast, or was not clear, gets another trial in a later boot: what
    /// a machine's neighbours do lasts longer than a trial, and which variant is best depends on it.
    pub fn knows(&self, variant: &Variant, boot: u32) -> bool {
        let Some(last) = self.trials.iter().rfind(|trial| trial.variant == *variant) else {
            return self.quarantined.contains(variant);
        };
        let another = match last.outcome {
            TrialOutcome::Undecided => true,
            TrialOutcome::Kept | TrialOutcome::Slower | TrialOutcome::Confirmed => self.is_near(variant),
            TrialOutcome::Refused | TrialOutcome::Wrong | TrialOutcome::Faulted => false,
        };
        let done = self.trials_of(variant) >= TRIALS_OF_A_VARIANT || self.quarantined.contains(variant);
        !another || last.boot >= boot || done
    }

    /// The kernel in use has not been measured against the hand-written one since it came into use, and boot `boot` is a later one.
    /// What it gained may have been the machine of that time.
    pub fn wants_confirmation(&self, boot: u32) -> bool {
        let Some(kernel) = &self.incumbent else { return false };
        let confirms = |trial: &Trial| {
            trial.variant == kernel.variant && trial.incumbent.is_none() && trial.boot > self.changed_at_boot
        };
        boot > self.changed_at_boot && !self.trials.iter().any(confirms)
    }

    /// By the trials so far `variant` takes at most [`NEAR`] times as long as the kernel in use, each with its weight.
    fn is_near(&self, variant: &Variant) -> bool {
        let in_use = self.incumbent.as_ref().map(|kernel| kernel.variant);
        let time = |of: Option<Variant>| Some(self.relative_time(of)? * of.map_or(1.0, |variant| variant.weight()));
        time(Some(*variant)).zip(time(in_use)).is_some_and(|(time, of_incumbent)| time <= NEAR * of_incumbent)
    }

    /// Time of `variant` in that of the hand-written kernel (`None`), over the trials that link the two; `None` where none do.
    fn relative_time(&self, variant: Option<Variant>) -> Option<f64> {
        let (mut variant, mut before, mut time) = (variant, self.trials.len(), 1.0);
        // Each link is to an earlier trial.
        while let Some(linked) = variant {
            before =
                self.trials[..before].iter().rposition(|trial| trial.variant == linked && trial.ratio.is_some())?;
            time *= f64::from(self.trials[before].ratio?);
            variant = self.trials[before].incumbent;
        }
        Some(time)
    }

    /// Forgets the kernel in use and what was measured against any kernel of the key: the search starts over from the
    /// hand-written one. What was refused, wrong or faulted stays known.
    pub fn drop_incumbent(&mut self) {
        use TrialOutcome::{Faulted, Refused, Wrong};
        self.incumbent = None;
        self.trials.retain(|trial| matches!(trial.outcome, Refused | Wrong | Faulted));
    }

    /// Trials of `variant`.
    pub fn trials_of(&self, variant: &Variant) -> usize {
        self.trials.iter().filter(|trial| trial.variant == *variant).count()
    }

    /// Variants that were tried, each counted once.
    pub fn variants_tried(&self) -> usize {
        let is_first = |(at, trial): &(usize, &Trial)| self.trials[..*at].iter().all(|t| t.variant != trial.variant);
        self.trials.iter().enumerate().filter(is_first).count()
    }
}

/// A compiled kernel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoredKernel {
    /// How it was built.
    pub variant: Variant,
    /// Its machine code; empty when it has to be compiled again (see [`CodeUse::ProfileOnly`](crate::CodeUse::ProfileOnly)).
    pub code: Vec<u8>,
    /// SHA-256 of the code; of the code that was dropped when `code` is empty.
    #[serde(with = "serde_bytes")]
    pub code_sha256: [u8; 32],
}

impl StoredKernel {
    /// A kernel with its hash.
    pub fn new(variant: Variant, code: Vec<u8>) -> Self {
        let code_sha256 = Sha256::digest(&code).into();
        Self { variant, code, code_sha256 }
    }

    /// True when there is code and it is the code that was hashed.
    pub fn is_intact(&self) -> bool {
        !self.code.is_empty() && <[u8; 32]>::from(Sha256::digest(&self.code)) == self.code_sha256
    }
}

/// One variant that was tried.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Trial {
    /// The candidate.
    pub variant: Variant,
    /// What it was measured against; `None` is the hand-written kernel.
    pub incumbent: Option<Variant>,
    /// Median of paired ratios candidate / incumbent; `None` when it never ran.
    pub ratio: Option<f32>,
    /// What became of it.
    pub outcome: TrialOutcome,
    /// Boot of the trial.
    pub boot: u32,
    /// Compile time in microseconds.
    pub compile_us: u32,
    /// Bytes of machine code; 0 when the compiler refused.
    pub code_bytes: u32,
}

/// What became of a tried variant.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum TrialOutcome {
    /// It replaced the incumbent.
    Kept,
    /// Not significantly faster.
    Slower,
    /// The compiler refused it.
    Refused,
    /// Output differed from the reference; quarantined.
    Wrong,
    /// It faulted; quarantined.
    Faulted,
    /// It looked faster, but that may have been chance.
    Undecided,
    /// In use already, it was no slower than the hand-written kernel in a later boot.
    Confirmed,
}

/// One boot, as the convergence decision and the progress plot need it.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct BootLine {
    /// Boot number, from 1.
    pub boot: u32,
    /// Seconds since 1970, when the machine has a wall clock.
    pub unix_time: Option<u64>,
    /// Median time of one generated token, microseconds.
    pub token_us_median: f32,
    /// Median absolute deviation of the token times of this boot, microseconds.
    pub token_us_mad: f32,
    /// Median time of a fixed piece of work that was measured between the tokens, microseconds: divides out what the
    /// machine as a whole got faster or slower.
    pub reference_us: Option<f32>,
    /// Generated tokens per second.
    pub decode_tok_s: f32,
    /// Entry of the image to the first token, milliseconds.
    pub ttft_ms: f32,
    /// Keys whose kernel changed in this boot.
    pub kernels_changed: u32,
    /// Share of kernel cycles in settled keys, 0..=1.
    pub settled_share: f32,
    /// Generation of the snapshot this boot started from; 0 is a cold start.
    pub generation: u64,
    /// Cores used.
    pub threads: u32,
    /// Times of this boot mean something (false under software emulation).
    pub clock_trusted: bool,
    /// With this boot the search had converged: what an export asks for.
    pub converged: bool,
}

impl Snapshot {
    /// What is larger was not made by this project, and going on with it would cost time and memory without bound. Each key
    /// has one record.
    pub(crate) fn is_within_limits(&self) -> bool {
        let of_record = |record: &KeyRecord| {
            let code_bytes = record.incumbent.as_ref().map_or(0, |kernel| kernel.code.len());
            code_bytes <= MAX_CODE_BYTES && record.trials.len() <= MAX_TRIALS && record.quarantined.len() <= MAX_TRIALS
        };
        self.boots.len() <= MAX_BOOT_LINES
            && self.model_file.is_none_or(|file| file.len_bytes > 0)
            && self.entries.len() <= MAX_ENTRIES
            && self.entries.iter().all(of_record)
            && self.entries.iter().enumerate().all(|(i, record)| self.entries[..i].iter().all(|r| r.key != record.key))
    }

    /// Record of `key`.
    pub fn record(&self, key: &KernelKey) -> Option<&KeyRecord> {
        self.entries.iter().find(|record| record.key == *key)
    }

    /// Record of `key`, added when it is new.
    pub fn record_mut(&mut self, key: KernelKey) -> &mut KeyRecord {
        let at = self.entries.iter().position(|record| record.key == key).unwrap_or_else(|| {
            self.entries.push(KeyRecord::new(key));
            self.entries.len() - 1
        });
        &mut self.entries[at]
    }

    /// Adds the line of one boot and forgets the oldest ones beyond [`MAX_BOOT_LINES`].
    pub fn push_boot(&mut self, line: BootLine) {
        self.boots.push(line);
        let extra = self.boots.len().saturating_sub(MAX_BOOT_LINES);
        self.boots.drain(..extra);
    }

    /// Drops machine code and keeps which variant it was. Answers go with it: they are those of the other build's numerics.
    pub(crate) fn drop_code(&mut self) {
        for record in &mut self.entries {
            record.answer_sha256 = None;
            if let Some(kernel) = &mut record.incumbent {
                kernel.code = Vec::new();
            }
        }
    }

    /// Drops what was measured: on another machine it says nothing. Variants in use stay as first guesses, quarantine stays.
    pub(crate) fn drop_measurements(&mut self) {
        for record in &mut self.entries {
            record.baseline_median_cycles = None;
            record.last_median_cycles = None;
            record.trials = Vec::new();
        }
        self.boots = Vec::new();
    }
}
