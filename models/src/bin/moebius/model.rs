//! Opening a trained model: a run's folder or one checkpoint of it.

use std::path::{Path, PathBuf};

use moebius::checkpoint::{Checkpoint, Checkpoints};
use moebius::{Engine, Session};
use moebius_models::config::Config;
use moebius_models::tokenizer::Tokenizer;
use moebius_models::training::{self, TOKENIZER_FILE};

use crate::failure::Failure;
use crate::text::note;

/// A trained model and the device it is to run on. Its programs are compiled before [`Model::load`], which only then knows in
/// which dtypes they want the parameters, and that there is memory for them.
pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) session: Session,
    checkpoint: Checkpoint,
}

impl Model {
    /// Reads every parameter that a program of the session wants from the checkpoint, piece by piece: no tensor lies in memory
    /// beside the one on the device.
    pub(crate) fn load(&mut self) -> Result<(), Failure> {
        for info in training::parameter_infos(&self.config) {
            if self.session.ty(&info.name).is_some() {
                self.session.load(&info.name, &mut self.checkpoint.model)?;
            }
        }
        Ok(())
    }
}

/// A checkpoint and the folder of its run.
pub(crate) struct Found {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) folder: PathBuf,
}

/// The newest intact checkpoint of a run's folder, or the checkpoint that `path` is.
pub(crate) fn find(path: &Path) -> Result<Found, Failure> {
    let no_model = |found: &str| Failure::NoModel { path: path.into(), found: found.into() };
    if !path.is_dir() {
        return Err(no_model(if path.exists() { "a file" } else { "nothing of that name" }));
    }
    if path.join("state.json").exists() {
        let checkpoint = Checkpoint::open(path)?;
        // DIR/checkpoints/step-N
        let folder = path.canonicalize().ok().and_then(|p| p.ancestors().nth(2).map(Path::to_owned));
        return Ok(Found { checkpoint, folder: folder.unwrap_or_else(|| path.into()) });
    }
    if !path.join("checkpoints").is_dir() {
        return Err(no_model("a folder without checkpoints"));
    }
    let mut intact = Checkpoints::open(path)?.latest_intact()?;
    for (step, why) in &intact.damaged {
        note!("moebius: warning: checkpoint step-{step} cannot be used: {why}");
    }
    match intact.checkpoint {
        Some(checkpoint) => Ok(Found { checkpoint, folder: path.into() }),
        None if intact.damaged.is_empty() => Err(no_model("a run that has no checkpoint yet")),
        None => Err(intact.damaged.remove(0).1.into()),
    }
}

/// Opens a model and a device, and looks whether the checkpoint is one of that model.
pub(crate) fn open(path: &Path, device: &str) -> Result<Model, Failure> {
    let engine = Engine::open(device)?;
    let Found { checkpoint, folder } = find(path)?;
    let config = Config::from_toml(&checkpoint.state.config, "the checkpoint's configuration")?;
    let tokenizer = if checkpoint.state.tokenizer_hash == Tokenizer::Bytes.fingerprint() {
        Tokenizer::Bytes
    } else {
        Tokenizer::from_file(&folder.join(TOKENIZER_FILE))?
    };
    if tokenizer.fingerprint() != checkpoint.state.tokenizer_hash {
        let (wanted, found) = (checkpoint.state.tokenizer.clone(), tokenizer.name().to_owned());
        return Err(training::TrainingError::OtherTokenizer { path: folder, wanted, found }.into());
    }
    checkpoint.model.expect(&training::parameter_infos(&config))?;
    Ok(Model { config, tokenizer, session: engine.session(), checkpoint })
}
