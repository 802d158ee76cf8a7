//! The course of a student: by whom it is taught, how, and until when.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{DistillError, Stop, Teacher};
use crate::config::{Config, limits};
use crate::gpt::Distillation;
use crate::tokenizer::Tokenizer;

/// File of a run that is distilled, beside its configuration.
pub const DISTILL_FILE: &str = "distill.toml";

/// The settings of a course, as they are kept in [`DISTILL_FILE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The teacher's checkpoint.
    pub teacher: PathBuf,
    /// Hash of its weights.
    pub teacher_hash: String,
    /// The last step that follows the teacher; 0 if none does.
    pub stop_step: u64,
    /// Weight of the distillation term.
    pub kd_weight: f64,
    /// Temperature of both softmaxes.
    pub kd_temperature: f64,
    /// Weight of the cross entropy while there is a teacher; afterwards it is 1.
    pub lm_weight: f64,
    /// Whether the student began with the teacher's weights.
    pub init_from_teacher: bool,
    /// The cache of the teacher's log-probabilities; absent: the teacher is in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSettings>,
}

impl Default for Settings {
    /// Both terms alike, at temperature 1, with the teacher in memory; for a [`Course`] to fill in the rest.
    fn default() -> Settings {
        Settings {
            teacher: PathBuf::new(),
            teacher_hash: String::new(),
            stop_step: 0,
            kd_weight: 1.0,
            kd_temperature: 1.0,
            lm_weight: 1.0,
            init_from_teacher: false,
            cache: None,
        }
    }
}

/// A cache of the teacher's log-probabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSettings {
    /// Its folder.
    pub folder: PathBuf,
    /// Tokens that are kept for each token of the text.
    pub top: usize,
}

/// A course, and its teacher once it is needed.
#[derive(Debug)]
pub struct Course {
    settings: Settings,
    teacher: Option<Teacher>,
}

impl Course {
    /// A course for `student`, whose settings are whole: `stop` becomes a step of it. The teacher and its hash are put into
    /// `settings`, and so is the step.
    ///
    /// # Errors
    /// [`DistillError::Vocabulary`] and the like if the student cannot learn from this teacher, [`DistillError::Number`] for a setting
    /// out of its range.
    pub fn new(
        mut teacher: Teacher,
        student: &Config,
        tokenizer: &Tokenizer,
        stop: Stop,
        mut settings: Settings,
    ) -> Result<Course, DistillError> {
        teacher.check(student, tokenizer)?;
        let not_negative = "a finite number of at least 0";
        for (what, wanted, found, holds) in [
            ("--kd-weight", not_negative, settings.kd_weight, settings.kd_weight >= 0.0),
            ("--lm-weight", not_negative, settings.lm_weight, settings.lm_weight >= 0.0),
            ("--kd-temp", "a finite number above 0", settings.kd_temperature, settings.kd_temperature > 0.0),
        ] {
            if !(found.is_finite() && holds) {
                return Err(DistillError::Number { what, wanted, found });
            }
        }
        if let Some(cache) = &mut settings.cache {
            if cache.top == 0 {
                return Err(DistillError::Number { what: "--cache-top", wanted: "at least 1", found: 0.0 });
            }
            // More tokens than there are cannot be kept.
            cache.top = cache.top.min(student.model.vocab);
        }
        let path = teacher.path();
        settings.teacher = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        settings.teacher_hash = teacher.hash()?.to_owned();
        settings.stop_step = stop.step(student.total_steps(), student.tokens_per_step());
        Ok(Course { settings, teacher: Some(teacher) })
    }

    /// The course of the run in `out`, if it is a distilled one.
    ///
    /// # Errors
    /// [`DistillError::Settings`], [`DistillError::Config`] for a text longer than any, [`DistillError::Io`].
    pub fn of_run(out: &Path) -> Result<Option<Course>, DistillError> {
        let path = out.join(DISTILL_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(DistillError::Io { operation: "read", path, source }),
        };
        limits::check(&text, &path.display().to_string())?;
        let wrong = |source| DistillError::Settings { path, source: Box::new(source) };
        Ok(Some(Course { settings: toml::from_str(&text).map_err(wrong)?, teacher: None }))
    }

    /// Writes [`DISTILL_FILE`], whole or not at all.
    ///
    /// # Errors
    /// [`DistillError::Io`], [`DistillError::Write`].
    pub(crate) fn write(&self, out: &Path) -> Result<(), DistillError> {
        let text =
            toml::to_string(&self.settings).map_err(|source| DistillError::Write { source: Box::new(source) })?;
        let path = out.join(DISTILL_FILE);
        let written: Result<(), std::io::Error> =
            crate::data::write_atomic(&path, |file| file.write_all(text.as_bytes()));
        written.map_err(|source| DistillError::Io { operation: "write", path, source })
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Looks for the teacher elsewhere, where it was moved. It must be the same.
    pub fn move_teacher(&mut self, path: &Path) {
        (self.settings.teacher, self.teacher) = (path.to_owned(), None);
    }

    /// Temperature and weight of the term.
    pub fn options(&self) -> Distillation {
        Distillation { temperature: self.settings.kd_temperature, beta: self.settings.kd_weight }
    }

    /// The teacher, opened if it was not.
    ///
    /// # Errors
    /// As [`Teacher::open`]; [`DistillError::OtherTeacher`] if it is not the one that the run began with.
    pub fn teacher(&mut self) -> Result<&mut Teacher, DistillError> {
        let mut teacher = match self.teacher.take() {
            Some(teacher) => teacher,
            None => Teacher::open(&self.settings.teacher)?,
        };
        let found = teacher.hash()?;
        if found != self.settings.teacher_hash {
            let (wanted, found) = (self.settings.teacher_hash.clone(), found.to_owned());
            return Err(DistillError::OtherTeacher { path: teacher.path().to_owned(), wanted, found });
        }
        Ok(self.teacher.insert(teacher))
    }
}
