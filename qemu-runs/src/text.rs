//! A run as a short text: the table of its boots and what it comes to.

use crate::run_report::{BootRecord, RunReport, Spread, median};
use report::{ImageKind, TrialOutcome};
use std::fmt::Write;

/// The summary, lines ended by `\n`.
pub fn summary(run: &RunReport) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(run, &mut out);
    out
}

fn write(run: &RunReport, out: &mut String) -> std::fmt::Result {
    writeln!(out, "model   {}", dash(&run.model))?;
    writeln!(out, "prompt  {:?}", run.prompt)?;
    writeln!(out, "accel   {}", run.accel_reason)?;
    if !run.hardware_times {
        writeln!(out, "        times are not hardware speed: compare counts and code, not seconds")?;
    }
    writeln!(out)?;
    writeln!(out, "boot  first token   prefill    decode  loaded  compiled  tried  kept  settled  snapshot")?;
    writeln!(out, "               ms     tok/s     tok/s")?;
    for boot in &run.boots {
        let b = &boot.report;
        let saved = b.snapshot.generation_saved.map_or("-".into(), |g| format!("gen {g}"));
        writeln!(
            out,
            "{:>4}  {:>11}  {:>8}  {:>8}  {:>6}  {:>8}  {:>5}  {:>4}  {:>6.1}%  {saved}",
            b.boot,
            measured(b.ttft_ms),
            measured(b.prefill_tok_s),
            measured(b.decode_tok_s),
            b.kernels_loaded,
            b.kernels_compiled,
            b.trials.len(),
            boot.trials_with(TrialOutcome::Kept),
            b.convergence.settled_share * 100.0,
        )?;
    }
    writeln!(out)?;
    match (run.converged_at, run.boots.last()) {
        (Some(boot), _) => writeln!(out, "converged at boot {boot}")?,
        (None, Some(last)) => {
            writeln!(out, "not converged after {} boots: {}", run.boots.len(), last.report.convergence.reason)?;
        }
        (None, None) => writeln!(out, "no boot passed")?,
    }
    if let Some(identical) = run.tokens_identical {
        writeln!(out, "tokens {}", if identical { "identical in every boot" } else { "DIFFER between boots" })?;
    }
    if let (Some(first), Some(settled)) = (run.boots.first(), run.settled()) {
        writeln!(
            out,
            "decode {}, prefill {}, first token {} (median of {} boots with settled kernels, against the first)",
            times(settled.decode_tok_s, first.report.decode_tok_s),
            times(settled.prefill_tok_s, first.report.prefill_tok_s),
            times(first.report.ttft_ms, settled.ttft_ms),
            settled.boots,
        )?;
    }
    if let Some(native) = &run.native {
        let jit = native.interleaved_jit_decode_tok_s;
        let ratio = |ratio: Option<Spread>| {
            let of = |s: Spread| format!("{:.2} ({:.2} to {:.2} in {} pairs)", s.median, s.min, s.max, s.n);
            ratio.map_or("-".into(), of)
        };
        let ttft = |boots: &[BootRecord]| median(boots.iter().map(|b| b.report.ttft_ms)).map_or("-".into(), number);
        writeln!(
            out,
            "native image: decode {} tok/s, the image with compiler {} in turn with it: {}\n\
             native image: first token {} ms, the image with compiler {} in turn with it: {}\n\
             native image: {} bytes, code {}; with compiler {} bytes, code {}",
            native.decode_tok_s.map_or("-".into(), number),
            jit.map_or("-".into(), number),
            ratio(native.decode_ratio),
            ttft(&native.boots),
            ttft(&native.interleaved_jit_boots),
            ratio(native.ttft_ratio),
            native.elf_bytes,
            native.text_bytes,
            run.jit_image.map_or("-".into(), |i| i.elf_bytes.to_string()),
            run.jit_image.map_or("-".into(), |i| i.text_bytes.to_string()),
        )?;
    }
    for load in &run.load {
        let image = if load.boot.report.image == ImageKind::Native { "native image" } else { "image with compiler" };
        let Spread { median, min, max, n } = load.share_of_raw;
        let percent = |share: f64| format!("{:.0}%", share * 100.0);
        writeln!(
            out,
            "{image}: the model loads at {} of the raw disk rate ({} rounds of both in turn: {} to {})",
            percent(median),
            n,
            percent(min),
            percent(max),
        )?;
    }
    if let Some(failure) = &run.failure {
        writeln!(out, "\nFAILED: {failure}")?;
    }
    Ok(())
}

fn dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// A value with three significant digits; `-` when it is not known.
pub(crate) fn number(value: f64) -> String {
    match value {
        v if !v.is_finite() || v < 0.0 => "-".into(),
        0.0 => "0".into(),
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// A rate or duration with three significant digits; zero is no measurement and prints `-`.
pub(crate) fn measured(value: f64) -> String {
    if value > 0.0 { number(value) } else { "-".into() }
}

/// `a / b` as `2.03x`; `-` when either is not known.
pub(crate) fn times(a: f64, b: f64) -> String {
    let ratio = a / b;
    if ratio.is_finite() && ratio > 0.0 && b > 0.0 { format!("{ratio:.2}x") } else { "-".into() }
}
