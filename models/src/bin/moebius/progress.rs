//! What a person sees while a model trains: a progress bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use moebius_models::distill::cache;
use moebius_models::metrics::{EvalRecord, TrainRecord};

use crate::text::{self, note};

/// Seconds between plain lines.
const QUIET: Duration = Duration::from_secs(10);

pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    first: u64,
    begun: Instant,
    printed: Option<Instant>,
    /// Running means over about twenty steps, so that the figures can be read.
    loss: Option<f64>,
    speed: Option<f64>,
    validation: Option<f64>,
}

/// Columns of a line with all figures and no bar.
const FIGURES: usize = 72;

/// The line for a terminal of so many columns: a bar where there is room beside the figures.
fn template(columns: usize) -> String {
    match columns.saturating_sub(FIGURES).min(28) {
        0..6 => "{pos}/{len}  {wide_msg}".into(),
        width => format!("{{bar:{width}.cyan/dim}} {{pos}}/{{len}}  {{wide_msg}}"),
    }
}

fn console_width() -> usize {
    usize::from(console::Term::stderr().size().1)
}

impl Progress {
    /// Of a run of `total` steps of which `done` are done.
    pub(crate) fn new(total: u64, done: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_position(done);
            let style = ProgressStyle::with_template(&template(console_width()));
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━╌"));
            bar
        });
        Progress {
            bar,
            total,
            first: done,
            begun: Instant::now(),
            printed: None,
            loss: None,
            speed: None,
            validation: None,
        }
    }

    pub(crate) fn step(&mut self, record: &TrainRecord) {
        let smooth = |old: Option<f64>, new: f64| Some(old.map_or(new, |o| o + (new - o) / 20.0));
        self.loss = smooth(self.loss, record.lm_loss);
        self.speed = smooth(self.speed, record.tokens_per_s);
        let done = (record.step - self.first).max(1);
        let left = self.begun.elapsed().mul_f64((self.total - record.step) as f64 / done as f64);
        let loss = self.loss.unwrap_or(record.lm_loss);
        let speed = text::count(self.speed.unwrap_or(record.tokens_per_s));
        // The most wanted first: a narrow terminal cuts the end off.
        let mut line = format!("loss {loss:.3}  {} left  {speed} tokens/s", text::duration(left));
        if let Some(validation) = self.validation {
            line += &format!("  val {validation:.3}");
        }
        match &self.bar {
            Some(bar) => {
                bar.set_message(line);
                bar.set_position(record.step);
            }
            None => {
                let last = record.step == self.total;
                if last || self.printed.is_none_or(|at| at.elapsed() >= QUIET) {
                    self.printed = Some(Instant::now());
                    note!("step {}/{}  {line}", record.step, self.total);
                }
            }
        }
    }

    pub(crate) fn evaluated(&mut self, record: &EvalRecord) {
        self.validation = Some(record.val_loss);
        let line = format!(
            "step {}: validation loss {:.4} nats per token, {:.4} bits per byte",
            record.step, record.val_loss, record.bits_per_byte
        );
        self.say(&line);
    }

    /// A line of its own, above the bar.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note!("{line}")),
            None => note!("{line}"),
        }
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

/// What a person sees while the cache of a teacher is built.
pub(crate) struct Caching {
    bar: Option<ProgressBar>,
    begun: Instant,
    printed: Option<Instant>,
}

impl Caching {
    pub(crate) fn begin() -> Caching {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template(&template(console_width()));
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━╌"));
            bar
        });
        Caching { bar, begun: Instant::now(), printed: None }
    }

    pub(crate) fn show(&mut self, cache::Progress { done, wanted, before, bytes_per_batch }: cache::Progress) {
        let bytes = |batches: u64| text::bytes((batches * bytes_per_batch) as f64);
        let new = done.saturating_sub(before);
        let left = match new {
            0 => String::new(),
            new => {
                let left = self.begun.elapsed().mul_f64(wanted.saturating_sub(done) as f64 / new as f64);
                format!("  {} left", text::duration(left))
            }
        };
        let line = format!("teacher's cache {} of {}{left}", bytes(done), bytes(wanted));
        match &self.bar {
            Some(bar) => {
                bar.set_length(wanted);
                bar.set_message(line);
                bar.set_position(done);
            }
            None => {
                if done == wanted || self.printed.is_none_or(|at| at.elapsed() >= QUIET) {
                    self.printed = Some(Instant::now());
                    note!("batch {done}/{wanted}  {line}");
                }
            }
        }
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_drawn_where_there_is_room() {
        assert_eq!(template(40), "{pos}/{len}  {wide_msg}");
        assert_eq!(template(77), "{pos}/{len}  {wide_msg}");
        assert!(template(80).starts_with("{bar:8."));
        assert!(template(200).starts_with("{bar:28."));
    }
}
