//! What is measured of an arm: the columns of a table, and what claims are about.

use super::stats::{Sample, reach};
use super::{Sheet, Training};

/// A measurement of an arm. Those that name another arm compare with it seed by seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The experts of each MoE layer, in words.
    Experts,
    /// All parameters.
    Parameters,
    /// Parameters that a token meets.
    ActiveParameters,
    /// Mean cross entropy on all of the validation text at the end, nats per token.
    ValidationLoss,
    /// Bits per byte of the test text at the end.
    TestBits,
    /// Time of a training step without a teacher, milliseconds.
    PlainStepMs,
    /// Time of a training step, milliseconds: the mean over the run where a teacher, in memory, leaves in it.
    StepMs,
    /// The same with the teacher in a cache.
    CachedStepMs,
    /// Bytes that dispatch moves for a token in one forward pass.
    DispatchBytes,
    /// Operations of the whole training, the forward passes of a teacher included.
    TrainingFlops,
    /// Time of all training steps, seconds.
    TrainingSeconds,
    /// Operations until the loss that the arm of this name had at its end.
    FlopsToReach(&'static str),
    /// Seconds until then.
    SecondsToReach(&'static str),
    /// How many times fewer operations that are than those of the arm of this name.
    LessTraining(&'static str),
    /// How many times less time.
    LessTime(&'static str),
    /// Time to generate a token, milliseconds.
    DecodeMs,
    /// Bytes on the device in training.
    TrainingMemory,
    /// Bytes of the weights, as generation reads them.
    WeightBytes,
    /// Highest learning rate.
    LearningRate,
    /// Coefficient of the load-balancing loss.
    AuxCoef,
}

/// How a number is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Count,
    Bytes,
    Loss,
    Time,
    Flops,
    Times,
    Setting,
}

impl Measure {
    /// The heading of the column.
    pub fn heading(self) -> String {
        match self {
            Measure::Experts => "experts".into(),
            Measure::Parameters => "parameters".into(),
            Measure::ActiveParameters => "active".into(),
            Measure::ValidationLoss => "validation loss, nats".into(),
            Measure::TestBits => "test, bits per byte".into(),
            Measure::PlainStepMs => "plain step, ms".into(),
            Measure::StepMs => "step, ms".into(),
            Measure::CachedStepMs => "step with cache, ms".into(),
            Measure::DispatchBytes => "dispatch, bytes per token".into(),
            Measure::TrainingFlops => "training FLOPs".into(),
            Measure::TrainingSeconds => "training, s".into(),
            Measure::FlopsToReach(arm) => format!("FLOPs to loss of {arm}"),
            Measure::SecondsToReach(arm) => format!("s to loss of {arm}"),
            Measure::LessTraining(arm) => format!("times fewer FLOPs than {arm}"),
            Measure::LessTime(arm) => format!("times less time than {arm}"),
            Measure::DecodeMs => "decode, ms per token".into(),
            Measure::TrainingMemory => "training memory".into(),
            Measure::WeightBytes => "weights".into(),
            Measure::LearningRate => "learning rate".into(),
            Measure::AuxCoef => "aux. coefficient".into(),
        }
    }

    /// Its name in `table.csv`. Those of what a clock measured end in `_ms`, `_s` or `_time`.
    pub fn key(self) -> String {
        let with = |name: &str, arm: &str, end: &str| format!("{name}_{}{end}", arm.replace('-', "_"));
        match self {
            Measure::Experts => "experts".into(),
            Measure::Parameters => "parameters".into(),
            Measure::ActiveParameters => "active_parameters".into(),
            Measure::ValidationLoss => "validation_loss".into(),
            Measure::TestBits => "test_bits_per_byte".into(),
            Measure::PlainStepMs => "plain_step_ms".into(),
            Measure::StepMs => "step_ms".into(),
            Measure::CachedStepMs => "cached_step_ms".into(),
            Measure::DispatchBytes => "dispatch_bytes_per_token".into(),
            Measure::TrainingFlops => "training_flops".into(),
            Measure::TrainingSeconds => "training_s".into(),
            Measure::FlopsToReach(arm) => with("flops_to", arm, ""),
            Measure::SecondsToReach(arm) => with("reach", arm, "_s"),
            Measure::LessTraining(arm) => with("fewer_flops_than", arm, ""),
            Measure::LessTime(arm) => with("less_than", arm, "_time"),
            Measure::DecodeMs => "decode_ms".into(),
            Measure::TrainingMemory => "training_bytes".into(),
            Measure::WeightBytes => "weight_bytes".into(),
            Measure::LearningRate => "learning_rate".into(),
            Measure::AuxCoef => "aux_coef".into(),
        }
    }

    pub(super) fn unit(self) -> Unit {
        match self {
            Measure::Experts | Measure::Parameters | Measure::ActiveParameters => Unit::Count,
            Measure::DispatchBytes | Measure::TrainingMemory | Measure::WeightBytes => Unit::Bytes,
            Measure::ValidationLoss | Measure::TestBits => Unit::Loss,
            Measure::PlainStepMs
            | Measure::StepMs
            | Measure::CachedStepMs
            | Measure::TrainingSeconds
            | Measure::SecondsToReach(_)
            | Measure::DecodeMs => Unit::Time,
            Measure::TrainingFlops | Measure::FlopsToReach(_) => Unit::Flops,
            Measure::LessTraining(_) | Measure::LessTime(_) => Unit::Times,
            Measure::LearningRate | Measure::AuxCoef => Unit::Setting,
        }
    }

    /// Whether each run has its own number; else the arm has one.
    pub fn is_of_runs(self) -> bool {
        match self {
            Measure::ValidationLoss
            | Measure::TestBits
            | Measure::TrainingSeconds
            | Measure::FlopsToReach(_)
            | Measure::SecondsToReach(_)
            | Measure::LessTraining(_)
            | Measure::LessTime(_) => true,
            Measure::Experts
            | Measure::Parameters
            | Measure::ActiveParameters
            | Measure::PlainStepMs
            | Measure::StepMs
            | Measure::CachedStepMs
            | Measure::DispatchBytes
            | Measure::TrainingFlops
            | Measure::DecodeMs
            | Measure::TrainingMemory
            | Measure::WeightBytes
            | Measure::LearningRate
            | Measure::AuxCoef => false,
        }
    }

    /// The arm that it compares with.
    pub fn reference(self) -> Option<&'static str> {
        match self {
            Measure::FlopsToReach(arm)
            | Measure::SecondsToReach(arm)
            | Measure::LessTraining(arm)
            | Measure::LessTime(arm) => Some(arm),
            Measure::Experts
            | Measure::Parameters
            | Measure::ActiveParameters
            | Measure::ValidationLoss
            | Measure::TestBits
            | Measure::PlainStepMs
            | Measure::StepMs
            | Measure::CachedStepMs
            | Measure::DispatchBytes
            | Measure::TrainingFlops
            | Measure::TrainingSeconds
            | Measure::DecodeMs
            | Measure::TrainingMemory
            | Measure::WeightBytes
            | Measure::LearningRate
            | Measure::AuxCoef => None,
        }
    }
}

/// What is read off a curve to compare it with the end of another arm's.
#[derive(Clone, Copy)]
enum Cost {
    Flops,
    Seconds,
}

impl Sheet<'_> {
    /// The measurement of an arm, one number for each finished run or one alone; no number where nothing is known.
    pub fn sample(&self, arm: usize, measure: Measure) -> Sample {
        let config = &self.configs[arm];
        let timing = self.timings.get(arm);
        let timed = |of: &dyn Fn(&super::Timing) -> Option<f64>| {
            let value = timing.and_then(of).filter(|v| v.is_finite());
            Sample { values: value.into_iter().collect(), bounds: 0 }
        };
        let of_runs = |of: &dyn Fn(&super::RunResult) -> Option<f64>| Sample {
            values: self.results[arm].iter().flatten().filter_map(of).collect(),
            bounds: 0,
        };
        match measure {
            Measure::Experts => {
                let experts: usize = config.model.experts_per_layer().iter().sum();
                Sample::exact(experts as f64)
            }
            Measure::Parameters => Sample::exact(config.parameters().total as f64),
            Measure::ActiveParameters => Sample::exact(config.parameters().active as f64),
            Measure::ValidationLoss => of_runs(&|run| run.validation_loss),
            Measure::TestBits => of_runs(&|run| run.test_bits),
            Measure::PlainStepMs => timed(&|t| Some(t.plain_ms)),
            Measure::StepMs => timed(&|t| Some(self.over_the_run(arm, t.plain_ms, t.live_ms))),
            Measure::CachedStepMs => timed(&|t| Some(self.over_the_run(arm, t.plain_ms, t.cached_ms))),
            Measure::DispatchBytes => Sample::exact(config.dispatch_bytes_per_token() as f64),
            Measure::TrainingFlops => Sample::exact(self.flops(arm, config.total_steps() as f64)),
            Measure::TrainingSeconds => of_runs(&|run| Some(run.seconds)),
            Measure::FlopsToReach(other) => self.reached(arm, other, Cost::Flops),
            Measure::SecondsToReach(other) => self.reached(arm, other, Cost::Seconds),
            Measure::LessTraining(other) => self.less(arm, other, Cost::Flops),
            Measure::LessTime(other) => self.less(arm, other, Cost::Seconds),
            Measure::DecodeMs => timed(&|t| Some(t.decode_ms)),
            Measure::TrainingMemory => timed(&|t| Some(t.training_bytes as f64)),
            Measure::WeightBytes => Sample::exact(config.parameters().total as f64 * config.model.dtype.bytes() as f64),
            Measure::LearningRate => Sample::exact(config.train.learning_rate),
            Measure::AuxCoef if !self.study.arms[arm].is_sparse() => Sample::default(),
            Measure::AuxCoef => Sample::exact(config.model.aux_coef),
        }
    }

    /// The last step in which an arm follows its teacher, and the teacher's arm.
    fn taught(&self, arm: usize) -> Option<(f64, usize)> {
        match self.study.arms[arm].training {
            Training::Plain => None,
            Training::Distilled { teacher, stop } => {
                let steps = crate::distill::Stop::Fraction(stop).step(self.configs[arm].total_steps(), 1);
                Some((steps as f64, self.study.arm(teacher)?))
            }
        }
    }

    /// The mean of a step over the run, of which the taught ones take `taught`.
    fn over_the_run(&self, arm: usize, plain: f64, taught: Option<f64>) -> f64 {
        match (self.taught(arm), taught) {
            (Some((steps, _)), Some(taught)) => {
                let share = steps / self.configs[arm].total_steps().max(1) as f64;
                share * taught + (1.0 - share) * plain
            }
            (Some(_) | None, _) => plain,
        }
    }

    /// Operations of the first steps of an arm's training: forward and backward of its own, forward of its teacher.
    pub(super) fn flops(&self, arm: usize, steps: f64) -> f64 {
        let of_step = |arm: usize| {
            let config = &self.configs[arm];
            config.flops_per_token().total as f64 * config.tokens_per_step() as f64
        };
        let taught = self.taught(arm).map_or(0.0, |(last, teacher)| steps.min(last) * of_step(teacher) / 3.0);
        steps * of_step(arm) + taught
    }

    /// The evaluation curve of a run over its cost.
    fn curve(&self, arm: usize, seed: usize, cost: Cost) -> Option<Vec<(f64, f64)>> {
        let run = self.results[arm].get(seed)?.as_ref()?;
        let x = |point: &super::Point| match cost {
            Cost::Flops => self.flops(arm, point.step as f64),
            Cost::Seconds => point.seconds,
        };
        Some(run.curve.iter().map(|point| (x(point), point.loss)).collect())
    }

    fn reached(&self, arm: usize, other: &str, cost: Cost) -> Sample {
        let mut sample = Sample::default();
        let Some(other) = self.study.arm(other) else { return sample };
        for seed in 0..self.seeds {
            let (Some(own), Some(of_other)) = (self.curve(arm, seed, cost), self.curve(other, seed, cost)) else {
                continue;
            };
            match of_other.last().and_then(|&(_, target)| reach(&own, target)) {
                Some(x) => sample.values.push(x),
                None => sample.bounds += 1,
            }
        }
        sample
    }

    /// For each seed the other arm's whole cost by the cost of its final loss here. Where that is not reached, the cost of the whole
    /// run takes its place, and the number is an upper bound.
    fn less(&self, arm: usize, other: &str, cost: Cost) -> Sample {
        let mut sample = Sample::default();
        let Some(other) = self.study.arm(other) else { return sample };
        for seed in 0..self.seeds {
            let (Some(own), Some(of_other)) = (self.curve(arm, seed, cost), self.curve(other, seed, cost)) else {
                continue;
            };
            let (Some(&(whole, _)), Some(&(all, target))) = (own.last(), of_other.last()) else { continue };
            let needed = reach(&own, target);
            sample.bounds += usize::from(needed.is_none());
            sample.values.push(all / needed.unwrap_or(whole));
        }
        sample
    }
}
