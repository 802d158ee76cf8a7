//! Evaluation: mean cross entropy over windows of text, each token counted once.

use moebius::{Program, Session};

use crate::config::ModelConfig;
use crate::data::{Windows, bits_per_byte};
use crate::gpt::{self, Routes};
use crate::routes::RouteTap;
use crate::training::TrainingError;

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean cross entropy, nats per token.
    pub loss: f64,
    /// The same per byte of text, in bits.
    pub bits_per_byte: f64,
    /// Tokens that were predicted.
    pub tokens: u64,
}

/// A compiled evaluation.
pub struct Evaluator {
    program: Program,
    tokens: Vec<i32>,
    targets: Vec<i32>,
    losses: Vec<f32>,
}

impl Evaluator {
    /// Compiles the evaluation of `batch` sequences at a time beside a training step, whose parameters it reads.
    ///
    /// # Errors
    /// As [`Session::compile`].
    pub fn new(session: &mut Session, config: &ModelConfig, batch: usize) -> moebius::Result<Evaluator> {
        let program = session.compile(&gpt::evaluation(config, batch)?)?;
        Ok(Evaluator::of(program, batch * config.sequence))
    }

    /// Compiles the evaluation of a model that is not trained in this session, for [`Evaluator::run_with`] a tap that wants these
    /// routes. The parameters are added as zeros in the dtype that the model computes in ([`Session::compile_frozen`]): write
    /// them after this, by [`Session::write_rounded`].
    ///
    /// # Errors
    /// As [`Session::compile`].
    pub fn frozen(
        session: &mut Session,
        config: &ModelConfig,
        batch: usize,
        routes: Routes,
    ) -> moebius::Result<Evaluator> {
        let program = session.compile_frozen(&gpt::evaluation_with(config, batch, routes)?)?;
        Ok(Evaluator::of(program, batch * config.sequence))
    }

    fn of(program: Program, n: usize) -> Evaluator {
        Evaluator { program, tokens: vec![0; n], targets: vec![0; n], losses: vec![0.0; n] }
    }

    /// The mean loss over all windows.
    ///
    /// # Errors
    /// As [`Session::run`]; [`TrainingError::Data`] if the text can no longer be read.
    pub fn run(&mut self, session: &mut Session, windows: &Windows) -> Result<Evaluation, TrainingError> {
        self.run_with(session, windows, &mut RouteTap::default())
    }

    /// [`Evaluator::run`] with routes that are recorded or forced; the recording is finished at the end.
    ///
    /// # Errors
    /// As [`Evaluator::run`]; [`TrainingError::Routes`], before anything is computed if the recording is too short.
    pub fn run_with(
        &mut self,
        session: &mut Session,
        windows: &Windows,
        tap: &mut RouteTap,
    ) -> Result<Evaluation, TrainingError> {
        tap.wants(windows.tokens())?;
        let mut sum = 0.0f64;
        for index in 0..windows.batches() {
            // Targets past the last window are negative and give a loss of 0.
            windows.fill(index, &mut self.tokens, &mut self.targets)?;
            self.program.feed("tokens", &self.tokens)?;
            self.program.feed("targets", &self.targets)?;
            tap.before(&mut self.program, &self.tokens)?;
            session.run(&mut self.program)?;
            tap.after(&self.program, &self.tokens)?;
            self.program.output_into("loss", &mut self.losses)?;
            sum += self.losses.iter().map(|&l| f64::from(l)).sum::<f64>();
        }
        tap.finish()?;
        let tokens = windows.tokens();
        let loss = sum / tokens as f64;
        Ok(Evaluation { loss, bits_per_byte: bits_per_byte(loss, tokens, windows.bytes()), tokens })
    }
}
