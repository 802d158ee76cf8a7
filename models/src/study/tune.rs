//! Tuning: the same short grid for every arm, on a seed of its own, before the real seeds.

use serde::{Deserialize, Serialize};

use super::train::{Wanted, Weights, Workshop};
use super::{Arm, StudyError, StudyEvent};
use crate::config::Config;

/// The seed that is tuned on; real seeds begin with 1.
const SEED: u64 = 0;
/// A run that tunes is so many times shorter.
const SHORTER: u64 = 4;
/// Learning rates, as multiples of the scale's.
const RATES: [f64; 3] = [0.5, 1.0, 2.0];
/// Further auxiliary coefficients that are tried with the best learning rate, as multiples of the scale's.
const COEFFICIENTS: [f64; 2] = [0.1, 10.0];

/// A setting that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Try {
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Coefficient of the load-balancing loss.
    pub aux_coef: f64,
    /// Validation loss at the end of the short run, nats per token; absent if it diverged.
    pub loss: Option<f64>,
}

/// What was tried for an arm.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// The arm.
    pub arm: &'static str,
    /// All settings, in the order they were tried; empty for an arm that takes those of another.
    pub tries: Vec<Try>,
    /// The one with the lowest loss.
    pub learning_rate: f64,
    /// Its coefficient.
    pub aux_coef: f64,
    /// The arm that it was found for.
    pub found_for: &'static str,
}

/// Changes the learning rate; the lowest one keeps its share of it.
fn set_rate(config: &mut Config, rate: f64) {
    let train = &mut config.train;
    train.min_learning_rate *= rate / train.learning_rate;
    train.learning_rate = rate;
}

impl Tuning {
    /// Whether the learning rate is the highest or lowest that was tried, so that the best may lie beyond.
    pub fn is_at_the_edge(&self) -> bool {
        let rates = self.tries.iter().map(|one| one.learning_rate);
        let (low, high) = rates.fold((f64::INFINITY, 0.0), |(l, h): (f64, f64), r| (l.min(r), h.max(r)));
        !self.tries.is_empty() && (self.learning_rate <= low || self.learning_rate >= high)
    }

    /// Gives the settings to an arm's configuration.
    pub(super) fn apply(&self, config: &mut Config) {
        set_rate(config, self.learning_rate);
        config.model.aux_coef = self.aux_coef;
    }
}

/// The short run of a setting.
fn short(arm: &Arm, config: &Config, rate: f64, coefficient: f64) -> Wanted {
    let mut config = config.clone();
    let train = &mut config.train;
    train.warmup_steps = train.warmup_steps.map(|steps| steps / SHORTER);
    train.warmup_tokens = train.warmup_tokens.map(|tokens| tokens / SHORTER);
    (train.decay_steps, train.decay_tokens) = (None, None);
    (train.eval_every, train.checkpoint_every, train.seed) = (0, 0, SEED);
    let steps = (config.total_steps() / SHORTER).max(1);
    (config.train.steps, config.train.tokens) = (Some(steps), None);
    set_rate(&mut config, rate);
    config.model.aux_coef = coefficient;
    let folder = format!("tune-{}", arm.folder);
    Wanted { arm: arm.name, folder, config, teacher: None, tuning: true }
}

/// Runs in all for these arms.
pub(super) fn count(arms: &[Arm]) -> usize {
    let own = arms.iter().filter(|arm| arm.tuned_as.is_none());
    own.map(|arm| RATES.len() + if arm.is_sparse() { COEFFICIENTS.len() } else { 0 }).sum()
}

/// The best settings of every arm. None if it was asked to stop.
pub(super) fn all(
    workshop: &Workshop<'_>,
    arms: &[Arm],
    configs: &[Config],
    observer: &mut dyn FnMut(StudyEvent<'_>),
) -> Result<Option<Vec<Tuning>>, StudyError> {
    let of = count(arms);
    let mut number = 0;
    let mut tunings: Vec<Tuning> = Vec::new();
    for (arm, config) in arms.iter().zip(configs).filter(|(arm, _)| arm.tuned_as.is_none()) {
        let (rate, coefficient) = (config.train.learning_rate, config.model.aux_coef);
        let mut tries: Vec<Try> = Vec::new();
        let mut attempt = |tries: &mut Vec<Try>, rate: f64, coefficient: f64| -> Result<bool, StudyError> {
            number += 1;
            observer(StudyEvent::Tuning { arm: arm.name, number, of, learning_rate: rate, aux_coef: coefficient });
            let wanted = short(arm, config, rate, coefficient);
            let Some(result) = workshop.train(&wanted, Weights::Forgotten, observer)? else { return Ok(false) };
            workshop.forget_weights(&wanted)?;
            tries.push(Try { learning_rate: rate, aux_coef: coefficient, loss: result.validation_loss });
            Ok(true)
        };
        for times in RATES {
            if !attempt(&mut tries, rate * times, coefficient)? {
                return Ok(None);
            }
        }
        let best = best(arm.name, &tries)?;
        if arm.is_sparse() {
            for times in COEFFICIENTS {
                if !attempt(&mut tries, best.learning_rate, coefficient * times)? {
                    return Ok(None);
                }
            }
        }
        let best = self::best(arm.name, &tries)?;
        let (learning_rate, aux_coef) = (best.learning_rate, best.aux_coef);
        tunings.push(Tuning { arm: arm.name, tries, learning_rate, aux_coef, found_for: arm.name });
    }
    // In the order of the arms, with those that take another's.
    let of_arm = |arm: &Arm| {
        let from = arm.tuned_as.unwrap_or(arm.name);
        let found = tunings.iter().find(|tuning| tuning.arm == from)?;
        let tries = if from == arm.name { found.tries.clone() } else { Vec::new() };
        Some(Tuning { arm: arm.name, tries, ..found.clone() })
    };
    Ok(Some(arms.iter().filter_map(of_arm).collect()))
}

/// The setting with the lowest loss; of equals the one tried first.
fn best(arm: &'static str, tries: &[Try]) -> Result<Try, StudyError> {
    let finite = tries.iter().filter_map(|one| Some((one, one.loss.filter(|loss| loss.is_finite())?)));
    match finite.min_by(|a, b| a.1.total_cmp(&b.1)) {
        Some((best, _)) => Ok(*best),
        None => {
            let rates = tries.iter().map(|one| one.learning_rate.to_string()).collect::<Vec<_>>().join(", ");
            Err(StudyError::Diverged { arm, rates })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_loss_is_the_best_and_a_diverged_one_never() {
        let one = |rate, loss| Try { learning_rate: rate, aux_coef: 0.01, loss };
        let tries = [one(1.0, Some(2.0)), one(2.0, Some(1.5)), one(3.0, None), one(4.0, Some(f64::NAN))];
        assert_eq!(best("a", &tries).unwrap().learning_rate, 2.0);
        let tuning =
            |rate: f64| Tuning { arm: "a", tries: tries.to_vec(), learning_rate: rate, aux_coef: 0.01, found_for: "a" };
        assert_eq!([1.0, 2.0, 4.0].map(|rate| tuning(rate).is_at_the_edge()), [true, false, true]);
        assert!(best("a", &tries[2..]).unwrap_err().to_string().contains("3, 4"));
    }

    #[test]
    fn a_short_run_has_a_schedule_of_its_own() {
        let config = Config::preset("tiny-pr-moe").unwrap();
        let arm = Arm::plain("a", config.clone());
        let short = short(&arm, &config, 4e-3, 0.1).config;
        short.validate().unwrap();
        assert_eq!((short.total_steps(), short.train.warmup_steps), (650, Some(25)));
        assert_eq!((short.train.learning_rate, short.train.min_learning_rate), (4e-3, 2e-4));
        let rate = short.learning_rate();
        assert_eq!(rate.decay, short.total_steps() * short.tokens_per_step());
    }
}
