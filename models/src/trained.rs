//! Where a trained model is: a run's folder, or one checkpoint of it.

use std::path::{Path, PathBuf};

use moebius::checkpoint::{Checkpoint, CheckpointError, Checkpoints};

/// A checkpoint and the folder of its run.
#[derive(Debug)]
pub struct Found {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The folder of the run, where its tokenizer is.
    pub folder: PathBuf,
    /// Newer checkpoints that cannot be used, and why.
    pub damaged: Vec<(u64, CheckpointError)>,
}

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nothing there is a model.
    #[error("{}: no model here: wanted a run's folder or one of its checkpoints, found {found}", path.display())]
    NoModel {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// The newest intact checkpoint of a run's folder, or the checkpoint that `path` is.
///
/// # Errors
/// [`FindError`].
pub fn find(path: &Path) -> Result<Found, FindError> {
    let no_model = |found: &'static str| FindError::NoModel { path: path.into(), found };
    if !path.is_dir() {
        return Err(no_model(if path.exists() { "a file" } else { "nothing of that name" }));
    }
    if path.join("state.json").exists() {
        let checkpoint = Checkpoint::open(path)?;
        // DIR/checkpoints/step-N
        let folder = path.canonicalize().ok().and_then(|p| p.ancestors().nth(2).map(Path::to_owned));
        return Ok(Found { checkpoint, folder: folder.unwrap_or_else(|| path.into()), damaged: Vec::new() });
    }
    if !path.join("checkpoints").is_dir() {
        return Err(no_model("a folder without checkpoints"));
    }
    let mut intact = Checkpoints::open(path)?.latest_intact()?;
    match intact.checkpoint {
        Some(checkpoint) => Ok(Found { checkpoint, folder: path.into(), damaged: intact.damaged }),
        None if intact.damaged.is_empty() => Err(no_model("a run that has no checkpoint yet")),
        None => Err(intact.damaged.remove(0).1.into()),
    }
}
