//! The training step of a configuration, as it is trained, inspected and measured.

use moebius::ir::{Graph, Value};
use moebius::{Engine, History, Optimizer, Session, StepOptions, Trainer};

use super::TrainingError;
use super::memory::largest_batch_of;
use crate::config::{Config, Recompute};
use crate::gpt::{self, Distilling};

/// Most steps between two looks of the host: what the device remembers has to be read with each of them.
const MOST_REMEMBERED: u64 = 256;

/// Outputs that are remembered of each step, beside loss and norm; the last one of a student that follows a teacher.
pub(super) const REMEMBERED: [&str; 3] = ["lm_loss", "aux_loss", "kd_loss"];

impl Config {
    /// How parameters are moved.
    pub fn optimizer(&self) -> Optimizer {
        let train = &self.train;
        Optimizer {
            beta1: train.betas[0] as f32,
            beta2: train.betas[1] as f32,
            eps: train.eps as f32,
            weight_decay: train.weight_decay as f32,
            clip: train.clip as f32,
            moments: train.moments,
        }
    }
}

/// The graph and the options of a configuration's training step: with its micro-batches and recomputation, and a history for the
/// steps between two looks of the host.
///
/// # Errors
/// As [`gpt::training`].
pub fn parts(config: &Config) -> moebius::Result<(Graph, Value, StepOptions)> {
    parts_of(config, None)
}

/// [`parts`] of a student that follows a teacher.
///
/// # Errors
/// As [`gpt::distilling`].
pub fn parts_of(config: &Config, lesson: Option<&Distilling<'_>>) -> moebius::Result<(Graph, Value, StepOptions)> {
    let train = &config.train;
    let (training, remembered) = match lesson {
        None => (gpt::training_accumulated(&config.model, train.batch, train.accumulate)?, &REMEMBERED[..2]),
        Some(lesson) => (gpt::distilling(&config.model, train.batch, train.accumulate, lesson)?, &REMEMBERED[..]),
    };
    let steps = train.log_every.clamp(1, MOST_REMEMBERED) as usize;
    let history = History { steps, outputs: remembered.iter().map(|&name| name.to_owned()).collect() };
    let recompute = match train.recompute {
        Recompute::Nothing => moebius::Recompute::Nothing,
        Recompute::Blocks => moebius::Recompute::Between(training.borders),
        Recompute::Light => moebius::Recompute::Light,
    };
    let options = StepOptions {
        optimizer: config.optimizer(),
        micro_batches: training.micro_batches,
        recompute,
        history: Some(history),
    };
    Ok((training.graph, training.loss, options))
}

/// The compiled training step of a configuration.
///
/// # Errors
/// [`TrainingError::TooLarge`] with the largest batch that the device has memory for; as [`Trainer::with`].
pub fn trainer(engine: &Engine, session: &mut Session, config: &Config) -> Result<Trainer, TrainingError> {
    trainer_of(engine, session, config, None)
}

/// [`trainer`] of a student that follows a teacher.
///
/// # Errors
/// As [`trainer`].
pub fn trainer_of(
    engine: &Engine,
    session: &mut Session,
    config: &Config,
    lesson: Option<&Distilling<'_>>,
) -> Result<Trainer, TrainingError> {
    let (graph, loss, options) = parts_of(config, lesson)?;
    match Trainer::with(session, graph, loss, options) {
        Err(moebius::Error::Backend(source @ moebius::BackendError::TooLarge { free, .. })) => {
            let largest = largest_batch_of(engine, config, lesson, free)?;
            Err(TrainingError::TooLarge { source, largest })
        }
        made => Ok(made?),
    }
}
