//! What can go wrong in a study.

use std::path::PathBuf;

use crate::config::ConfigError;
use crate::data::DataError;
use crate::distill::DistillError;
use crate::generate::GenerateError;
use crate::metrics::MetricsError;
use crate::report::ReportError;
use crate::training::TrainingError;

/// What can go wrong in a study.
#[derive(Debug, thiserror::Error)]
pub enum StudyError {
    /// There is no study of that name.
    #[error("no study `{found}`: wanted one of {}", known.join(", "))]
    Unknown {
        /// The name given.
        found: String,
        /// All names.
        known: &'static [&'static str],
    },
    /// A study without runs.
    #[error("--seeds: wanted 1 to 1000, found {found}")]
    Seeds {
        /// The number given.
        found: usize,
    },
    /// Settings that do not fit an arm.
    #[error("arm {arm}: {source}")]
    Config {
        /// The arm.
        arm: &'static str,
        /// What is wrong.
        source: ConfigError,
    },
    /// A scale's file.
    #[error(transparent)]
    Scale(#[from] ConfigError),
    /// A run went wrong.
    #[error("{}: {source}", folder.display())]
    Run {
        /// Its folder.
        folder: PathBuf,
        /// What happened.
        source: TrainingError,
    },
    /// A student or its teacher.
    #[error(transparent)]
    Distill(#[from] DistillError),
    /// The text.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A part of the text is too short to be split into training, validation and test.
    #[error("{name}: wanted at least {wanted} tokens to hold back for validation and test, found {found}")]
    Short {
        /// The text.
        name: String,
        /// Tokens needed.
        wanted: usize,
        /// Tokens there are.
        found: usize,
    },
    /// A run's measurements.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A run's report.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Timing a step.
    #[error(transparent)]
    Engine(#[from] moebius::Error),
    /// Timing a step of training.
    #[error(transparent)]
    Training(#[from] TrainingError),
    /// Timing generation.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A result that is none.
    #[error("{}: not a result of a study: {source}; remove the file to have the run finished anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Line and column.
        source: serde_json::Error,
    },
    /// Another study is at work in the same folder.
    #[error("{}: in use by another study: wait for it, or choose another folder with --out", path.display())]
    InUse {
        /// The lock.
        path: PathBuf,
    },
    /// A file or folder of the study.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// All settings of a grid diverged.
    #[error("arm {arm}: training diverged with every learning rate of the grid: {rates}")]
    Diverged {
        /// The arm.
        arm: &'static str,
        /// The learning rates.
        rates: String,
    },
}
