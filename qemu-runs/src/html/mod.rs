//! A run as one HTML page that needs nothing else: styles inside, plots as inline SVG, light and dark, down to phone width.
//!
//! [`page`]: [`RunReport`] -> HTML. Every text from a guest, a model or the host passes through [`escape`].

mod sections;

use crate::run_report::{LoadRecord, RunReport, Settled};
use crate::text::{measured, number, times};
use report::ImageKind;
use std::fmt::Write;

/// `text` as HTML character data, also inside quoted attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Not allowed in HTML even as references.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The whole page.
pub fn page(run: &RunReport) -> String {
    let mut out = String::new();
    let title = if run.model.is_empty() { "no boot passed" } else { run.model.as_str() };
    let _ = write!(
        out,
        "<!doctype html><html lang=en><head><meta charset=utf-8>\
         <meta name=viewport content=\"width=device-width, initial-scale=1\">\
         <title>BareFlow: {0}</title><style>{1}</style></head><body><main>\
         <header><p class=brand>BareFlow</p><h1>{0}</h1><p class=verdict>{2}</p></header>",
        escape(title),
        include_str!("style.css"),
        verdict(run)
    );
    if let Some(failure) = &run.failure {
        let _ = write!(out, "<p class=\"banner bad\"><b>Failed.</b> {}</p>", escape(failure));
    }
    if !run.hardware_times && !run.boots.is_empty() {
        let _ = write!(
            out,
            "<p class=banner><b>These times are not hardware speed.</b> The guest ran under {}, where a cycle counter says how fast the \
             emulator is, not the CPU. Counts, sizes, tokens and what the tuner chose are real; do not quote the rates.</p>",
            if run.accel.name() == "tcg" { "TCG (software emulation)" } else { "an untrusted clock" }
        );
    }
    if !run.boots.is_empty() {
        tiles(run, &mut out);
        sections::speed(run, &mut out);
        sections::kernels(run, &mut out);
        sections::stages(run, &mut out);
        sections::native(run, &mut out);
        sections::boots(run, &mut out);
        sections::answer(run, &mut out);
    }
    sections::environment(run, &mut out);
    out.push_str("<footer>Every number comes from the guest's own messages; report.json has them all.</footer>");
    out.push_str("</main></body></html>\n");
    out
}

/// The run in one sentence.
fn verdict(run: &RunReport) -> String {
    let (Some(first), Some(last)) = (run.boots.first(), run.boots.last()) else {
        return "No boot passed.".into();
    };
    let (first, last) = (&first.report, &last.report);
    let mut out = match run.converged_at {
        Some(boot) => format!("<b>Converged at boot {boot}.</b> "),
        None => format!("<b>Not converged after {} boots.</b> ", run.boots.len()),
    };
    if let Some(settled) = run.settled() {
        let _ = write!(
            out,
            "Decode went from {} tokens/s in the first boot to <b>{} tokens/s</b> and prefill from {} to <b>{} tokens/s</b> \
             (medians of the {} boots since the last kernel changed). ",
            measured(first.decode_tok_s),
            measured(settled.decode_tok_s),
            measured(first.prefill_tok_s),
            measured(settled.prefill_tok_s),
            settled.boots
        );
    }
    match run.tokens_identical {
        Some(true) => {
            let _ = write!(out, "All {} boots gave the same {} tokens.", run.all_boots().count(), last.token_ids.len());
        }
        Some(false) => out.push_str("<b>The boots did not give the same tokens.</b>"),
        None => {}
    }
    out
}

fn tiles(run: &RunReport, out: &mut String) {
    let (Some(first), Some(last)) = (run.boots.first(), run.boots.last()) else { return };
    let (first, last) = (&first.report, &last.report);
    let settled = run.settled();
    let now = |value: fn(&Settled) -> f64, last: f64| settled.as_ref().map_or(last, value);
    let decode_tok_s = now(|s| s.decode_tok_s, last.decode_tok_s);
    let prefill_tok_s = now(|s| s.prefill_tok_s, last.prefill_tok_s);
    let ttft_ms = now(|s| s.ttft_ms, last.ttft_ms);
    out.push_str("<div class=tiles>");
    let against = |now: f64, then: f64, was: String| {
        if run.boots.len() < 2 {
            return "one boot".to_owned();
        }
        let class = if now / then < 0.97 { " class=bad" } else { "" };
        format!("<b{class}>{}</b> first boot ({was})", escape(&times(now, then).replace('x', "\u{d7}")))
    };
    tile(
        out,
        "Decode",
        &measured(decode_tok_s),
        "tok/s",
        &against(decode_tok_s, first.decode_tok_s, measured(first.decode_tok_s)),
    );
    tile(
        out,
        "Prefill",
        &measured(prefill_tok_s),
        "tok/s",
        &against(prefill_tok_s, first.prefill_tok_s, measured(first.prefill_tok_s)),
    );
    tile(
        out,
        "First token",
        &measured(ttft_ms),
        "ms",
        &against(first.ttft_ms, ttft_ms, measured(first.ttft_ms)).replace("first boot", "sooner than first boot"),
    );
    let tried: usize = run.boots.iter().map(|b| b.report.trials.len()).sum();
    let kept: usize = run.boots.iter().map(|b| b.trials_with(report::TrialOutcome::Kept)).sum();
    tile(out, "Variants tried", &tried.to_string(), "", &format!("<b>{kept}</b> kept in {} boots", run.boots.len()));
    let share = format!("{:.0}% of kernel time settled", last.convergence.settled_share * 100.0);
    match run.converged_at {
        Some(boot) => tile(out, "Converged", &format!("boot {boot}"), "", &share),
        None => tile(out, "Converged", "not yet", "", &share),
    }
    if let Some(native) = &run.native {
        let size = match run.jit_image {
            Some(jit) if jit.elf_bytes > 0 => {
                let share = native.elf_bytes as f64 / jit.elf_bytes as f64 * 100.0;
                format!("<b>{share:.0}%</b> of the image with compiler")
            }
            _ => "exported image".to_owned(),
        };
        let (value, unit) = bytes(native.elf_bytes);
        tile(out, "Native image", &value, unit, &size);
    }
    if let Some((load, others)) = run.load.split_first() {
        let share = |load: &LoadRecord| format!("{:.0}", load.share_of_raw.median * 100.0);
        let others = others.iter().fold(String::new(), |text, other| {
            text + &format!("; <b>{}%</b> in the {} image", share(other), image_name(other.boot.report.image))
        });
        tile(out, "Model load", &share(load), "%", &format!("of the raw disk rate{others}"));
    }
    out.push_str("</div>");
}

fn tile(out: &mut String, what: &str, value: &str, unit: &str, change: &str) {
    let _ = write!(
        out,
        "<div class=tile><div class=what>{what}</div><div class=value>{value} <small>{unit}</small></div><div class=change>{change}</div></div>"
    );
}

/// A byte count as value and unit.
fn bytes(len: u64) -> (String, &'static str) {
    match len {
        0..1_000 => (len.to_string(), "B"),
        1_000..1_000_000 => (number(len as f64 / 1e3), "KB"),
        1_000_000..1_000_000_000 => (number(len as f64 / 1e6), "MB"),
        _ => (number(len as f64 / 1e9), "GB"),
    }
}

fn bytes_text(len: u64) -> String {
    let (value, unit) = bytes(len);
    format!("{value} {unit}")
}

fn percent(share: f64) -> String {
    match share * 100.0 {
        p if !p.is_finite() => "-".into(),
        p if p > 0.0 && p < 0.05 => "&lt;0.1%".into(),
        p if p < 9.95 => format!("{p:.1}%"),
        p => format!("{p:.0}%"),
    }
}

fn image_name(image: ImageKind) -> &'static str {
    match image {
        ImageKind::Jit => "self-optimising",
        ImageKind::Native => "native",
        ImageKind::Hosted => "hosted",
    }
}
