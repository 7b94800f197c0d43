//! `cargo xtask demo`: the main job on a real model, from a cold boot to the exported image.

use crate::{demo_model, kernel_build, packages};
use anyhow::{Context, Result, bail};
use bootimage::ImageSpec;
use clap::Args;
use export_tool::{ExportSpec, Exported};
use qemu_runs::accel::{AccelChoice, KVM_SMOKE_LIMIT, probe};
use qemu_runs::display::Display;
use qemu_runs::runs::{NativeSpec, RunSpec, converge};
use qemu_runs::{Accel, Deadlines, Drive, Environment, Machine, Qemu, RunReport, text};
use runtime::options::setting;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a user can choose.
#[derive(Args)]
pub struct DemoArgs {
    /// GGUF file to run [default: SmolLM2-135M-Instruct Q4_1, fetched once].
    #[arg(long)]
    model: Option<PathBuf>,
    /// Boots at most before giving up on convergence.
    #[arg(long, default_value_t = 16)]
    boots: u32,
    /// Accelerator: auto boots our own kernel under KVM and falls back to TCG.
    #[arg(long, value_enum, default_value = "auto")]
    accel: AccelChoice,
    /// Directory for the report, logs, disk and images; like --model, relative to the current directory.
    #[arg(long, default_value = "out/demo")]
    out: PathBuf,
    /// The prompt.
    #[arg(long, default_value = "Once upon a time")]
    prompt: String,
    /// Guest cores.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
}

/// Settings of a demo run that depend on the accelerator: emulation is some hundred times slower, so it does less.
struct Pace {
    max_tokens: u32,
    tune_budget_ms: u64,
    tune_max_variants: u32,
    native_boots: u32,
    load_rounds: u32,
    deadline: Duration,
}

impl Pace {
    fn of(accel: Accel) -> Self {
        match accel {
            Accel::Kvm => Self {
                max_tokens: 64,
                tune_budget_ms: 5000,
                tune_max_variants: 0,
                native_boots: 6,
                load_rounds: 24,
                deadline: Duration::from_secs(120),
            },
            Accel::Tcg => Self {
                max_tokens: 4,
                tune_budget_ms: 60_000,
                tune_max_variants: 2,
                native_boots: 1,
                load_rounds: 0,
                deadline: Duration::from_secs(600),
            },
        }
    }
}

/// Runs the demo; `Ok` only if it converged, every boot and the native image gave the same tokens, and the audit passed.
///
/// # Errors
/// The first of these that did not hold, or whatever stopped the run.
pub fn run(workspace: &Path, args: &DemoArgs) -> Result<()> {
    packages::ensure(&[&packages::QEMU])?;
    let model = match &args.model {
        Some(file) => file.clone(),
        None => demo_model::obtain(&workspace.join(".cache"))?,
    };
    println!("model   {}", model.display());
    let kernel = kernel_build::jit_image(workspace)?;
    let library = kernel_build::native_library(workspace)?;
    let qemu = Qemu::find()?;
    let memory_mib = memory_mib(&model)?;
    let probe = probe(&qemu, &kernel, args.accel, memory_mib, args.cpus, KVM_SMOKE_LIMIT)?;
    println!("accel   {}", probe.reason());
    let pace = Pace::of(probe.accel);
    if probe.accel == Accel::Tcg {
        println!("        software emulation: {} tokens a boot, and times say nothing about hardware", pace.max_tokens);
    }

    let out = &args.out;
    std::fs::create_dir_all(out.join("logs")).with_context(|| format!("creating {}", out.display()))?;
    let disk = out.join("disk.img");
    let config = [
        setting("prompt", &args.prompt),
        setting("max_tokens", &pace.max_tokens.to_string()),
        setting("ignore_eos", "true"),
        setting("tune.budget_ms", &pace.tune_budget_ms.to_string()),
        setting("tune.max_variants", &pace.tune_max_variants.to_string()),
    ]
    .join("\n");
    let image = ImageSpec { config: config + "\n", overwrite: true, ..ImageSpec::new(&kernel) };
    bootimage::build(&image, &disk)?;

    let machine = Machine {
        memory_mib,
        cpus: args.cpus,
        drives: vec![Drive { path: disk.clone(), read_only: false }, Drive { path: model, read_only: true }],
        ..Machine::with_kernel(probe.accel, &kernel, "")
    };
    let deadlines = Deadlines { boot: pace.deadline, silence: pace.deadline };
    let words = std::iter::once("cargo xtask".to_owned()).chain(std::env::args().skip(1));
    let command = words.collect::<Vec<_>>().join(" ");
    let spec = RunSpec {
        machine,
        deadlines,
        max_boots: args.boots,
        accel_reason: probe.reason(),
        logs: Some(out.join("logs")),
        native: None,
        environment: Environment::of_host(workspace, command),
    };
    let mut display = Display::new(args.boots);
    let mut report = converge(&qemu, &spec, &mut |p| display.show(p));
    // What was measured until here survives whatever comes next.
    report.write(out).with_context(|| format!("writing the report to {}", out.display()))?;
    if report.failure.is_none() && report.converged_at.is_some() {
        match export(workspace, &disk, library, out) {
            Ok(exported) => {
                let native = NativeSpec {
                    elf: exported.elf,
                    audit: Some(serde_json::to_value(&exported.audit)?),
                    boots: pace.native_boots,
                    load_rounds: pace.load_rounds,
                };
                qemu_runs::runs::compare(&qemu, &spec, &native, &mut report, &mut |p| display.show(p));
            }
            Err(error) => report.failure = Some(format!("the native image could not be made: {error:#}")),
        }
    }
    display.finish();
    report.write(out).with_context(|| format!("writing the report to {}", out.display()))?;
    println!("{}", text::summary(&report));
    println!("report  {}", out.join("report.html").display());
    verdict(&report).with_context(|| format!("the demo did not succeed; logs are in {}", out.join("logs").display()))
}

/// Makes the native image of what `disk` has learnt, in `out`, and says what is in it.
fn export(workspace: &Path, disk: &Path, kernel_library: PathBuf, out: &Path) -> Result<Exported> {
    let exported = export_tool::export(&ExportSpec {
        disk: disk.to_owned(),
        kernel_library,
        linker_script: workspace.join("kernel/link.ld"),
        embed_model: None,
        out: out.join("native.elf"),
        disk_image: None,
        keep_debug: true,
        allow_unconverged: false,
    })?;
    println!(
        "export  {}: {} KiB, text {} KiB, {} kernels; audit passed",
        exported.elf.display(),
        exported.sizes.elf_bytes / 1024,
        exported.sizes.text_bytes / 1024,
        exported.kernels.len()
    );
    for gap in exported.gaps() {
        println!("        {gap}");
    }
    Ok(exported)
}

/// Whether a run did what the demo promises.
///
/// # Errors
/// The first thing it did not: every boot passed, convergence, an audited native image that ran, the same tokens everywhere.
fn verdict(report: &RunReport) -> Result<()> {
    if let Some(failure) = &report.failure {
        bail!("{failure}");
    }
    if report.converged_at.is_none() {
        let why = report.boots.last().map_or("no boot passed", |b| b.report.convergence.reason.as_str());
        bail!("not converged after {} boots: {why}", report.boots.len());
    }
    let Some(native) = report.native.as_ref().filter(|native| !native.boots.is_empty()) else {
        bail!("the native image was not run");
    };
    if native.audit.as_ref().and_then(|audit| audit["passed"].as_bool()) != Some(true) {
        bail!("the native image has not passed its audit");
    }
    if report.tokens_identical != Some(true) {
        bail!("the boots did not all give the same tokens");
    }
    Ok(())
}

/// Guest memory: weights, their file's header, KV cache and room to spare.
///
/// # Errors
/// When there is no such file.
pub fn memory_mib(model: &Path) -> Result<u32> {
    let bytes = std::fs::metadata(model).with_context(|| format!("no model at {}", model.display()))?.len();
    Ok(u32::try_from(bytes / (1 << 20) * 2 + 768).unwrap_or(u32::MAX))
}

#[cfg(test)]
#[path = "../../qemu-runs/tests/made_up/mod.rs"]
mod made_up;

#[cfg(test)]
mod tests {
    use super::made_up::{made_up_native, made_up_run};
    use super::*;

    fn good() -> RunReport {
        let mut report = made_up_run(8, Accel::Kvm);
        let native = made_up_native(2);
        report.set_native(qemu_runs::NativeRecord { audit: Some(serde_json::json!({ "passed": true })), ..native });
        report
    }

    #[test]
    fn a_whole_run_is_a_success_and_each_thing_that_is_missing_is_named() {
        verdict(&good()).unwrap();
        let says = |spoil: fn(&mut RunReport)| {
            let mut report = good();
            spoil(&mut report);
            verdict(&report).unwrap_err().to_string()
        };
        assert_eq!(says(|r| r.failure = Some("boot-03: silence".into())), "boot-03: silence");
        let unfinished = made_up_run(3, Accel::Kvm);
        let why = verdict(&unfinished).unwrap_err().to_string();
        assert_eq!(why, "not converged after 3 boots: kernels are still being tuned");
        let none = RunReport::new(Accel::Tcg, String::new(), 1, Environment::default());
        assert_eq!(verdict(&none).unwrap_err().to_string(), "not converged after 0 boots: no boot passed");
        assert_eq!(says(|r| r.native = None), "the native image was not run");
        assert_eq!(says(|r| r.native.as_mut().unwrap().boots.clear()), "the native image was not run");
        for audit in [None, Some(serde_json::json!({ "passed": false })), Some(serde_json::json!({}))] {
            let mut report = good();
            report.native.as_mut().unwrap().audit = audit;
            assert_eq!(verdict(&report).unwrap_err().to_string(), "the native image has not passed its audit");
        }
        assert_eq!(says(|r| r.tokens_identical = None), "the boots did not all give the same tokens");
        // The report itself finds tokens that differ, in whichever boot.
        let mut differs = made_up_run(8, Accel::Kvm);
        let mut native = made_up_native(1);
        native.audit = Some(serde_json::json!({ "passed": true }));
        native.boots[0].report.token_ids.push(1);
        differs.set_native(native);
        assert!(verdict(&differs).unwrap_err().to_string().contains("gave different tokens"));
    }
}
