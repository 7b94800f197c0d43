//! The message types, in the order a boot sends them.

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Version of the serial protocol; a host refuses any other.
pub const PROTOCOL: u32 = 8;

/// Which image is talking.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// The self-optimising image, with the compiler in it.
    Jit,
    /// The exported image: converged kernels, no compiler.
    Native,
    /// The same runtime as a Linux process.
    Hosted,
}

/// Process or machine exit status. The guest writes [`ExitStatus::debug_exit_value`] to QEMU's isa-debug-exit port.
///
/// All from [`ExitStatus::Fatal`] on are refusals: nothing is broken, something the boot needs is not as it must be, and
/// the last note says what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// Everything asked for was done.
    Pass,
    /// A self-test failed.
    TestFailed,
    /// Our bug: a panic or an unrecovered CPU fault.
    Panic,
    /// The machine does not allow the work.
    Fatal,
    /// A setting is wrong, or the prompt: what a command line or settings file says.
    Settings,
    /// The model is missing, damaged, not one that can run, or not the one that was promised.
    Model,
    /// Not enough memory.
    Memory,
    /// A disk or a file on it cannot be read.
    Storage,
    /// The kernels of a native image are not for this model or CPU.
    Kernels,
}

impl ExitStatus {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Pass,
        Self::TestFailed,
        Self::Panic,
        Self::Fatal,
        Self::Settings,
        Self::Model,
        Self::Memory,
        Self::Storage,
        Self::Kernels,
    ];

    /// Value for isa-debug-exit; QEMU then exits with `(value << 1) | 1`.
    pub const fn debug_exit_value(self) -> u8 {
        16 + self as u8
    }

    /// QEMU's process exit code for this status: 33, 35, and so on.
    pub const fn qemu_exit_code(self) -> i32 {
        ((self.debug_exit_value() as i32) << 1) | 1
    }

    /// The status behind a QEMU exit code; `None` for anything else (0 is a triple fault under `-no-reboot`).
    pub fn from_qemu_exit_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.qemu_exit_code() == code)
    }

    /// Exit code of a process: 0; 1 for what has no code of its own; not 2, which command line parsers use; from 3 on one
    /// for each kind of refusal.
    pub const fn process_exit_code(self) -> u8 {
        match self {
            ExitStatus::Pass => 0,
            ExitStatus::TestFailed | ExitStatus::Panic | ExitStatus::Fatal => 1,
            ExitStatus::Settings => 3,
            ExitStatus::Model => 4,
            ExitStatus::Memory => 5,
            ExitStatus::Storage => 6,
            ExitStatus::Kernels => 7,
        }
    }
}

/// How serious a [`Message::Note`] is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Expected, worth seeing.
    Info,
    /// Something was refused or degraded; the run goes on.
    Warning,
    /// The run ends because of it.
    Error,
}

/// One message from guest to host.
#[allow(clippy::large_enum_variant, reason = "one report a boot: boxing it would save nothing")]
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// First message of every boot.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Which image.
        image: ImageKind,
        /// Hash of the build, as lower-case hex.
        build_id: String,
    },
    /// A stage of the boot ended.
    Stage(Stage),
    /// A line worth keeping: what was refused, degraded or failed, and why.
    Note {
        /// Seriousness.
        level: Level,
        /// The line.
        text: String,
    },
    /// Generated tokens, some at a time; their text is on COM1.
    Tokens {
        /// Vocabulary ids.
        ids: Vec<u32>,
    },
    /// One self-test finished.
    Test {
        /// Test name.
        name: String,
        /// How it ended.
        outcome: TestOutcome,
    },
    /// The boot's report.
    Report(BootReport),
    /// A CPU fault that was not recovered.
    Fault(Fault),
    /// Last message of every boot that ends in order.
    End {
        /// Outcome.
        status: ExitStatus,
        /// Messages sent before this one, so that a host sees loss.
        messages: u32,
    },
}

/// How a self-test ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TestOutcome {
    /// It ran, and all was as it should be.
    Passed,
    /// What went wrong.
    Failed(String),
    /// It did not run: what the machine or the settings lack.
    Skipped(String),
}

/// A stage of the boot with its duration.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Stage {
    /// Name, such as `load_model`.
    pub name: String,
    /// Duration in milliseconds.
    pub ms: f64,
}

/// Registers and backtrace of a fault.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// Exception vector.
    pub vector: u8,
    /// Error code pushed by the CPU, 0 where none is.
    pub error_code: u64,
    /// Faulting instruction.
    pub rip: u64,
    /// Faulting address (CR2) of a page fault.
    pub address: u64,
    /// Return addresses, innermost first.
    pub backtrace: Vec<u64>,
}

/// What became of the snapshot at the start of this boot.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SnapshotStatus {
    /// `loaded`, `profile_only`, `cold` or `disabled`.
    pub outcome: SnapshotOutcome,
    /// Why it was not used in full, for people.
    pub reason: Option<String>,
    /// Generation read, when one was.
    pub generation_loaded: Option<u64>,
    /// Generation written at the end of this boot, when one was.
    pub generation_saved: Option<u64>,
    /// Bytes of the payload written.
    pub saved_bytes: Option<u64>,
    /// Compiled kernels restored and verified.
    pub kernels_restored: u32,
}

impl SnapshotStatus {
    /// No snapshot is read or written; the caller says why.
    pub fn disabled() -> Self {
        Self {
            outcome: SnapshotOutcome::Disabled,
            reason: None,
            generation_loaded: None,
            generation_saved: None,
            saved_bytes: None,
            kernels_restored: 0,
        }
    }
}

/// Use made of the snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotOutcome {
    /// Code and profile used.
    Loaded,
    /// Profile kept, code rebuilt (other build or CPU).
    ProfileOnly,
    /// Nothing used.
    Cold,
    /// No snapshot volume, or switched off.
    Disabled,
}

/// One row of the kernel table.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct KernelRow {
    /// Key name.
    pub key: String,
    /// What runs now: `reference`, `avx2`, or a variant name.
    pub variant: String,
    /// Calls in this boot's generation.
    pub calls: u64,
    /// Share of all kernel cycles of this boot's generation, 0..=1.
    pub time_share: f64,
    /// Cycles in this boot's generation.
    pub total_cycles: u64,
    /// Fewest cycles of one call.
    pub min_cycles: u64,
    /// Most cycles of one call.
    pub max_cycles: u64,
    /// Median cycles of one call.
    pub median_cycles: u64,
    /// Median cycles a call took with the hand-written baseline on the first boot that measured it.
    pub baseline_cycles: Option<u64>,
    /// Bytes of weights one call reads.
    pub bytes_per_call: u64,
    /// GB/s at the median; unknown without a trusted clock.
    pub gb_s: Option<f64>,
    /// GFLOP/s at the median.
    pub gflop_s: Option<f64>,
    /// Median against the machine's measured limit for this key, 0..=1 or slightly above.
    pub limit_fraction: Option<f64>,
    /// Variants tried in all boots, this one included.
    pub variants_tried: u32,
    /// Variants the search space holds.
    pub variants_total: u32,
    /// Nothing left to try, or within the settle distance of the limit.
    pub settled: bool,
}

/// A trial of one variant against the incumbent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TrialRow {
    /// Key name.
    pub key: String,
    /// Variant name.
    pub variant: String,
    /// Name of the kernel it was measured against.
    pub incumbent: String,
    /// Median of paired ratios candidate / incumbent; absent when it never ran.
    pub ratio: Option<f64>,
    /// What became of it.
    pub outcome: TrialOutcome,
    /// Compile time in microseconds.
    pub compile_us: Option<f64>,
    /// Bytes of machine code.
    pub code_bytes: Option<u32>,
}

/// What became of a tried variant.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrialOutcome {
    /// It replaced the incumbent.
    Kept,
    /// Not significantly faster.
    Slower,
    /// The compiler refused it (for example, too many live vectors).
    Refused,
    /// Output differed from the reference; quarantined.
    Wrong,
    /// It faulted; quarantined.
    Faulted,
    /// It looked faster, but that may have been chance; it gets another trial.
    Undecided,
    /// In use since an earlier boot, it was no slower than the hand-written kernel.
    Confirmed,
}

/// Why the run is, or is not, converged.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Convergence {
    /// All conditions hold.
    pub converged: bool,
    /// Share of kernel cycles in settled keys, 0..=1.
    pub settled_share: f64,
    /// Boots in a row without a changed kernel.
    pub unchanged_boots: u32,
    /// Boots in a row that are required.
    pub window: u32,
    /// Spread of token times over the window (robust, relative); unknown before the window is full.
    pub token_time_variation: Option<f64>,
    /// Spread of a fixed piece of work over the same boots: the noise floor of the machine.
    pub machine_variation: Option<f64>,
    /// Largest spread allowed on a quiet machine.
    pub max_variation: f64,
    /// Largest spread allowed in this window: `max_variation`, or the noise floor where that is higher, up to a cap.
    pub allowed_variation: f64,
    /// The spread is required; false where the clock cannot be trusted (TCG).
    pub variation_required: bool,
    /// One line for people.
    pub reason: String,
}

impl Convergence {
    /// Of a boot that has no say in it, and why: its `window` is 0.
    pub fn undecided(settled_share: f64, reason: String) -> Self {
        Self {
            converged: false,
            settled_share,
            unchanged_boots: 0,
            window: 0,
            token_time_variation: None,
            machine_variation: None,
            max_variation: 0.0,
            allowed_variation: 0.0,
            variation_required: false,
            reason,
        }
    }
}

/// Everything one boot measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BootReport {
    /// Boots this snapshot has seen, this one included (1 = cold).
    pub boot: u32,
    /// Which image.
    pub image: ImageKind,
    /// Build hash, lower-case hex.
    pub build_id: String,
    /// Hypervisor vendor string, or `none`.
    pub hypervisor: String,
    /// CPU brand string.
    pub cpu: String,
    /// Instruction set tier in use, such as `avx2`.
    pub isa: String,
    /// Cores used.
    pub threads: u32,
    /// TSC frequency.
    pub tsc_hz: u64,
    /// Times from this clock are meaningful (false under TCG).
    pub clock_trusted: bool,
    /// Seconds since 1970 from the RTC.
    pub unix_time: Option<u64>,
    /// Model facts.
    pub model: ModelFacts,
    /// The prompt text.
    pub prompt: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Generated ids.
    pub token_ids: Vec<u32>,
    /// Generated text.
    pub text: String,
    /// Stages in order.
    pub stages: Vec<Stage>,
    /// Entry of the image to the first generated token, ms.
    pub ttft_ms: f64,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
    /// Generated tokens per second, the first excluded; not a number where there was no other.
    pub decode_tok_s: f64,
    /// Median time of one generated token, ms; not a number where there was none after the first.
    pub token_ms_median: f64,
    /// Measured read bandwidth, GB/s.
    pub read_gb_s: Option<f64>,
    /// Measured multiply-add peak of the tier in use, GFLOP/s.
    pub peak_gflop_s: Option<f64>,
    /// Measured share of time in which a core did not run, because a host or hypervisor did something else.
    pub interrupted: Option<f64>,
    /// Model load rate against the raw device rate of the same boot.
    pub load: Option<LoadFacts>,
    /// Cost of profiling as a share of kernel time, measured.
    pub profiler_overhead: Option<f64>,
    /// Where the time of the prompt and of the decoded tokens went, in the order of a token.
    pub parts: Vec<PartRow>,
    /// Memory high-water marks.
    pub memory: Vec<MemoryRow>,
    /// Kernel table, hottest first.
    pub kernels: Vec<KernelRow>,
    /// Trials of this boot.
    pub trials: Vec<TrialRow>,
    /// Kernels restored from the snapshot.
    pub kernels_loaded: u32,
    /// Kernels compiled in this boot.
    pub kernels_compiled: u32,
    /// Keys whose kernel changed in this boot.
    pub kernels_changed: u32,
    /// Sum of compile times, ms.
    pub compile_ms_total: f64,
    /// Snapshot use.
    pub snapshot: SnapshotStatus,
    /// Convergence evidence.
    pub convergence: Convergence,
}

/// Facts about the model file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Name from the file, or the file's own name.
    pub name: String,
    /// Architecture string.
    pub architecture: String,
    /// File size.
    pub file_bytes: u64,
    /// SHA-256 over samples of the content, lower-case hex: tells models apart, does not prove integrity.
    pub fingerprint: String,
    /// SHA-256 of the whole file, lower-case hex, where it is known.
    pub sha256: Option<String>,
    /// It was computed by an earlier boot, for a file of the same fingerprint.
    pub sha256_remembered: bool,
    /// Layers.
    pub n_layers: u32,
    /// Embedding length.
    pub dim: u32,
    /// Vocabulary size.
    pub vocab_size: u32,
    /// Weight types in use, such as `q4_1+q8_0`.
    pub dtypes: String,
}

/// Model load speed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LoadFacts {
    /// Bytes read.
    pub bytes: u64,
    /// MB/s of the whole load.
    pub mb_s: f64,
    /// MB/s of raw reads from the same device in the same boot.
    pub raw_mb_s: f64,
    /// Both again and again in turn, where that was asked for (`load.rounds`).
    pub rounds: Vec<LoadRound>,
}

/// A raw pass over the model and a load of it, one right after the other.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct LoadRound {
    /// MB/s of the load.
    pub mb_s: f64,
    /// MB/s of the raw pass.
    pub raw_mb_s: f64,
}

/// A part of the work on a token, such as `attention`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PartRow {
    /// Name.
    pub name: String,
    /// Share of the prompt's time, 0..=1; unknown without a prompt of several tokens.
    pub prefill_share: Option<f64>,
    /// Share of the time of single tokens, 0..=1; unknown when none was decoded.
    pub decode_share: Option<f64>,
    /// Microseconds of it in a decoded token, on average.
    pub decode_us: Option<f64>,
}

/// One memory region's use.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemoryRow {
    /// Arena name, such as `weights`.
    pub name: String,
    /// Bytes in use at the high-water mark.
    pub used_bytes: u64,
    /// Bytes set aside.
    pub capacity_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_own_exit_code() {
        let codes = ExitStatus::ALL.map(ExitStatus::qemu_exit_code);
        assert_eq!(codes, [33, 35, 37, 39, 41, 43, 45, 47, 49]);
        assert_eq!(codes.map(ExitStatus::from_qemu_exit_code), ExitStatus::ALL.map(Some));
        assert_eq!([0, 1, 34, 51].map(ExitStatus::from_qemu_exit_code), [None; 4]);
        let refusals = ExitStatus::ALL[4..].iter().map(|status| status.process_exit_code());
        assert!(refusals.eq(3..=7), "0, 1 and 2 have their meanings");
    }
}
