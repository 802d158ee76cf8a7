//! What can go wrong in a run.

use std::path::PathBuf;

use moebius::checkpoint::CheckpointError;

use super::CONFIG_FILE;
use crate::config::{ConfigError, Moments};
use crate::data::DataError;
use crate::distill::DistillError;
use crate::metrics::MetricsError;
use crate::routes::RouteError;

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
    /// The teacher.
    #[error(transparent)]
    Distill(#[from] DistillError),
    /// Routes that are recorded or forced in an evaluation.
    #[error(transparent)]
    Routes(#[from] RouteError),
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
    /// A step takes more memory than the device has.
    #[error("{source}; {}", advice(*largest))]
    TooLarge {
        /// What it takes, and what there is.
        source: moebius::BackendError,
        /// The largest batch that fits; 0 if none does.
        largest: usize,
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
    /// The checkpoint keeps its moments in another way.
    #[error(
        "{}: the checkpoint has train.moments = {found}, this run {wanted}: a run goes on with the moments it has, \
         so resume it with --moments {found}",
        path.display()
    )]
    OtherMoments {
        /// The checkpoint.
        path: PathBuf,
        /// This run's way.
        wanted: Moments,
        /// The checkpoint's way.
        found: Moments,
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
    /// The checkpoint's record of its routers is not one.
    #[error("{}: wanted the idle steps and alarms of this model's routers under `extra.{key}`, found {found}", path.display())]
    RouterState {
        /// The checkpoint.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is there.
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

/// What to do about a step that is too large.
fn advice(largest: usize) -> String {
    match largest {
        0 => "not even a batch of 1 fits".into(),
        largest => format!("the largest batch that fits is {largest} (--set train.batch={largest})"),
    }
}
