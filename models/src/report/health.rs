//! The health of the routers over the run: a chart for each quantity, a line for each MoE layer; and alarms.

use std::fmt::Write;

use super::chart::{Chart, Line};
use super::gather::{Dead, Gathered, HealthBin, LayerBins, Stat};
use super::page::escape;
use super::scale::grouped;

/// Points of all lines of a chart together: bounds the size of the page.
const POINTS: usize = 2_400;
const MAX_POINTS: usize = 160;
const MIN_POINTS: usize = 20;
/// Colours of lines, from the first layer to the last.
const COLOURS: [&str; 8] = ["l0", "l1", "l2", "l3", "l4", "l5", "l6", "l7"];
/// Alarms that are listed.
const LISTED: usize = 8;
/// Dead experts of a layer that are listed.
const LISTED_DEAD: usize = 32;

/// What is drawn: id, title, unit, and where the values are.
type Quantity = (&'static str, &'static str, &'static str, fn(&HealthBin) -> Stat);
const QUANTITIES: [Quantity; 5] = [
    ("entropy", "Router entropy", "nats per token", |bin| bin.entropy),
    ("dropped", "Dropped", "fraction of the choices", |bin| bin.dropped),
    ("dead", "Dead experts", "without a token for many steps", |bin| bin.dead),
    ("coefficient", "Side coefficient", "mean over tokens", |bin| bin.coefficient),
    ("logits", "Logit scale", "root of the z-loss", |bin| bin.logit_scale),
];

/// The class of line `i` of `n`: neighbours differ as much as the colours allow.
fn colour(i: usize, n: usize) -> &'static str {
    COLOURS[if n <= COLOURS.len() { i * (COLOURS.len() - 1) / (n - 1).max(1) } else { i * COLOURS.len() / n }]
}

/// The section of all MoE layers; nothing if no record tells of their health.
pub(super) fn curves(html: &mut String, gathered: &Gathered) {
    let layers: &[LayerBins] = &gathered.layers;
    let known = |layer: &LayerBins| layer.health.filled().any(|bin| bin.point(|bin| bin.entropy).is_some());
    if !layers.iter().any(known) {
        return;
    }
    let points = (POINTS / layers.len()).clamp(MIN_POINTS, MAX_POINTS);
    let bins: Vec<_> = layers.iter().map(|layer| layer.health.clone().at_most(points)).collect();
    let mut drawn = String::new();
    for (id, title, unit, of) in QUANTITIES {
        let line = |(i, bins): (usize, &super::bins::Bins<HealthBin>)| Line {
            class: colour(i, layers.len()),
            name: format!("layer {}", layers[i].layer).into(),
            points: bins.filled().filter_map(|bin| bin.point(of)).collect(),
            dots: false,
        };
        let lines: Vec<Line> = bins.iter().enumerate().map(line).filter(|line| !line.points.is_empty()).collect();
        // A dropless run has nothing to show of drops.
        if id == "dropped" && lines.iter().flat_map(|line| &line.points).all(|point| point.1 == 0.0) {
            continue;
        }
        let (steps, from_zero, many) = (gathered.steps as f64, id != "logits", true);
        drawn.push_str(&Chart { id, title, unit, lines, steps, from_zero, many, ..Chart::default() }.html());
    }
    html.push_str(
        "<section><h2>Router health</h2>\n<p class=\"note\">One line for each MoE layer, from the first to the last. Entropy is \
         that of the router's probabilities, 0 where it is sure of every token; the side coefficient is the weight of the network \
         beside the experts; the logit scale is the root of the mean square of logsumexp(logits).</p>\n<div class=\"layers\">",
    );
    for (i, layer) in layers.iter().enumerate() {
        let _ = write!(html, "<span class=\"{}\">layer {}</span>", colour(i, layers.len()), layer.layer);
    }
    let _ = write!(html, "</div>\n<div class=\"charts\">\n{drawn}</div>");
    graveyard(html, layers);
    html.push_str("</section>\n");
}

/// Dead experts of all layers at the last measurement; `None` if a layer does not tell.
pub(super) fn dead(gathered: &Gathered) -> Option<usize> {
    gathered.layers.iter().map(|layer| Some(layer.dead.as_ref()?.len())).sum()
}

/// Which experts are dead and since when, a row for each layer that has any.
fn graveyard(html: &mut String, layers: &[LayerBins]) {
    let mut rows = String::new();
    for layer in layers {
        let Some(dead) = layer.dead.as_ref().filter(|dead| !dead.is_empty()) else { continue };
        let named = |dead: &Dead| match dead.last {
            Some(step) => format!("{} (step {})", dead.expert, grouped(step)),
            None => format!("{} (never)", dead.expert),
        };
        let mut named: Vec<String> = dead.iter().take(LISTED_DEAD).map(named).collect();
        named.extend(
            dead.len().checked_sub(LISTED_DEAD).filter(|&more| more > 0).map(|more| format!("and {more} more")),
        );
        let _ = writeln!(
            rows,
            "<tr><th scope=\"row\">Layer {}: {} of {}</th><td>{}</td></tr>",
            layer.layer,
            dead.len(),
            layer.experts,
            named.join(", ")
        );
    }
    if !rows.is_empty() {
        let _ = write!(
            html,
            "<h3>Dead experts at the end</h3>\n<p class=\"note\">By layer: number of the expert, and when it last had a \
             token.</p>\n<table><tbody>\n{rows}</tbody></table>\n"
        );
    }
}

/// The first alarms, if there were any.
pub(super) fn alarms(html: &mut String, gathered: &Gathered) {
    if gathered.alarm_count == 0 {
        return;
    }
    let count = gathered.alarm_count;
    let plural = if count == 1 { "" } else { "s" };
    let _ = write!(html, "<div class=\"alarm\"><b>{} alarm{plural}</b><ul>", grouped(count as u64));
    for alarm in gathered.alarms.iter().take(LISTED) {
        let _ = write!(html, "<li>{}</li>", escape(&alarm.to_string()));
    }
    if count > LISTED {
        let _ = write!(html, "<li>and {} more in metrics.jsonl</li>", grouped((count - LISTED) as u64));
    }
    html.push_str("</ul></div>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_go_from_the_first_to_the_last_and_few_lines_share_none() {
        for n in 1..=100 {
            let all: Vec<&str> = (0..n).map(|i| colour(i, n)).collect();
            assert!(all.is_sorted(), "{all:?}");
            assert!(n == 1 || (all[0] == "l0" && all[n - 1] == "l7"), "{all:?}");
            assert!(n > 8 || all.windows(2).all(|pair| pair[0] != pair[1]), "{all:?}");
        }
    }
}
