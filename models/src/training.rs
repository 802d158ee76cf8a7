//! A training run: from a configuration and a corpus to a folder with metrics, checkpoints and a report.
//!
//! The folder holds `config.toml`, `tokenizer.json` (if there is one), `metrics.jsonl`, `checkpoints/step-N/` and
//! `report.html`. A run is a pure function of its configuration and corpus: batch and start values come from
//! counter-based generators, so a run that was killed and resumed gives the same bits as one that was not.

mod error;
mod memory;
mod state;

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moebius::checkpoint::{CheckpointError, Checkpoints, Dtype, TensorInfo};
use moebius::{Engine, Optimizer, Session, Trainer};

use crate::config::Config;
use crate::data::{Batches, Corpus, Windows};
use crate::evaluation::{Evaluation, Evaluator};
use crate::gpt;
use crate::health::{self, Alarms, DEAD_AFTER, Watch};
use crate::metrics::{AlarmRecord, EvalRecord, MetricsWriter, Record, TrainRecord};
use crate::tokenizer::Tokenizer;

pub use error::TrainingError;
pub use memory::{largest_batch, memory};
use state::newest_intact;

/// File with the run's configuration.
pub const CONFIG_FILE: &str = "config.toml";
/// File with the tokenizer, where the run has one.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// File with one JSON record a line.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The report for people.
pub const REPORT_FILE: &str = "report.html";

/// What a run tells its observer.
pub enum Event<'a> {
    /// A newer checkpoint cannot be used; the run goes on from an older one.
    Damaged(u64, &'a CheckpointError),
    /// The run goes on after this step.
    Resumed(u64),
    /// A step was done. Its record has the health of the routers if `logged` or if there are alarms.
    Step {
        /// What it measured.
        record: &'a TrainRecord,
        /// Whether it went into `metrics.jsonl`.
        logged: bool,
    },
    /// An evaluation was done.
    Evaluated(&'a EvalRecord),
    /// A router left the limits of an alarm.
    Alarm(&'a AlarmRecord),
    /// A checkpoint is on the disk.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done.
    Done,
    /// It was asked to stop; a checkpoint was written.
    Stopped,
    /// An alarm ended it; a checkpoint was written.
    Alarmed,
}

type Observer<'o> = dyn FnMut(Event<'_>) + 'o;

/// A run that is ready to go on.
pub struct Run {
    config: Config,
    tokenizer_name: String,
    tokenizer_hash: String,
    session: Session,
    trainer: Trainer,
    evaluator: Evaluator,
    batches: Batches,
    windows: Windows,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    /// The MoE layers and their experts.
    moe_layers: Vec<(usize, usize)>,
    watch: Watch,
    alarm_ends: bool,
    is_noisy: bool,
    tokens: Vec<i32>,
    targets: Vec<i32>,
    best: Option<f64>,
    last_evaluation: Option<Evaluation>,
    training_time: Duration,
}

/// The description of every tensor of the model, as checkpoints hold it: parameters and what is not trained by a gradient.
pub fn parameter_infos(config: &Config) -> Vec<TensorInfo> {
    let info = |p: gpt::Parameter| TensorInfo::new(p.name, Dtype::F32, p.shape.to_vec());
    let untrained = gpt::Parameter::untrained(&config.model);
    gpt::Parameter::list(&config.model).into_iter().chain(untrained).map(info).collect()
}

/// The key of a step's noise: of the seed and the step alone, so that a resumed run draws the same numbers, and another one
/// than that of start values and batches.
fn noise_key(seed: u64, step: u64) -> [u32; 2] {
    let key = [seed as u32, (seed >> 32) as u32];
    let word = |index: u64| moebius::ir::philox::bits(key, u32::MAX, index);
    [word(2 * step), word(2 * step + 1)]
}

impl Run {
    /// Starts a run in `out` from fresh weights, or goes on with the one that is there.
    ///
    /// # Errors
    /// [`TrainingError::RunExists`] if a fresh run would overwrite another; everything else as the variants say.
    pub fn open(
        engine: &Engine,
        config: Config,
        tokenizer: &Tokenizer,
        corpus: &Corpus,
        out: &Path,
        resume: bool,
        observer: &mut Observer<'_>,
    ) -> Result<Run, TrainingError> {
        let train = &config.train;
        let sequence = config.model.sequence;
        let batches = Batches::new(&corpus.train, train.seed, train.batch, sequence)?;
        // 0 means all of the validation text.
        let most = (train.eval_windows > 0).then(|| train.eval_windows.div_ceil(train.batch));
        let windows = Windows::new(&corpus.validation, train.batch, sequence, most)?;
        if !resume && out.join(CONFIG_FILE).exists() {
            return Err(TrainingError::RunExists { path: out.into() });
        }

        let mut session = engine.session();
        let graph = gpt::training(&config.model, train.batch)?;
        let optimizer = Optimizer {
            beta1: train.betas[0] as f32,
            beta2: train.betas[1] as f32,
            eps: train.eps as f32,
            weight_decay: train.weight_decay as f32,
            clip: train.clip as f32,
        };
        let trainer = match Trainer::new(&mut session, graph.graph, graph.loss, &optimizer) {
            Err(moebius::Error::Backend(source @ moebius::BackendError::TooLarge { free, .. })) => {
                let largest = largest_batch(engine, &config, free)?;
                return Err(TrainingError::TooLarge { source, largest });
            }
            made => made?,
        };
        let evaluator = Evaluator::new(&mut session, &config.model, train.batch)?;

        // Only now, so that a model that does not fit the device leaves nothing behind.
        if !resume {
            write_folder(out, &config, tokenizer)?;
        }
        let checkpoints = Checkpoints::create(out, train.keep_checkpoints)?;
        let mut newest = if resume { newest_intact(&checkpoints, out, observer)? } else { None };
        // Lines of steps that will be done again are dropped.
        let done = newest.as_ref().map_or(0, |checkpoint| checkpoint.state.step);
        let metrics = MetricsWriter::resume(&out.join(METRICS_FILE), done)?;
        let ids = train.batch * sequence;
        let mut run = Run {
            tokenizer_name: tokenizer.name().to_owned(),
            tokenizer_hash: tokenizer.fingerprint(),
            session,
            trainer,
            evaluator,
            batches,
            windows,
            checkpoints,
            metrics,
            moe_layers: health::moe_layers(&config.model),
            watch: Watch::default(),
            alarm_ends: false,
            is_noisy: gpt::is_noisy(&config.model),
            tokens: vec![0; ids],
            targets: vec![0; ids],
            best: None,
            last_evaluation: None,
            training_time: Duration::ZERO,
            config,
        };
        match &mut newest {
            Some(checkpoint) => {
                run.load(checkpoint)?;
                observer(Event::Resumed(checkpoint.state.step));
            }
            None => {
                let (session, config) = (&mut run.session, &run.config);
                gpt::initialise(&config.model, config.train.seed, |p, values| session.write(&p.name, values))?;
            }
        }
        Ok(run)
    }

    /// The run's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.trainer.steps_done()
    }

    /// The session with the model's parameters.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Bytes of the training step's arena, and of parameters and moments.
    pub fn memory(&mut self) -> (usize, usize) {
        let plan = self.trainer.program().plan();
        (plan.arena_bytes(), plan.state_bytes())
    }

    /// The latest evaluation of this process.
    pub fn last_evaluation(&self) -> Option<Evaluation> {
        self.last_evaluation
    }

    /// Time spent in training steps and evaluations, over all processes of the run.
    pub fn training_time(&self) -> Duration {
        self.training_time
    }

    /// Watches the health of the routers in every step from now on. What was told before the checkpoint that the run goes on
    /// from, by the same limit, is not told again. With `ends` an alarm ends the run after its step.
    pub fn watch(&mut self, alarms: Alarms, ends: bool) {
        self.watch.set(alarms);
        self.alarm_ends = ends;
    }

    /// Trains until all steps are done, `stop` is set or an alarm ends it, with evaluations and checkpoints as configured and at
    /// the end.
    ///
    /// # Errors
    /// On [`moebius::Error::NonFinite`] the checkpoints written so far remain; otherwise as the variants say.
    pub fn train(&mut self, stop: &AtomicBool, observer: &mut Observer<'_>) -> Result<Ending, TrainingError> {
        let total = self.config.total_steps();
        let (eval_every, save_every) = (self.config.train.eval_every, self.config.train.checkpoint_every);
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        let mut saved = self.trainer.steps_done();
        while self.trainer.steps_done() < total {
            if stop.load(Ordering::Relaxed) {
                if saved != self.trainer.steps_done() {
                    self.save(observer)?;
                }
                return Ok(Ending::Stopped);
            }
            let begun = Instant::now();
            let alarmed = self.step(observer)?;
            let step = self.trainer.steps_done();
            if due(eval_every, step) || step == total {
                self.evaluate(observer)?;
            }
            self.training_time += begun.elapsed();
            if due(save_every, step) || step == total {
                self.save(observer)?;
                saved = step;
            }
            if alarmed && self.alarm_ends {
                if saved != step {
                    self.save(observer)?;
                }
                return Ok(Ending::Alarmed);
            }
        }
        Ok(Ending::Done)
    }

    /// Does one step; whether an alarm was given.
    fn step(&mut self, observer: &mut Observer<'_>) -> Result<bool, TrainingError> {
        let begun = Instant::now();
        let step = self.trainer.steps_done() + 1;
        self.batches.fill(step - 1, &mut self.tokens, &mut self.targets)?;
        let learning_rate = self.config.learning_rate_of_step(step);
        let program = self.trainer.program();
        program.feed("tokens", &self.tokens)?;
        program.feed("targets", &self.targets)?;
        if self.is_noisy {
            program.feed(gpt::NOISE_KEY, &noise_key(self.config.train.seed, step))?;
        }
        let report = self.trainer.step(&mut self.session, learning_rate as f32)?;
        let program = self.trainer.program();
        let mut record = TrainRecord {
            step,
            tokens: step * self.tokens.len() as u64,
            loss: f64::from(report.loss),
            lm_loss: f64::from(program.scalar("lm_loss")?),
            aux_loss: f64::from(program.scalar("aux_loss")?),
            lr: learning_rate,
            grad_norm: f64::from(report.grad_norm),
            tokens_per_s: 0.0,
            experts: Vec::new(),
        };
        let every = self.config.train.log_every.max(1);
        let logged = step == 1 || step.is_multiple_of(every) || step == self.config.total_steps();
        let mut alarms = Vec::new();
        if logged || !self.watch.alarms().is_empty() {
            let dead_after = self.watch.alarms().dead_experts.unwrap_or(DEAD_AFTER);
            record.experts = health::read(&self.session, program, &self.moe_layers, dead_after)?;
            alarms = self.watch.look(step, &record.experts);
        }
        record.tokens_per_s = self.tokens.len() as f64 / begun.elapsed().as_secs_f64();
        let record = Record::Train(record);
        if logged {
            self.metrics.write(&record)?;
        }
        if let Record::Train(record) = &record {
            observer(Event::Step { record, logged });
        }
        for alarm in &alarms {
            self.metrics.write(&Record::Alarm(alarm.clone()))?;
            observer(Event::Alarm(alarm));
        }
        Ok(!alarms.is_empty())
    }

    fn evaluate(&mut self, observer: &mut Observer<'_>) -> Result<(), TrainingError> {
        let evaluation = self.evaluator.run(&mut self.session, &self.windows)?;
        let step = self.trainer.steps_done();
        let record = EvalRecord {
            step,
            tokens: step * self.tokens.len() as u64,
            val_loss: evaluation.loss,
            bits_per_byte: evaluation.bits_per_byte,
        };
        self.best = Some(self.best.map_or(evaluation.loss, |b| b.min(evaluation.loss)));
        self.last_evaluation = Some(evaluation);
        self.metrics.write(&Record::Eval(record.clone()))?;
        observer(Event::Evaluated(&record));
        Ok(())
    }
}

fn write_folder(out: &Path, config: &Config, tokenizer: &Tokenizer) -> Result<(), TrainingError> {
    let refused = |source| TrainingError::Io { operation: "create the folder", path: out.to_owned(), source };
    std::fs::create_dir_all(out).map_err(refused)?;
    if let Some(json) = tokenizer.json() {
        let path = out.join(TOKENIZER_FILE);
        write_whole(&path, json)?;
    }
    // Last, as this file is what makes the folder a run.
    let path = out.join(CONFIG_FILE);
    write_whole(&path, config.to_toml()?.as_bytes())
}

/// Writes a file so that it is whole or not there.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainingError> {
    let io = |source| TrainingError::Io { operation: "write", path: path.to_owned(), source };
    crate::data::write_atomic(path, |file| file.write_all(bytes)).map_err(io)
}
