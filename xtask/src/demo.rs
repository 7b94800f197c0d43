//! `cargo xtask demo`: the main job on a real model, from a cold boot to the exported image.

use crate::{demo_model, kernel_build, packages};
use anyhow::{Context, Result, bail};
use bootimage::ImageSpec;
use clap::Args;
use export_tool::ExportSpec;
use qemu_runs::accel::{AccelChoice, KVM_SMOKE_LIMIT, probe};
use qemu_runs::display::Display;
use qemu_runs::runs::{NativeSpec, RunSpec, converge};
use qemu_runs::{Accel, Deadlines, Drive, Environment, Machine, Qemu, text};
use runtime::options::setting;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a user can choose.
#[derive(Args)]
pub struct DemoArgs {
    /// GGUF file to run; default: SmolLM2-135M-Instruct Q4_1, fetched once.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Boots at most before giving up on convergence.
    #[arg(long, default_value_t = 16)]
    boots: u32,
    /// Accelerator: auto boots our own kernel under KVM and falls back to TCG.
    #[arg(long, value_enum, default_value = "auto")]
    accel: AccelChoice,
    /// Directory for the report, logs, disk and images.
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
    deadline: Duration,
}

impl Pace {
    fn of(accel: Accel) -> Self {
        match accel {
            Accel::Kvm => Self {
                max_tokens: 64,
                tune_budget_ms: 3000,
                tune_max_variants: 0,
                native_boots: 3,
                deadline: Duration::from_secs(120),
            },
            Accel::Tcg => Self {
                max_tokens: 4,
                tune_budget_ms: 60_000,
                tune_max_variants: 2,
                native_boots: 1,
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

    let out = workspace.join(&args.out);
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
    report.write(&out).with_context(|| format!("writing the report to {}", out.display()))?;
    if let Some(failure) = &report.failure {
        bail!("{failure}\nlogs are in {}", out.join("logs").display());
    }
    if report.converged_at.is_none() {
        let why = report.boots.last().map(|b| b.report.convergence.reason.clone()).unwrap_or_default();
        bail!("not converged after {} boots: {why}; see {}", args.boots, out.join("report.html").display());
    }

    let native_elf = out.join("native.elf");
    let exported = export_tool::export(&ExportSpec {
        disk: disk.clone(),
        kernel_library: library,
        linker_script: workspace.join("kernel/link.ld"),
        embed_model: None,
        out: native_elf.clone(),
        disk_image: None,
        keep_debug: true,
        allow_unconverged: false,
    })?;
    println!(
        "export  {}: {} KiB, text {} KiB, {} kernels; audit passed",
        native_elf.display(),
        exported.sizes.elf_bytes / 1024,
        exported.sizes.text_bytes / 1024,
        exported.kernels.len()
    );
    for key in &exported.without_kernel {
        println!(
            "        no kernel for {key}: no variant matched the hand-written op, and the native image will be slow there"
        );
    }
    let native =
        NativeSpec { elf: native_elf, audit: Some(serde_json::to_value(&exported.audit)?), boots: pace.native_boots };
    qemu_runs::runs::compare(&qemu, &spec, &native, &mut report, &mut |p| display.show(p));
    display.finish();
    report.write(&out).with_context(|| format!("writing the report to {}", out.display()))?;
    println!("{}", text::summary(&report));
    println!("report  {}", out.join("report.html").display());
    if let Some(failure) = &report.failure {
        bail!("{failure}");
    }
    if report.tokens_identical != Some(true) {
        bail!("the boots did not all give the same tokens; see {}", out.join("report.json").display());
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
