//! Grouped bars with their spread, as an SVG file that stands alone: own colours for light and dark, no scripts, no fonts.

use qemu_runs::Spread;
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 44.0;
/// Told apart by people who do not see all colours, on white and on black.
const COLOURS: [&str; 5] = ["#2a78c2", "#6cc0f0", "#9aa5ad", "#d9730d", "#b23aa5"];

const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#222}.small{font-size:11px;fill:#555}.title{font-size:15px;font-weight:600}\
.grid{stroke:#ddd}.one{stroke:#222;stroke-dasharray:5 4}.whisker{stroke:#222;stroke-width:1.2}\
@media(prefers-color-scheme:dark){text{fill:#eee}.small{fill:#aaa}.grid{stroke:#333}.one,.whisker{stroke:#eee}}";

/// Bars that stand together.
pub struct Group {
    /// Text below them.
    pub label: String,
    /// One value for each series; `None` leaves its place empty.
    pub bars: Vec<Option<Spread>>,
}

/// A chart of `groups`, whose bars belong to `series` in order, with a dashed line at `one`, if given.
pub fn bars(title: &str, series: &[&str], groups: &[Group], one: Option<(f64, &str)>) -> String {
    let tops = groups.iter().flat_map(|g| g.bars.iter().flatten().map(|s| s.max)).chain(one.map(|(value, _)| value));
    let step = step(tops.fold(0.0, f64::max));
    let top = tops_above(groups, one, step);
    let y = |value: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value / top);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title><style>{STYLE}</style><text class=\"title\" x=\"{LEFT}\" y=\"20\">{0}</text>",
        escape(title)
    );
    let mut x = LEFT;
    for (name, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        let text = escape(name);
        let _ = write!(
            out,
            "<rect x=\"{x:.1}\" y=\"32\" width=\"11\" height=\"11\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"42\">{text}</text>",
            x + 16.0
        );
        x += 34.0 + 7.4 * name.len() as f64;
    }
    for tick in (0..).map(|i| f64::from(i) * step).take_while(|tick| *tick <= top * 1.0001) {
        let at = y(tick);
        let _ = write!(
            out,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{:.1}\"/><text class=\"small\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            number(tick)
        );
    }
    let slot = (WIDTH - LEFT - RIGHT) / groups.len().max(1) as f64;
    let width = (slot * 0.8 / series.len().max(1) as f64).min(34.0);
    for (i, group) in groups.iter().enumerate() {
        let middle = LEFT + slot * (i as f64 + 0.5);
        let first = middle - width * series.len() as f64 / 2.0;
        for (j, (spread, colour)) in group.bars.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let Some(spread) = spread else { continue };
            let (left, above) = (first + width * j as f64, y(spread.median));
            let _ = write!(
                out,
                "<rect x=\"{:.1}\" y=\"{above:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"><title>{}, {}: {} ({} to {}, n {})</title></rect><path class=\"whisker\" d=\"M{:.1} {:.1}V{:.1}\"/><text class=\"small\" x=\"{2:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                left + 1.0,
                width - 2.0,
                y(0.0) - above,
                escape(series.get(j).copied().unwrap_or_default()),
                escape(&group.label),
                number(spread.median),
                number(spread.min),
                number(spread.max),
                spread.n,
                left + width / 2.0,
                y(spread.min),
                y(spread.max),
                y(spread.max) - 4.0,
                number(spread.median),
            );
        }
        let _ = write!(
            out,
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - BOTTOM + 19.0,
            escape(&group.label)
        );
    }
    if let Some((value, label)) = one {
        let _ = write!(
            out,
            "<path class=\"one\" d=\"M{LEFT} {0:.1}H{1:.1}\"/><text class=\"small\" x=\"{LEFT}\" y=\"{2:.1}\">dashed: {3}</text>",
            y(value),
            WIDTH - RIGHT,
            HEIGHT - 6.0,
            escape(label)
        );
    }
    out + "</svg>\n"
}

/// The next of 1, 2, 2.5 and 5 times a power of ten that gives at most five ticks up to `high`.
fn step(high: f64) -> f64 {
    let least = high.max(1e-9) / 5.0;
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= least * (1.0 - 1e-9)).unwrap_or(least)
}

fn tops_above(groups: &[Group], one: Option<(f64, &str)>, step: f64) -> f64 {
    let tops = groups.iter().flat_map(|g| g.bars.iter().flatten().map(|s| s.max));
    let high = tops.chain(one.map(|(value, _)| value)).fold(0.0, f64::max);
    (high / step).ceil().max(1.0) * step
}

/// Two digits behind the point below 10, none above 100.
fn number(value: f64) -> String {
    let text = match value {
        v if v >= 99.95 => return format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_bar_and_missing_ones_none() {
        let spread = |median| Some(Spread { median, min: median * 0.9, max: median * 1.1, n: 3 });
        let groups = [
            Group { label: "F32 & 1".into(), bars: vec![spread(1.2), None] },
            Group { label: "Q8_0".into(), bars: vec![spread(0.8), spread(2.0)] },
        ];
        let svg = bars("decode <ratio>", &["a", "b"], &groups, Some((1.0, "peer")));
        assert_eq!(svg.matches("<rect").count(), 2 + 3, "legend and bars");
        assert!(svg.contains("decode &lt;ratio&gt;") && svg.contains("F32 &amp; 1") && !svg.contains("NaN"));
        assert!(svg.contains("a, Q8_0: 0.8 (0.72 to 0.88, n 3)"), "{svg}");
    }

    #[test]
    fn no_data_is_an_empty_chart() {
        let svg = bars("t", &[], &[], None);
        assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.5, 1.234, 12.34, 123.4].map(number), ["0", "0.5", "1.23", "12.3", "123"]);
    }
}
