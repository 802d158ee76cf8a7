//! Training steps that are timed one by one, on a session of their own.

use std::time::Instant;

use moebius::{Engine, Session, Trainer};

use crate::config::Config;
use crate::data::Batches;
use crate::distill::DistillError;
use crate::distill::cache::CacheReader;
use crate::gpt::{self, Distilling};
use crate::training::{self, TrainingError};

/// A compiled step of a configuration, from start values, with the seconds of the steps that were counted.
pub struct TimedStep {
    /// The session that it runs in.
    pub session: Session,
    /// The step.
    pub trainer: Trainer,
    /// Seconds of each step that was counted.
    pub times: Vec<f64>,
    config: Config,
    ids: Vec<i32>,
    tokens: [Vec<i32>; 2],
}

impl TimedStep {
    /// Compiles the step, which follows a teacher if there is a lesson.
    ///
    /// # Errors
    /// Those of compiling, and of writing the start values.
    pub fn new(engine: &Engine, config: &Config, lesson: Option<&Distilling<'_>>) -> Result<TimedStep, TrainingError> {
        let mut config = config.clone();
        // Every step is looked at, so that its time is its own.
        config.train.log_every = 1;
        let mut session = engine.session();
        let trainer = training::trainer_of(engine, &mut session, &config, lesson)?;
        gpt::initialise(&config.model, config.train.seed, |p, values| session.write(&p.name, values))?;
        let n = config.train.batch * config.model.sequence;
        Ok(TimedStep { session, trainer, times: Vec::new(), config, ids: Vec::new(), tokens: [vec![0; n], vec![0; n]] })
    }

    /// Runs a step on the next batch, with what a cache has of the teacher where the step reads it; its seconds.
    ///
    /// # Errors
    /// [`DistillError`] of the batch, the cache or the step.
    pub fn run(&mut self, batches: &Batches, reader: Option<&CacheReader>) -> Result<f64, DistillError> {
        let TimedStep { session, trainer, config, ids, tokens: [x, y], .. } = self;
        let begun = Instant::now();
        trainer.step_with(session, |at, program| {
            let batch = (at.step - 1) * config.train.accumulate as u64 + at.micro_batch as u64;
            batches.fill(batch, x, y)?;
            program.feed("tokens", x)?;
            program.feed("targets", y)?;
            if let Some(reader) = reader {
                reader.feed(batch, ids, program)?;
            }
            if gpt::is_noisy(&config.model) {
                program.feed(gpt::NOISE_KEY, &[0u32, 0])?;
            }
            Ok::<_, DistillError>(config.train.learning_rate as f32)
        })?;
        Ok(begun.elapsed().as_secs_f64())
    }
}

/// The middle one of some times, of an even number the later of the two; NaN of none.
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
