//! What a run of repeated boots found: the content of `report.json`.

use crate::elf::ImageBytes;
use crate::machine::Accel;
use report::{BootReport, TrialOutcome};
use serde::Serialize;
use std::path::Path;

/// Version of the JSON schema.
pub const SCHEMA: u32 = 2;

/// One boot.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BootRecord {
    /// What the guest reported, its fields side by side with the ones here.
    #[serde(flatten)]
    pub report: BootReport,
    /// Start to end of QEMU on the host's clock, seconds.
    pub wall_s: f64,
}

impl BootRecord {
    /// Trials of this boot with the given outcome.
    pub fn trials_with(&self, outcome: TrialOutcome) -> usize {
        self.report.trials.iter().filter(|t| t.outcome == outcome).count()
    }
}

/// The exported native image on the same machine and disks.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct NativeRecord {
    /// Bytes of the ELF file without symbols.
    pub elf_bytes: u64,
    /// Bytes of its executable sections.
    pub text_bytes: u64,
    /// Median of its boots; `null` when none passed.
    pub decode_tok_s: Option<f64>,
    /// Median of its boots.
    pub prefill_tok_s: Option<f64>,
    /// Ids of its first boot.
    pub token_ids: Vec<u32>,
    /// The export tool's audit, as it wrote it.
    pub audit: Option<serde_json::Value>,
    /// Its boots.
    pub boots: Vec<BootRecord>,
    /// Boots of the self-optimising image, each right before or after the native one of its number: the fair comparison.
    pub interleaved_jit_boots: Vec<BootRecord>,
    /// Median of the boots in between.
    pub interleaved_jit_decode_tok_s: Option<f64>,
    /// Tokens per second of each native boot by those of its neighbour.
    pub decode_ratio: Option<Spread>,
    /// Milliseconds to the first token of each native boot by those of its neighbour.
    pub ttft_ratio: Option<Spread>,
}

impl NativeRecord {
    /// Of an image and its boots, each with its neighbour in `between`.
    pub fn new(
        image: ImageBytes,
        audit: Option<serde_json::Value>,
        boots: Vec<BootRecord>,
        between: Vec<BootRecord>,
    ) -> Self {
        let middle =
            |boots: &[BootRecord], value: fn(&BootReport) -> f64| median(boots.iter().map(|boot| value(&boot.report)));
        let ratio = |value: fn(&BootReport) -> f64| {
            Spread::of(boots.iter().zip(&between).map(|(native, jit)| value(&native.report) / value(&jit.report)))
        };
        Self {
            elf_bytes: image.elf_bytes,
            text_bytes: image.text_bytes,
            decode_tok_s: middle(&boots, |b| b.decode_tok_s),
            prefill_tok_s: middle(&boots, |b| b.prefill_tok_s),
            token_ids: boots.first().map(|boot| boot.report.token_ids.clone()).unwrap_or_default(),
            audit,
            interleaved_jit_decode_tok_s: middle(&between, |b| b.decode_tok_s),
            decode_ratio: ratio(|b| b.decode_tok_s),
            ttft_ratio: ratio(|b| b.ttft_ms),
            boots,
            interleaved_jit_boots: between,
        }
    }
}

/// How fast one of the images loads the model, in a boot of its own that does it again and again.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LoadRecord {
    /// Rates of loading, as shares of the rate of reading the same bytes right before, without using them.
    pub share_of_raw: Spread,
    /// The boot.
    pub boot: BootRecord,
}

impl LoadRecord {
    /// Of a boot with `load.rounds`; `None` if it reported no round.
    pub fn of(boot: BootRecord) -> Option<Self> {
        let rounds = boot.report.load.iter().flat_map(|load| &load.rounds);
        let share_of_raw = Spread::of(rounds.map(|round| round.mb_s / round.raw_mb_s))?;
        Some(Self { share_of_raw, boot })
    }
}

/// Several measurements of one thing.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Spread {
    /// Median; of an even number the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// How many.
    pub n: usize,
}

impl Spread {
    /// Of finite values; `None` without any.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        Some(Self {
            median: median(values.iter().copied())?,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            n: values.len(),
        })
    }
}

/// What the image with compiler does once it has learnt: medians of its boots since the last that changed a kernel.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Settled {
    /// Decoded tokens per second.
    pub decode_tok_s: f64,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
    /// Milliseconds from entry to the first token.
    pub ttft_ms: f64,
    /// How many boots.
    pub boots: usize,
}

impl Settled {
    /// Medians of these boots; `None` without any.
    fn of<'a>(boots: impl Iterator<Item = &'a BootRecord> + Clone) -> Option<Self> {
        let middle = |value: fn(&BootReport) -> f64| median(boots.clone().map(|b| value(&b.report)));
        Some(Self {
            decode_tok_s: middle(|b| b.decode_tok_s)?,
            prefill_tok_s: middle(|b| b.prefill_tok_s)?,
            ttft_ms: middle(|b| b.ttft_ms)?,
            boots: boots.count(),
        })
    }
}

/// Where and how the run was made.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Environment {
    /// First line of `qemu-system-x86_64 --version`.
    pub qemu: String,
    /// The host's CPU.
    pub host_cpu: Option<String>,
    /// The host's cores.
    pub host_cores: Option<usize>,
    /// The commit the tools were run from, with `-dirty` when files differ.
    pub commit: Option<String>,
    /// The command that started the run.
    pub command: String,
    /// QEMU's command line for each boot.
    pub machine: String,
    /// Guest memory.
    pub memory_mib: u32,
    /// Guest cores.
    pub cpus: u32,
}

impl Environment {
    /// This host, with the commit of the `checkout` and the command that started the run.
    pub fn of_host(checkout: &Path, command: String) -> Self {
        Self {
            host_cpu: host_cpu(),
            host_cores: std::thread::available_parallelism().ok().map(usize::from),
            commit: git_commit(checkout),
            command,
            ..Self::default()
        }
    }
}

fn host_cpu() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn git_commit(checkout: &Path) -> Option<String> {
    let git = |arguments: &[&str]| {
        let run = std::process::Command::new("git").current_dir(checkout).args(arguments).output().ok()?;
        run.status.success().then(|| String::from_utf8_lossy(&run.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let dirty = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if dirty { commit + "-dirty" } else { commit })
}

/// A whole run.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RunReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What executed the guest.
    pub accel: Accel,
    /// Why that accelerator.
    pub accel_reason: String,
    /// Times are times of hardware: KVM and a trusted clock in every boot.
    pub hardware_times: bool,
    /// The model's name.
    pub model: String,
    /// The prompt.
    pub prompt: String,
    /// Boot (the guest's own count) that reported convergence; `null` if none did.
    pub converged_at: Option<u32>,
    /// Most boots the run was allowed.
    pub max_boots: u32,
    /// Every boot that ran to its end gave the same tokens; `null` with fewer than two.
    pub tokens_identical: Option<bool>,
    /// Why the run ended early or must not be trusted.
    pub failure: Option<String>,
    /// The boots, first to last.
    pub boots: Vec<BootRecord>,
    /// Sizes of the self-optimising image, without symbols as the native one, if it was given as a file.
    pub jit_image: Option<ImageBytes>,
    /// The exported image, if it was run.
    pub native: Option<NativeRecord>,
    /// Loading against reading, of each image where that was measured.
    pub load: Vec<LoadRecord>,
    /// Where and how.
    pub environment: Environment,
}

impl RunReport {
    /// A report without boots.
    pub fn new(accel: Accel, accel_reason: String, max_boots: u32, environment: Environment) -> Self {
        Self {
            schema: SCHEMA,
            accel,
            accel_reason,
            hardware_times: false,
            model: String::new(),
            prompt: String::new(),
            converged_at: None,
            max_boots,
            tokens_identical: None,
            failure: None,
            boots: Vec::new(),
            jit_image: None,
            native: None,
            load: Vec::new(),
            environment,
        }
    }

    /// Adds a boot and what follows from it.
    pub fn push(&mut self, record: BootRecord) {
        if self.boots.is_empty() {
            self.model = record.report.model.name.clone();
            self.prompt = record.report.prompt.clone();
        }
        if self.converged_at.is_none() && record.report.convergence.converged {
            self.converged_at = Some(record.report.boot);
        }
        self.boots.push(record);
        self.settle();
    }

    /// Sets the native image's results.
    pub fn set_native(&mut self, native: NativeRecord) {
        self.native = Some(native);
        self.settle();
    }

    /// Adds a boot that loaded the model again and again.
    pub fn push_load(&mut self, load: LoadRecord) {
        self.load.push(load);
        self.settle();
    }

    /// Every boot of either image, in order.
    pub fn all_boots(&self) -> impl Iterator<Item = &BootRecord> {
        let native = self.native.iter().flat_map(|n| n.boots.iter().chain(&n.interleaved_jit_boots));
        self.boots.iter().chain(native).chain(self.load.iter().map(|load| &load.boot))
    }

    /// How fast the image with compiler is once nothing changes any more; `None` before there is such a boot.
    pub fn settled(&self) -> Option<Settled> {
        let after_change = self.boots.iter().rposition(|b| b.report.kernels_changed > 0).map_or(0, |last| last + 1);
        // The first boot is what the others are compared with.
        let own = &self.boots[after_change.max(1).min(self.boots.len())..];
        let between = self.native.iter().flat_map(|native| &native.interleaved_jit_boots);
        Settled::of(own.iter().chain(between))
    }

    fn settle(&mut self) {
        self.hardware_times = self.accel == Accel::Kvm && self.all_boots().all(|b| b.report.clock_trusted);
        let ids: Vec<&Vec<u32>> = self.all_boots().map(|b| &b.report.token_ids).collect();
        self.tokens_identical = (ids.len() > 1).then(|| ids.windows(2).all(|pair| pair[0] == pair[1]));
        if self.tokens_identical == Some(false) && self.failure.is_none() {
            self.failure = Some("boots of the same prompt gave different tokens: a kernel is wrong".into());
        }
    }

    /// Writes report.json, report.html and report.txt into `dir`.
    ///
    /// # Errors
    /// The system's, when a file cannot be written.
    pub fn write(&self, dir: &Path) -> std::io::Result<()> {
        std::fs::write(dir.join("report.json"), self.to_json())?;
        std::fs::write(dir.join("report.html"), crate::html::page(self))?;
        std::fs::write(dir.join("report.txt"), crate::text::summary(self))
    }

    /// `report.json`.
    ///
    /// # Panics
    /// Never in practice: every field serialises.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report holds only serialisable types")
    }
}

/// Median of finite values; `None` without any.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}
