//! `state.json`: where a training run stands, and the length and hashes of the files beside it.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::{
    error::{CheckpointError, Damage},
    write::{FileRecord, hex},
};

/// Version of the checkpoint format this program writes and reads.
pub const FORMAT: u32 = 1;

/// Where a training run stands: with the tensors, all that is needed to go on with the same bits.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps done. Names the checkpoint's folder.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seed of the run.
    pub seed: u64,
    /// Next position in the order of the training data; its unit is the data source's.
    pub data_position: u64,
    /// The run's configuration as TOML text.
    pub config: String,
    /// Stable hash of the configuration.
    pub config_hash: String,
    /// Name of the model.
    pub model: String,
    /// Name of the tokenizer, `bytes` for none.
    pub tokenizer: String,
    /// Hash of the tokenizer's file, empty for none.
    pub tokenizer_hash: String,
    /// Lowest validation loss so far, in nats per token; absent before the first evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_validation_loss: Option<f64>,
    /// Whatever else the program wants back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// The content of `state.json` after its own hash.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StateFile {
    pub(super) format: u32,
    pub(super) state: TrainState,
    pub(super) files: BTreeMap<String, FileRecord>,
}

/// `state.json` begins with these bytes and then the 32 digits of its hash, which is that of all its other bytes. So the
/// hash covers the text itself, and a change that JSON would not notice is found too.
const HEAD: &str = "{\n  \"xxh3\": \"";
const DIGITS: usize = 32;

fn content_hash(head: &[u8], tail: &[u8]) -> String {
    let mut hash = Xxh3::new();
    hash.update(head);
    hash.update(tail);
    hex(hash.digest128())
}

impl StateFile {
    pub(super) fn to_text(&self, path: &Path) -> Result<String, CheckpointError> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|source| CheckpointError::Json { path: path.to_path_buf(), source })?;
        let tail = format!("\",{}\n", &json[1..]);
        Ok(format!("{HEAD}{}{tail}", content_hash(HEAD.as_bytes(), tail.as_bytes())))
    }

    pub(super) fn from_bytes(bytes: &[u8], path: &Path) -> Result<StateFile, CheckpointError> {
        let head = bytes.get(..HEAD.len()).unwrap_or(bytes);
        let digits = bytes.get(HEAD.len()..HEAD.len() + DIGITS).unwrap_or_default();
        let tail = bytes.get(HEAD.len() + DIGITS..).unwrap_or_default();
        let found = content_hash(head, tail);
        let wanted = std::str::from_utf8(digits).ok().filter(|d| head == HEAD.as_bytes() && d.len() == DIGITS);
        if wanted != Some(found.as_str()) {
            let damage = Damage::State { wanted: wanted.map(str::to_string), found };
            return Err(CheckpointError::Damaged { path: path.to_path_buf(), damage });
        }
        let json = |source| CheckpointError::Json { path: path.to_path_buf(), source };
        /// The version alone, so that another version is recognised whatever else it holds.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let Version { format } = serde_json::from_slice(bytes).map_err(json)?;
        if format != FORMAT {
            return Err(CheckpointError::Format { path: path.to_path_buf(), wanted: FORMAT, found: format });
        }
        serde_json::from_slice(bytes).map_err(json)
    }
}
