//! The guest beside the hosted process: the same runtime, once on bare metal under KVM, once on Linux, taking turns.

use crate::bench::ours::{Form, Job};
use crate::bench::rows::Run;
use crate::kernel_build;
use anyhow::{Context, Result, bail};
use bootimage::ImageSpec;
use qemu_runs::accel::{AccelChoice, KVM_SMOKE_LIMIT, probe};
use qemu_runs::{Accel, Deadlines, Drive, Machine, Qemu, runs};
use report::BootReport;
use runtime::options::setting;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(240);

/// A guest that boots here.
pub struct Guest {
    qemu: Qemu,
    kernel: PathBuf,
    dir: PathBuf,
    /// Why KVM was taken, for the results.
    pub accel: String,
}

impl Guest {
    /// Builds the image and makes sure that KVM boots it.
    ///
    /// # Errors
    /// Why there is nothing to compare: no QEMU, no KVM that boots our kernel.
    pub fn obtain(workspace: &Path, dir: &Path, memory_mib: u32, cpus: u32) -> Result<Self> {
        let qemu = Qemu::find()?;
        let kernel = kernel_build::jit_image(workspace)?;
        let probe = probe(&qemu, &kernel, AccelChoice::Kvm, memory_mib, cpus, KVM_SMOKE_LIMIT)?;
        std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Self { qemu, kernel, dir: dir.to_owned(), accel: probe.reason() })
    }

    /// Guest and hosted in turn, `rounds` times each, after both tuned: the guest in boots of its own disk, hosted on `snapshot`.
    ///
    /// # Errors
    /// A boot or run that fails, or tokens that differ.
    pub fn compare(&self, job: &Job<'_>, form: Form, snapshot: &Path, plan: &Plan<'_>) -> Result<Vec<Run>> {
        let disk = self.dir.join(format!("guest-{}-t{}.img", plan.dtype, job.threads));
        let config = [
            setting("prompt", job.prompt),
            setting("max_tokens", &job.tokens.to_string()),
            setting("context", &job.context.to_string()),
            setting("ignore_eos", "true"),
        ]
        .join("\n");
        let image = ImageSpec { config: config + "\n", overwrite: true, ..ImageSpec::new(&self.kernel) };
        bootimage::build(&image, &disk)?;
        let mut tuned = false;
        for _ in 0..plan.boots {
            let report = self.boot(job, &disk, plan.memory_mib, plan.tune_ms)?;
            tuned = report.convergence.converged;
            if tuned {
                break;
            }
        }
        if !tuned {
            eprintln!("the guest's kernels have not converged in {} boots; measured as they are", plan.boots);
        }
        let mut out = Vec::new();
        for round in 1..=plan.rounds {
            let mut hosted_first = round % 2 == 0;
            for _ in 0..2 {
                let limits = job.limits(form == Form::Avx2)?;
                let (engine, report) = if hosted_first {
                    ("hosted", job.run(form, Some(snapshot), 0)?)
                } else {
                    ("guest", self.boot(job, &disk, plan.memory_mib, 0)?)
                };
                hosted_first = !hosted_first;
                // A process has a peak of its own; a machine has the sum of its regions.
                let process = report.memory.iter().find(|m| m.name == "process").map(|m| m.used_bytes);
                let peak = process.unwrap_or_else(|| report.memory.iter().map(|m| m.used_bytes).sum());
                out.push((
                    Run {
                        round,
                        engine,
                        dtype: plan.dtype.to_owned(),
                        threads: job.threads,
                        limits,
                        prefill_tok_s: report.prefill_tok_s,
                        decode_tok_s: report.decode_tok_s,
                        ttft_ms: report.ttft_ms,
                        peak_rss_mib: peak as f64 / (1 << 20) as f64,
                        interrupted: report.interrupted,
                    },
                    report.token_ids,
                ));
            }
        }
        if out.iter().any(|(_, ids)| *ids != out[0].1) {
            bail!("guest and hosted gave different tokens on {}", plan.dtype);
        }
        Ok(out.into_iter().map(|(run, _)| run).collect())
    }

    fn boot(&self, job: &Job<'_>, disk: &Path, memory_mib: u32, tune_ms: u64) -> Result<BootReport> {
        let append = setting("tune.budget_ms", &tune_ms.to_string());
        let drives = [(disk, false), (job.model, true)];
        let machine = Machine {
            memory_mib,
            cpus: job.threads,
            drives: drives.map(|(path, read_only)| Drive { path: path.to_owned(), read_only }).to_vec(),
            ..Machine::with_kernel(Accel::Kvm, &self.kernel, &append)
        };
        let deadlines = Deadlines { boot: DEADLINE, silence: DEADLINE };
        let console = self.dir.join("guest.log");
        let record = runs::boot(&self.qemu, &machine, deadlines, Some(&console), &mut |_| {})?;
        Ok(record.report)
    }
}

/// How long to tune and measure.
pub struct Plan<'a> {
    /// Weight type.
    pub dtype: &'a str,
    /// Guest memory.
    pub memory_mib: u32,
    /// Tuning boots at most.
    pub boots: u32,
    /// Trials of one tuning boot, ms.
    pub tune_ms: u64,
    /// Measured rounds.
    pub rounds: u32,
}
