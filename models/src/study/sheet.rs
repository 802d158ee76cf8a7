//! Everything that is known of a study's arms.

use super::measure::Unit;
use super::{Measure, RunResult, Sample, Study, Timing, Tuning};
use crate::config::Config;
use crate::report::scale::short;

/// Everything that is known of a study's arms, by arm and seed.
#[derive(Clone, Debug)]
pub struct Sheet<'s> {
    /// The study.
    pub study: &'s Study,
    /// How many seeds it has.
    pub seeds: usize,
    /// The settings of each arm, as changed and tuned.
    pub configs: Vec<Config>,
    /// The finished runs of each arm, by seed.
    pub results: Vec<Vec<Option<RunResult>>>,
    /// What steps take, by arm; empty before it is measured.
    pub timings: Vec<Timing>,
    /// What was tried to tune each arm; empty without tuning.
    pub tunings: Vec<Tuning>,
}

impl Sheet<'_> {
    /// Finished runs, and runs in all.
    pub fn runs(&self) -> (usize, usize) {
        let done = self.results.iter().flatten().filter(|run| run.is_some()).count();
        (done, self.seeds * self.study.arms.len())
    }

    /// A measurement as people read it: mean and standard deviation over the seeds.
    pub fn text(&self, arm: usize, measure: Measure) -> String {
        if measure == Measure::Experts {
            return experts(&self.configs[arm]);
        }
        let sample = self.sample(arm, measure);
        if sample.values.is_empty() {
            return if sample.bounds > 0 { "not reached".into() } else { "–".into() };
        }
        let text = with_spread(&sample, measure.unit());
        match (measure, sample.bounds) {
            (_, 0) => text,
            (Measure::LessTraining(_) | Measure::LessTime(_), _) => format!("< {text}"),
            (_, missing) => format!("{text} (not reached by {missing} of {})", missing + sample.values.len()),
        }
    }
}

/// The experts of each MoE layer, where alike once.
fn experts(config: &Config) -> String {
    let layers: Vec<usize> = config.model.experts_per_layer();
    if layers.iter().all(|&e| e == 0) {
        return "none".into();
    }
    let interval = config.model.expert_interval.max(1);
    let able: Vec<usize> = layers.iter().skip(interval - 1).step_by(interval).copied().collect();
    let all_alike = able.windows(2).all(|pair| pair[0] == pair[1]);
    match able.first() {
        Some(first) if all_alike => format!("{} × {first}", able.len()),
        Some(_) | None => able.iter().map(|e| e.max(&1).to_string()).collect::<Vec<_>>().join(" "),
    }
}

/// A number of a kind.
pub(super) fn number(value: f64, unit: Unit) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    match unit {
        Unit::Loss => format!("{value:.4}"),
        Unit::Times => format!("{value:.2}"),
        Unit::Bytes => match value {
            v if v >= 1e9 => format!("{:.2} GB", v / 1e9),
            v if v >= 1e6 => format!("{:.1} MB", v / 1e6),
            v if v >= 1e4 => format!("{:.1} kB", v / 1e3),
            v => format!("{v:.0} B"),
        },
        Unit::Flops if value == 0.0 => "0".into(),
        Unit::Flops => format!("{value:.2e}"),
        Unit::Count | Unit::Time | Unit::Setting => short(value),
    }
}

/// Mean ± standard deviation; a single number alone.
pub(super) fn with_spread(sample: &Sample, unit: Unit) -> String {
    let mean = number(sample.mean(), unit);
    let deviation = sample.deviation();
    if !deviation.is_finite() {
        return mean;
    }
    let spread = match unit {
        Unit::Time => short(format!("{deviation:.1e}").parse().unwrap_or(deviation)),
        Unit::Loss | Unit::Times | Unit::Bytes | Unit::Flops | Unit::Count | Unit::Setting => number(deviation, unit),
    };
    format!("{mean} ± {spread}")
}
