//! Line charts as static SVG, with their points as JSON for the read-out.

use std::borrow::Cow;
use std::fmt::Write;

use super::page::escape;
use super::scale::{Scale, short};

/// One line of a chart.
#[derive(Debug, Clone, Default)]
pub(super) struct Line {
    /// CSS class of its colour: `a` or `b`, or `l0` to `l7` for one of many.
    pub(super) class: &'static str,
    /// Name at its end and in the read-out.
    pub(super) name: Cow<'static, str>,
    /// Points (step, value), all finite.
    pub(super) points: Vec<(f64, f64)>,
    /// Whether every point is marked (few points).
    pub(super) dots: bool,
}

/// A chart over steps.
#[derive(Debug, Clone, Default)]
pub(super) struct Chart {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    pub(super) unit: &'static str,
    /// Drawn faint behind the lines: every bin's mean, and its least and greatest value.
    pub(super) raw: Vec<(f64, f64)>,
    pub(super) band: Vec<(f64, f64, f64)>,
    pub(super) lines: Vec<Line>,
    /// Steps of the whole run, the same for all charts of a page.
    pub(super) steps: f64,
    /// Large charts name their lines at the end.
    pub(super) large: bool,
    pub(super) from_zero: bool,
    /// Its lines are named in a legend elsewhere; the heading has the range of their last values.
    pub(super) many: bool,
    /// A step that is marked, and what happened after it.
    pub(super) mark: Option<(f64, &'static str)>,
}

/// Pixels of a drawing.
#[derive(Debug, Clone, Copy)]
struct Frame {
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

const SMALL: Frame = Frame { width: 500.0, height: 190.0, left: 44.0, right: 14.0, top: 10.0, bottom: 26.0 };
const WIDE: Frame = Frame { width: 1040.0, height: 380.0, left: 44.0, right: 112.0, top: 12.0, bottom: 28.0 };
const NARROW: Frame = Frame { width: 360.0, height: 260.0, left: 38.0, right: 14.0, top: 10.0, bottom: 26.0 };
/// Least distance of two names at the ends of lines.
const NAME_GAP: f64 = 38.0;

impl Chart {
    /// The chart as a `figure`; empty if there is nothing to draw.
    pub(super) fn html(&self) -> String {
        if self.lines.iter().all(|line| line.points.is_empty()) {
            return String::new();
        }
        let latest = self.lines.iter().filter_map(|line| Some((line, line.points.last()?.1)));
        let heading: String = if self.many {
            let last = latest.map(|(_, value)| value);
            let (low, high) = last.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
            let (low, high) = (short(low), short(high));
            let range = if low == high { low } else { format!("{low} to {high}") };
            format!("<span class=\"end\">latest <b>{range}</b></span>")
        } else {
            latest
                .map(|(line, value)| {
                    let name = if self.lines.len() > 1 { &*line.name } else { "latest" };
                    format!("<span class=\"end {}\">{} <b>{}</b></span>", line.class, escape(name), short(value))
                })
                .collect()
        };
        let kind = if self.large { "chart large" } else { "chart" };
        let mut html = format!(
            "<figure class=\"{kind}\"><figcaption><h3>{}</h3><span class=\"unit\">{}{}</span>{heading}</figcaption>\n",
            escape(self.title),
            escape(self.unit),
            if self.is_log() { ", log scale" } else { "" }
        );
        if self.large {
            self.svg(&mut html, WIDE, "wide");
            self.svg(&mut html, NARROW, "narrow");
        } else {
            // The same height everywhere, drawn for the width it will have.
            self.svg(&mut html, SMALL, "wide");
            self.svg(&mut html, Frame { height: 180.0, ..NARROW }, "narrow");
        }
        html.push_str(&self.json());
        html.push_str("</figure>\n");
        html
    }

    fn range(&self) -> (f64, f64) {
        let lines = self.lines.iter().flat_map(|line| &line.points).map(|point| point.1);
        let all: Vec<f64> = lines.chain(self.raw.iter().map(|point| point.1)).collect();
        let (low, high) = all.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
        match self.from_zero {
            // Nothing but zeros stands on the axis, not in the middle of a chart that reaches below it.
            true if low == 0.0 && high == 0.0 => (0.0, 1.0),
            true => (low.min(0.0), high),
            false => (low, high),
        }
    }

    /// A logarithmic axis where the values span so much that a linear one would squash most of them.
    fn is_log(&self) -> bool {
        let (low, high) = self.range();
        !self.from_zero && low > 0.0 && high / low > 2.5
    }

    fn svg(&self, html: &mut String, frame: Frame, class: &str) {
        let Frame { width, height, left, right, top, bottom } = frame;
        let x = Scale::new((0.0, self.steps.max(1.0)), false, (left, width - right));
        let y = Scale::new(self.range(), self.is_log(), (height - bottom, top)).rounded(4);
        let label = format!("{} over steps", self.title);
        let _ = write!(
            html,
            "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\" \
             data-points=\"{}\" data-plot=\"{left},{},{top},{}\">",
            escape(&label),
            self.id,
            width - right,
            height - bottom
        );
        for (value, text) in y.ticks(if height > 300.0 { 6 } else { 4 }) {
            let at = y.pixel(value);
            let _ = write!(
                html,
                "<path class=\"grid\" d=\"M{left} {at:.1}H{:.1}\"/><text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>",
                width - right,
                left - 7.0,
                at + 3.5
            );
        }
        let ticks = x.ticks(if width > 900.0 { 10 } else { 5 });
        let last = ticks.len().saturating_sub(1);
        for (i, (value, text)) in ticks.into_iter().enumerate() {
            let text = if i == last { text + " steps" } else { text };
            let at = x.pixel(value);
            // The last one must not run out of the drawing.
            let (at, class) = if i == last && at > width - 30.0 { (width - 2.0, "x last") } else { (at, "x") };
            let _ = write!(html, "<text class=\"{class}\" x=\"{at:.1}\" y=\"{:.1}\">{text}</text>", height - 7.0);
        }
        let _ = write!(html, "<path class=\"axis\" d=\"M{left} {:.1}H{:.1}\"/>", height - bottom, width - right);
        if let Some((step, what)) = self.mark {
            let at = x.pixel(step);
            let _ = write!(
                html,
                "<path class=\"mark\" d=\"M{at:.1} {top}V{:.1}\"/><text class=\"mark\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                height - bottom,
                at - 6.0,
                top + 12.0,
                escape(what)
            );
        }
        self.draw_lines(html, x, y);
        if self.large && frame.right > 60.0 {
            self.draw_names(html, x, y);
        }
        html.push_str("</svg>\n");
    }

    fn draw_lines(&self, html: &mut String, x: Scale, y: Scale) {
        if self.band.iter().any(|(_, low, high)| low < high) {
            html.push_str("<path class=\"band\" d=\"");
            let upper = self.band.iter().map(|&(step, _, high)| (step, high));
            let lower = self.band.iter().rev().map(|&(step, low, _)| (step, low));
            path(html, x, y, upper.chain(lower));
            html.push_str("z\"/>");
        }
        if !self.raw.is_empty() {
            html.push_str("<path class=\"raw\" d=\"");
            path(html, x, y, self.raw.iter().copied());
            html.push_str("\"/>");
        }
        for line in &self.lines {
            let _ = write!(html, "<path class=\"line {}\" d=\"", line.class);
            path(html, x, y, line.points.iter().copied());
            html.push_str("\"/>");
            if line.dots || line.points.len() == 1 {
                for &(step, value) in &line.points {
                    let (cx, cy) = (x.pixel(step), y.pixel(value));
                    let _ = write!(html, "<circle class=\"{}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3\"/>", line.class);
                }
            }
        }
    }

    /// Name and last value of each line beside its end, moved apart where they would overlap.
    fn draw_names(&self, html: &mut String, x: Scale, y: Scale) {
        let end = |line: &Line| line.points.last().map(|&(step, value)| (x.pixel(step), y.pixel(value), value));
        let mut names: Vec<_> = self.lines.iter().filter_map(|line| Some((line, end(line)?))).collect();
        names.sort_by(|a, b| a.1.1.total_cmp(&b.1.1));
        let middle = names.iter().map(|name| name.1.1).sum::<f64>() / names.len() as f64;
        let first = middle - NAME_GAP * (names.len() as f64 - 1.0) / 2.0;
        let close = names.windows(2).any(|pair| pair[1].1.1 - pair[0].1.1 < NAME_GAP);
        // Two lines of text under the last one must stay above the axis.
        let lowest = y.pixel(f64::MIN) - 18.0;
        let shift = (first + NAME_GAP * (names.len() as f64 - 1.0) - lowest).max(0.0);
        for (i, (line, (at, height, value))) in names.into_iter().enumerate() {
            let height = if close { first - shift + NAME_GAP * i as f64 } else { height };
            let _ = write!(
                html,
                "<text class=\"name {0}\" x=\"{1:.1}\" y=\"{2:.1}\">{3}</text>\
                 <text class=\"name {0} strong\" x=\"{1:.1}\" y=\"{4:.1}\">{5}</text>",
                line.class,
                at + 9.0,
                height - 1.0,
                escape(&line.name),
                height + 13.0,
                short(value)
            );
        }
    }

    fn json(&self) -> String {
        let series = |line: &Line| {
            let points: Vec<(f64, f64)> = line.points.iter().map(|&(step, v)| (step.round(), rounded(v))).collect();
            serde_json::json!({"name": line.name, "class": line.class, "points": points})
        };
        let all: Vec<_> = self.lines.iter().map(series).collect();
        let json = serde_json::json!({"unit": self.unit, "steps": self.steps.max(1.0), "lines": all});
        // `<` could end the script element.
        let json = json.to_string().replace('<', "\\u003c");
        format!("<script type=\"application/json\" id=\"{}\">{json}</script>", self.id)
    }
}

fn path(html: &mut String, x: Scale, y: Scale, points: impl Iterator<Item = (f64, f64)>) {
    for (i, (step, value)) in points.enumerate() {
        let _ = write!(html, "{}{:.1} {:.1}", if i == 0 { 'M' } else { 'L' }, x.pixel(step), y.pixel(value));
    }
}

/// Five significant digits.
fn rounded(value: f64) -> f64 {
    format!("{value:.4e}").parse().unwrap_or(value)
}
