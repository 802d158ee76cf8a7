//! The learning rate over a run.

use super::{Config, Schedule};

/// A learning rate as a function of tokens: a linear rise from 0, then down to a floor, constant after.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    /// Highest learning rate.
    pub peak: f64,
    /// Learning rate after the decay.
    pub floor: f64,
    /// Tokens until the highest is reached.
    pub warmup: u64,
    /// Tokens until the floor is reached, counted from the start of the run.
    pub decay: u64,
    /// How it comes down.
    pub schedule: Schedule,
}

impl LearningRate {
    /// The learning rate after `tokens` tokens, after Megatron-DeepSpeed (2.5): peak * t / w in the warm-up, then
    /// floor + (peak - floor) * (1 + cos(pi * (t - w) / (d - w))) / 2, and floor from d on.
    pub fn at(&self, tokens: u64) -> f64 {
        if tokens < self.warmup {
            return self.peak * (tokens as f64 / self.warmup as f64);
        }
        match self.schedule {
            Schedule::Constant => self.peak,
            Schedule::Cosine if tokens >= self.decay => self.floor,
            Schedule::Cosine => {
                // warmup <= tokens < decay, so the divisor is not 0.
                let done = (tokens - self.warmup) as f64 / (self.decay - self.warmup) as f64;
                self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

impl Config {
    /// The learning rate of the run, with lengths in steps turned into tokens.
    pub fn learning_rate(&self) -> LearningRate {
        let t = &self.train;
        let tokens = |steps: u64| steps.saturating_mul(self.tokens_per_step());
        let length = |steps: Option<u64>, in_tokens: Option<u64>| in_tokens.or(steps.map(tokens));
        LearningRate {
            peak: t.learning_rate,
            floor: t.min_learning_rate,
            warmup: length(t.warmup_steps, t.warmup_tokens).unwrap_or(0),
            decay: length(t.decay_steps, t.decay_tokens).unwrap_or_else(|| tokens(self.total_steps())),
            schedule: t.schedule,
        }
    }

    /// The learning rate of a step, counted from 1: that after the step's own tokens, so that the first step, too, moves
    /// the weights.
    pub fn learning_rate_of_step(&self, step: u64) -> f64 {
        self.learning_rate().at(step.saturating_mul(self.tokens_per_step()))
    }
}
