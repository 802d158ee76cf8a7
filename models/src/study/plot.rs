//! The plots of a study: static SVG that needs no other file, light or dark.

use std::fmt::Write;

use super::measure::Unit;
use super::{Measure, Sheet};
use crate::report::escape;
use crate::report::scale::{Scale, short};

/// What a curve is drawn over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Training tokens.
    Tokens,
    /// Training FLOPs, a teacher's forward passes included.
    Flops,
}

/// A plot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plot {
    /// The validation loss at the end, dots joined by seed and a bar for the mean of an arm.
    Seeds,
    /// The loss of the evaluations: mean over the seeds, and a band from the least to the greatest.
    Curves(Axis),
    /// The validation loss at the end against a measurement, an arm a point.
    Scatter(Measure),
}

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 620.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 350.0;
/// The part of a run whose curve is left out: its steep beginning would press the rest together.
const BEGINNING: f64 = 0.2;
/// Least distance of two names in a list.
const LINE: f64 = 19.0;

/// Colours and type, for a file that stands alone. Classes begin with `st-`, so that several drawings can be in one page.
const STYLE: &str = "\
.st{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\
.st text{fill:#5b6570;font-size:13px}.st .st-t{fill:#1b1f24;font-size:15px;font-weight:600}.st .st-n{fill:#1b1f24}\
.st-bg{fill:#fff}.st-g{stroke:#e4e7eb}.st-x{stroke:#5b6570}.st-l{fill:none;stroke-width:2;stroke-linejoin:round}\
.st-b{stroke:none;fill-opacity:.15}.st-m{stroke-width:3}.st-e{stroke-width:1.5}.st-p{fill:none;stroke:#9aa4af;stroke-opacity:.5}\
.st-0{--c:#3457b1}.st-1{--c:#c24e00}.st-2{--c:#0a8f6f}.st-3{--c:#a8003f}.st-4{--c:#7a4fb5}.st-5{--c:#8a6d00}.st-6{--c:#0a7fa5}.st-7{--c:#5b6570}\
.st-l,.st-m,.st-e{stroke:var(--c)}.st-b,.st-d{fill:var(--c)}\
@media (prefers-color-scheme:dark){.st text{fill:#9aa4af}.st .st-t,.st .st-n{fill:#e8eaed}.st-bg{fill:#14171b}.st-g{stroke:#2c3238}.st-x{stroke:#9aa4af}\
.st-0{--c:#7f9cf5}.st-1{--c:#f59c42}.st-2{--c:#45cfa4}.st-3{--c:#ff7ba5}.st-4{--c:#b48be0}.st-5{--c:#e0c04a}.st-6{--c:#4fbbe0}.st-7{--c:#9aa4af}}";

/// Colours there are; further arms begin again.
const COLOURS: usize = 8;

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Axis::Tokens => "tokens",
            Axis::Flops => "flops",
        }
    }
}

impl Plot {
    /// The name of its file.
    pub fn file_name(self) -> String {
        match self {
            Plot::Seeds => "seeds.svg".into(),
            Plot::Curves(axis) => format!("curves-{}.svg", axis.name()),
            Plot::Scatter(measure) => format!("loss-{}.svg", measure.key().replace('_', "-")),
        }
    }

    /// What it shows.
    pub fn title(self) -> String {
        match self {
            Plot::Seeds => "Validation loss at the end: bars for means, dots joined by seed".into(),
            Plot::Curves(Axis::Tokens) => "Validation loss over training tokens: mean and range over the seeds".into(),
            Plot::Curves(Axis::Flops) => "Validation loss over training FLOPs: mean and range over the seeds".into(),
            Plot::Scatter(measure) => {
                format!("Validation loss against {}: mean and range over the seeds", measure.heading())
            }
        }
    }
}

/// The drawing; says so where there is nothing to draw yet.
pub(super) fn svg(sheet: &Sheet<'_>, plot: Plot) -> String {
    let title = plot.title();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"st\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"{0}\"><style>{STYLE}</style><rect class=\"st-bg\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\
         <text class=\"st-t\" x=\"{LEFT}\" y=\"22\">{0}</text>",
        escape(&title)
    );
    let drawn = match plot {
        Plot::Seeds => seeds(sheet, &mut svg),
        Plot::Curves(axis) => curves(sheet, axis, &mut svg),
        Plot::Scatter(measure) => scatter(sheet, measure, &mut svg),
    };
    if drawn.is_none() {
        let _ = write!(svg, "<text x=\"{LEFT}\" y=\"{TOP}\">no finished run yet</text>");
    }
    svg += "</svg>\n";
    svg
}

fn colour(arm: usize) -> usize {
    arm % COLOURS
}

/// Least and greatest of some numbers; none of none.
fn range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    values.into_iter().filter(|v| v.is_finite()).fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((low.min(v), high.max(v))),
    })
}

/// The loss axis with its grid.
fn losses(svg: &mut String, low: f64, high: f64) -> Scale {
    let room = (high - low) * 0.06;
    let y = Scale::new((low - room, high + room), false, (BOTTOM, TOP));
    for (value, text) in y.ticks(6) {
        let at = y.pixel(value);
        let _ = write!(
            svg,
            "<path class=\"st-g\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/><text text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>",
            LEFT - 8.0,
            at + 4.5
        );
    }
    let _ = write!(
        svg,
        "<path class=\"st-x\" d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/><text x=\"{LEFT}\" y=\"38\">nats per token</text>"
    );
    y
}

fn across(svg: &mut String, x: Scale, what: &str) {
    for (value, text) in x.ticks(6) {
        let at = x.pixel(value);
        let _ = write!(svg, "<text text-anchor=\"middle\" x=\"{at:.1}\" y=\"{:.1}\">{text}</text>", BOTTOM + 19.0);
    }
    let (middle, at) = ((LEFT + RIGHT) / 2.0, BOTTOM + 40.0);
    let _ = write!(svg, "<text text-anchor=\"middle\" x=\"{middle}\" y=\"{at}\">{}</text>", escape(what));
}

/// Names at the right, each near its height but apart from the others, with a mark of its colour.
fn names(svg: &mut String, mut wanted: Vec<(usize, f64, String)>) {
    wanted.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut heights: Vec<f64> = Vec::new();
    for (_, height, _) in &wanted {
        let least = heights.last().map_or(TOP, |last| last + LINE);
        heights.push(height.max(least));
    }
    // Those that ran out at the bottom are pushed up again.
    let mut most = BOTTOM - 2.0;
    for height in heights.iter_mut().rev() {
        *height = height.min(most);
        most = *height - LINE;
    }
    for ((arm, _, text), height) in wanted.iter().zip(heights) {
        let _ = write!(
            svg,
            "<circle class=\"st-d st-{}\" cx=\"{:.1}\" cy=\"{height:.1}\" r=\"4.5\"/>\
             <text class=\"st-n\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            colour(*arm),
            RIGHT + 16.0,
            RIGHT + 27.0,
            height + 4.5,
            escape(text)
        );
    }
}

/// The name of an arm and its mean loss at the end.
fn named(sheet: &Sheet<'_>, arm: usize, loss: f64) -> String {
    format!("{} {loss:.3}", sheet.study.arms[arm].name)
}

fn seeds(sheet: &Sheet<'_>, svg: &mut String) -> Option<()> {
    let arms = sheet.study.arms.len();
    let samples: Vec<_> = (0..arms).map(|arm| sheet.sample(arm, Measure::ValidationLoss)).collect();
    let (low, high) = range(samples.iter().flat_map(|s| s.values.iter().copied()))?;
    let y = losses(svg, low, high);
    let step = (RIGHT - LEFT) / arms as f64;
    let half = (step * 0.28).min(40.0);
    let place = |arm: usize, seed: usize, value: f64| {
        let aside = (seed as f64 + 0.5 - sheet.seeds as f64 / 2.0) * (half / sheet.seeds.max(2) as f64);
        (LEFT + step * (arm as f64 + 0.5) + aside, y.pixel(value))
    };
    let loss = |arm: usize, seed: usize| sheet.results[arm].get(seed)?.as_ref()?.validation_loss;
    // What the seeds share is seen along the lines.
    for seed in 0..sheet.seeds {
        let points = (0..arms).filter_map(|arm| Some(place(arm, seed, loss(arm, seed)?)));
        let points: Vec<String> = points.map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        if points.len() > 1 {
            let _ = write!(svg, "<path class=\"st-p\" d=\"M{}\"/>", points.join("L"));
        }
    }
    let mut list = Vec::new();
    for (arm, sample) in samples.iter().enumerate().filter(|(_, s)| !s.values.is_empty()) {
        let (middle, class) = (LEFT + step * (arm as f64 + 0.5), colour(arm));
        let mean = y.pixel(sample.mean());
        let _ =
            write!(svg, "<path class=\"st-m st-{class}\" d=\"M{:.1} {mean:.1}h{:.1}\"/>", middle - half, 2.0 * half);
        for (x, y) in (0..sheet.seeds).filter_map(|seed| Some(place(arm, seed, loss(arm, seed)?))) {
            let _ = write!(svg, "<circle class=\"st-d st-{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>");
        }
        let name = escape(sheet.study.arms[arm].name);
        let _ = write!(svg, "<text text-anchor=\"middle\" x=\"{middle:.1}\" y=\"{:.1}\">{name}</text>", BOTTOM + 19.0);
        list.push((arm, mean, named(sheet, arm, sample.mean())));
    }
    names(svg, list);
    Some(())
}

/// Of an arm over the steps that all of its finished runs were evaluated at: step, least, mean and greatest loss.
fn curve(sheet: &Sheet<'_>, arm: usize) -> Vec<(u64, f64, f64, f64)> {
    let runs: Vec<_> = sheet.results[arm].iter().flatten().collect();
    let Some(first) = runs.first() else { return Vec::new() };
    let at = |step: u64| {
        let all: Option<Vec<f64>> =
            runs.iter().map(|run| run.curve.iter().find(|point| point.step == step).map(|point| point.loss)).collect();
        let all = all?;
        let (low, high) = range(all.iter().copied())?;
        Some((step, low, all.iter().sum::<f64>() / all.len() as f64, high))
    };
    let from = BEGINNING * first.steps as f64;
    first.curve.iter().filter(|point| point.step as f64 >= from).filter_map(|point| at(point.step)).collect()
}

fn curves(sheet: &Sheet<'_>, axis: Axis, svg: &mut String) -> Option<()> {
    let x_of = |arm: usize, step: u64| match axis {
        Axis::Tokens => (step * sheet.configs[arm].tokens_per_step()) as f64,
        Axis::Flops => sheet.flops(arm, step as f64),
    };
    let all: Vec<_> = (0..sheet.study.arms.len()).map(|arm| curve(sheet, arm)).collect();
    let (low, high) = range(all.iter().flatten().flat_map(|&(_, low, _, high)| [low, high]))?;
    let points = all.iter().enumerate().flat_map(|(arm, curve)| curve.iter().map(move |point| (arm, point.0)));
    let (from, to) = range(points.map(|(arm, step)| x_of(arm, step)))?;
    // Models of many sizes lie far apart in FLOPs.
    let x = Scale::new((from, to), axis == Axis::Flops, (LEFT, RIGHT));
    let y = losses(svg, low, high);
    across(
        svg,
        x,
        match axis {
            Axis::Tokens => "training tokens",
            Axis::Flops => "training FLOPs, log scale",
        },
    );
    let mut list = Vec::new();
    for (arm, curve) in all.iter().enumerate() {
        let Some(&(_, _, last, _)) = curve.last() else { continue };
        let class = colour(arm);
        let place = |step: u64, loss: f64| format!("{:.1} {:.1}", x.pixel(x_of(arm, step)), y.pixel(loss));
        let there = curve.iter().map(|&(step, low, ..)| place(step, low));
        let back = curve.iter().rev().map(|&(step, .., high)| place(step, high));
        let band: Vec<String> = there.chain(back).collect();
        let middle: Vec<String> = curve.iter().map(|&(step, _, mean, _)| place(step, mean)).collect();
        let _ = write!(
            svg,
            "<path class=\"st-b st-{class}\" d=\"M{}z\"/><path class=\"st-l st-{class}\" d=\"M{}\"/>",
            band.join("L"),
            middle.join("L")
        );
        list.push((arm, y.pixel(last), named(sheet, arm, last)));
    }
    names(svg, list);
    Some(())
}

fn scatter(sheet: &Sheet<'_>, measure: Measure, svg: &mut String) -> Option<()> {
    let point = |arm: usize| {
        let (x, loss) = (sheet.sample(arm, measure).mean(), sheet.sample(arm, Measure::ValidationLoss));
        let (low, high) = range(loss.values.iter().copied())?;
        x.is_finite().then_some((arm, x, low, loss.mean(), high))
    };
    let points: Vec<_> = (0..sheet.study.arms.len()).filter_map(point).collect();
    let (low, high) = range(points.iter().flat_map(|p| [p.2, p.4]))?;
    let (from, to) = range(points.iter().map(|p| p.1))?;
    let log = from > 0.0 && to / from > 2.5;
    let room = if log { (to / from).powf(0.06) } else { 1.0 };
    let x = Scale::new((from / room, to * room), log, (LEFT + 10.0, RIGHT - 10.0));
    let y = losses(svg, low, high);
    let unit = if measure.unit() == Unit::Bytes { ", bytes" } else { "" };
    across(svg, x, &format!("{}{unit}{}", measure.heading(), if log { ", log scale" } else { "" }));
    let mut list = Vec::new();
    for (arm, at, low, mean, high) in points {
        let class = colour(arm);
        let (cx, cy) = (x.pixel(at), y.pixel(mean));
        let _ = write!(
            svg,
            "<path class=\"st-e st-{class}\" d=\"M{cx:.1} {:.1}V{:.1}\"/><circle class=\"st-d st-{class}\" cx=\"{cx:.1}\" \
             cy=\"{cy:.1}\" r=\"5\"/>",
            y.pixel(low),
            y.pixel(high)
        );
        list.push((arm, cy, format!("{} {mean:.3}, {}", sheet.study.arms[arm].name, short(at))));
    }
    names(svg, list);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::{Point, RunResult, study};
    use super::*;

    fn sheet_of<'s>(study: &'s super::super::Study, empty: bool) -> Sheet<'s> {
        let run = |arm: usize, seed: usize| {
            let loss = |step: u64| 3.0 - 0.1 * arm as f64 - step as f64 / 32.0 + 0.01 * seed as f64;
            let curve = (1..=8).map(|i| Point { step: 4 * i, loss: loss(4 * i), seconds: i as f64 }).collect();
            (!empty).then(|| RunResult {
                key: String::new(),
                device: String::new(),
                steps: 32,
                tokens: 0,
                validation_loss: Some(loss(32)),
                validation_bits: None,
                test_loss: None,
                test_bits: None,
                seconds: 8.0,
                curve,
            })
        };
        Sheet {
            study,
            seeds: 2,
            configs: study.arms.iter().map(|arm| arm.config.clone()).collect(),
            results: (0..study.arms.len()).map(|arm| (0..2).map(|seed| run(arm, seed)).collect()).collect(),
            timings: vec![],
            tunings: vec![],
        }
    }

    /// Numbers in the attributes of a drawing must be finite and inside of it, tags closed, names those of the arms.
    #[test]
    fn drawings_are_whole_and_inside_their_frame() {
        let study = study("cost", super::super::Scale::Smoke).unwrap();
        for empty in [false, true] {
            let sheet = sheet_of(&study, empty);
            for plot in
                [Plot::Seeds, Plot::Curves(Axis::Tokens), Plot::Curves(Axis::Flops), Plot::Scatter(Measure::Parameters)]
            {
                let svg = svg(&sheet, plot);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{plot:?}");
                assert_eq!(svg.matches('<').count(), svg.matches('>').count(), "{plot:?}");
                assert_eq!(svg.contains("no finished run"), empty, "{plot:?}");
                for arm in &study.arms {
                    assert_eq!(
                        svg.contains(&format!("{} 2.", arm.name)) || svg.contains(&format!("{} 1.", arm.name)),
                        !empty
                    );
                }
                for attribute in ["cx", "cy"] {
                    for part in svg.split(&format!("{attribute}=\"")).skip(1) {
                        let value: f64 = part.split('"').next().unwrap().parse().unwrap();
                        let most = if attribute == "cx" { WIDTH } else { HEIGHT };
                        assert!((0.0..=most).contains(&value), "{plot:?}: {attribute} {value}");
                    }
                }
            }
        }
    }

    #[test]
    fn curves_are_the_mean_and_range_of_the_seeds() {
        let study = study("pyramid", super::super::Scale::Smoke).unwrap();
        let sheet = sheet_of(&study, false);
        let curve = curve(&sheet, 0);
        // Steps 4 to 32 without those of the first fifth.
        assert_eq!(curve.iter().map(|point| point.0).collect::<Vec<_>>(), [8, 12, 16, 20, 24, 28, 32]);
        let (_, low, mean, high) = curve[6];
        assert!((low - 2.0).abs() < 1e-9 && (mean - 2.005).abs() < 1e-9 && (high - 2.01).abs() < 1e-9);
    }

    #[test]
    fn the_longest_name_with_its_numbers_fits() {
        let studies = crate::study::NAMES.iter().map(|name| study(name, super::super::Scale::Smoke).unwrap());
        let longest = studies.flat_map(|s| s.arms).map(|arm| arm.name.len()).max().unwrap();
        // A character of this type is less than 8 wide; the numbers are at most as these.
        let text = longest + " 2.480, 0.06256".len();
        assert!(RIGHT + 27.0 + 8.0 * text as f64 <= WIDTH, "{text} characters");
    }

    #[test]
    fn names_do_not_overlap() {
        let mut svg = String::new();
        names(&mut svg, (0..8).map(|arm| (arm, BOTTOM - arm as f64, format!("arm {arm}"))).collect());
        let heights: Vec<f64> =
            svg.split("cy=\"").skip(1).map(|part| part.split('"').next().unwrap().parse().unwrap()).collect();
        assert!(heights.windows(2).all(|pair| pair[1] - pair[0] >= LINE - 0.2), "{heights:?}");
        assert!(heights.iter().all(|h| (TOP..=BOTTOM).contains(h)), "{heights:?}");
    }
}
