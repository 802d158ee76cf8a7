//! How many slots an expert has: the one place where a capacity factor becomes a number.

use crate::config::{CapacityRule, ModelConfig};

/// Slots per expert for `tokens` tokens, or `None` if nothing is dropped: [`CapacityOf::slots`] of the model's fields.
pub fn capacity(config: &ModelConfig, training: bool, tokens: usize, experts: usize) -> Option<usize> {
    let factor = config.capacity_factor(training)?;
    if config.routing().expert_choice {
        // Each expert takes this many tokens; there is no queue that a minimum could help.
        let share = tokens as f64 / experts as f64;
        return Some(((share * factor).ceil() as usize).clamp(1, tokens.max(1)));
    }
    Some(CapacityOf::new(config, training).slots(factor, tokens, experts))
}

/// How many slots an expert has, as a function of the capacity factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapacityOf {
    /// The rule.
    pub rule: CapacityRule,
    /// Choices of each token.
    pub k: usize,
    /// Least slots of an expert, where the rule has such a thing.
    pub min: usize,
    /// Whether the factor is one of evaluation alone, which fairseq's rule takes as a share of all tokens.
    pub evaluation: bool,
}

impl CapacityOf {
    /// The rule of a model in training or evaluation.
    pub fn new(config: &ModelConfig, training: bool) -> CapacityOf {
        let evaluation = !training && config.eval_capacity_factor.is_some();
        CapacityOf { rule: config.routing().capacity, k: config.top_k(), min: config.min_capacity, evaluation }
    }

    /// Slots of each of `experts` for `tokens` tokens and this capacity factor. `ceil` and product of the DeepSpeed rule are in
    /// f32 as it has them (spec 1.1); the other rules are those of section 6. See [`CapacityRule`].
    pub fn slots(self, factor: f64, tokens: usize, experts: usize) -> usize {
        let k = self.k as f64;
        let share = tokens as f64 / experts as f64;
        let whole = tokens.div_ceil(experts) as f64;
        let slots = match self.rule {
            CapacityRule::Deepspeed => {
                let slots = (share as f32) * ((k * factor) as f32);
                return (slots.ceil() as usize).max(self.min);
            }
            CapacityRule::Gshard => {
                let slots = (k * factor * share).floor() as usize;
                return slots.max(self.min).min(tokens.max(1));
            }
            CapacityRule::Fair if self.evaluation => (factor * tokens as f64).ceil(),
            CapacityRule::Fair => (factor * k * whole).ceil(),
            CapacityRule::Tutel => k * (factor * whole).floor(),
        };
        (slots as usize).max(1)
    }
}
