//! `docs/BENCHMARKS.md`: prose by people, tables and plots by the run, each between two markers.

use crate::bench::chart::{Group, bars};
use crate::bench::rows::{Phase, Row};
use anyhow::{Context, Result};
use qemu_runs::Spread;
use std::fmt::Write;

/// Puts `content` between the markers of `section` in `text`.
///
/// # Errors
/// When the markers are not there, once each and in order.
pub fn replace(text: &str, section: &str, content: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- begin {section} -->"), format!("<!-- end {section} -->"));
    let missing = || format!("the document has no `{begin}` followed by `{end}`");
    let (before, rest) = text.split_once(&begin).with_context(missing)?;
    let (_, after) = rest.split_once(&end).with_context(missing)?;
    Ok(format!("{before}{begin}\n{}\n{end}{after}", content.trim_end()))
}

/// `12.3 (11.9-12.8)`.
pub fn spread(value: &Spread) -> String {
    format!("{} ({}-{})", number(value.median), number(value.min), number(value.max))
}

fn number(value: f64) -> String {
    match value {
        v if v >= 1000.0 => format!("{v:.0}"),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn or_dash(value: Option<&Spread>) -> String {
    value.map_or_else(|| "-".into(), spread)
}

/// A Markdown table.
pub fn table(header: &[String], lines: &[Vec<String>]) -> String {
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule: Vec<String> = header.iter().map(|_| "---".to_owned()).collect();
    let mut out = row(header) + &row(&rule);
    for line in lines {
        out += &row(line);
    }
    out
}

/// One line for each type and thread count, one column for each engine, then ratios.
pub fn rates(rows: &[Row], phase: Phase) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|r| r.phase == phase).collect();
    let mut engines: Vec<&str> = Vec::new();
    let mut cases: Vec<(&str, u32)> = Vec::new();
    for row in &rows {
        if !engines.contains(&row.engine) {
            engines.push(row.engine);
        }
        if !cases.contains(&(row.dtype.as_str(), row.threads)) {
            cases.push((&row.dtype, row.threads));
        }
    }
    let ratios: Vec<(&str, &str)> = [
        ("ours_avx2", "llama_cpp_avx2"),
        ("ours", "llama_cpp_avx2"),
        ("ours", "llama_cpp_avx512"),
        ("ours_avx2", "ours_baseline"),
        ("guest", "hosted"),
    ]
    .into_iter()
    .filter(|(a, b)| engines.contains(a) && engines.contains(b))
    .collect();
    let words = ["type", "threads"].into_iter().chain(engines.iter().copied()).map(str::to_owned);
    let header: Vec<String> = words.chain(ratios.iter().map(|(a, b)| format!("{a} / {b}"))).collect();
    let lines: Vec<Vec<String>> = cases
        .iter()
        .map(|(dtype, threads)| {
            let find =
                |engine: &str| rows.iter().find(|r| r.engine == engine && r.dtype == *dtype && r.threads == *threads);
            let mut line = vec![(*dtype).to_owned(), threads.to_string()];
            line.extend(engines.iter().map(|engine| or_dash(find(engine).map(|r| &r.tok_s))));
            line.extend(ratios.iter().map(|(a, b)| {
                let ratio = find(a).and_then(|row| row.ratio_to.get(b));
                ratio.map_or_else(
                    || "-".into(),
                    |r| format!("**{}** ({}-{})", number(r.median), number(r.min), number(r.max)),
                )
            }));
            line
        })
        .collect();
    table(&header, &lines)
}

/// How much of their time cores did not run: one line for each type, thread count and engine.
pub fn interruptions(rows: &[Row]) -> String {
    let header = ["type", "threads", "engine", "% of time"].map(str::to_owned);
    let decode = rows.iter().filter(|r| r.phase == Phase::Decode);
    let percent = |s: &Spread| Spread { median: 100.0 * s.median, min: 100.0 * s.min, max: 100.0 * s.max, n: s.n };
    let lines: Vec<Vec<String>> = decode
        .map(|r| {
            let interrupted = r.interrupted.as_ref().map(percent);
            vec![r.dtype.clone(), r.threads.to_string(), r.engine.to_owned(), or_dash(interrupted.as_ref())]
        })
        .collect();
    format!(
        "\ninterrupted, a core's time that passes without it, for instance in the host's interrupts:\n\n{}",
        table(&header, &lines)
    )
}

/// One line for each engine, type and thread count: shares of the machine's limits, time to first token, memory.
pub fn resources(rows: &[Row]) -> String {
    const REFERENCE: &str = "llama_cpp_avx2";
    let header = [
        "type",
        "threads",
        "engine",
        "decode, share of read bandwidth",
        "of what reading sustains",
        "prefill, share of multiply-add peak",
        "first token after, ms",
        "of llama_cpp_avx2's",
        "peak RSS, MiB",
    ];
    let prefill = |row: &Row| {
        let same = |r: &&Row| (r.engine, &r.dtype, r.threads) == (row.engine, &row.dtype, row.threads);
        rows.iter().filter(same).find_map(|r| r.fraction_of_arithmetic.as_ref())
    };
    let lines: Vec<Vec<String>> = rows
        .iter()
        .filter(|r| r.phase == Phase::Decode)
        .map(|r| {
            vec![
                r.dtype.clone(),
                r.threads.to_string(),
                r.engine.to_owned(),
                or_dash(r.fraction_of_bandwidth.as_ref()),
                or_dash(r.fraction_of_sustained_bandwidth.as_ref()),
                or_dash(prefill(r)),
                spread(&r.ttft_ms),
                or_dash(r.ttft_ratio_to.get(REFERENCE)),
                number(r.peak_rss_mib.median),
            ]
        })
        .collect();
    table(&header.map(str::to_owned), &lines)
}

/// Bars of every engine's rate relative to `reference`, by type, for one phase and thread count.
pub fn chart(rows: &[Row], phase: Phase, threads: u32, reference: &str) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|r| r.phase == phase && r.threads == threads).collect();
    let mut series: Vec<&str> = Vec::new();
    let mut dtypes: Vec<&str> = Vec::new();
    for row in &rows {
        if row.ratio_to.contains_key(reference) && !series.contains(&row.engine) {
            series.push(row.engine);
        }
        if !dtypes.contains(&row.dtype.as_str()) {
            dtypes.push(&row.dtype);
        }
    }
    let groups: Vec<Group> = dtypes
        .iter()
        .map(|dtype| Group {
            label: (*dtype).to_owned(),
            bars: series
                .iter()
                .map(|engine| {
                    let row = rows.iter().find(|r| r.engine == *engine && r.dtype == *dtype)?;
                    row.ratio_to.get(reference).copied()
                })
                .collect(),
        })
        .collect();
    let plural = if threads == 1 { "" } else { "s" };
    let title = format!("{} relative to {reference}, {threads} thread{plural}", phase.name());
    bars(&title, &series, &groups, Some((1.0, reference)))
}

/// A command in a code block.
pub fn command(line: &str) -> String {
    let mut out = String::new();
    let _ = write!(out, "```sh\n{line}\n```\n\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_replaced_and_missing_ones_said() {
        let text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n";
        let new = replace(text, "x", "new\n").unwrap();
        assert_eq!(new, "a\n<!-- begin x -->\nnew\n<!-- end x -->\nb\n");
        assert_eq!(replace(&new, "x", "new").unwrap(), new, "idempotent");
        assert!(replace(text, "y", "").unwrap_err().to_string().contains("begin y"));
    }

    #[test]
    fn tables_are_markdown() {
        let text = table(&["a".into(), "b".into()], &[vec!["1".into(), "2".into()]]);
        assert_eq!(text, "| a | b |\n| --- | --- |\n| 1 | 2 |\n");
        assert_eq!(spread(&Spread { median: 123.4, min: 1.234, max: 12.34, n: 3 }), "123 (1.23-12.3)");
    }
}
