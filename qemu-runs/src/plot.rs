//! Line and column charts as inline SVG, in the page's own colours and fonts. No scripts, no external files.
//!
//! A chart scales with its box, so its text stays readable only if the box is about as wide as [`WIDTH`] units; the page
//! sets them in a grid of such boxes.

use crate::html::escape;
use std::fmt::Write;

/// Width of a chart in its own units.
pub(crate) const WIDTH: f64 = 460.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 58.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 34.0;

/// One line of a chart. `None` leaves a gap.
pub(crate) struct Series {
    /// Name for the tooltip.
    pub name: String,
    /// Value at each boot.
    pub values: Vec<Option<f64>>,
    /// CSS colour.
    pub colour: String,
}

/// Scale of the value axis.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// Logarithmic, between the data's own ends.
    Log,
}

/// A line chart over boots.
pub(crate) struct Lines<'a> {
    /// What the chart shows, for readers who cannot see it.
    pub title: &'a str,
    /// Boot numbers along the bottom.
    pub boots: &'a [u32],
    /// The lines.
    pub series: &'a [Series],
    /// Value axis.
    pub scale: Scale,
    /// Height in units.
    pub height: f64,
    /// Boot to mark with a dashed upright, and its label.
    pub mark: Option<(u32, &'a str)>,
    /// Value to mark with a dashed line across, and its label.
    pub level: Option<(f64, &'a str)>,
    /// Write the last value at the end of each line.
    pub end_labels: bool,
    /// Text of a value.
    pub format: fn(f64) -> String,
}

struct Axis {
    low: f64,
    high: f64,
    scale: Scale,
    ticks: Vec<f64>,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, scale: Scale) -> Option<Self> {
        let usable = |v: &f64| v.is_finite() && (scale == Scale::Linear || *v > 0.0);
        let (low, high) = values.filter(usable).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return None;
        }
        Some(match scale {
            Scale::Linear => {
                let step = round_step(high.max(f64::MIN_POSITIVE) / 4.0);
                let count = (high / step - 1e-9).ceil().clamp(1.0, 10.0);
                let ticks = (0..=count as u32).map(|i| f64::from(i) * step).collect();
                Self { low: 0.0, high: count * step, scale, ticks }
            }
            Scale::Log => {
                let (low, high) = (low / 1.15, high * 1.15);
                Self { low, high, scale, ticks: log_ticks(low, high) }
            }
        })
    }

    /// Place of `value` between the ends, 0 at the bottom.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => value / self.high,
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        }
    }
}

/// The next of 1, 2, 2.5 and 5 times a power of ten at or above `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= step * (1.0 - 1e-9)).unwrap_or(step)
}

/// A tick's value without trailing zeros.
fn tick_text(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    text.to_owned()
}

fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let ticks = |steps: &[f64]| -> Vec<f64> {
        let all = decades.clone().flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d)));
        all.filter(|t| (low..=high).contains(t)).collect()
    };
    // The coarsest set that still gives three ticks.
    let sets: [&[f64]; 3] = [&[1.0], &[1.0, 2.0, 5.0], &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]];
    sets.iter().map(|s| ticks(s)).find(|t| t.len() >= 3).unwrap_or_else(|| ticks(sets[2]))
}

/// The chart as an `<svg>` element; a sentence when there is nothing to draw.
pub(crate) fn lines(chart: &Lines<'_>) -> String {
    let values = chart.series.iter().flat_map(|s| s.values.iter().flatten().copied());
    let Some(axis) = Axis::new(values.chain(chart.level.map(|l| l.0)), chart.scale) else {
        return "<p class=\"none\">No boot measured this.</p>".into();
    };
    let x = |i: usize| {
        let last = chart.boots.len().saturating_sub(1).max(1) as f64;
        LEFT + (WIDTH - LEFT - RIGHT) * if chart.boots.len() > 1 { i as f64 / last } else { 0.5 }
    };
    let y = |v: f64| TOP + (chart.height - TOP - BOTTOM) * (1.0 - axis.place(v));
    let mut out = open(chart.title, chart.height);
    for tick in &axis.ticks {
        grid_line(&mut out, y(*tick), &tick_text(*tick));
    }
    boot_labels(&mut out, chart.boots, chart.height, x);
    if let Some((boot, label)) = chart.mark
        && let Some(i) = chart.boots.iter().position(|b| *b == boot)
    {
        let (at, bottom) = (x(i), chart.height - BOTTOM);
        let _ = write!(
            out,
            "<path class=mark d=\"M{at:.1} {TOP}V{bottom:.1}\"/><text class=note x={:.1} y={:.1} text-anchor=end>{}</text>",
            at - 5.0,
            bottom - 6.0,
            escape(label)
        );
    }
    if let Some((value, label)) = chart.level {
        let at = y(value);
        let _ = write!(
            out,
            "<path class=mark d=\"M{LEFT} {at:.1}H{:.1}\"/><text class=note x={:.1} y={:.1}>{}</text>",
            WIDTH - RIGHT,
            LEFT + 5.0,
            at - 5.0,
            escape(label)
        );
    }
    let mut ends: Vec<(f64, String, &str)> = Vec::new();
    for series in chart.series {
        let points: Vec<(usize, f64)> =
            series.values.iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?))).collect();
        let points: Vec<(usize, f64)> = points.into_iter().filter(|(_, v)| axis.place(*v).is_finite()).collect();
        let mut path = String::new();
        let mut previous = None;
        for (i, v) in &points {
            let joined = previous.is_some_and(|p| p + 1 == *i);
            let _ = write!(path, "{}{:.1} {:.1}", if joined { 'L' } else { 'M' }, x(*i), y(*v));
            previous = Some(*i);
        }
        let _ = write!(out, "<path class=line style=\"stroke:{}\" d=\"{path}\"/>", series.colour);
        for (i, v) in &points {
            let _ = write!(
                out,
                "<circle cx={:.1} cy={:.1} r=3.2 style=\"fill:{}\"><title>{}, boot {}: {}</title></circle>",
                x(*i),
                y(*v),
                series.colour,
                escape(&series.name),
                chart.boots.get(*i).copied().unwrap_or_default(),
                escape(&(chart.format)(*v))
            );
        }
        if let (true, Some((_, v))) = (chart.end_labels, points.last()) {
            ends.push((y(*v), (chart.format)(*v), &series.colour));
        }
    }
    for (at, text, colour) in spread(ends, chart.height - BOTTOM) {
        let _ = write!(
            out,
            "<text class=end x={:.1} y={:.1} style=\"fill:{colour}\">{}</text>",
            WIDTH - RIGHT + 9.0,
            at + 4.0,
            escape(&text)
        );
    }
    out + "</svg>"
}

/// Moves end labels apart so that none covers another.
fn spread(mut ends: Vec<(f64, String, &str)>, bottom: f64) -> Vec<(f64, String, &str)> {
    const LINE: f64 = 14.0;
    ends.sort_by(|a, b| a.0.total_cmp(&b.0));
    for i in 1..ends.len() {
        ends[i].0 = ends[i].0.max(ends[i - 1].0 + LINE);
    }
    let mut limit = bottom;
    for end in ends.iter_mut().rev() {
        end.0 = end.0.min(limit);
        limit = end.0 - LINE;
    }
    ends
}

/// One part of every column.
pub(crate) struct Part {
    /// Name for the tooltip.
    pub name: &'static str,
    /// CSS classes that colour it.
    pub class: &'static str,
    /// Count at each boot.
    pub counts: Vec<usize>,
}

/// Stacked columns over boots.
pub(crate) fn columns(title: &str, boots: &[u32], parts: &[Part], height: f64) -> String {
    let totals: Vec<usize> = (0..boots.len()).map(|i| parts.iter().filter_map(|p| p.counts.get(i)).sum()).collect();
    let axis = Axis::new(totals.iter().map(|t| (*t).max(1) as f64), Scale::Linear);
    let Some(mut axis) = axis else {
        return "<p class=\"none\">No boot measured this.</p>".into();
    };
    // Counts have no halves.
    axis.ticks.retain(|t| t.fract() == 0.0);
    let slot = (WIDTH - LEFT - RIGHT / 3.0) / boots.len().max(1) as f64;
    let width = (slot * 0.62).min(34.0);
    let x = |i: usize| LEFT + slot * (i as f64 + 0.5);
    let scale = chart_height(height) / axis.high;
    let mut out = open(title, height);
    for tick in &axis.ticks {
        grid_line(&mut out, height - BOTTOM - tick * scale, &format!("{tick:.0}"));
    }
    boot_labels(&mut out, boots, height, x);
    for (i, boot) in boots.iter().enumerate() {
        let mut base = height - BOTTOM;
        for part in parts {
            let count = part.counts.get(i).copied().unwrap_or_default();
            if count == 0 {
                continue;
            }
            let tall = count as f64 * scale;
            base -= tall;
            let _ = write!(
                out,
                "<rect class=\"{}\" x={:.1} y={base:.1} width={width:.1} height={:.1}><title>boot {boot}: {count} {}</title></rect>",
                part.class,
                x(i) - width / 2.0,
                (tall - 1.0).max(0.5),
                part.name
            );
        }
    }
    out + "</svg>"
}

fn chart_height(height: f64) -> f64 {
    height - TOP - BOTTOM
}

fn open(title: &str, height: f64) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=img aria-label=\"{0}\"><title>{0}</title>", escape(title))
}

fn grid_line(out: &mut String, at: f64, label: &str) {
    let _ = write!(
        out,
        "<path class=grid d=\"M{LEFT} {at:.1}H{:.1}\"/><text x={:.1} y={:.1} text-anchor=end>{}</text>",
        WIDTH - RIGHT / 3.0,
        LEFT - 7.0,
        at + 4.0,
        escape(label)
    );
}

fn boot_labels(out: &mut String, boots: &[u32], height: f64, x: impl Fn(usize) -> f64) {
    // At most about ten labels, the last one always.
    let every = boots.len().div_ceil(10).max(1);
    for (i, boot) in boots.iter().enumerate() {
        let from_end = boots.len() - 1 - i;
        if from_end.is_multiple_of(every) {
            let _ = write!(out, "<text x={:.1} y={:.1} text-anchor=middle>{boot}</text>", x(i), height - BOTTOM + 16.0);
        }
    }
    let _ = write!(out, "<text class=axis x={LEFT} y={:.1}>boot</text>", height - 2.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_data() {
        let axis = Axis::new([3.0, 81.2].into_iter(), Scale::Linear).unwrap();
        assert_eq!(axis.ticks, [0.0, 25.0, 50.0, 75.0, 100.0]);
        assert_eq!((axis.place(0.0), axis.place(100.0)), (0.0, 1.0));
        let axis = Axis::new([0.08, 1.0].into_iter(), Scale::Log).unwrap();
        assert_eq!(axis.ticks.len(), 4, "{:?}", axis.ticks);
        assert!(axis.place(0.08) > 0.0 && axis.place(1.0) < 1.0);
        let axis = Axis::new([0.9, 1.0].into_iter(), Scale::Log).unwrap();
        assert!(!axis.ticks.is_empty());
        assert!(Axis::new([f64::NAN].into_iter(), Scale::Linear).is_none());
        assert!(Axis::new([0.0, -1.0].into_iter(), Scale::Log).is_none());
        assert!(Axis::new([0.0].into_iter(), Scale::Linear).unwrap().ticks.iter().all(|t| t.is_finite()));
    }

    #[test]
    fn tick_texts_are_short() {
        assert_eq!([0.0, 0.05, 0.25, 80.0, 1200.0].map(tick_text), ["0", "0.05", "0.25", "80", "1200"]);
    }

    #[test]
    fn labels_are_moved_apart_and_stay_inside() {
        let ends = vec![(100.0, "a".to_owned(), "c"), (98.0, "b".to_owned(), "c"), (97.0, "d".to_owned(), "c")];
        let places: Vec<f64> = spread(ends, 110.0).iter().map(|e| e.0).collect();
        assert_eq!(places, [82.0, 96.0, 110.0]);
    }

    #[test]
    fn a_gap_in_the_data_is_a_gap_in_the_line() {
        let series =
            [Series { name: "<s>".into(), values: vec![Some(1.0), None, Some(2.0), Some(3.0)], colour: "red".into() }];
        let svg = lines(&Lines {
            title: "t & u",
            boots: &[1, 2, 3, 4],
            series: &series,
            scale: Scale::Linear,
            height: 200.0,
            mark: None,
            level: None,
            end_labels: true,
            format: |v| format!("{v}"),
        });
        let path = svg.split("class=line").nth(1).unwrap();
        let path = &path[..path.find("/>").unwrap()];
        assert_eq!((path.matches('M').count(), path.matches('L').count()), (2, 1), "{path}");
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("t &amp; u") && svg.contains("&lt;s&gt;, boot 3: 2"), "{svg}");
    }
}
