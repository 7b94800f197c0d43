//! BareFlow's side: building `bareflow`, tuning its snapshots, and one measured run of it.

use crate::bench::machine::pinned;
use anyhow::{Context, Result, bail};
use report::BootReport;
use runtime::identity::hex;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;

/// One way to run BareFlow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Compiled kernels, AVX2 at most.
    Avx2,
    /// Compiled kernels, whatever the CPU has.
    Unrestricted,
    /// The hand-written AVX2 ops alone.
    Baseline,
}

impl Form {
    /// Engine name in every table.
    pub fn engine(self) -> &'static str {
        match self {
            Form::Avx2 => "ours_avx2",
            Form::Unrestricted => "ours",
            Form::Baseline => "ours_baseline",
        }
    }

    /// Runs kernels from a snapshot.
    pub fn is_tuned(self) -> bool {
        self != Form::Baseline
    }

    /// Flags of `bareflow` that make it so.
    pub fn flags(self) -> [&'static str; 4] {
        match self {
            Form::Avx2 => ["--isa", "avx2", "--tier", "compiled"],
            Form::Unrestricted => ["--isa", "auto", "--tier", "compiled"],
            Form::Baseline => ["--isa", "avx2", "--tier", "baseline"],
        }
    }
}

/// Builds the hosted program in release mode and returns it.
///
/// # Errors
/// When the build fails.
pub fn build(workspace: &Path) -> Result<PathBuf> {
    let args = ["build", "--locked", "--release", "--package", "hosted", "--bin", "bareflow"];
    println!("  $ cargo {}", args.join(" "));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).current_dir(workspace).args(args).status().context("starting cargo")?;
    if !status.success() {
        bail!("building bareflow failed ({status}); the lines above say why");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    Ok(target.join("release/bareflow"))
}

/// Everything but the form of a run.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The program.
    pub bareflow: &'a Path,
    /// Cores to choose from.
    pub cores: &'a [usize],
    /// GGUF file.
    pub model: &'a Path,
    /// Prompt text.
    pub prompt: &'a str,
    /// Threads, each on a core of its own.
    pub threads: u32,
    /// Tokens to generate.
    pub tokens: u32,
    /// Context in tokens.
    pub context: u32,
    /// Element type of the KV cache, or `auto`.
    pub kv: &'a str,
}

impl Job<'_> {
    /// One run as `form`; `snapshot` holds the kernels of a tuned one, and `tune_ms` is what it may spend on new ones.
    ///
    /// # Errors
    /// When the program fails, with what it wrote.
    pub fn run(&self, form: Form, snapshot: Option<&Path>, tune_ms: u64) -> Result<BootReport> {
        let mut command = pinned(self.cores, self.threads, self.bareflow);
        command
            .args(["generate", "--json", "--ignore-eos", "--prompt", self.prompt, "--kv", self.kv])
            .args(form.flags());
        command.arg("--model").arg(self.model);
        for (flag, value) in [("--max-tokens", self.tokens), ("--threads", self.threads), ("--context", self.context)] {
            command.arg(flag).arg(value.to_string());
        }
        if let Some(snapshot) = snapshot {
            command.arg("--snapshot").arg(snapshot).arg("--tune-ms").arg(tune_ms.to_string());
        }
        #[derive(Deserialize)]
        struct Printed {
            report: BootReport,
        }
        Ok(json::<Printed>(command)?.report)
    }

    /// What the job's cores can do at this moment, with AVX2 at most or with all they have.
    ///
    /// # Errors
    /// When the program fails, with what it wrote.
    pub fn limits(&self, avx2_only: bool) -> Result<Limits> {
        let mut command = pinned(self.cores, self.threads, self.bareflow);
        command.args(["limits", "--json", "--threads"]).arg(self.threads.to_string());
        if avx2_only {
            command.arg("--avx2");
        }
        json(command)
    }
}

/// What some cores can do together, measured in a moment.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Read bandwidth, GB/s: the best of a few passes.
    pub read_gb_s: f64,
    /// The same over all passes.
    pub sustained_read_gb_s: f64,
    /// f32 multiply-adds, counted as two operations each, Gop/s.
    pub f32_gflop_s: f64,
    /// Exact int8 multiply-adds, likewise.
    pub int8_gop_s: f64,
}

/// Runs `command` and reads the JSON it prints.
///
/// # Errors
/// When it fails, with what it wrote.
pub fn json<T: serde::de::DeserializeOwned>(mut command: Command) -> Result<T> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("reading what {command:?} printed"))
}

/// How a snapshot was tuned.
#[derive(Clone, Debug, Serialize)]
pub struct Tuning {
    /// Engine name.
    pub engine: &'static str,
    /// Weight type.
    pub dtype: String,
    /// Threads.
    pub threads: u32,
    /// Boots it took.
    pub boots: u32,
    /// The last boot said so.
    pub converged: bool,
    /// The last boot's reason.
    pub reason: String,
    /// Variants measured in all boots.
    pub trials: usize,
}

/// Boots `form` on `snapshot`, which is made when missing, until it converges or `max_boots` is reached; not at all if this
/// build left it converged.
///
/// # Errors
/// When a boot fails.
pub fn tune(job: &Job<'_>, form: Form, dtype: &str, snapshot: &Path, limits: TuneLimits) -> Result<Tuning> {
    let mut tuning = Tuning {
        engine: form.engine(),
        dtype: dtype.to_owned(),
        threads: job.threads,
        boots: 0,
        converged: false,
        reason: "no boot".into(),
        trials: 0,
    };
    if is_converged(snapshot) {
        tuning.converged = true;
        tuning.reason = "kept as an earlier run left it converged".into();
    }
    while tuning.boots < limits.max_boots && !tuning.converged {
        let report = job.run(form, Some(snapshot), limits.budget_ms)?;
        tuning.boots += 1;
        tuning.trials += report.trials.len();
        tuning.converged = report.convergence.converged;
        tuning.reason = report.convergence.reason;
    }
    Ok(tuning)
}

/// The file holds a snapshot of this build whose last boot had converged.
fn is_converged(snapshot: &Path) -> bool {
    let Ok(on_disk) = export_tool::read_snapshot(snapshot) else { return false };
    hex(&on_disk.identity.build_id) == runtime::BUILD_ID
        && on_disk.snapshot.boots.last().is_some_and(|boot| boot.converged)
}

/// What tuning may cost.
#[derive(Clone, Copy)]
pub struct TuneLimits {
    /// Boots at most.
    pub max_boots: u32,
    /// Trials of one boot, ms.
    pub budget_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::options::hex_32;
    use snapshot_format::{BootLine, DiskMedium, Identity, Snapshot};
    use storage::MemoryDisk;

    /// Leaves an image at `path` with a snapshot of the build `build_id`.
    fn leave(path: &Path, build_id: [u8; 32], converged: bool) {
        let spec = bootimage::ImageSpec { overwrite: true, ..bootimage::ImageSpec::without_kernel() };
        bootimage::build(&spec, path).unwrap();
        let mut snapshot = Snapshot::default();
        snapshot.push_boot(BootLine {
            boot: 1,
            unix_time: None,
            token_us_median: 1.0,
            token_us_mad: 0.0,
            reference_us: None,
            decode_tok_s: 1.0,
            ttft_ms: 1.0,
            kernels_changed: 0,
            settled_share: 1.0,
            generation: 0,
            threads: 1,
            clock_trusted: true,
            converged,
        });
        let mut disk = MemoryDisk::new(std::fs::read(path).unwrap());
        let identity = Identity { build_id, model_id: [1; 32], machine: [2; 32] };
        snapshot_format::save(&mut DiskMedium::open(&mut disk).unwrap(), &identity, &snapshot).unwrap();
        std::fs::write(path, disk.into_bytes()).unwrap();
    }

    #[test]
    fn a_kept_snapshot_is_not_tuned_again_and_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernels.img");
        // A program that fails: every boot is an error.
        let job = Job {
            bareflow: Path::new("/bin/false"),
            cores: &[0],
            model: Path::new("none.gguf"),
            prompt: "",
            threads: 1,
            tokens: 1,
            context: 1,
            kv: "auto",
        };
        let limits = TuneLimits { max_boots: 2, budget_ms: 1 };
        let mine = hex_32(runtime::BUILD_ID).unwrap();
        leave(&path, mine, true);
        let tuning = tune(&job, Form::Avx2, "F32", &path, limits).unwrap();
        assert_eq!((tuning.boots, tuning.converged), (0, true));
        for (build_id, converged) in [(mine, false), ([7; 32], true)] {
            leave(&path, build_id, converged);
            tune(&job, Form::Avx2, "F32", &path, limits).unwrap_err();
            assert!(path.exists());
        }
    }
}
