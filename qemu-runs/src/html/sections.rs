//! The sections of the page, in reading order.

use super::{bytes_text, escape, image_name, percent};
use crate::plot::{Lines, Part, Scale, Series, columns, lines};
use crate::run_report::{BootRecord, RunReport, Spread, median};
use crate::text::{measured, number, times};
use report::{BootReport, KernelRow, SnapshotOutcome, SnapshotStatus, TrialOutcome, TrialRow};
use std::fmt::Write;

/// Keys drawn in the kernel chart.
const CHART_KEYS: usize = 6;
/// Trials listed for each boot; report.json has the rest.
const TRIALS_LISTED: usize = 200;
/// Height of the charts.
const HEIGHT: f64 = 230.0;
/// Relative cycles spread further than this are drawn on a logarithmic axis.
const LOG_FROM_SPREAD: f64 = 4.0;

const OUTCOMES: [(TrialOutcome, &str, &str); 7] = [
    (TrialOutcome::Kept, "kept", "kept"),
    (TrialOutcome::Confirmed, "confirmed", "kept pale"),
    (TrialOutcome::Slower, "not faster", "slower"),
    (TrialOutcome::Undecided, "not clear, tried again", "slower pale"),
    (TrialOutcome::Refused, "refused by the compiler", "refused"),
    (TrialOutcome::Wrong, "wrong result, quarantined", "wrong"),
    (TrialOutcome::Faulted, "faulted, quarantined", "wrong pale"),
];

fn colour(i: usize) -> String {
    format!("var(--c{})", i % 8)
}

fn known(value: f64) -> Option<f64> {
    (value.is_finite() && value > 0.0).then_some(value)
}

/// Speed, kernels and trials over boots.
pub(super) fn speed(run: &RunReport, out: &mut String) {
    out.push_str("<h2>Over the boots</h2><p class=lead>Each boot starts from the snapshot the one before it left on the disk.</p><div class=charts>");
    let boots: Vec<u32> = run.boots.iter().map(|b| b.report.boot).collect();
    let mark = run.converged_at.map(|boot| (boot, "converged"));
    let rate = |title: &str, colour_index: usize, value: fn(&BootReport) -> f64, native: Option<f64>| {
        let values = run.boots.iter().map(|b| known(value(&b.report))).collect();
        let series = [Series { name: title.into(), values, colour: colour(colour_index) }];
        let chart = lines(&Lines {
            title,
            boots: &boots,
            series: &series,
            scale: Scale::Linear,
            height: HEIGHT,
            mark,
            level: native.map(|v| (v, "native image")),
            end_labels: true,
            format: number,
        });
        format!("<div class=card><h3>{title}</h3>{chart}</div>")
    };
    let native = run.native.as_ref();
    out.push_str(&rate("Decode, tokens per second", 0, |b| b.decode_tok_s, native.and_then(|n| n.decode_tok_s)));
    out.push_str(&rate("Prefill, tokens per second", 5, |b| b.prefill_tok_s, native.and_then(|n| n.prefill_tok_s)));
    kernel_chart(run, &boots, mark, out);
    trial_chart(run, &boots, out);
    out.push_str("</div>");
}

/// Cycles of a call against the hand-written kernel, or against the key's first boot where that was not measured.
fn relative(run: &RunReport, key: &str) -> Vec<Option<f64>> {
    let row = |b: &BootRecord| b.report.kernels.iter().find(|k| k.key == key && k.calls > 0).cloned();
    let rows: Vec<Option<KernelRow>> = run.boots.iter().map(row).collect();
    let base = rows.iter().flatten().find_map(|r| r.baseline_cycles.filter(|c| *c > 0));
    let base = base.or_else(|| rows.iter().flatten().map(|r| r.median_cycles).find(|c| *c > 0));
    rows.iter().map(|r| Some(r.as_ref()?.median_cycles as f64 / base? as f64).filter(|v| *v > 0.0)).collect()
}

fn kernel_chart(run: &RunReport, boots: &[u32], mark: Option<(u32, &str)>, out: &mut String) {
    let Some(last) = run.boots.last() else { return };
    let series: Vec<Series> = last
        .report
        .kernels
        .iter()
        .take(CHART_KEYS)
        .enumerate()
        .map(|(i, row)| Series { name: row.key.clone(), values: relative(run, &row.key), colour: colour(i) })
        .collect();
    let values = || series.iter().flat_map(|s| s.values.iter().flatten().copied()).chain([1.0]);
    let spread = values().fold(0.0, f64::max) / values().fold(f64::MAX, f64::min);
    let chart = lines(&Lines {
        title: "Cycles of one call against the hand-written kernel",
        boots,
        series: &series,
        scale: if spread > LOG_FROM_SPREAD { Scale::Log } else { Scale::Linear },
        height: HEIGHT,
        mark,
        level: Some((1.0, "hand-written = 1")),
        end_labels: true,
        format: |v| if v < 0.0995 { format!("{v:.3}") } else { format!("{v:.2}") },
    });
    let _ = write!(
        out,
        "<div class=card><h3>Cycles of one call, hand-written kernel = 1 (lower is better)</h3>{chart}<ul class=legend>"
    );
    for s in &series {
        let _ = write!(out, "<li><i style=\"background:{}\"></i><code>{}</code></li>", s.colour, escape(&s.name));
    }
    out.push_str("</ul></div>");
}

fn trial_chart(run: &RunReport, boots: &[u32], out: &mut String) {
    let parts: Vec<Part> = OUTCOMES
        .iter()
        .map(|(outcome, name, class)| Part {
            name,
            class,
            counts: run.boots.iter().map(|b| b.trials_with(*outcome)).collect(),
        })
        .filter(|p| p.counts.iter().any(|c| *c > 0))
        .collect();
    let chart = columns("Variants tried in each boot", boots, &parts, HEIGHT);
    let _ = write!(out, "<div class=card><h3>Variants tried in each boot</h3>{chart}<ul class=legend>");
    for p in &parts {
        let total: usize = p.counts.iter().sum();
        let _ = write!(out, "<li><i class=\"{}\"></i>{total} {}</li>", p.class, p.name);
    }
    if parts.is_empty() {
        out.push_str("<li>none</li>");
    }
    out.push_str("</ul></div>");
}

/// The kernel table of the last boot.
pub(super) fn kernels(run: &RunReport, out: &mut String) {
    let Some(last) = run.boots.last() else { return };
    let b = &last.report;
    let _ = write!(
        out,
        "<h2>Kernels of boot {}</h2><p class=lead>Before: the hand-written kernel when it was first measured. After: what runs now. Median cycles of a \
         call. The limit is what this machine's memory bandwidth ({}) and multiply-add rate ({}) allow for that shape. \
         Green in the last column: settled.</p>",
        b.boot,
        b.read_gb_s.map_or("-".into(), |v| format!("{} GB/s", number(v))),
        b.peak_gflop_s.map_or("-".into(), |v| format!("{} GFLOP/s", number(v)))
    );
    out.push_str(
        "<div class=\"card scroll\"><table><tr><th class=text>kernel, variant<th>calls<th>time<th>before<th>after<th>faster\
         <th>GB/s<th>of limit<th>variants tried</tr>",
    );
    for row in &b.kernels {
        let speedup = row.baseline_cycles.map_or("-".into(), |before| times(before as f64, row.median_cycles as f64));
        let faster = row.baseline_cycles.is_some_and(|before| before as f64 > row.median_cycles as f64 * 1.005);
        let _ = write!(
            out,
            "<tr><td class=text><code>{}</code><br><code class=soft>{}</code><td>{}<td>{}<td>{}<td>{}<td class=\"{}\">{}<td>{}<td>{}\
             <td class=\"{}\">{} of {}</tr>",
            escape(&row.key),
            escape(&row.variant),
            row.calls,
            bar(Some(row.time_share), ""),
            row.baseline_cycles.map_or("-".into(), grouped),
            if row.calls > 0 { grouped(row.median_cycles) } else { "-".into() },
            if faster { "good" } else { "soft" },
            speedup.replace('x', "&times;"),
            row.gb_s.map_or("-".into(), number),
            bar(row.limit_fraction, " good"),
            if row.settled { "good" } else { "soft" },
            row.variants_tried,
            row.variants_total
        );
    }
    out.push_str("</table></div>");
}

fn bar(share: Option<f64>, class: &str) -> String {
    let Some(share) = share.filter(|s| s.is_finite()) else { return "-".into() };
    let width = (share * 100.0).clamp(0.0, 100.0);
    format!(
        "<span class=bar><span class=track><span class=\"fill{class}\" style=\"width:{width:.0}%\"></span></span><span class=n>{}</span></span>",
        percent(share)
    )
}

/// A count with thin spaces between thousands.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(c);
    }
    out
}

/// Where the time of the first, the last and the native boot went.
pub(super) fn stages(run: &RunReport, out: &mut String) {
    let (Some(first), Some(last)) = (run.boots.first(), run.boots.last()) else { return };
    let mut rows: Vec<(String, &BootReport)> = vec![(format!("boot {}", first.report.boot), &first.report)];
    if run.boots.len() > 1 {
        rows.push((format!("boot {}", last.report.boot), &last.report));
    }
    if let Some(native) = run.native.as_ref().and_then(|n| n.boots.last()) {
        rows.push(("native".into(), &native.report));
    }
    let mut names: Vec<&str> = Vec::new();
    for stage in rows.iter().flat_map(|(_, b)| &b.stages) {
        if !names.contains(&stage.name.as_str()) {
            names.push(&stage.name);
        }
    }
    if names.is_empty() {
        return;
    }
    let total = |b: &BootReport| b.stages.iter().map(|s| s.ms).filter(|ms| ms.is_finite()).sum::<f64>();
    let longest = rows.iter().map(|(_, b)| total(b)).fold(0.0, f64::max);
    out.push_str("<h2>Where the time went</h2><p class=lead>Stages of a boot in order, on one scale.</p><div class=card><div class=timeline>");
    for (name, b) in &rows {
        let _ = write!(out, "<div>{}</div><div class=row>", escape(name));
        for stage in b.stages.iter().filter(|s| s.ms.is_finite() && s.ms > 0.0) {
            let at = names.iter().position(|n| *n == stage.name).unwrap_or(0);
            let _ = write!(
                out,
                "<span style=\"width:{:.2}%;background:{}\" title=\"{}: {} ms\"></span>",
                stage.ms / longest * 100.0,
                colour(at),
                escape(&stage.name),
                number(stage.ms)
            );
        }
        let _ = write!(out, "</div><div class=ms>{} ms</div>", number(total(b)));
    }
    out.push_str("</div></div><div class=\"card scroll\" style=\"margin-top:12px\"><table><tr><th class=text>stage");
    for (name, _) in &rows {
        let _ = write!(out, "<th>{}, ms", escape(name));
    }
    out.push_str("</tr>");
    for (i, name) in names.iter().enumerate() {
        let _ = write!(
            out,
            "<tr><td class=text><ul class=legend style=\"margin:0\"><li><i style=\"background:{}\"></i>{}</li></ul>",
            colour(i),
            escape(name)
        );
        for (_, b) in &rows {
            let ms = b.stages.iter().filter(|s| s.name == *name).map(|s| s.ms).reduce(|a, b| a + b);
            let _ = write!(out, "<td>{}", ms.map_or("-".into(), number));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table></div>");
}

/// The exported image: sizes, speed, audit.
pub(super) fn native(run: &RunReport, out: &mut String) {
    let Some(native) = &run.native else {
        if let Some(jit) = run.jit_image {
            let _ = write!(
                out,
                "<h2>Size</h2><p class=lead>The image with the compiler in it has {} ({} of code). No native image was given to this run.</p>",
                bytes_text(jit.elf_bytes),
                bytes_text(jit.text_bytes)
            );
        }
        return;
    };
    out.push_str("<h2>Native image</h2><p class=lead>The converged kernels linked in, no compiler: grow to shrink.</p><div class=charts><div class=card><h3>Size</h3><div class=sizes>");
    let mut sizes = Vec::new();
    if let Some(jit) = run.jit_image {
        sizes.push(("with compiler", jit.elf_bytes, jit.text_bytes, 7));
    }
    sizes.push(("native", native.elf_bytes, native.text_bytes, 0));
    let largest = sizes.iter().map(|s| s.1).max().unwrap_or(1).max(1) as f64;
    for (name, elf, text, c) in sizes {
        let _ = write!(
            out,
            "<div>{name}</div><div class=row><span style=\"width:{:.1}%;background:{}\"></span>{}, code {}</div>",
            elf as f64 / largest * 55.0,
            colour(c),
            bytes_text(elf),
            bytes_text(text)
        );
    }
    out.push_str(
        "</div></div><div class=\"card scroll\"><h3>In turn with the image with compiler (JIT)</h3><table><tr><th><th colspan=3>decode, tokens/s<th colspan=3>first token, ms</tr>\
         <tr><th class=text>pair<th>native<th>JIT<th>ratio<th>native<th>JIT<th>ratio</tr>",
    );
    let line = |name: &str, decode: (f64, f64, f64), first: (f64, f64, f64)| {
        format!(
            "<tr><td class=text>{name}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
            measured(decode.0),
            measured(decode.1),
            times(decode.2, 1.0).replace('x', "&times;"),
            measured(first.0),
            measured(first.1),
            times(first.2, 1.0).replace('x', "&times;")
        )
    };
    let pairs = native.boots.iter().zip(&native.interleaved_jit_boots).map(|(n, j)| (&n.report, &j.report));
    for (i, (n, j)) in pairs.clone().enumerate() {
        let with_ratio = |native: f64, jit: f64| (native, jit, native / jit);
        let (decode, first) = (with_ratio(n.decode_tok_s, j.decode_tok_s), with_ratio(n.ttft_ms, j.ttft_ms));
        out.push_str(&line(&(i + 1).to_string(), decode, first));
    }
    // The median of the ratios is that of neighbours, which the ratio of the medians is not.
    let middle = |values: &dyn Fn(&BootReport) -> f64, ratio: Option<Spread>| {
        let of = |boots: Vec<&BootReport>| median(boots.into_iter().map(values)).unwrap_or(0.0);
        let (native, jit) = (of(pairs.clone().map(|p| p.0).collect()), of(pairs.clone().map(|p| p.1).collect()));
        (native, jit, ratio.map_or(f64::NAN, |ratio| ratio.median))
    };
    let decode = middle(&|b| b.decode_tok_s, native.decode_ratio);
    out.push_str(&line("<b>median</b>", decode, middle(&|b| b.ttft_ms, native.ttft_ratio)));
    out.push_str("</table></div></div>");
    if let Some(audit) = &native.audit {
        let text = serde_json::to_string_pretty(audit).unwrap_or_default();
        let _ = write!(
            out,
            "<details class=card style=\"margin-top:12px\"><summary><b>Audit</b> by the export tool</summary><pre>{}</pre></details>",
            escape(&text)
        );
    }
}

/// The table of boots, and each boot's trials.
pub(super) fn boots(run: &RunReport, out: &mut String) {
    out.push_str(
        "<h2>Boots</h2><p class=lead>Prefill and decode in tokens per second; loaded: kernels restored from the snapshot; settled: share of kernel time with \
         nothing left to try; spread: variation of token time over the last boots.</p><div class=\"card scroll\"><table><tr><th class=text>boot<th>first token, ms<th>prefill<th>decode<th>loaded<th>compiled\
         <th>in ms<th>tried<th>kept<th>settled<th>spread<th class=text>snapshot generation</tr>",
    );
    for boot in &run.boots {
        let b = &boot.report;
        let kept = boot.trials_with(TrialOutcome::Kept);
        let _ = write!(
            out,
            "<tr><td class=text>{}{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td class=\"{}\">{kept}<td>{}<td>{}<td class=\"text wrap\">{}</tr>",
            b.boot,
            if run.converged_at == Some(b.boot) { " <b>converged</b>" } else { "" },
            measured(b.ttft_ms),
            measured(b.prefill_tok_s),
            measured(b.decode_tok_s),
            b.kernels_loaded,
            b.kernels_compiled,
            number(b.compile_ms_total),
            b.trials.len(),
            if kept > 0 { "good" } else { "soft" },
            percent(b.convergence.settled_share),
            b.convergence.token_time_variation.map_or("-".into(), percent),
            escape(&snapshot(&b.snapshot))
        );
    }
    out.push_str("</table></div><div class=card style=\"margin-top:12px\"><h3>What each boot tried</h3>");
    for boot in &run.boots {
        trials(boot, out);
    }
    out.push_str("</div>");
}

/// Generation read, what was not taken over and why, generation written.
fn snapshot(s: &SnapshotStatus) -> String {
    let generation = |g: Option<u64>| g.map_or("-".to_owned(), |g| g.to_string());
    let reason = s.reason.as_deref().map_or(String::new(), |r| format!(" ({r})"));
    let read = match s.outcome {
        SnapshotOutcome::Loaded => generation(s.generation_loaded) + &reason,
        SnapshotOutcome::ProfileOnly => format!("{} profile only{reason}", generation(s.generation_loaded)),
        SnapshotOutcome::Cold => format!("cold{reason}"),
        SnapshotOutcome::Disabled => return format!("off{reason}"),
    };
    let size = s.saved_bytes.map_or(String::new(), |len| format!(", {}", bytes_text(len)));
    match s.generation_saved {
        Some(saved) => format!("{read} \u{2192} {saved}{size}"),
        None => format!("{read} \u{2192} not saved"),
    }
}

fn trials(boot: &BootRecord, out: &mut String) {
    let b = &boot.report;
    let tally: Vec<String> = OUTCOMES
        .iter()
        .map(|(outcome, name, _)| (boot.trials_with(*outcome), name))
        .filter(|(n, _)| *n > 0)
        .map(|(n, name)| format!("{n} {name}"))
        .collect();
    if tally.is_empty() {
        let _ = write!(out, "<p class=none><b>boot {}</b>: nothing tried</p>", b.boot);
        return;
    }
    let _ = write!(
        out,
        "<details><summary><b>boot {}</b>: {}</summary><div class=scroll><table><tr><th class=text>kernel<th class=text>variant<th class=text>against\
         <th>time ratio<th class=text>outcome<th>compile, &micro;s<th>code, B</tr>",
        b.boot,
        tally.join(", ")
    );
    // What changed something or went wrong comes first, so that the cut never hides it.
    let mut rows: Vec<&TrialRow> = b.trials.iter().collect();
    let rank = |t: &TrialRow| match t.outcome {
        TrialOutcome::Wrong | TrialOutcome::Faulted => 0,
        TrialOutcome::Kept => 1,
        TrialOutcome::Confirmed => 2,
        TrialOutcome::Slower | TrialOutcome::Undecided => 3,
        TrialOutcome::Refused => 4,
    };
    rows.sort_by_key(|t| rank(t));
    for t in rows.iter().take(TRIALS_LISTED) {
        let name = OUTCOMES.iter().find(|(o, _, _)| *o == t.outcome).map_or("-", |o| o.1);
        let class = match t.outcome {
            TrialOutcome::Kept | TrialOutcome::Confirmed => "good",
            TrialOutcome::Wrong | TrialOutcome::Faulted => "bad",
            TrialOutcome::Slower | TrialOutcome::Undecided | TrialOutcome::Refused => "soft",
        };
        let _ = write!(
            out,
            "<tr><td class=text><code>{}</code><td class=text><code>{}</code><td class=text><code>{}</code><td>{}<td class=\"text {class}\">{name}<td>{}<td>{}</tr>",
            escape(&t.key),
            escape(&t.variant),
            escape(&t.incumbent),
            t.ratio.filter(|r| r.is_finite()).map_or("-".into(), |r| format!("{r:.3}")),
            t.compile_us.map_or("-".into(), number),
            t.code_bytes.map_or("-".into(), |b| b.to_string())
        );
    }
    out.push_str("</table></div>");
    if rows.len() > TRIALS_LISTED {
        let _ = write!(out, "<p class=none>{} more are in report.json.</p>", rows.len() - TRIALS_LISTED);
    }
    out.push_str("</details>");
}

/// What the model said.
pub(super) fn answer(run: &RunReport, out: &mut String) {
    let Some(last) = run.boots.last() else { return };
    let same = match run.tokens_identical {
        Some(true) => ", the same in every boot",
        Some(false) => " in the last boot; others differ",
        None => "",
    };
    let _ = write!(
        out,
        "<h2>Answer</h2><p class=lead>{} tokens from a prompt of {}{same}.</p><blockquote><b>{}</b>{}</blockquote>",
        last.report.token_ids.len(),
        last.report.prompt_tokens,
        escape(&last.report.prompt),
        escape(&last.report.text)
    );
}

/// Where and how the run was made.
pub(super) fn environment(run: &RunReport, out: &mut String) {
    out.push_str("<h2>Environment</h2><div class=card><dl>");
    let mut fact = |name: &str, value: &str| {
        let value = if value.is_empty() { "-" } else { value };
        let _ = write!(out, "<dt>{name}<dd>{}", escape(value));
    };
    let e = &run.environment;
    fact("accelerator", &run.accel_reason);
    let cores = e.host_cores.map_or(String::new(), |n| format!(", {n} cores"));
    fact("host CPU", &format!("{}{cores}", e.host_cpu.as_deref().unwrap_or("-")));
    if let Some(last) = run.boots.last() {
        let b = &last.report;
        fact(
            "guest CPU",
            &format!("{}, {}, {} of {} cores, under {}", b.cpu.trim(), b.isa, b.threads, e.cpus, b.hypervisor),
        );
        let trusted = if b.clock_trusted { "trusted" } else { "not trusted" };
        fact("clock", &format!("TSC {:.3} GHz, {trusted}", b.tsc_hz as f64 / 1e9));
        let overhead = b.profiler_overhead.map_or("-".into(), |share| format!("{:.3}% of kernel time", share * 100.0));
        fact("profiling", &overhead);
        let m = &b.model;
        fact(
            "model",
            &format!(
                "{}: {}, {} layers, dim {}, {} tokens, {}, {}",
                m.name,
                m.architecture,
                m.n_layers,
                m.dim,
                m.vocab_size,
                m.dtypes,
                bytes_text(m.file_bytes)
            ),
        );
        fact("model fingerprint", &m.fingerprint);
        let of_boot = if m.sha256_remembered { " (computed by an earlier boot)" } else { "" };
        fact("model SHA-256", &format!("{}{of_boot}", m.sha256.as_deref().unwrap_or("-")));
        fact("image", &format!("{}, build {}", image_name(b.image), b.build_id));
        if let Some(load) = &b.load {
            fact("model load", &format!("{} MB/s; raw disk {} MB/s", number(load.mb_s), number(load.raw_mb_s)));
        }
        let memory: Vec<String> = b
            .memory
            .iter()
            .map(|m| format!("{} {} of {}", m.name, bytes_text(m.used_bytes), bytes_text(m.capacity_bytes)))
            .collect();
        fact("memory", &memory.join(", "));
    }
    fact("guest memory", &format!("{} MiB", e.memory_mib));
    fact("QEMU", &e.qemu);
    fact("commit", e.commit.as_deref().unwrap_or("-"));
    fact("command", &e.command);
    fact("machine", &e.machine);
    out.push_str("</dl></div>");
}
