//! The boot report as one 80-column ASCII screen, for the first serial port and for files.
//!
//! [`boot_screen`]: [`BootReport`] -> text. Every line fits [`COLUMNS`], every character is printable ASCII, and a value that
//! is not known prints `-`. Names that do not fit are shortened, kernel and variant names by dropping what the reader
//! can infer; the full names are in the typed report. Nothing parses this text.

use crate::{BootReport, ImageKind, SnapshotOutcome, SnapshotStatus, TrialOutcome};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Width of the screen in characters.
pub const COLUMNS: usize = 80;
/// Kernel rows shown; the rest are summed up in one line.
pub const KERNEL_ROWS: usize = 16;
/// Columns of the `kernel` field.
const KERNEL_COLUMNS: usize = 24;
/// Columns of the `variant` field.
const VARIANT_COLUMNS: usize = 19;
/// A space at which a fact is not wrapped: between a number and its unit.
const TIE: char = '\u{a0}';
/// Columns of the labels on the left of the facts.
const LABEL_COLUMNS: usize = 11;

/// The whole screen, lines ended by `\n`.
pub fn boot_screen(report: &BootReport) -> String {
    let mut screen = Screen::default();
    head(&mut screen, report);
    facts(&mut screen, report);
    stages(&mut screen, report);
    parts(&mut screen, report);
    kernels(&mut screen, report);
    tuning(&mut screen, report);
    screen.out
}

fn head(screen: &mut Screen, report: &BootReport) {
    let image = match report.image {
        ImageKind::Jit => "self-optimising image",
        ImageKind::Native => "native image, no compiler",
        ImageKind::Hosted => "hosted on Linux",
    };
    let start = match (report.image, report.snapshot.outcome) {
        (ImageKind::Native, _) => "kernels linked in",
        (_, SnapshotOutcome::Loaded) => "warm start",
        (_, SnapshotOutcome::ProfileOnly) => "warm profile, code rebuilt",
        (_, SnapshotOutcome::Cold | SnapshotOutcome::Disabled) => "cold start",
    };
    screen.rule('=');
    screen.spread(&format!(" BareFlow   boot {}, {start}", report.boot), &format!("{image} "));
    screen.rule('=');
    screen.line(&format!(
        "  first token {:>9}      prefill {:>13}      decode {:>13}",
        millis(report.ttft_ms),
        rate(report.prefill_tok_s, "tok/s"),
        rate(report.decode_tok_s, "tok/s"),
    ));
    if !report.clock_trusted {
        screen.line("  (emulated CPU: these times say nothing about hardware)");
    }
    screen.line("");
}

fn facts(screen: &mut Screen, report: &BootReport) {
    screen.fact("prompt", &format!("{} ({} tokens)", quoted(&report.prompt, 46), report.prompt_tokens), 2);
    screen.fact("answer", &format!("{} ({} tokens)", quoted(&report.text, 112), report.token_ids.len()), 3);
    let model = &report.model;
    let shape = format!(
        "{}, {} layers x {}, {}, {}",
        model.architecture,
        model.n_layers,
        model.dim,
        model.dtypes,
        bytes(model.file_bytes)
    );
    screen.fact("model", &format!("{}: {shape}", shorten(&model.name, 56)), 2);
    let cores = if report.threads == 1 { "1 core".to_string() } else { format!("{} cores", report.threads) };
    let cpu = shorten(report.cpu.trim(), 48);
    let hypervisor = match report.hypervisor.trim() {
        "" | "none" => String::new(),
        name => format!(" under {name}"),
    };
    let tsc = if report.tsc_hz == 0 {
        "TSC -".to_string()
    } else {
        format!("TSC{TIE}{}{TIE}GHz", decimal(report.tsc_hz as f64 / 1e9, 2))
    };
    screen.fact("machine", &format!("{cpu}{hypervisor}, {cores}, {}, {tsc}", report.isa), 2);
    screen.fact(
        "limits",
        &format!(
            "reads {}, multiply-add {}, interrupted {} (measured)",
            known_rate(report.read_gb_s, "GB/s"),
            known_rate(report.peak_gflop_s, "GFLOP/s"),
            report.interrupted.map_or("-".to_string(), percent)
        ),
        2,
    );
    if let Some(load) = &report.load {
        let share = |mb_s: f64, raw_mb_s: f64| if raw_mb_s > 0.0 { percent(mb_s / raw_mb_s) } else { "-".to_string() };
        let mut line = format!("{} at {}, ", bytes(load.bytes), rate(load.mb_s, "MB/s"));
        line.push_str(&share(load.mb_s, load.raw_mb_s));
        line.push_str(" of the raw disk rate");
        for (i, round) in load.rounds.iter().enumerate() {
            line.push_str(if i == 0 { "; again, each in turn with a raw pass: " } else { " " });
            line.push_str(&share(round.mb_s, round.raw_mb_s));
        }
        screen.fact("load", &line, 5);
    }
    if !report.memory.is_empty() {
        let rows: Vec<String> = report
            .memory
            .iter()
            .map(|row| format!("{} {} of {}", shorten(&row.name, 24), bytes(row.used_bytes), bytes(row.capacity_bytes)))
            .collect();
        screen.fact("memory", &rows.join(", "), 3);
    }
}

fn stages(screen: &mut Screen, report: &BootReport) {
    if report.stages.is_empty() {
        return;
    }
    const BAR: usize = 40;
    screen.section("stages of this boot");
    let total: f64 = report.stages.iter().map(|s| s.ms).filter(|ms| ms.is_finite()).sum();
    let longest = report.stages.iter().map(|s| s.ms).filter(|ms| ms.is_finite()).fold(0.0, f64::max);
    for stage in &report.stages {
        let share = if total > 0.0 { percent(stage.ms / total) } else { "-".to_string() };
        // Rounded up, so that a stage that took time shows.
        let filled = if longest > 0.0 && stage.ms > 0.0 {
            ((stage.ms / longest * BAR as f64) as usize).clamp(1, BAR)
        } else {
            0
        };
        screen.line(&format!(
            "  {:<18} {:>9} {share:>6}  {}",
            shorten(&stage.name, 18),
            millis(stage.ms),
            "#".repeat(filled)
        ));
    }
}

/// Where the time of a token goes: decoded tokens, and the prompt's behind a slash.
fn parts(screen: &mut Screen, report: &BootReport) {
    if report.parts.iter().all(|part| part.decode_share.is_none() && part.prefill_share.is_none()) {
        return;
    }
    screen.section("a token's time: decode / prefill");
    let share = |share: Option<f64>| share.map_or("-".to_string(), percent);
    let cells: Vec<String> = report
        .parts
        .iter()
        .map(|part| {
            format!("{:<10}{:>6} /{:>6}", shorten(&part.name, 9), share(part.decode_share), share(part.prefill_share))
        })
        .collect();
    for row in cells.chunks(3) {
        screen.line(&format!("  {}", row.join("  ")));
    }
}

fn kernels(screen: &mut Screen, report: &BootReport) {
    if report.kernels.is_empty() {
        return;
    }
    screen.section("kernels, hottest first");
    screen.line(&kernel_line("kernel", "calls", "time", "variant", "before", "after", "GB/s", "limit"));
    let shown = &report.kernels[..report.kernels.len().min(KERNEL_ROWS)];
    for row in shown {
        let variant = variant_name(&row.variant, VARIANT_COLUMNS);
        screen.line(&kernel_line(
            &kernel_name(&row.key, KERNEL_COLUMNS),
            &count(row.calls as f64),
            &percent_short(Some(row.time_share)),
            &variant,
            &row.baseline_cycles.map_or("-".to_string(), |c| count(c as f64)),
            &if row.calls == 0 { "-".to_string() } else { count(row.median_cycles as f64) },
            &row.gb_s.map_or("-".to_string(), three_digits),
            &percent_short(row.limit_fraction),
        ));
    }
    let rest = &report.kernels[shown.len()..];
    if !rest.is_empty() {
        let share: f64 = rest.iter().map(|r| r.time_share).sum();
        screen.line(&format!("... and {} more, {} of the time", rest.len(), percent(share)));
    }
    screen.line("  kernel   operation, weight type, tokens x outputs x inputs");
    screen.line("  variant  w vector bits (v, a: VNNI), tile rows x columns, s streams, u unroll,");
    screen.line("           p prefetch bytes, k block of inputs; a plain word (avx2) is hand-written");
    screen.line("  before   median cycles a call, hand-written kernel;  after: the kernel in use");
    screen.line("  limit    share of what this machine's memory and multipliers allow");
}

fn tuning(screen: &mut Screen, report: &BootReport) {
    screen.section("tuning");
    let outcomes: Vec<String> = [
        (TrialOutcome::Kept, "kept"),
        (TrialOutcome::Confirmed, "confirmed"),
        (TrialOutcome::Slower, "not faster"),
        (TrialOutcome::Undecided, "not clear"),
        (TrialOutcome::Refused, "refused by the compiler"),
        (TrialOutcome::Wrong, "WRONG (quarantined)"),
        (TrialOutcome::Faulted, "FAULTED (quarantined)"),
    ]
    .into_iter()
    .filter_map(|(outcome, name)| {
        let n = report.trials.iter().filter(|t| t.outcome == outcome).count();
        (n > 0).then(|| format!("{n} {name}"))
    })
    .collect();
    let tried = match report.trials.len() {
        0 => "nothing tried in this boot".to_string(),
        1 => format!("1 variant tried: {}", outcomes.join(", ")),
        n => format!("{n} variants tried: {}", outcomes.join(", ")),
    };
    screen.fact("trials", &tried, 2);
    screen.fact(
        "kernels",
        &format!(
            "{} loaded, {} compiled in {}, {} changed; profiling cost {}",
            report.kernels_loaded,
            report.kernels_compiled,
            millis(report.compile_ms_total),
            report.kernels_changed,
            report.profiler_overhead.map_or("-".to_string(), percent)
        ),
        2,
    );
    let tried: u64 = report.kernels.iter().map(|k| u64::from(k.variants_tried)).sum();
    let total: u64 = report.kernels.iter().map(|k| u64::from(k.variants_total)).sum();
    if total > 0 {
        let settled = report.kernels.iter().filter(|k| k.settled).count();
        let keys = report.kernels.len();
        screen.fact(
            "search",
            &format!("{tried} of {total} variants tried in all boots, {settled} of {keys} kernels settled"),
            1,
        );
    }
    screen.fact("snapshot", &snapshot_line(&report.snapshot), 3);
    let c = &report.convergence;
    if c.window == 0 {
        // A boot that does not tune has no say in it.
        screen.fact("converged", &c.reason, 3);
        screen.rule('=');
        return;
    }
    let required = if c.variation_required { "" } else { ", not required here" };
    let raised = if c.allowed_variation > c.max_variation {
        format!(", raised to {} by this machine's noise", percent(c.allowed_variation))
    } else {
        String::new()
    };
    screen.fact(
        "converged",
        &format!(
            "{}: {} of kernel time settled, {} of {} boots unchanged, token time varies {} (limit {}{raised}{required})",
            if c.converged { "YES" } else { "not yet" },
            percent(c.settled_share),
            c.unchanged_boots,
            c.window,
            c.token_time_variation.map_or("-".to_string(), percent),
            percent(c.max_variation),
        ),
        3,
    );
    // Once it has converged, the reason repeats these figures.
    if !c.reason.is_empty() && !c.converged {
        screen.fact("", &c.reason, 4);
    }
    screen.rule('=');
}

/// What became of the snapshot, read and written, in one sentence.
fn snapshot_line(snapshot: &SnapshotStatus) -> String {
    let reason = snapshot.reason.as_deref().unwrap_or("no reason given");
    let generation = snapshot.generation_loaded.map_or("-".to_string(), |g| g.to_string());
    let read = match snapshot.outcome {
        SnapshotOutcome::Loaded => {
            let tail = snapshot.reason.as_deref().map_or(String::new(), |r| format!(" ({r})"));
            format!("loaded generation {generation}, {} kernels verified{tail}", snapshot.kernels_restored)
        }
        SnapshotOutcome::ProfileOnly => format!("generation {generation}: profile kept, code refused ({reason})"),
        SnapshotOutcome::Cold => format!("none used ({reason})"),
        SnapshotOutcome::Disabled => format!("off ({reason})"),
    };
    let saved = match (snapshot.generation_saved, snapshot.saved_bytes) {
        (Some(generation), Some(len)) => format!("; saved generation {generation}, {}", bytes(len)),
        (Some(generation), None) => format!("; saved generation {generation}"),
        (None, _) if snapshot.outcome == SnapshotOutcome::Disabled => String::new(),
        (None, _) => "; not saved".to_string(),
    };
    read + &saved
}

#[allow(clippy::too_many_arguments, reason = "one argument for each column of the table")]
fn kernel_line(
    key: &str,
    calls: &str,
    time: &str,
    variant: &str,
    before: &str,
    after: &str,
    gb_s: &str,
    limit: &str,
) -> String {
    format!(
        "{key:<KERNEL_COLUMNS$} {calls:>5} {time:>4} {variant:<VARIANT_COLUMNS$} {before:>6} {after:>5} {gb_s:>5} {limit:>5}"
    )
}

/// A kernel key's name for a table, within `columns`: `gate_up_silu_q4_1_m1_n1536_k576` becomes `gate_up q4_1 1x1536x576`.
pub fn kernel_name(key: &str, columns: usize) -> String {
    let short = (|| {
        let (rest, k) = key.rsplit_once("_k")?;
        let (rest, n) = rest.rsplit_once("_n")?;
        let (rest, m) = rest.rsplit_once("_m")?;
        let dtype = ["f32", "f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
            .into_iter()
            .find(|d| rest.ends_with(d))?;
        let op = match rest.strip_suffix(dtype)?.strip_suffix('_')? {
            "matmul_residual" => "mm+res",
            "gate_up_silu" => "gate_up",
            "gate_up_gelu" => "geglu",
            op => op,
        };
        Some(format!("{op} {dtype} {m}x{n}x{k}"))
    })();
    shorten(&short.unwrap_or_else(|| key.to_string()), columns)
}

/// A variant's name for a table, within `columns`: `w256v_r6_c16_s4_u2_pf4096` becomes `w256v 6x16 s4u2p4k`, and
/// `w256_r6_c16_s1_u2_pf0_kb288` becomes `w256 6x16 s1u2k288`.
pub fn variant_name(variant: &str, columns: usize) -> String {
    let short = (|| {
        let mut fields = variant.split('_');
        let width = fields.next()?;
        let rows = fields.next()?.strip_prefix('r')?;
        let columns = fields.next()?.strip_prefix('c')?;
        let streams = fields.next()?;
        let unroll = fields.next()?;
        let prefetch: u32 = fields.next()?.strip_prefix("pf")?.parse().ok()?;
        let prefetch = match prefetch {
            0 => String::new(),
            p if p % 1024 == 0 => format!("p{}k", p / 1024),
            p => format!("p{p}"),
        };
        let block = match fields.next() {
            None => String::new(),
            field => format!("k{}", field?.strip_prefix("kb")?),
        };
        Some(format!("{width} {rows}x{columns} {streams}{unroll}{prefetch}{block}"))
    })();
    shorten(&short.unwrap_or_else(|| variant.to_string()), columns)
}

/// The first `columns` characters, the last one `~` when something was cut.
fn shorten(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_string();
    }
    let mut out: String = text.chars().take(columns.saturating_sub(1)).collect();
    out.push('~');
    out
}

fn quoted(text: &str, columns: usize) -> String {
    let one_line: String = text.chars().map(|c| if c.is_whitespace() { ' ' } else { c }).collect();
    let shown = one_line.trim_end();
    if shown.chars().count() <= columns {
        return format!("\"{shown}\"");
    }
    let cut: String = shown.chars().take(columns).collect();
    format!("\"{}...\"", cut.trim_end())
}

/// At most five characters: `9999`, `12.3k`, `123k`, `1.23M`.
fn count(value: f64) -> String {
    if value < 9999.5 {
        return decimal(value, 0);
    }
    let (mut value, mut unit) = (value / 1e3, 0);
    const UNITS: [char; 5] = ['k', 'M', 'G', 'T', 'P'];
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1e3;
        unit += 1;
    }
    format!("{}{}", three_digits(value), UNITS[unit])
}

/// `value` with `digits` digits behind the point. The standard library's way to write floats would be 15 KB of the native
/// image, for numbers of every size; these are below 2^64 when scaled, and what is not is written as the nearest that is.
fn decimal(value: f64, digits: u32) -> String {
    let scale = 10u64.pow(digits);
    let scaled = (value.abs() * scale as f64 + 0.5) as u64;
    let sign = if value < 0.0 && scaled > 0 { "-" } else { "" };
    let (whole, fraction) = (scaled / scale, scaled % scale);
    match digits {
        0 => format!("{sign}{whole}"),
        _ => format!("{sign}{whole}.{fraction:0width$}", width = digits as usize),
    }
}

/// Three significant digits, at most five characters below 100 000.
fn three_digits(value: f64) -> String {
    if !value.is_finite() {
        "-".to_string()
    } else if value == 0.0 {
        "0".to_string()
    } else if value < 9.995 {
        decimal(value, 2)
    } else if value < 99.95 {
        decimal(value, 1)
    } else if value < 99_999.5 {
        decimal(value, 0)
    } else {
        ">99k".to_string()
    }
}

fn percent(share: f64) -> String {
    match share * 100.0 {
        p if !p.is_finite() => "-".to_string(),
        p if p > 0.0 && p < 0.05 => "<0.1%".to_string(),
        p => decimal(p, 1) + "%",
    }
}

/// A percentage in four characters.
fn percent_short(share: Option<f64>) -> String {
    match share {
        Some(share) if share.is_finite() => match share * 100.0 {
            p if p < 9.95 => decimal(p, 1) + "%",
            p if p < 999.5 => decimal(p, 0) + "%",
            _ => ">999".to_string(),
        },
        _ => "-".to_string(),
    }
}

fn millis(ms: f64) -> String {
    if !ms.is_finite() || ms < 0.0 {
        "-".to_string()
    } else if ms < 9999.5 {
        format!("{} ms", three_digits(ms))
    } else {
        format!("{} s", three_digits(ms / 1e3))
    }
}

fn rate(value: f64, unit: &str) -> String {
    if value.is_finite() && value > 0.0 { format!("{} {unit}", three_digits(value)) } else { format!("- {unit}") }
}

fn known_rate(value: Option<f64>, unit: &str) -> String {
    rate(value.unwrap_or(f64::NAN), unit)
}

fn bytes(len: u64) -> String {
    match len {
        0..1_000 => format!("{len} B"),
        1_000..1_000_000 => format!("{} KB", three_digits(len as f64 / 1e3)),
        1_000_000..1_000_000_000 => format!("{} MB", three_digits(len as f64 / 1e6)),
        _ => format!("{} GB", three_digits(len as f64 / 1e9)),
    }
}

/// Collects lines and keeps the promise of width and character set.
#[derive(Default)]
struct Screen {
    out: String,
}

impl Screen {
    fn line(&mut self, text: &str) {
        let safe = text.chars().map(|c| match c {
            TIE => ' ',
            c if c.is_ascii_graphic() || c == ' ' => c,
            _ => '?',
        });
        let start = self.out.len();
        self.out.extend(safe.take(COLUMNS));
        let end = self.out[start..].trim_end().len() + start;
        self.out.truncate(end);
        self.out.push('\n');
    }

    fn rule(&mut self, c: char) {
        self.line(&c.to_string().repeat(COLUMNS));
    }

    fn spread(&mut self, left: &str, right: &str) {
        let room = COLUMNS.saturating_sub(right.len());
        self.line(&format!("{:<room$}{right}", shorten(left, room)));
    }

    fn section(&mut self, title: &str) {
        let dashes = COLUMNS.saturating_sub(title.len() + 4);
        self.line("");
        self.line(&format!("-- {title} {}", "-".repeat(dashes)));
    }

    /// `label` on the left, `text` wrapped at word boundaries to at most `max_lines` lines beside it.
    fn fact(&mut self, label: &str, text: &str, max_lines: usize) {
        let room = COLUMNS - LABEL_COLUMNS - 1;
        let mut lines: Vec<String> = Vec::new();
        let mut current = String::new();
        for word in text.split(' ').filter(|word| !word.is_empty()) {
            let length = current.chars().count();
            if length > 0 && length + 1 + word.chars().count() > room {
                lines.push(core::mem::take(&mut current));
            }
            if !current.is_empty() {
                current.push(' ');
            }
            current.push_str(word);
        }
        lines.push(current);
        let cut = lines.len() > max_lines;
        lines.truncate(max_lines);
        if let (true, Some(last)) = (cut, lines.last_mut()) {
            last.push_str(" ...");
        }
        for (i, line) in lines.iter().enumerate() {
            let label = if i == 0 { label } else { "" };
            self.line(&format!(" {label:<LABEL_COLUMNS$}{}", shorten(line, room)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Convergence, KernelRow, LoadFacts, LoadRound, MemoryRow, ModelFacts, PartRow, Stage, TrialRow};

    fn row(key: &str, variant: &str) -> KernelRow {
        KernelRow {
            key: key.into(),
            variant: variant.into(),
            calls: 1890,
            time_share: 0.382,
            total_cycles: 166_000_000,
            min_cycles: 80_000,
            max_cycles: 300_000,
            median_cycles: 88_123,
            baseline_cycles: Some(123_456),
            bytes_per_call: 1_105_920,
            gb_s: Some(21.34),
            gflop_s: Some(37.0),
            limit_fraction: Some(0.871),
            variants_tried: 14,
            variants_total: 96,
            settled: false,
        }
    }

    fn part(name: &str, prefill_share: Option<f64>, decode_share: Option<f64>, decode_us: Option<f64>) -> PartRow {
        PartRow { name: name.into(), prefill_share, decode_share, decode_us }
    }

    /// A made-up report; the numbers mean nothing.
    fn made_up() -> BootReport {
        BootReport {
            boot: 3,
            image: ImageKind::Jit,
            build_id: "00ff".into(),
            hypervisor: "KVM".into(),
            cpu: "Made-up(R) Test CPU @ 2.70GHz".into(),
            isa: "avx2".into(),
            threads: 2,
            tsc_hz: 2_700_000_000,
            clock_trusted: true,
            unix_time: None,
            model: ModelFacts {
                name: "Made-up-135M".into(),
                architecture: "llama".into(),
                file_bytes: 98_362_432,
                fingerprint: "ab".into(),
                sha256: None,
                sha256_remembered: false,
                n_layers: 30,
                dim: 576,
                vocab_size: 49152,
                dtypes: "q4_1+q8_0".into(),
            },
            prompt: "Once upon a time".into(),
            prompt_tokens: 4,
            token_ids: alloc::vec![1; 64],
            text: ", there was a test.".into(),
            stages: alloc::vec![
                Stage { name: "platform".into(), ms: 3.21 },
                Stage { name: "load_model".into(), ms: 212.0 },
                Stage { name: "tune".into(), ms: 2004.0 },
            ],
            ttft_ms: 812.0,
            prefill_tok_s: 210.3,
            decode_tok_s: 81.23,
            token_ms_median: 12.3,
            read_gb_s: Some(12.34),
            peak_gflop_s: None,
            interrupted: Some(0.021),
            load: Some(LoadFacts { bytes: 98_362_432, mb_s: 1810.0, raw_mb_s: 2011.0, rounds: Vec::new() }),
            profiler_overhead: Some(0.0004),
            parts: alloc::vec![
                part("norm", Some(0.031), Some(0.012), Some(160.0)),
                part("product", Some(0.9), Some(0.9), Some(11_000.0)),
                part("attention", None, Some(0.0001), Some(1.2)),
            ],
            memory: alloc::vec![MemoryRow {
                name: "weights".into(),
                used_bytes: 95_000_000,
                capacity_bytes: 96_000_000
            }],
            kernels: alloc::vec![
                row("gate_up_silu_q4_1_m1_n1536_k576", "w256v_r1_c32_s4_u2_pf4096"),
                row("qkv_q4_1_m64_n960_k576", "avx2"),
            ],
            trials: alloc::vec![TrialRow {
                key: "k".into(),
                variant: "v".into(),
                incumbent: "avx2".into(),
                ratio: Some(0.8),
                outcome: TrialOutcome::Kept,
                compile_us: None,
                code_bytes: None,
            }],
            kernels_loaded: 2,
            kernels_compiled: 14,
            kernels_changed: 1,
            compile_ms_total: 7.5,
            snapshot: SnapshotStatus {
                outcome: SnapshotOutcome::Loaded,
                reason: None,
                generation_loaded: Some(2),
                generation_saved: Some(3),
                saved_bytes: Some(48_213),
                kernels_restored: 2,
            },
            convergence: Convergence {
                converged: false,
                settled_share: 0.42,
                unchanged_boots: 0,
                window: 3,
                token_time_variation: None,
                machine_variation: None,
                max_variation: 0.01,
                allowed_variation: 0.01,
                variation_required: true,
                reason: "58 % of kernel time is in kernels still being tuned".into(),
            },
        }
    }

    fn assert_fits(screen: &str) {
        for line in screen.lines() {
            assert!(line.len() <= COLUMNS, "{} columns: {line}", line.len());
            assert!(line.bytes().all(|b| (0x20..0x7f).contains(&b)), "{line:?}");
        }
    }

    #[test]
    fn the_screen_says_what_the_report_holds() {
        let screen = boot_screen(&made_up());
        assert_fits(&screen);
        for expected in [
            "boot 3, warm start",
            "first token    812 ms",
            "81.2 tok/s",
            "\"Once upon a time\" (4 tokens)",
            "multiply-add - GFLOP/s",
            "90.0% of the raw disk rate",
            "gate_up q4_1 1x1536x576   1890  38% w256v 1x32 s4u2p4k    123k 88.1k  21.3   87%",
            "qkv q4_1 64x960x576       1890  38% avx2                  123k 88.1k  21.3   87%",
            "1 variant tried: 1 kept",
            "28 of 192 variants tried in all boots, 0 of 2 kernels settled",
            "loaded generation 2, 2 kernels verified; saved generation 3, 48.2 KB",
            "not yet: 42.0% of kernel time settled, 0 of 3 boots unchanged, token",
            "58 % of kernel time is in kernels still being tuned",
        ] {
            assert!(screen.contains(expected), "no `{expected}` in\n{screen}");
        }
    }

    #[test]
    fn rounds_of_loading_are_listed_beside_the_load() {
        let mut report = made_up();
        let round = |mb_s| LoadRound { mb_s, raw_mb_s: 2000.0 };
        report.load.as_mut().unwrap().rounds = [1700.0, 1910.0].map(round).to_vec();
        let text = boot_screen(&report).split_whitespace().collect::<Vec<_>>().join(" ");
        let expected = "90.0% of the raw disk rate; again, each in turn with a raw pass: 85.0% 95.5%";
        assert!(text.contains(expected), "{text}");
        let many = 200;
        report.load.as_mut().unwrap().rounds = alloc::vec![round(1700.0); many];
        assert_fits(&boot_screen(&report));
    }

    #[test]
    fn a_raised_limit_is_shown_although_the_run_has_converged() {
        let mut report = made_up();
        report.convergence.converged = true;
        report.convergence.token_time_variation = Some(0.031);
        let shown =
            |report: &BootReport| -> String { boot_screen(report).split_whitespace().collect::<Vec<_>>().join(" ") };
        assert!(!shown(&report).contains("raised"), "{}", boot_screen(&report));
        report.convergence.allowed_variation = 0.042;
        let text = shown(&report);
        assert!(text.contains("varies 3.1% (limit 1.0%, raised to 4.2% by this machine's noise)"), "{text}");
    }

    #[test]
    fn long_and_hostile_names_never_leave_the_screen() {
        let mut report = made_up();
        let long = "\u{1b}[2J\u{e9}\t\u{1f600}_long".repeat(400);
        report.model.name = long.clone();
        report.model.dtypes = long.clone();
        report.cpu = long.clone();
        report.isa = long.clone();
        report.hypervisor = long.clone();
        report.prompt = long.clone();
        report.text = long.clone();
        report.stages[0].name = long.clone();
        report.memory[0].name = long.clone();
        report.snapshot.reason = Some(long.clone());
        report.convergence.reason = long.clone();
        report.kernels[0] = KernelRow {
            calls: u64::MAX,
            time_share: 1e9,
            median_cycles: u64::MAX,
            baseline_cycles: Some(u64::MAX),
            gb_s: Some(1e12),
            limit_fraction: Some(1e6),
            ..row(&long, &long)
        };
        for outcome in
            [SnapshotOutcome::Loaded, SnapshotOutcome::ProfileOnly, SnapshotOutcome::Cold, SnapshotOutcome::Disabled]
        {
            report.snapshot.outcome = outcome;
            let screen = boot_screen(&report);
            assert_fits(&screen);
            assert!(screen.lines().count() < 70, "{screen}");
        }
    }

    #[test]
    fn unknown_values_print_a_dash() {
        let mut report = made_up();
        report.tsc_hz = 0;
        report.read_gb_s = None;
        report.ttft_ms = f64::NAN;
        report.decode_tok_s = f64::INFINITY;
        report.prefill_tok_s = 0.0;
        report.kernels[0] = KernelRow {
            calls: 0,
            baseline_cycles: None,
            gb_s: None,
            limit_fraction: None,
            ..row("matmul_f32_m1_n8_k8", "reference")
        };
        let screen = boot_screen(&report);
        assert!(screen.contains("first token         -"), "{screen}");
        assert!(screen.contains("decode       - tok/s"), "{screen}");
        assert!(screen.contains("TSC -"), "{screen}");
        let kernel = screen.lines().find(|l| l.starts_with("matmul f32")).unwrap();
        let fields: Vec<&str> = kernel.split_whitespace().collect();
        assert_eq!(fields, ["matmul", "f32", "1x8x8", "0", "38%", "reference", "-", "-", "-", "-"]);
    }

    #[test]
    fn more_kernels_than_rows_are_summed_up() {
        let mut report = made_up();
        report.kernels = (0..KERNEL_ROWS + 3).map(|_| KernelRow { time_share: 0.01, ..row("qkv", "avx2") }).collect();
        let screen = boot_screen(&report);
        assert_eq!(screen.lines().filter(|l| l.starts_with("qkv")).count(), KERNEL_ROWS);
        assert!(screen.contains("... and 3 more, 3.0% of the time"), "{screen}");
    }

    #[test]
    fn names_are_shortened_by_dropping_what_can_be_inferred() {
        assert_eq!(kernel_name("matmul_residual_q4_1_m64_n1536_k1536", 24), "mm+res q4_1 64x1536x1536");
        assert_eq!(kernel_name("lm_head_q8_0_m1_n24576_k576", 24), "lm_head q8_0 1x24576x576");
        assert_eq!(kernel_name("not_a_kernel_name_at_all_really", 24), "not_a_kernel_name_at_al~");
        assert_eq!(variant_name("w512v_r14_c16_s4_u2_pf4096", 19), "w512v 14x16 s4u2p4k");
        assert_eq!(variant_name("w128_r1_c32_s1_u1_pf0", 19), "w128 1x32 s1u1");
        assert_eq!(variant_name("w128_r1_c32_s1_u1_pf192", 19), "w128 1x32 s1u1p192");
        assert_eq!(variant_name("w256_r6_c16_s1_u2_pf0_kb288", 19), "w256 6x16 s1u2k288");
        assert_eq!(variant_name("reference", 19), "reference");
    }

    #[test]
    fn numbers_keep_to_five_characters() {
        let cases = [
            (0.0, "0"),
            (9999.0, "9999"),
            (9999.9, "10.0k"),
            (123_456.0, "123k"),
            (999_600.0, "1.00M"),
            (u64::MAX as f64, ">99k"),
        ];
        for (value, text) in &cases[..5] {
            assert_eq!(count(*value), *text);
        }
        assert!(count(1e15).len() <= 5, "{}", count(1e15));
        assert_eq!(three_digits(1e12), cases[5].1);
    }
}
