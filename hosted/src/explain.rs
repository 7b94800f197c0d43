//! `bareflow explain KEY`: what was tried for one key, what won and how close to the limit it is, and its machine code.

use crate::platform::{FileDisk, Process};
use crate::{BadFlag, limits};
use anyhow::{Context, Result, bail};
use jit::{Compiler, disassemble, space};
use model::kernel::{KernelKey, Variant};
use runtime::Options;
use runtime::options::IsaLimit;
use runtime::platform::Platform;
use runtime::tune::is_exhausted;
use snapshot_format::{DiskMedium, KeyRecord, Snapshot, TrialOutcome};
use std::path::Path;

/// Prints what the snapshot on `image` knows about `key`, or without one the search space and its first guess.
///
/// # Errors
/// A name that is no key, an image without a snapshot, a key that the snapshot has never met.
pub fn print(key: &str, image: Option<&Path>, isa: IsaLimit) -> Result<()> {
    let key: KernelKey = key.parse().map_err(|error| BadFlag(format!("`{key}`: {error}")))?;
    let mut process = Process::start(engine::cycles(), 0, None, None, true)?;
    let isa = runtime::boot::limited(process.cpu().isa, isa);
    let compiler = Compiler::new(isa)?;
    print_line!("{key}");
    print_line!("  reads {} bytes of weights, does {} multiply-adds", key.weight_bytes(), key.flops() / 2);
    let Some(image) = image else { return print_space(&key, compiler) };

    let snapshot = open(image)?;
    let Some(record) = snapshot.record(&key) else {
        let known: Vec<String> = snapshot.entries.iter().map(|r| format!("  {}", r.key)).collect();
        bail!("the snapshot on {} has never met {key}; it knows:\n{}", image.display(), known.join("\n"));
    };
    let tried_all = isa.avx2 && is_exhausted(record, &Options::default(), compiler.isa());
    print_record(record, tried_all)?;
    let threads = snapshot.boots.last().map_or(1, |line| line.threads as usize);
    if let Some(cycles) = record.last_median_cycles {
        let measured = limits::measure(&mut process, isa, threads)?;
        let roofline = runtime::rows::roofline(&measured, &key, threads);
        let gb_s = roofline.read_bytes_per_cycle * process.clock().tsc_hz as f64 / 1e9;
        match (roofline.limit_cycles(key.weight_bytes(), key.flops()), roofline.limit_fraction(&key, cycles)) {
            (Some(limit), Some(fraction)) => print_line!(
                "  last boot: {cycles} cycles a call, median; the limit measured now ({gb_s:.1} GB/s a core, {threads} threads) is {limit:.0}: {:.0} % of it",
                100.0 * fraction
            ),
            _ => print_line!("  last boot: {cycles} cycles a call, median"),
        }
    }
    match &record.incumbent {
        Some(kernel) if kernel.code.is_empty() => {
            print_line!("\n{}: its code was dropped, and is compiled again at the next boot", kernel.variant)
        }
        Some(kernel) => print_code(&kernel.variant, &kernel.code)?,
        None => print_line!("\nThe hand-written op runs: no variant beat it, or none was tried."),
    }
    Ok(())
}

fn open(image: &Path) -> Result<Snapshot> {
    let mut disk = FileDisk::open(image, false).with_context(|| format!("opening {}", image.display()))?;
    let mut medium = DiskMedium::open(&mut disk).with_context(|| format!("reading {}", image.display()))?;
    let (opened, _) =
        snapshot_format::open_any(&mut medium).map_err(|cold| anyhow::anyhow!("{}: {cold}", image.display()))?;
    Ok(opened.snapshot)
}

fn print_space(key: &KernelKey, mut compiler: Compiler) -> Result<()> {
    let variants = space::variants(key, compiler.isa());
    print_line!(
        "  search space, best guess first ({} variants; --snapshot FILE shows what was measured):",
        variants.len()
    );
    for variant in &variants {
        print_line!("    {variant}");
    }
    let first = variants.first().context("no variant can compute this key on this CPU")?;
    let compiled = compiler.compile(key, first)?;
    print_code(first, &compiled.code)
}

fn print_record(record: &KeyRecord, tried_all: bool) -> Result<()> {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let runs = record.incumbent.as_ref().map_or_else(|| "the hand-written op".to_owned(), |k| k.variant.to_string());
    print_line!("  runs {runs}, since boot {}", record.changed_at_boot);
    print_line!(
        "  hand-written op: {} cycles a call, median",
        or_dash(record.baseline_median_cycles.map(|c| c.to_string()))
    );
    print_line!("  {} variants tried{}", record.variants_tried(), if tried_all { ": all worth trying" } else { "" });
    print_line!(
        "\n  {:<4} {:<28} {:<28} {:>6} {:<9} {:>8} {:>6}",
        "boot",
        "variant",
        "against",
        "ratio",
        "outcome",
        "compile",
        "bytes"
    );
    for trial in &record.trials {
        print_line!(
            "  {:<4} {:<28} {:<28} {:>6} {:<9} {:>5} us {:>6}",
            trial.boot,
            trial.variant.to_string(),
            or_dash(trial.incumbent.map(|v| v.to_string()).or(Some("hand-written".into()))),
            or_dash(trial.ratio.map(|r| format!("{r:.3}"))),
            outcome(trial.outcome),
            trial.compile_us,
            trial.code_bytes
        );
    }
    for variant in &record.quarantined {
        print_line!("  quarantined: {variant}");
    }
    Ok(())
}

fn outcome(outcome: TrialOutcome) -> &'static str {
    match outcome {
        TrialOutcome::Kept => "kept",
        TrialOutcome::Slower => "slower",
        TrialOutcome::Refused => "refused",
        TrialOutcome::Wrong => "wrong",
        TrialOutcome::Faulted => "faulted",
        TrialOutcome::Undecided => "unclear",
        TrialOutcome::Confirmed => "confirmed",
    }
}

fn print_code(variant: &Variant, code: &[u8]) -> Result<()> {
    print_line!("\n{variant}: {} bytes", code.len());
    print_line!("{}", disassemble(code).trim_end());
    Ok(())
}
