//! Opening a trained model: a run's folder or one checkpoint of it.

use std::path::Path;

use moebius::checkpoint::Checkpoint;
use moebius::{Engine, Session};
use moebius_models::config::Config;
use moebius_models::tokenizer::Tokenizer;
use moebius_models::trained::{self, Found};
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

/// The newest intact checkpoint of a run's folder, or the checkpoint that `path` is; damaged ones are told.
pub(crate) fn find(path: &Path) -> Result<Found, Failure> {
    let found = trained::find(path)?;
    for (step, why) in &found.damaged {
        note!("moebius: warning: checkpoint step-{step} cannot be used: {why}");
    }
    Ok(found)
}

/// Opens a model and a device, and looks whether the checkpoint is one of that model.
pub(crate) fn open(path: &Path, device: &str) -> Result<Model, Failure> {
    let engine = Engine::open(device)?;
    let Found { checkpoint, folder, .. } = find(path)?;
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
