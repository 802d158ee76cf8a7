//! A trained model that teaches.

use std::path::{Path, PathBuf};

use moebius::Session;
use moebius::checkpoint::{Checkpoint, CheckpointError, TensorInfo};
use xxhash_rust::xxh3::Xxh3;

use super::DistillError;
use crate::config::Config;
use crate::gpt;
use crate::tokenizer::Tokenizer;
use crate::trained::{self, Found};
use crate::training::{TOKENIZER_FILE, parameter_infos};

/// A trained model that teaches. It lies in its checkpoint; only [`Teacher::load`] brings it into memory.
#[derive(Debug)]
pub struct Teacher {
    config: Config,
    checkpoint: Checkpoint,
    folder: PathBuf,
    damaged: Vec<(u64, CheckpointError)>,
    hash: Option<String>,
}

impl Teacher {
    /// Opens a run's newest intact checkpoint, or the checkpoint that `path` is.
    ///
    /// # Errors
    /// [`DistillError::Find`], [`DistillError::Config`], [`DistillError::Checkpoint`] if the checkpoint is of another model than it
    /// says.
    pub fn open(path: &Path) -> Result<Teacher, DistillError> {
        let Found { checkpoint, folder, damaged } = trained::find(path)?;
        let config = Config::from_toml(&checkpoint.state.config, "the checkpoint's configuration")?;
        config.validate()?;
        checkpoint.model.expect(&parameter_infos(&config))?;
        Ok(Teacher { config, checkpoint, folder, damaged, hash: None })
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The checkpoint's folder.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// Newer checkpoints that cannot be used, and why.
    pub fn damaged(&self) -> &[(u64, CheckpointError)] {
        &self.damaged
    }

    /// The file of the tokenizer it was trained with; `None` for bytes.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        let bytes = self.checkpoint.state.tokenizer_hash == Tokenizer::Bytes.fingerprint();
        (!bytes).then(|| self.folder.join(TOKENIZER_FILE))
    }

    /// Hash of all its weights, of their names and shapes: 32 hexadecimal digits of xxh3-128. Reads the checkpoint once.
    ///
    /// # Errors
    /// [`DistillError::Checkpoint`].
    pub fn hash(&mut self) -> Result<&str, DistillError> {
        let hash = match self.hash.take() {
            Some(hash) => hash,
            None => {
                let mut hash = Xxh3::new();
                for info in parameter_infos(&self.config) {
                    hash.update(format!("{} {:?}\n", info.name, info.shape).as_bytes());
                    self.checkpoint.model.load_chunks(&info.name, |_, bytes| {
                        hash.update(bytes);
                        Ok(())
                    })?;
                }
                format!("{:032x}", hash.digest128())
            }
        };
        Ok(self.hash.insert(hash))
    }

    /// The student can learn from this teacher.
    ///
    /// # Errors
    /// [`DistillError::Vocabulary`], [`DistillError::Tokenizer`], [`DistillError::Sequence`].
    pub fn check(&self, student: &Config, tokenizer: &Tokenizer) -> Result<(), DistillError> {
        let (own, of_student) = (&self.config.model, &student.model);
        let teacher = || own.name.clone();
        let state = &self.checkpoint.state;
        if state.tokenizer_hash != tokenizer.fingerprint() {
            let (wanted, found) = (state.tokenizer.clone(), tokenizer.name().to_owned());
            return Err(DistillError::Tokenizer { teacher: teacher(), wanted, found });
        }
        if own.vocab != of_student.vocab {
            let (of_teacher, student) = (own.vocab, of_student.name.clone());
            let of_student = of_student.vocab;
            return Err(DistillError::Vocabulary { teacher: teacher(), student, of_teacher, of_student });
        }
        if of_student.sequence > own.sequence {
            let (wanted, found) = (own.sequence, of_student.sequence);
            return Err(DistillError::Sequence { teacher: teacher(), wanted, found });
        }
        Ok(())
    }

    /// The elements of one of its tensors.
    ///
    /// # Errors
    /// [`DistillError::Checkpoint`].
    pub fn tensor(&mut self, name: &str) -> Result<Vec<f32>, DistillError> {
        let elements = self.checkpoint.model.info(name).map_or(0, |info: &TensorInfo| info.shape.iter().product());
        let mut values = vec![0.0f32; elements];
        self.checkpoint.model.load_into(name, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Writes its tensors into the states that programs of the session have for it (named by [`gpt::of_teacher`]), piece by piece.
    ///
    /// # Errors
    /// [`DistillError::Checkpoint`], [`DistillError::Engine`].
    pub fn load(&mut self, session: &mut Session) -> Result<(), DistillError> {
        for info in parameter_infos(&self.config) {
            let stored = gpt::of_teacher(&info.name);
            if session.ty(&stored).is_some() {
                session.load_from(&stored, &info.name, &mut self.checkpoint.model)?;
            }
        }
        Ok(())
    }
}
