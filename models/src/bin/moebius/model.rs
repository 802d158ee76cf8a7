//! Opening a trained model: a run's folder or one checkpoint of it.

use std::path::{Path, PathBuf};

use moebius::checkpoint::{Checkpoint, Checkpoints};
use moebius::{Engine, Session};
use moebius_models::config::Config;
use moebius_models::tokenizer::Tokenizer;
use moebius_models::training::{self, TOKENIZER_FILE};

use crate::failure::Failure;
use crate::text::note;

/// A trained model on a device.
pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) session: Session,
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

/// Loads a model's weights onto a device.
pub(crate) fn open(path: &Path, device: &str) -> Result<Model, Failure> {
    let engine = Engine::open(device)?;
    let Found { mut checkpoint, folder } = find(path)?;
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
    let mut session = engine.session();
    let infos = training::parameter_infos(&config);
    checkpoint.model.expect(&infos)?;
    let mut bytes = Vec::new();
    for info in infos {
        let ty = moebius::ir::TensorType::f32(info.shape.clone());
        bytes.resize(ty.bytes(), 0);
        checkpoint.model.load_into(&info.name, &mut bytes)?;
        session.insert(&info.name, &ty)?;
        session.write_bytes(&info.name, &bytes)?;
    }
    Ok(Model { config, tokenizer, session })
}
