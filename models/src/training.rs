//! A training run: from a configuration and a corpus to a folder with metrics, checkpoints and a report.
//!
//! The folder holds `config.toml`, `tokenizer.json` and `distill.toml` (if there is one), `metrics.jsonl`, `checkpoints/step-N/` and
//! `report.html`. A run is a pure function of its configuration and corpus: batch and start values come from
//! counter-based generators, so a run that was killed and resumed gives the same bits as one that was not.

mod error;
mod memory;
mod state;
mod step;
mod teaching;

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moebius::checkpoint::{CheckpointError, Checkpoints, Dtype, TensorInfo};
use moebius::{Engine, MicroStep, Program, Session, StepReport, Trainer};

use crate::config::Config;
use crate::data::{Batches, Corpus, Windows};
use crate::distill::cache::Progress;
use crate::distill::{Course, DISTILL_FILE, DistillError};
use crate::evaluation::{Evaluation, Evaluator};
use crate::gpt;
use crate::health::{self, Alarms, DEAD_AFTER, Watch};
use crate::metrics::{AlarmRecord, EvalRecord, MetricsWriter, Record, TrainRecord};
use crate::tokenizer::Tokenizer;

pub use error::TrainingError;
pub use memory::{kept, largest_batch, memory, memory_of};
use state::newest_intact;
pub use step::{parts, parts_of, trainer, trainer_of};
use teaching::{Distillation, Teaching};

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
    /// A step was done. Its record has the health of the routers if it is one that the host looks at (`train.log_every`), or if
    /// there are alarms.
    Step(&'a TrainRecord),
    /// An evaluation was done.
    Evaluated(&'a EvalRecord),
    /// A router left the limits of an alarm.
    Alarm(&'a AlarmRecord),
    /// A checkpoint is on the disk.
    Saved(&'a Path),
    /// A batch was added to the cache of the teacher's log-probabilities.
    Caching(Progress),
    /// The teacher has left.
    TeacherLeft {
        /// After this step.
        step: u64,
        /// [`Run::memory`] before.
        before: (usize, usize),
        /// And after.
        after: (usize, usize),
    },
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
    feeds: Feeds,
    windows: Windows,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    /// The MoE layers and their experts.
    moe_layers: Vec<(usize, usize)>,
    watch: Watch,
    alarm_ends: bool,
    saves_last: bool,
    /// When the first step was launched that was not collected yet.
    begun: Option<Instant>,
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

/// The key of a micro-batch's noise: of the seed and the number of the micro-batch in the run (from 1) alone, so that a resumed run
/// draws the same numbers, and another one than that of start values and batches.
fn noise_key(seed: u64, number: u64) -> [u32; 2] {
    let key = [seed as u32, (seed >> 32) as u32];
    let word = |index: u64| moebius::ir::philox::bits(key, u32::MAX, index);
    [word(2 * number), word(2 * number + 1)]
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
        if resume && out.join(DISTILL_FILE).exists() {
            return Err(DistillError::OtherKind { path: out.into(), distilled: true }.into());
        }
        Run::open_with(engine, config, (tokenizer, corpus), out, resume, None, observer)
    }

    /// [`Run::open`] of a run that follows a teacher until the course's stop, then goes on as if it had never had one. If the
    /// course has a cache, what is missing of it is built first, unless `stop` is set meanwhile.
    ///
    /// # Errors
    /// As [`Run::open`]; [`TrainingError::Distill`], among them [`DistillError::Stopped`].
    pub fn distil(
        engine: &Engine,
        config: Config,
        text: (&Tokenizer, &Corpus),
        out: &Path,
        resume: bool,
        (course, stop): (&mut Course, &AtomicBool),
        observer: &mut Observer<'_>,
    ) -> Result<Run, TrainingError> {
        Run::open_with(engine, config, text, out, resume, Some(Distillation { course, stop }), observer)
    }

    fn open_with(
        engine: &Engine,
        config: Config,
        (tokenizer, corpus): (&Tokenizer, &Corpus),
        out: &Path,
        resume: bool,
        mut distillation: Option<Distillation<'_>>,
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

        let mut newest = match resume {
            true => newest_intact(&Checkpoints::create(out, train.keep_checkpoints)?, out, observer)?,
            false => None,
        };
        // Lines of steps that will be done again are dropped.
        let done = newest.as_ref().map_or(0, |checkpoint| checkpoint.state.step);
        let mut teaching = None;
        if let Some(distillation) = &mut distillation {
            teaching = distillation.prepare(engine, &config, (tokenizer, corpus, &batches), done, observer)?;
        }
        let mut session = engine.session();
        let trainer = match distillation.as_mut().filter(|_| teaching.is_some()) {
            None => step::trainer(engine, &mut session, &config)?,
            Some(distillation) => {
                let trainer = step::trainer_of(engine, &mut session, &config, Some(&distillation.lesson()?))?;
                if distillation.course.settings().cache.is_none() {
                    distillation.course.teacher()?.load(&mut session)?;
                }
                trainer
            }
        };
        let evaluator = Evaluator::new(&mut session, &config.model, train.batch)?;

        // Only now, so that a model that does not fit the device leaves nothing behind.
        if !resume {
            write_folder(out, &config, tokenizer, distillation.as_ref().map(|d| &*d.course))?;
        }
        let checkpoints = Checkpoints::create(out, train.keep_checkpoints)?;
        let metrics = MetricsWriter::resume(&out.join(METRICS_FILE), done)?;
        let ids = train.batch * sequence;
        let mut run = Run {
            tokenizer_name: tokenizer.name().to_owned(),
            tokenizer_hash: tokenizer.fingerprint(),
            session,
            trainer,
            evaluator,
            feeds: Feeds {
                batches,
                is_noisy: gpt::is_noisy(&config.model),
                teaching,
                tokens: vec![0; ids],
                targets: vec![0; ids],
            },
            windows,
            checkpoints,
            metrics,
            moe_layers: health::moe_layers(&config.model),
            watch: Watch::default(),
            alarm_ends: false,
            saves_last: true,
            begun: None,
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
                if let Some(course) = distillation.map(|d| d.course).filter(|c| c.settings().init_from_teacher) {
                    course.teacher()?.endow(&config.model, session)?;
                }
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

    /// Whether there is a checkpoint after the last step, which is the default; one that is due then is written in any case. For a
    /// caller that keeps what it wants of the weights, or wants none of them.
    pub fn save_last(&mut self, saves: bool) {
        self.saves_last = saves;
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
        while self.trainer.steps_launched() < total {
            if stop.load(Ordering::Relaxed) {
                self.collect(observer)?;
                if saved != self.trainer.steps_done() {
                    self.save(observer)?;
                }
                return Ok(Ending::Stopped);
            }
            self.launch(observer)?;
            let step = self.trainer.steps_launched();
            let evaluates = due(eval_every, step) || step == total;
            let saves = due(save_every, step) || (step == total && self.saves_last);
            let leaves = step < total && self.feeds.teaching.as_ref().is_some_and(|teaching| teaching.stop == step);
            let looks = self.has_health(step) || self.trainer.room() == 0 || leaves;
            if !(looks || evaluates || saves || stop.load(Ordering::Relaxed)) {
                continue;
            }
            let alarmed = self.collect(observer)?;
            if leaves {
                self.dismiss_teacher(observer)?;
            }
            if evaluates {
                let begun = Instant::now();
                self.evaluate(observer)?;
                self.training_time += begun.elapsed();
            }
            if saves {
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

    /// Whether the record of a step has the health of the routers: on the steps that are logged, and on all where alarms watch it.
    fn has_health(&self, step: u64) -> bool {
        self.is_logged(step) || !self.watch.alarms().is_empty()
    }

    /// Whether the health of the routers in a step goes into `metrics.jsonl`.
    fn is_logged(&self, step: u64) -> bool {
        let every = self.config.train.log_every.max(1);
        step == 1 || step.is_multiple_of(every) || step == self.config.total_steps()
    }

    /// Launches the next step. What the steps before it did is not lost if that fails.
    fn launch(&mut self, observer: &mut Observer<'_>) -> Result<(), TrainingError> {
        self.begun.get_or_insert_with(Instant::now);
        let (config, feeds) = (&self.config, &mut self.feeds);
        let launched = self.trainer.launch(&mut self.session, |at, program| feeds.give(config, at, program));
        if launched.is_err() {
            match self.collect(observer) {
                // Behind a step that did not end there is nothing to look at; why it did not is what counts.
                Ok(_) | Err(TrainingError::Engine(moebius::Error::StillTorn { .. })) => {}
                Err(of_steps_before) => return Err(of_steps_before),
            }
        }
        launched
    }

    /// Looks at what the steps that were launched have done; whether an alarm was given.
    fn collect(&mut self, observer: &mut Observer<'_>) -> Result<bool, TrainingError> {
        let mut seen: Vec<(StepReport, Vec<f32>)> = Vec::new();
        let (config, feeds) = (&self.config, &mut self.feeds);
        let collected = self.trainer.collect(
            &mut self.session,
            |at, program| feeds.give(config, at, program),
            |report, values| seen.push((report, values.to_vec())),
        );
        let elapsed = self.begun.take().map_or(Duration::ZERO, |begun| begun.elapsed());
        self.training_time += elapsed;
        let last = self.trainer.steps_done();
        // The outputs that tell of routers are those of the latest step, and of none after a step that was not finite.
        let read = collected.is_ok() && self.has_health(last) && !seen.is_empty();
        let mut experts = Vec::new();
        if read {
            let dead_after = self.watch.alarms().dead_experts.unwrap_or(DEAD_AFTER);
            experts = health::read(&self.session, self.trainer.program(), &self.moe_layers, dead_after)?;
        }
        let of_step = self.config.tokens_per_step();
        let tokens_per_s = (seen.len() as u64 * of_step) as f64 / elapsed.as_secs_f64();
        let mut alarmed = false;
        for (StepReport { step, loss, grad_norm }, values) in seen {
            let [lm_loss, aux_loss] = [0, 1].map(|i| values.get(i).copied().map_or(f64::NAN, f64::from));
            let mut record = TrainRecord {
                step,
                tokens: step * of_step,
                loss: f64::from(loss),
                lm_loss,
                aux_loss,
                kd_loss: values.get(2).copied().map(f64::from),
                lr: self.config.learning_rate_of_step(step),
                grad_norm: f64::from(grad_norm),
                tokens_per_s,
                experts: Vec::new(),
            };
            let mut alarms = Vec::new();
            if read && step == last {
                alarms = self.watch.look(step, &experts);
                record.experts = std::mem::take(&mut experts);
            }
            let with_health = record.clone();
            if !self.is_logged(step) {
                record.experts.clear();
            }
            self.metrics.write(&Record::Train(record))?;
            observer(Event::Step(&with_health));
            for alarm in &alarms {
                self.metrics.write(&Record::Alarm(alarm.clone()))?;
                observer(Event::Alarm(alarm));
            }
            alarmed |= !alarms.is_empty();
        }
        collected?;
        Ok(alarmed)
    }

    fn evaluate(&mut self, observer: &mut Observer<'_>) -> Result<(), TrainingError> {
        let evaluation = self.evaluator.run(&mut self.session, &self.windows)?;
        let step = self.trainer.steps_done();
        let record = EvalRecord {
            step,
            tokens: step * self.config.tokens_per_step(),
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

/// What a micro-batch is fed.
struct Feeds {
    batches: Batches,
    is_noisy: bool,
    /// While the run follows a teacher.
    teaching: Option<Teaching>,
    tokens: Vec<i32>,
    targets: Vec<i32>,
}

impl Feeds {
    /// Gives the program the tokens and the noise of a micro-batch; the learning rate of its step.
    fn give(&mut self, config: &Config, at: MicroStep, program: &mut Program) -> Result<f32, TrainingError> {
        let train = &config.train;
        // Batches are counted over the whole run, so that a resumed one goes on with those it would have seen.
        let number = (at.step - 1) * train.accumulate as u64 + at.micro_batch as u64;
        self.batches.fill(number, &mut self.tokens, &mut self.targets)?;
        program.feed("tokens", &self.tokens)?;
        program.feed("targets", &self.targets)?;
        if let Some(teaching) = &mut self.teaching {
            teaching.give(number, program)?;
        }
        if self.is_noisy {
            program.feed(gpt::NOISE_KEY, &noise_key(train.seed, number + 1))?;
        }
        Ok(config.learning_rate_of_step(at.step) as f32)
    }
}

fn write_folder(
    out: &Path,
    config: &Config,
    tokenizer: &Tokenizer,
    course: Option<&Course>,
) -> Result<(), TrainingError> {
    let refused = |source| TrainingError::Io { operation: "create the folder", path: out.to_owned(), source };
    std::fs::create_dir_all(out).map_err(refused)?;
    if let Some(json) = tokenizer.json() {
        let path = out.join(TOKENIZER_FILE);
        write_whole(&path, json)?;
    }
    match course {
        Some(course) => course.write(out)?,
        // Left by a run that was killed before it was one.
        None => remove_if_there(&out.join(DISTILL_FILE))?,
    }
    // Last, as this file is what makes the folder a run.
    let path = out.join(CONFIG_FILE);
    write_whole(&path, config.to_toml()?.as_bytes())
}

fn remove_if_there(path: &Path) -> Result<(), TrainingError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainingError::Io { operation: "remove", path: path.to_owned(), source })
        }
        Err(_) | Ok(()) => Ok(()),
    }
}

/// Writes a file so that it is whole or not there.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainingError> {
    let io = |source| TrainingError::Io { operation: "write", path: path.to_owned(), source };
    crate::data::write_atomic(path, |file| file.write_all(bytes)).map_err(io)
}
