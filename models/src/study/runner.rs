//! Runs a study: tuning, models, timings, and the files that say what was found.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use moebius::Engine;

use super::files;
use super::timing::{self, Timings};
use super::train::{Wanted, Weights, Workshop};
use super::{RunResult, Scale, Sheet, Study, StudyError, StudyEvent as Event, TIMING_FILE, Text, Training, tune};
use crate::config::Config;

/// Most seeds of a study.
const MOST_SEEDS: usize = 1000;

/// How a study is run.
pub struct Setup<'a> {
    /// The device.
    pub engine: &'a Engine,
    /// The text.
    pub text: &'a Text,
    /// The scale that the study was made for.
    pub scale: Scale,
    /// The parent folder: runs are in `runs/` there, tables in a folder named like the study.
    pub out: &'a Path,
    /// How many seeds, from 1 on.
    pub seeds: usize,
    /// Whether learning rate and auxiliary coefficient are tuned first.
    pub tune: bool,
    /// Changes to the settings of all arms, as `train.steps=100`.
    pub set: &'a [String],
    /// Whether the checkpoints of finished runs stay.
    pub keep_checkpoints: bool,
    /// The command, for the report.
    pub command: &'a str,
    /// Set to end it after the step; it goes on when it is run again.
    pub stop: &'a AtomicBool,
}

/// What a study tells its observer.
pub enum StudyEvent<'a> {
    /// A short run begins, or is there already.
    Tuning {
        /// The arm.
        arm: &'static str,
        /// From 1.
        number: usize,
        /// How many there are.
        of: usize,
        /// Its learning rate.
        learning_rate: f64,
        /// Its coefficient of the load-balancing loss.
        aux_coef: f64,
    },
    /// A run begins, or is there already.
    Arm {
        /// The arm.
        arm: &'static str,
        /// Its seed.
        seed: u64,
        /// From 1.
        number: usize,
        /// How many there are.
        of: usize,
        /// Its result, if it is there.
        finished: Option<&'a RunResult>,
    },
    /// A run is trained.
    Training {
        /// Its settings.
        config: &'a Config,
        /// Whether it was begun before.
        resumed: bool,
    },
    /// What the run tells.
    Run(crate::training::Event<'a>),
    /// A run is finished.
    Finished(&'a RunResult),
    /// Steps and generation are timed.
    Timing,
    /// Something worth a line.
    Note(&'a str),
}

/// How it ended.
#[derive(Debug)]
pub struct Outcome<'s> {
    /// What is known of all arms.
    pub sheet: Sheet<'s>,
    /// The folder with the tables.
    pub folder: PathBuf,
    /// Whether everything is done; else it was asked to stop.
    pub done: bool,
}

/// Runs a study, or goes on with it, and writes its tables, plots and page, also when it is asked to stop.
///
/// # Errors
/// As the variants of [`StudyError`] say. Finished runs stay.
pub fn run<'s>(
    study: &'s Study,
    setup: &Setup<'_>,
    observer: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome<'s>, StudyError> {
    if !(1..=MOST_SEEDS).contains(&setup.seeds) {
        return Err(StudyError::Seeds { found: setup.seeds });
    }
    let configs = changed(study, setup.set)?;
    let folder = setup.out.join(study.name);
    let runs = setup.out.join("runs");
    for path in [&folder, &runs] {
        let fail = |source| StudyError::Io { operation: "create the folder", path: path.clone(), source };
        std::fs::create_dir_all(path).map_err(fail)?;
    }
    let _lock = lock(&setup.out.join("lock"))?;
    let workshop = Workshop { engine: setup.engine, text: setup.text, runs, command: setup.command, stop: setup.stop };
    let mut sheet = Sheet {
        study,
        seeds: setup.seeds,
        configs,
        results: vec![vec![None; setup.seeds]; study.arms.len()],
        timings: Vec::new(),
        tunings: Vec::new(),
    };
    let done = fill(&mut sheet, &workshop, setup, &folder, observer)?;
    files::write(&sheet, setup, &folder)?;
    Ok(Outcome { sheet, folder, done })
}

/// The settings of all arms with the changes.
fn changed(study: &Study, set: &[String]) -> Result<Vec<Config>, StudyError> {
    let mut configs = Vec::new();
    for arm in &study.arms {
        let mut config = arm.config.clone();
        let wrong = |source| StudyError::Config { arm: arm.name, source };
        for setting in set {
            config.set(setting).map_err(wrong)?;
        }
        config.validate().map_err(wrong)?;
        configs.push(config);
    }
    Ok(configs)
}

/// Two studies at work on one run would spoil it.
fn lock(path: &Path) -> Result<File, StudyError> {
    let fail = |source| StudyError::Io { operation: "open", path: path.to_owned(), source };
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StudyError::InUse { path: path.to_owned() }),
        Err(std::fs::TryLockError::Error(source)) => Err(fail(source)),
    }
}

/// Does whatever is missing; false if it was asked to stop.
fn fill(
    sheet: &mut Sheet<'_>,
    workshop: &Workshop<'_>,
    setup: &Setup<'_>,
    folder: &Path,
    observer: &mut dyn FnMut(Event<'_>),
) -> Result<bool, StudyError> {
    let arms = &sheet.study.arms;
    if setup.tune {
        match tune::all(workshop, arms, &sheet.configs, observer)? {
            None => return Ok(false),
            Some(tunings) => {
                sheet.configs.iter_mut().zip(&tunings).for_each(|(config, tuning)| tuning.apply(config));
                sheet.tunings = tunings;
            }
        }
    }
    // Seed by seed, so that a study that is stopped has whole pairs.
    let mut number = 0;
    let of = setup.seeds * arms.len();
    for seed in 0..setup.seeds {
        let wanted: Vec<Wanted> = (0..arms.len()).map(|arm| wanted(sheet, arm, seed as u64 + 1)).collect();
        for (at, run) in wanted.iter().enumerate() {
            number += 1;
            let finished = workshop.finished(run)?;
            let seed_number = seed as u64 + 1;
            let event = Event::Arm { arm: run.arm, seed: seed_number, number, of, finished: finished.as_ref() };
            observer(event);
            let needed = finished.is_none();
            if let Some((teacher, _)) = run.teacher.as_ref().filter(|_| needed)
                && workshop.train(teacher, Weights::Needed, observer)?.is_none()
            {
                return Ok(false);
            }
            let weights = match setup.keep_checkpoints || teaches(&wanted, at) {
                true => Weights::Kept,
                false => Weights::Forgotten,
            };
            let Some(result) = workshop.train(run, weights, observer)? else { return Ok(false) };
            if needed {
                observer(Event::Finished(&result));
            }
            sheet.results[at][seed] = Some(result);
            if !setup.keep_checkpoints && !teaches(&wanted, at) {
                workshop.forget_weights(run)?;
            }
        }
    }
    if !time(sheet, workshop, setup, folder, observer)? {
        return Ok(false);
    }
    if !setup.keep_checkpoints {
        for seed in 0..setup.seeds {
            for arm in 0..arms.len() {
                workshop.forget_weights(&wanted(sheet, arm, seed as u64 + 1))?;
            }
        }
    }
    Ok(true)
}

/// The run of an arm and a seed.
fn wanted(sheet: &Sheet<'_>, arm: usize, seed: u64) -> Wanted {
    let description = &sheet.study.arms[arm];
    let mut config = sheet.configs[arm].clone();
    config.train.seed = seed;
    let teacher = match description.training {
        Training::Plain => None,
        Training::Distilled { teacher, stop } => {
            // Studies name only arms that they have, and teachers before their students.
            sheet.study.arm(teacher).filter(|&at| at < arm).map(|at| (Box::new(wanted(sheet, at, seed)), stop))
        }
    };
    let folder = format!("{}-seed{seed}", description.folder);
    Wanted { arm: description.name, folder, config, teacher, tuning: false }
}

/// Whether a run of a seed teaches another one of it.
fn teaches(all: &[Wanted], at: usize) -> bool {
    all.iter().any(|run| run.teacher.as_ref().is_some_and(|(teacher, _)| teacher.arm == all[at].arm))
}

/// Times steps and generation, unless that was done; false if it was asked to stop.
fn time(
    sheet: &mut Sheet<'_>,
    workshop: &Workshop<'_>,
    setup: &Setup<'_>,
    folder: &Path,
    observer: &mut dyn FnMut(Event<'_>),
) -> Result<bool, StudyError> {
    let arms: Vec<_> = sheet.study.arms.iter().zip(sheet.configs.iter().cloned()).collect();
    let path = folder.join(TIMING_FILE);
    let key = timing::key(workshop.engine, &arms, setup.scale.timed());
    if let Some(timings) = Timings::read(&path, &key)? {
        sheet.timings = timings.arms;
        return Ok(true);
    }
    observer(Event::Timing);
    let all: Vec<Wanted> = (0..arms.len()).map(|arm| wanted(sheet, arm, 1)).collect();
    for (_, run) in all.iter().enumerate().filter(|&(at, _)| teaches(&all, at)) {
        if workshop.train(run, Weights::Needed, observer)?.is_none() {
            return Ok(false);
        }
    }
    let teacher = |arm: usize| workshop.model(&all[arm]);
    let counts = setup.scale.timed();
    let measured =
        timing::measure(workshop.engine, &arms, workshop.text, (&path, &key), counts, workshop.stop, &teacher)?;
    Ok(measured.is_some_and(|timings| {
        sheet.timings = timings.arms;
        true
    }))
}
