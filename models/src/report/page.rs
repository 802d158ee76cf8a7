//! The page itself.

use std::fmt::Write;

use super::RunFacts;
use super::chart::{Chart, Line};
use super::gather::{Gathered, Stat, TrainBin, smooth};
use super::scale::{grouped, short};
use super::{health, heat};

/// Evaluations drawn; more are thinned out evenly.
const MAX_EVALS: usize = 300;
/// Evaluations up to this many are marked one by one.
const MAX_DOTS: usize = 60;

/// Makes text safe inside an element and inside a quoted attribute.
pub(crate) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

pub(super) fn html(facts: &RunFacts, gathered: &Gathered) -> String {
    let title = if facts.title.is_empty() { "Moebius run" } else { &facts.title };
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'\">\n<title>{0}</title>\n<style>{1}</style></head>\n<body><main>\n\
         <header><h1>{0}</h1>",
        escape(title),
        include_str!("style.css"),
    );
    let _ = writeln!(
        html,
        "<p class=\"lead\">{} steps · {} tokens</p></header>",
        grouped(gathered.steps),
        short(gathered.tokens as f64)
    );
    if let Some(step) = gathered.not_finite {
        let _ = writeln!(html, "<p class=\"alarm\">The loss was not finite at step {}.</p>", grouped(step));
    }
    if !gathered.trained && gathered.evals.is_empty() {
        html.push_str("<p class=\"alarm\">No measurements yet.</p>\n");
    }
    health::alarms(&mut html, gathered);
    tiles(&mut html, facts, gathered);
    curves(&mut html, gathered);
    health::curves(&mut html, gathered);
    html.push_str(&heat::html(gathered));
    table(&mut html, facts, gathered);
    for (heading, text) in [("Command", &facts.command), ("Configuration", &facts.config)] {
        if !text.is_empty() {
            let _ = writeln!(html, "<section><h2>{heading}</h2><pre>{}</pre></section>", escape(text));
        }
    }
    let _ = write!(
        html,
        "</main><div id=\"tip\" hidden></div>\n<script>{}</script>\n</body></html>\n",
        include_str!("script.js")
    );
    html
}

/// The few numbers one looks for first.
fn tiles(html: &mut String, facts: &RunFacts, gathered: &Gathered) {
    let mut tile = |name: &str, value: String, more: String| {
        let _ = write!(html, "<div><dt>{name}</dt><dd>{value}</dd><dd class=\"more\">{more}</dd></div>");
    };
    if let Some(best) = gathered.best() {
        let at = format!("best, at step {}", grouped(best.step));
        tile("Validation loss", format!("{:.3} <small>nats</small>", best.val_loss), at.clone());
        tile("Bits per byte", format!("{:.3}", best.bits_per_byte), at);
    }
    if let Some(speed) = median(gathered) {
        tile("Speed", format!("{} <small>tokens/s</small>", short(speed)), "median".to_owned());
    }
    if facts.total_params > 0 {
        let more = if facts.active_params > 0 && facts.active_params != facts.total_params {
            format!("{} active per token", short(facts.active_params as f64))
        } else {
            "all active".to_owned()
        };
        tile("Parameters", short(facts.total_params as f64), more);
    }
    if let Some((dead, experts, dropped)) = heat::summary(gathered) {
        let more = format!("worst layer drops {}%", short((dropped * 1e5).round() / 1e3));
        tile("Dead experts", format!("{dead} <small>of {experts}</small>"), more);
    }
    // The closure writes only tiles, so the list is put around them afterwards.
    if let Some(first) = html.find("<div><dt>") {
        html.insert_str(first, "<dl class=\"tiles\">");
        html.push_str("</dl>\n");
    }
}

fn median(gathered: &Gathered) -> Option<f64> {
    let mut speeds: Vec<f64> = gathered.curve(|bin| bin.tokens_per_s).into_iter().map(|point| point.1).collect();
    speeds.sort_by(f64::total_cmp);
    speeds.get(speeds.len() / 2).copied()
}

fn curves(html: &mut String, gathered: &Gathered) {
    let steps = gathered.steps as f64;
    let every = gathered.evals.len().div_ceil(MAX_EVALS).max(1);
    // Counted from the end: the last evaluation is always drawn.
    let mut evals: Vec<_> = gathered.evals.iter().rev().step_by(every).collect();
    evals.reverse();
    let eval_line = |name: &'static str, of: &dyn Fn(&crate::metrics::EvalRecord) -> f64| {
        let points: Vec<(f64, f64)> =
            evals.iter().map(|eval| (eval.step as f64, of(eval))).filter(|point| point.1.is_finite()).collect();
        Line { class: "b", name: name.into(), dots: points.len() <= MAX_DOTS, points }
    };
    let line = |name: &'static str, of: fn(&TrainBin) -> Stat| Line {
        class: "a",
        name: name.into(),
        points: smooth(&gathered.curve(of)),
        dots: false,
    };
    let loss: fn(&TrainBin) -> Stat = |bin| bin.lm_loss;
    let lines = [line("training", loss), eval_line("validation", &|eval| eval.val_loss)];
    let chart = Chart {
        id: "loss",
        title: "Loss",
        unit: "cross entropy, nats per token",
        raw: gathered.curve(loss),
        band: gathered.band(loss),
        lines: lines.into_iter().filter(|line| !line.points.is_empty()).collect(),
        steps,
        large: true,
        from_zero: false,
        many: false,
        mark: gathered.taught.filter(|&step| step < gathered.steps).map(|step| (step as f64, "without teacher")),
    };
    let small = |id, title, unit, lines: Line| Chart { id, title, unit, lines: vec![lines], steps, ..Chart::default() };
    let noisy = |id, title, unit, of: fn(&TrainBin) -> Stat| Chart {
        raw: gathered.curve(of),
        ..small(id, title, unit, line(title, of))
    };
    let exact = |name, of: fn(&TrainBin) -> Stat| Line { points: gathered.curve(of), ..line(name, of) };
    let mut drawn = chart.html();
    drawn.push_str("<div class=\"charts\">\n");
    let bits = eval_line("bits per byte", &|eval| eval.bits_per_byte);
    drawn.push_str(&small("bits", "Bits per byte", "validation text", bits).html());
    let rate = small("lr", "Learning rate", "", exact("learning rate", |bin| bin.lr));
    drawn.push_str(&Chart { from_zero: true, ..rate }.html());
    drawn.push_str(&noisy("norm", "Gradient norm", "before clipping", |bin| bin.grad_norm).html());
    let speed = noisy("speed", "Speed", "tokens per second", |bin| bin.tokens_per_s);
    drawn.push_str(&Chart { from_zero: true, ..speed }.html());
    let aux: fn(&TrainBin) -> Stat = |bin| bin.aux_loss;
    if gathered.train.filled().any(|bin| bin.aux_loss.max > 0.0) {
        drawn.push_str(&noisy("aux", "Auxiliary loss", "as weighted in training", aux).html());
    }
    if gathered.taught.is_some() {
        let kd = noisy("kd", "Distillation", "divergence from the teacher, as weighted in training", |bin| bin.kd_loss);
        drawn.push_str(&kd.html());
    }
    drawn.push_str("</div>\n");
    if drawn.contains("<figure") {
        let _ = writeln!(html, "<section><h2>Training</h2>\n{drawn}</section>");
    }
}

fn table(html: &mut String, facts: &RunFacts, gathered: &Gathered) {
    let mut rows: Vec<(&str, String)> = Vec::new();
    if !facts.device.is_empty() {
        rows.push(("Device", facts.device.clone()));
    }
    if facts.total_params > 0 {
        rows.push(("Parameters", grouped(facts.total_params)));
    }
    if facts.active_params > 0 {
        rows.push(("Active parameters per token", grouped(facts.active_params)));
    }
    rows.push(("Steps", grouped(gathered.steps)));
    rows.push(("Tokens", grouped(gathered.tokens)));
    if let Some(&(_, loss)) = smooth(&gathered.curve(|bin| bin.lm_loss)).last() {
        rows.push(("Training loss, last", format!("{loss:.4} nats per token")));
    }
    if let Some(step) = gathered.taught {
        let left = format!("left after step {}", grouped(step));
        rows.push(("Teacher", if step < gathered.steps { left } else { "followed to the end".into() }));
    }
    let both = |loss: f64, bits: f64| format!("{loss:.4} nats per token, {bits:.4} bits per byte");
    if let Some(last) = gathered.evals.last() {
        rows.push(("Validation, last", both(last.val_loss, last.bits_per_byte)));
    }
    if let Some(best) = gathered.best() {
        let text = format!("{} (step {})", both(best.val_loss, best.bits_per_byte), grouped(best.step));
        rows.push(("Validation, best", text));
    }
    rows.extend(facts.more.iter().map(|(name, value)| (name.as_str(), value.clone())));
    html.push_str("<section><h2>Summary</h2><table><tbody>\n");
    for (name, value) in rows {
        let _ = writeln!(html, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(name), escape(&value));
    }
    html.push_str("</tbody></table></section>\n");
}
