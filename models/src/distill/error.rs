//! What can go wrong in distillation.

use std::path::PathBuf;

use moebius::checkpoint::CheckpointError;

use super::DISTILL_FILE;
use super::cache::CacheError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::trained::FindError;

/// What can go wrong in distillation.
#[derive(Debug, thiserror::Error)]
pub enum DistillError {
    /// There is no teacher.
    #[error("the teacher: {0}")]
    Find(#[from] FindError),
    /// The teacher's checkpoint.
    #[error("the teacher: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// The teacher's configuration.
    #[error("the teacher: {0}")]
    Config(#[from] ConfigError),
    /// The device, or a graph.
    #[error(transparent)]
    Engine(#[from] moebius::Error),
    /// A graph.
    #[error(transparent)]
    Graph(#[from] moebius::ir::Error),
    /// The text.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The cache of the teacher's log-probabilities.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Teacher and student do not speak of the same tokens.
    #[error(
        "teacher {teacher} and student {student}: wanted one vocabulary, as the student learns the teacher's probabilities token by \
         token, found model.vocab = {of_teacher} and {of_student}"
    )]
    Vocabulary {
        /// Name of the teacher.
        teacher: String,
        /// Name of the student.
        student: String,
        /// Tokens of the teacher.
        of_teacher: usize,
        /// Tokens of the student.
        of_student: usize,
    },
    /// The teacher was trained with another tokenizer.
    #[error("teacher {teacher}: wanted the tokenizer it was trained with, {wanted}, found {found}")]
    Tokenizer {
        /// Name of the teacher.
        teacher: String,
        /// Its tokenizer.
        wanted: String,
        /// The run's.
        found: String,
    },
    /// The student reads more tokens at once than the teacher can.
    #[error(
        "teacher {teacher}: wanted sequences of at most {wanted} tokens, which it knows, found model.sequence = {found}"
    )]
    Sequence {
        /// Name of the teacher.
        teacher: String,
        /// Its sequence.
        wanted: usize,
        /// The student's.
        found: usize,
    },
    /// A number of layers that no student has.
    #[error("--layers: wanted 1 to {most}, the layers of teacher {teacher}, found {found}")]
    Layers {
        /// Name of the teacher.
        teacher: String,
        /// Its layers.
        most: usize,
        /// What was asked for.
        found: usize,
    },
    /// A student that cannot begin with the teacher's weights.
    #[error("to begin from teacher {teacher} the student needs its {key}: wanted {wanted}, found {found}")]
    Inheritance {
        /// Name of the teacher.
        teacher: String,
        /// The setting.
        key: &'static str,
        /// The teacher's.
        wanted: usize,
        /// The student's.
        found: usize,
    },
    /// A number that is none of its kind.
    #[error("{what}: wanted {wanted}, found {found}")]
    Number {
        /// The option.
        what: &'static str,
        /// Its range.
        wanted: &'static str,
        /// The number.
        found: f64,
    },
    /// The checkpoint is not the one that the run began with.
    #[error("{}: the teacher is not the one of this run: wanted weights with hash {wanted}, found {found}", path.display())]
    OtherTeacher {
        /// The checkpoint.
        path: PathBuf,
        /// Hash of the weights that the run began with.
        wanted: String,
        /// Hash of the weights there.
        found: String,
    },
    /// A run that is trained plainly and one that is distilled were taken for each other.
    #[error("{}: {}", path.display(), if *distilled {
        format!("this run distils a teacher ({DISTILL_FILE}): go on with it by `moebius distill --resume`")
    } else {
        format!("this run has no teacher (no {DISTILL_FILE}): go on with it by `moebius train --resume`")
    })]
    OtherKind {
        /// The folder.
        path: PathBuf,
        /// What the run is.
        distilled: bool,
    },
    /// `distill.toml` is not one.
    #[error("{}: {source}", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// Line and column.
        source: Box<toml::de::Error>,
    },
    /// `distill.toml` cannot be written as TOML.
    #[error("cannot write {DISTILL_FILE}: {source}")]
    Write {
        /// Which value.
        source: Box<toml::ser::Error>,
    },
    /// A file of the run.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The teacher's probabilities are not numbers.
    #[error("teacher {teacher}: wanted finite logits, found {found} in batch {batch}")]
    NotFinite {
        /// Name of the teacher.
        teacher: String,
        /// The batch, from 0.
        batch: u64,
        /// The logit.
        found: f32,
    },
    /// It was asked to stop while the cache was built; what is built stays.
    #[error("stopped while the cache of the teacher was built: {done} of {wanted} batches are there")]
    Stopped {
        /// Batches that are there.
        done: u64,
        /// Batches that are wanted.
        wanted: u64,
    },
}
