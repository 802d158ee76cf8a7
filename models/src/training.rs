//! A training run: from a configuration and a corpus to a folder with metrics, checkpoints and a report.
//!
//! The folder holds `config.toml`, `tokenizer.json` (if there is one), `metrics.jsonl`, `checkpoints/step-N/` and
//! `report.html`. A run is a pure function of its configuration and corpus: batch and start values come from
//! counter-based generators, so a run that was killed and resumed gives the same bits as one that was not.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moebius::checkpoint::{Checkpoint, CheckpointError, Checkpoints, Dtype, Snapshot, Tensor, TensorInfo, TrainState};
use moebius::{Engine, Optimizer, Session, Trainer};

use crate::config::{Config, ConfigError};
use crate::data::{Batches, Corpus, DataError, Windows};
use crate::evaluation::{Evaluation, Evaluator};
use crate::gpt;
use crate::metrics::{EvalRecord, LayerLoad, MetricsError, MetricsWriter, Record, TrainRecord};
use crate::tokenizer::Tokenizer;

/// File with the run's configuration.
pub const CONFIG_FILE: &str = "config.toml";
/// File with the tokenizer, where the run has one.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// File with one JSON record a line.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The report for people.
pub const REPORT_FILE: &str = "report.html";

/// What can go wrong in a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainingError {
    /// The device, a graph, or a step that is not finite.
    #[error(transparent)]
    Engine(#[from] moebius::Error),
    /// A graph.
    #[error(transparent)]
    Graph(#[from] moebius::ir::Error),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The text.
    #[error(transparent)]
    Data(#[from] DataError),
    /// `metrics.jsonl`.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A file or folder of the run.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A fresh run would overwrite an older one.
    #[error("{} already holds a training run: go on with it by --resume, or choose another folder with --out", path.display())]
    RunExists {
        /// The folder.
        path: PathBuf,
    },
    /// Nothing to resume.
    #[error("{}: nothing to resume: wanted a folder with {CONFIG_FILE}, found none", path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
    },
    /// The checkpoint belongs to another model or run than the configuration in the folder.
    #[error("{}: the checkpoint is of another model than the run's configuration: {difference}", path.display())]
    OtherConfig {
        /// The checkpoint.
        path: PathBuf,
        /// The settings that differ, with both values.
        difference: String,
    },
    /// The checkpoint was made with another tokenizer.
    #[error("{}: the checkpoint was made with tokenizer {found}, this run has {wanted}", path.display())]
    OtherTokenizer {
        /// The checkpoint.
        path: PathBuf,
        /// This run's tokenizer.
        wanted: String,
        /// The checkpoint's tokenizer.
        found: String,
    },
    /// Every checkpoint of the run is damaged.
    #[error("{}: every checkpoint is damaged; the newest: {newest}", path.display())]
    AllDamaged {
        /// The run's folder.
        path: PathBuf,
        /// What is wrong with the newest.
        newest: CheckpointError,
    },
}

/// What a run tells its observer.
pub enum Event<'a> {
    /// A newer checkpoint cannot be used; the run goes on from an older one.
    Damaged(u64, &'a CheckpointError),
    /// The run goes on after this step.
    Resumed(u64),
    /// A step was done. Its record is complete if `logged`; otherwise without loads.
    Step {
        /// What it measured.
        record: &'a TrainRecord,
        /// Whether it went into `metrics.jsonl`.
        logged: bool,
    },
    /// An evaluation was done.
    Evaluated(&'a EvalRecord),
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
    moe_layers: Vec<usize>,
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
        let trainer = Trainer::new(&mut session, graph.graph, graph.loss, &optimizer)?;
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
        let experts = config.model.experts_per_layer();
        let moe_layers = experts.iter().enumerate().filter(|(_, e)| **e > 0).map(|(layer, _)| layer).collect();
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
            moe_layers,
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

    fn load(&mut self, checkpoint: &mut Checkpoint) -> Result<(), TrainingError> {
        let state = checkpoint.state.clone();
        let path = checkpoint.path().to_owned();
        if state.config_hash != self.config.model_hash() {
            let written = Config::from_toml(&state.config, "the checkpoint's configuration")?;
            let difference = self.config.model_difference(&written)?;
            return Err(TrainingError::OtherConfig { path, difference });
        }
        if state.tokenizer_hash != self.tokenizer_hash {
            let (wanted, found) = (self.tokenizer_name.clone(), state.tokenizer);
            return Err(TrainingError::OtherTokenizer { path, wanted, found });
        }
        let model = parameter_infos(&self.config);
        let optimizer = self.infos(&self.trainer.moments());
        checkpoint.model.expect(&model)?;
        checkpoint.optimizer.expect(&optimizer)?;
        for (file, infos) in [(&mut checkpoint.model, model), (&mut checkpoint.optimizer, optimizer)] {
            let mut bytes = Vec::new();
            for info in infos {
                bytes.resize(info.bytes().unwrap_or(0) as usize, 0);
                file.load_into(&info.name, &mut bytes)?;
                self.session.write_bytes(&info.name, &bytes)?;
            }
        }
        self.trainer.resume_at(state.step);
        self.best = state.best_validation_loss;
        let seconds = state.extra.get("training_seconds").and_then(serde_json::Value::as_f64);
        self.training_time = Duration::from_secs_f64(seconds.unwrap_or(0.0).max(0.0));
        Ok(())
    }

    fn infos(&self, names: &[String]) -> Vec<TensorInfo> {
        let shape = |name: &String| self.session.ty(name).map_or_else(Vec::new, |t| t.shape.to_vec());
        names.iter().map(|name| TensorInfo::new(name, Dtype::F32, shape(name))).collect()
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

    /// Trains until all steps are done or `stop` is set, with evaluations and checkpoints as configured and at the end.
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
            self.step(observer)?;
            let step = self.trainer.steps_done();
            if due(eval_every, step) || step == total {
                self.evaluate(observer)?;
            }
            self.training_time += begun.elapsed();
            if due(save_every, step) || step == total {
                self.save(observer)?;
                saved = step;
            }
        }
        Ok(Ending::Done)
    }

    fn step(&mut self, observer: &mut Observer<'_>) -> Result<(), TrainingError> {
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
        if logged {
            for &layer in &self.moe_layers {
                let counts: Vec<i32> = program.output(&gpt::load_output(layer))?;
                let dropped: Vec<i32> = program.output(&gpt::dropped_output(layer))?;
                let all = counts.iter().sum::<i32>().max(1) as f32;
                let load = counts.iter().map(|&c| c as f32 / all).collect();
                record.experts.push(LayerLoad { layer, load, dropped: dropped[0] as f32 / all });
            }
        }
        record.tokens_per_s = self.tokens.len() as f64 / begun.elapsed().as_secs_f64();
        if logged {
            let record = Record::Train(record);
            self.metrics.write(&record)?;
            if let Record::Train(record) = &record {
                observer(Event::Step { record, logged });
            }
        } else {
            observer(Event::Step { record: &record, logged });
        }
        Ok(())
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

    fn save(&mut self, observer: &mut Observer<'_>) -> Result<(), TrainingError> {
        let step = self.trainer.steps_done();
        let session = &self.session;
        let tensors = |infos: Vec<TensorInfo>| {
            let tensor = |info: TensorInfo| {
                let name = info.name.clone();
                Tensor::lazy(info, move || Ok(session.bytes(&name)?))
            };
            infos.into_iter().map(tensor).collect()
        };
        let snapshot = Snapshot {
            state: TrainState {
                step,
                tokens: step * self.tokens.len() as u64,
                seed: self.config.train.seed,
                data_position: step,
                config: self.config.to_toml()?,
                config_hash: self.config.model_hash(),
                model: self.config.model.name.clone(),
                tokenizer: self.tokenizer_name.clone(),
                tokenizer_hash: self.tokenizer_hash.clone(),
                best_validation_loss: self.best,
                extra: [("training_seconds".to_owned(), self.training_time.as_secs_f64().into())].into(),
            },
            model: tensors(parameter_infos(&self.config)),
            optimizer: tensors(self.infos(&self.trainer.moments())),
        };
        let path = self.checkpoints.save(snapshot)?;
        observer(Event::Saved(&path));
        Ok(())
    }
}

/// The newest intact checkpoint, if there is any; damaged ones are told to the observer.
fn newest_intact(
    checkpoints: &Checkpoints,
    out: &Path,
    observer: &mut Observer<'_>,
) -> Result<Option<Checkpoint>, TrainingError> {
    let mut intact = checkpoints.latest_intact()?;
    intact.damaged.iter().for_each(|(step, why)| observer(Event::Damaged(*step, why)));
    if intact.checkpoint.is_none() && !intact.damaged.is_empty() {
        return Err(TrainingError::AllDamaged { path: out.into(), newest: intact.damaged.remove(0).1 });
    }
    Ok(intact.checkpoint)
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
