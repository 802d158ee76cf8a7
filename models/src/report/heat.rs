//! Expert loads as heat maps: experts down, steps to the right, colour for the multiple of the balanced share.

use std::fmt::Write;

use super::gather::{Gathered, LayerBins, LoadBin};
use super::scale::{Scale, short};

/// Upper edges of the colour classes, as multiples of the balanced share; the last class has none.
const EDGES: [f64; 9] = [0.01, 0.25, 0.5, 0.71, 0.9, 1.1, 1.4, 2.0, 4.0];
/// What the legend says for each class.
const NAMES: [&str; 10] = ["idle", "<¼", "¼–½", "½–0.7", "0.7–0.9", "balanced", "1.1–1.4", "1.4–2", "2–4", ">4"];
/// Cells of all maps together: bounds the size of the page.
const CELLS: usize = 60_000;
const MAX_COLUMNS: usize = 120;
const MIN_COLUMNS: usize = 24;
/// Share of the run whose end is summed up beside a map.
const RECENT: usize = 10;
/// Digits of the cells in the read-out's data, see [`level`].
const LEVELS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The section of all MoE layers; empty if there is none.
pub(super) fn html(gathered: &Gathered) -> String {
    if gathered.layers.is_empty() {
        return String::new();
    }
    let experts: usize = gathered.layers.iter().map(|layer| layer.experts).sum();
    let columns = (CELLS / experts).clamp(MIN_COLUMNS, MAX_COLUMNS);
    let mut html = String::from(
        "<section><h2>Expert load</h2>\n<p class=\"note\">Share of the routed tokens that each expert was given, as a \
         multiple of the balanced share (1 / experts). Experts run down, steps to the right; the bars are the last tenth \
         of the run, the dashed line is the balanced share.</p>\n<div class=\"legend\">",
    );
    for (class, name) in NAMES.iter().enumerate() {
        let name = name.replace('<', "&lt;").replace('>', "&gt;");
        let _ = write!(html, "<span class=\"k{class}\"><svg><rect width=\"100%\" height=\"100%\"/></svg>{name}</span>");
    }
    html.push_str("</div>\n<div class=\"maps\">\n");
    for (index, layer) in gathered.layers.iter().enumerate() {
        map(&mut html, index, layer, columns);
    }
    html.push_str("</div></section>\n");
    html
}

/// At the end of the run: experts without a load, experts in all, and the dropped share of the worst layer.
pub(super) fn summary(gathered: &Gathered) -> Option<(usize, usize, f64)> {
    let ends: Vec<End> = gathered.layers.iter().filter_map(End::of).collect();
    let idle = ends.iter().map(|end| end.idle).sum();
    let experts = gathered.layers.iter().map(|layer| layer.experts).sum();
    let dropped = ends.iter().map(|end| end.dropped).fold(0.0, f64::max);
    (!ends.is_empty()).then_some((idle, experts, dropped))
}

/// A layer at the end of the run.
struct End {
    /// Multiples of the balanced share.
    ratios: Vec<f64>,
    dropped: f64,
    /// Experts with less than a hundredth of the balanced share.
    idle: usize,
    /// exp of the entropy of the shares: how many experts equally used would be as spread out.
    effective: f64,
}

impl End {
    fn of(layer: &LayerBins) -> Option<Self> {
        let bins: Vec<&LoadBin> = layer.bins.filled().collect();
        let recent = &bins[bins.len() - bins.len().div_ceil(RECENT)..];
        let count = recent.len() as f64;
        let mut ratios = vec![0.0; layer.experts];
        for bin in recent {
            ratios.iter_mut().zip(bin.ratios()).for_each(|(sum, ratio)| *sum += ratio / count);
        }
        let total: f64 = ratios.iter().sum();
        let shares = ratios.iter().map(|ratio| ratio / total).filter(|share| *share > 0.0);
        let effective = shares.map(|share| -share * share.ln()).sum::<f64>().exp();
        let idle = ratios.iter().filter(|ratio| class(**ratio) == 0).count();
        let dropped = recent.iter().map(|bin| bin.dropped()).sum::<f64>() / count;
        (!recent.is_empty()).then_some(Self { ratios, dropped, idle, effective })
    }
}

fn class(ratio: f64) -> usize {
    EDGES.iter().position(|edge| ratio < *edge).unwrap_or(EDGES.len())
}

/// 0 for none, else 1..=63 for 2^-5 to 2^5.3 in steps of a sixth of an octave: 6 percent, enough to read out.
fn level(ratio: f64) -> usize {
    if ratio <= 0.0 { 0 } else { ((ratio.log2() + 5.0) * 6.0).round().clamp(0.0, 62.0) as usize + 1 }
}

fn map(html: &mut String, index: usize, layer: &LayerBins, columns: usize) {
    let Some(end) = End::of(layer) else { return };
    let experts = layer.experts;
    let bins = layer.bins.clone().at_most(columns);
    let columns = cells(bins.all());
    let count = columns.len();
    let balanced = 100.0 / experts as f64;
    let _ = write!(
        html,
        "<figure class=\"map\"><figcaption><h3>Layer {}</h3><span class=\"unit\">{experts} {} · balanced share {}%</span>",
        layer.layer,
        if experts == 1 { "expert" } else { "experts" },
        short(balanced)
    );
    if end.idle > 0 {
        let _ = write!(html, "<span class=\"warn\">{} idle</span>", end.idle);
    }
    html.push_str("</figcaption>\n");
    // One pixel an expert at least.
    let height = (12 * experts).clamp(36, experts.max(240));
    let _ = write!(html, "<div class=\"grid2\" style=\"--h:{height}px\"><div class=\"ys\">");
    for expert in expert_ticks(experts) {
        let middle = (expert as f64 + 0.5) / experts as f64 * 100.0;
        let _ = write!(html, "<span style=\"top:{middle:.2}%\">{expert}</span>");
    }
    let _ = write!(
        html,
        "</div><svg class=\"cells\" viewBox=\"0 0 {count} {experts}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"Load of the experts of layer {} over steps\" data-map=\"map{index}\">",
        layer.layer
    );
    for (class, path) in runs(&columns, experts).iter().enumerate().filter(|(_, path)| !path.is_empty()) {
        let _ = write!(html, "<path class=\"k{class}\" d=\"{path}\"/>");
    }
    html.push_str("</svg>");
    bars(html, &end);
    html.push_str("<div class=\"xs\">");
    let steps = count as f64 * bins.width() as f64;
    for (value, text) in Scale::new((0.0, steps), false, (0.0, 100.0)).ticks(5) {
        let at = value / steps * 100.0;
        if at < 92.0 {
            let _ = write!(html, "<span style=\"left:{at:.2}%\">{text}</span>");
        }
    }
    html.push_str("<span class=\"last\">steps</span></div><div class=\"xr\">last tenth</div></div>\n");
    stats(html, &end);
    let cells: String = columns.iter().flatten().map(|&ratio| char::from(LEVELS[level(ratio)])).collect();
    let json = serde_json::json!({"experts": experts, "columns": count, "width": bins.width(), "cells": cells});
    let _ = writeln!(html, "<script type=\"application/json\" id=\"map{index}\">{json}</script></figure>");
}

/// Column by column the ratios of all experts. A column without a measurement shows the one before it (the first ones
/// the first measurement), for loads may be written less often than once a column.
fn cells(bins: &[Option<LoadBin>]) -> Vec<Vec<f64>> {
    let Some(mut latest) = bins.iter().flatten().next() else { return Vec::new() };
    let column = |bin| {
        latest = Option::unwrap_or(bin, latest);
        latest.ratios().collect()
    };
    bins.iter().map(Option::as_ref).map(column).collect()
}

/// One SVG path for each class, of rectangles one expert high that join equal neighbours in time.
fn runs(columns: &[Vec<f64>], experts: usize) -> [String; 10] {
    let mut paths: [String; 10] = Default::default();
    for expert in 0..experts {
        let mut from = 0;
        while from < columns.len() {
            let this = class(columns[from][expert]);
            let length = columns[from..].iter().take_while(|column| class(column[expert]) == this).count();
            let _ = write!(paths[this], "M{from} {expert}h{length}v1h-{length}z");
            from += length;
        }
    }
    paths
}

/// Shares at the end of the run, row by row beside the map.
fn bars(html: &mut String, end: &End) {
    let widest = end.ratios.iter().copied().fold(2.0, f64::max);
    let _ = write!(html, "<svg class=\"bars\" viewBox=\"0 0 100 {}\" preserveAspectRatio=\"none\">", end.ratios.len());
    let (top, bar) = if end.ratios.len() > 60 { (0.0, 1.0) } else { (0.14, 0.72) };
    for (expert, &ratio) in end.ratios.iter().enumerate() {
        // An idle expert has no bar of its own length, so its whole row is marked.
        let (kind, width) = if class(ratio) == 0 { ("gone", 100.0) } else { ("bar", ratio / widest * 100.0) };
        let _ =
            write!(html, "<path class=\"{kind}\" d=\"M0 {:.2}h{width:.1}v{bar}h-{width:.1}z\"/>", expert as f64 + top);
    }
    let _ = write!(html, "<path class=\"even\" d=\"M{:.1} 0V{}\"/></svg>", 100.0 / widest, end.ratios.len());
}

fn stats(html: &mut String, end: &End) {
    let by = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
    let busiest = end.ratios.iter().enumerate().max_by(by);
    let idlest = end.ratios.iter().enumerate().min_by(by);
    let (Some((busy, most)), Some((idle, least))) = (busiest, idlest) else { return };
    let experts = end.ratios.len();
    html.push_str("<p class=\"note\">");
    if experts > 1 {
        let _ = write!(
            html,
            "Busiest: expert {busy} at {most:.2}×; idlest: expert {idle} at {least:.2}×; effectively {:.1} of {experts} in \
             use. ",
            end.effective
        );
    }
    let _ = write!(html, "Dropped: {}%.</p>", short((end.dropped * 1e5).round() / 1e3));
}

/// A few experts to name at the side, the first and the last among them.
fn expert_ticks(experts: usize) -> Vec<usize> {
    let step = [1, 2, 4, 8, 16, 32, 64, 128, 256].into_iter().find(|step| experts.div_ceil(*step) <= 9).unwrap_or(512);
    let mut ticks: Vec<usize> = (0..experts).step_by(step).collect();
    // The last one instead of a neighbour that its text would run into.
    if ticks.last().is_some_and(|&last| last + step.div_ceil(2) >= experts && last != 0 && step > 1) {
        ticks.pop();
    }
    if experts > 1 && ticks.last() != Some(&(experts - 1)) {
        ticks.push(experts - 1);
    }
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_symmetric_and_only_no_load_is_idle() {
        let of = [0.0, 0.009, 0.02, 0.3, 0.6, 0.8, 1.0, 1.2, 1.7, 3.0, 40.0].map(class);
        assert_eq!(of, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn runs_cover_every_cell_once() {
        let columns: Vec<Vec<f64>> =
            (0..50).map(|c| (0..7).map(|e| f64::from((c * 7 + e * e) % 11) / 3.0).collect()).collect();
        let mut seen = vec![None; 50 * 7];
        for (class, path) in runs(&columns, 7).iter().enumerate() {
            for part in path.split('M').filter(|part| !part.is_empty()) {
                let number = |text: &str| text.parse::<usize>().unwrap();
                let (x, rest) = part.split_once(' ').unwrap();
                let (y, rest) = rest.split_once('h').unwrap();
                let (length, _) = rest.split_once('v').unwrap();
                for column in number(x)..number(x) + number(length) {
                    assert_eq!(seen[column * 7 + number(y)].replace(class), None);
                }
            }
        }
        for (at, ratio) in columns.iter().flatten().enumerate() {
            assert_eq!(seen[at], Some(class(*ratio)));
        }
    }

    #[test]
    fn ticks_name_the_first_and_the_last_expert() {
        for experts in 1..=512 {
            let ticks = expert_ticks(experts);
            assert!(ticks[0] == 0 && ticks.last() == Some(&(experts - 1)) && ticks.len() <= 10, "{experts} {ticks:?}");
        }
        assert_eq!(expert_ticks(8), [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
