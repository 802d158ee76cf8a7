//! One run of a study: an ordinary run folder, made or gone on with, and its result.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use moebius::Engine;

use super::{Point, RunResult, StudyError, StudyEvent};
use crate::config::{Config, hash};
use crate::data::{Corpus, CorpusSpec, Source, Stream, Validation, Windows, default_cache_dir};
use crate::distill::{Course, DistillError, Settings, Stop, Teacher};
use crate::evaluation::{Evaluation, Evaluator};
use crate::metrics::{MetricsReader, Record};
use crate::report::{self, RunFacts};
use crate::tokenizer::Tokenizer;
use crate::training::{CONFIG_FILE, Ending, METRICS_FILE, REPORT_FILE, Run, TrainingError};

/// The text of a study, as bytes: 90 % to train on, 5 % to validate on, 5 % for the test at the end.
#[derive(Debug)]
pub struct Text {
    /// Training and validation text.
    pub corpus: Corpus,
    /// The test text.
    pub test: Stream,
    /// Its name, for people.
    pub name: String,
    hash: String,
}

impl Text {
    /// Opens a file, or Tiny Shakespeare.
    ///
    /// # Errors
    /// [`StudyError::Data`]; [`StudyError::Short`].
    pub fn open(data: Option<&Path>) -> Result<Text, StudyError> {
        let source = match data {
            Some(path) => Source::File(path.to_owned()),
            None => Source::TinyShakespeare,
        };
        let spec = CorpusSpec {
            train: std::slice::from_ref(&source),
            validation: Validation::Fraction(0.1),
            tokenizer: &Tokenizer::Bytes,
            vocab: None,
            cache_dir: &default_cache_dir(),
        };
        let Corpus { train, validation: held } = Corpus::open(&spec, &mut |_, _, _| ())?;
        let half = held.len() / 2;
        if half == 0 {
            return Err(StudyError::Short { name: held.name().to_owned(), wanted: 2, found: held.len() });
        }
        let (validation, test) = (held.part(0..half), held.part(half..held.len()));
        let hash = format!("{}{}", train.hash()?, held.hash()?);
        let name = match data {
            Some(path) => path.display().to_string(),
            None => "Tiny Shakespeare".to_owned(),
        };
        let name = format!("{name}, {} bytes, split 90/5/5", train.len() + held.len());
        Ok(Text { corpus: Corpus { train, validation }, test, name, hash })
    }
}

/// A run that is wanted.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// The arm.
    pub(super) arm: &'static str,
    /// How its folder's name begins.
    pub(super) folder: String,
    /// All settings.
    pub(super) config: Config,
    /// The run of the teacher, and the fraction of this run that follows it.
    pub(super) teacher: Option<(Box<Wanted>, f64)>,
    /// Whether it only tunes: no test.
    pub(super) tuning: bool,
}

/// What becomes of the weights of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// They are not wanted after the last evaluation.
    Forgotten,
    /// They stay if the run is trained now.
    Kept,
    /// They must be there: a run that has none is trained again.
    Needed,
}

/// What runs are made with.
pub(super) struct Workshop<'a> {
    pub(super) engine: &'a Engine,
    pub(super) text: &'a Text,
    /// The folder of all runs.
    pub(super) runs: PathBuf,
    /// The command, for the reports of the runs.
    pub(super) command: &'a str,
    pub(super) stop: &'a AtomicBool,
}

/// Where the checkpoints of a run are.
pub(super) fn checkpoints(folder: &Path) -> PathBuf {
    folder.join("checkpoints")
}

impl Workshop<'_> {
    /// Hash of everything that makes a run: settings, text, teacher.
    pub(super) fn key(&self, wanted: &Wanted) -> String {
        let teacher = wanted.teacher.as_ref().map(|(teacher, stop)| format!("{} {stop}", self.key(teacher)));
        hash(&serde_json::json!([wanted.config.hash(), self.text.hash, teacher, wanted.tuning]))
    }

    pub(super) fn folder(&self, wanted: &Wanted) -> PathBuf {
        self.runs.join(format!("{}-{}", wanted.folder, &self.key(wanted)[..8]))
    }

    /// The result of a run that is finished.
    pub(super) fn finished(&self, wanted: &Wanted) -> Result<Option<RunResult>, StudyError> {
        Ok(RunResult::read(&self.folder(wanted))?.filter(|result| result.key == self.key(wanted)))
    }

    /// Whether the weights of a run are there.
    fn has_weights(&self, wanted: &Wanted) -> bool {
        std::fs::read_dir(checkpoints(&self.folder(wanted))).is_ok_and(|mut all| all.next().is_some())
    }

    /// The trained model of a run.
    pub(super) fn model(&self, wanted: &Wanted) -> Result<Teacher, StudyError> {
        Ok(Teacher::open(&self.folder(wanted))?)
    }

    /// Removes the checkpoints of a run that is finished.
    pub(super) fn forget_weights(&self, wanted: &Wanted) -> Result<(), StudyError> {
        remove(&checkpoints(&self.folder(wanted)))
    }

    /// Trains a run to its end, or goes on with it; nothing is done if it is finished and, where they are needed, its weights are
    /// there. None if it was asked to stop. Only weights that are `kept` are written at the end.
    pub(super) fn train(
        &self,
        wanted: &Wanted,
        weights: Weights,
        observer: &mut dyn FnMut(StudyEvent<'_>),
    ) -> Result<Option<RunResult>, StudyError> {
        if let Some(result) = self.finished(wanted)?
            && (weights != Weights::Needed || self.has_weights(wanted))
        {
            return Ok(Some(result));
        }
        let folder = self.folder(wanted);
        match self.train_once(wanted, &folder, weights, observer) {
            // The teacher was trained anew and came out with other bits, as on another device: so is its student.
            Err(StudyError::Run { source: TrainingError::Distill(DistillError::OtherTeacher { .. }), .. }) => {
                remove(&folder)?;
                observer(StudyEvent::Note("its teacher was trained anew and is another one: it begins again"));
                self.train_once(wanted, &folder, weights, observer)
            }
            trained => trained,
        }
    }

    fn train_once(
        &self,
        wanted: &Wanted,
        folder: &Path,
        weights: Weights,
        observer: &mut dyn FnMut(StudyEvent<'_>),
    ) -> Result<Option<RunResult>, StudyError> {
        let fail = |source| StudyError::Run { folder: folder.to_owned(), source };
        let resume = folder.join(CONFIG_FILE).exists();
        let (config, text) = (wanted.config.clone(), (&Tokenizer::Bytes, &self.text.corpus));
        observer(StudyEvent::Training { config: &config, resumed: resume });
        let mut events = |event: crate::training::Event<'_>| observer(StudyEvent::Run(event));
        let opened = match &wanted.teacher {
            None => Run::open(self.engine, config, text.0, text.1, folder, resume, &mut events),
            Some((teacher, stop)) => {
                let mut course = self.course(&self.folder(teacher), *stop, &config, folder, resume)?;
                Run::distil(self.engine, config, text, folder, resume, (&mut course, self.stop), &mut events)
            }
        };
        let mut run = opened.map_err(fail)?;
        run.save_last(weights != Weights::Forgotten);
        let ending = match run.train(self.stop, &mut events) {
            Err(TrainingError::Engine(moebius::Error::NonFinite { step, .. })) if wanted.tuning => {
                let result = self.result(wanted, folder, None, None)?;
                observer(StudyEvent::Note(&format!("diverged at step {step}")));
                result.write(folder)?;
                return Ok(Some(result));
            }
            ended => ended.map_err(fail)?,
        };
        match ending {
            Ending::Stopped | Ending::Alarmed => return Ok(None),
            Ending::Done => {}
        }
        let validation = evaluate(&mut run, &self.text.corpus.validation).map_err(fail)?;
        let test = match wanted.tuning {
            true => None,
            false => Some(evaluate(&mut run, &self.text.test).map_err(fail)?),
        };
        let result = self.result(wanted, folder, Some(validation), test)?;
        // Trained again for its weights alone: what was measured the first time stays, unless it came out differently.
        if let Some(before) = self.finished(wanted)?
            && (before.validation_loss, before.test_loss) == (result.validation_loss, result.test_loss)
        {
            return Ok(Some(before));
        }
        self.report(&run, folder)?;
        // Last, as this file says that the run is finished.
        result.write(folder)?;
        Ok(Some(result))
    }

    fn course(
        &self,
        teacher: &Path,
        stop: f64,
        student: &Config,
        folder: &Path,
        resume: bool,
    ) -> Result<Course, StudyError> {
        if resume && let Some(mut course) = Course::of_run(folder)? {
            course.move_teacher(teacher);
            return Ok(course);
        }
        let settings = Settings::default();
        Ok(Course::new(Teacher::open(teacher)?, student, &Tokenizer::Bytes, Stop::Fraction(stop), settings)?)
    }

    fn result(
        &self,
        wanted: &Wanted,
        folder: &Path,
        validation: Option<Evaluation>,
        test: Option<Evaluation>,
    ) -> Result<RunResult, StudyError> {
        let (curve, seconds) = measured(&folder.join(METRICS_FILE), wanted.config.tokens_per_step())?;
        let steps = wanted.config.total_steps();
        Ok(RunResult {
            key: self.key(wanted),
            device: format!("{} ({})", self.engine.name(), self.engine.describe()),
            steps,
            tokens: steps * wanted.config.tokens_per_step(),
            validation_loss: validation.map(|e| e.loss),
            validation_bits: validation.map(|e| e.bits_per_byte),
            test_loss: test.map(|e| e.loss),
            test_bits: test.map(|e| e.bits_per_byte),
            seconds,
            curve,
        })
    }

    fn report(&self, run: &Run, folder: &Path) -> Result<(), StudyError> {
        let config = run.config();
        let parameters = config.parameters();
        let facts = RunFacts {
            title: format!("{}, seed {}", config.model.name, config.train.seed),
            command: self.command.to_owned(),
            device: format!("{} ({})", self.engine.name(), self.engine.describe()),
            total_params: parameters.total,
            active_params: parameters.active,
            config: config.to_toml()?,
            more: vec![("Text".into(), self.text.name.clone())],
        };
        Ok(report::write_report(&folder.join(REPORT_FILE), &facts, &folder.join(METRICS_FILE))?)
    }
}

/// Removes a folder, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), StudyError> {
    match std::fs::remove_dir_all(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(StudyError::Io { operation: "remove", path: path.to_owned(), source })
        }
        Err(_) | Ok(()) => Ok(()),
    }
}

/// The loss of a trained model on all of a text.
fn evaluate(run: &mut Run, stream: &Stream) -> Result<Evaluation, TrainingError> {
    let config = run.config().clone();
    let windows = Windows::new(stream, config.train.batch, config.model.sequence, None)?;
    let session = run.session();
    let mut evaluator = Evaluator::new(session, &config.model, config.train.batch)?;
    evaluator.run(session, &windows)
}

/// The evaluations in a run's metrics, and the seconds of all of its training steps.
fn measured(metrics: &Path, tokens_per_step: u64) -> Result<(Vec<Point>, f64), StudyError> {
    let (mut curve, mut seconds) = (Vec::new(), 0.0);
    for record in MetricsReader::open(metrics)? {
        match record? {
            Record::Train(train) if train.tokens_per_s > 0.0 => seconds += tokens_per_step as f64 / train.tokens_per_s,
            Record::Eval(eval) => curve.push(Point { step: eval.step, loss: eval.val_loss, seconds }),
            Record::Train(_) | Record::Alarm(_) => {}
        }
    }
    Ok((curve, seconds))
}
