//! The parts of a cache file.

use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::CacheError;
use crate::config::Config;
use crate::data::Stream;
use crate::distill::{DistillError, Settings, Teacher};
use crate::tokenizer::Tokenizer;

pub(super) const MAGIC: &[u8; 8] = b"moelogit";
pub(super) const VERSION: u32 = 1;
/// Bytes before the header's text.
pub(super) const FIXED: usize = 24;
/// Vocabularies up to this have ids of two bytes.
const SHORT_IDS: usize = 1 << 16;
const MOST_VOCABULARY: usize = 1 << 24;

/// Of what a cache is: everything that decides on its content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Name of the teacher.
    pub teacher: String,
    /// Hash of its section `[model]`.
    pub teacher_model: String,
    /// Hash of its weights.
    pub teacher_weights: String,
    /// Hash of the token ids of the training text.
    pub data: String,
    /// Hash of the tokenizer's file, empty for none.
    pub tokenizer: String,
    /// Token kinds.
    pub vocabulary: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of a batch.
    pub batch: usize,
    /// Seed of the order of the batches.
    pub seed: u64,
    /// Tokens that are kept for each token, K.
    pub top: usize,
    /// Temperature of the probabilities.
    pub temperature: f64,
}

impl Identity {
    /// That of the cache which a run of this configuration needs.
    ///
    /// # Errors
    /// [`DistillError::Checkpoint`], [`DistillError::Data`] if teacher or text cannot be read.
    pub fn of(
        teacher: &mut Teacher,
        config: &Config,
        text: &Stream,
        tokenizer: &Tokenizer,
        settings: &Settings,
    ) -> Result<Identity, DistillError> {
        Ok(Identity {
            teacher: teacher.config().model.name.clone(),
            teacher_model: teacher.config().model_hash(),
            teacher_weights: teacher.hash()?.to_owned(),
            data: text.hash()?,
            tokenizer: tokenizer.fingerprint(),
            vocabulary: config.model.vocab,
            sequence: config.model.sequence,
            batch: config.train.batch,
            seed: config.train.seed,
            top: settings.cache.as_ref().map_or(0, |cache| cache.top),
            temperature: settings.kd_temperature,
        })
    }

    /// What differs in `found`, with both values.
    pub fn difference(&self, found: &Identity) -> String {
        let values = |identity: &Identity| match serde_json::to_value(identity) {
            Ok(serde_json::Value::Object(map)) => map,
            Ok(_) | Err(_) => serde_json::Map::new(),
        };
        let (wanted, found) = (values(self), values(found));
        let differ = wanted.iter().filter(|(key, value)| found.get(*key) != Some(value));
        let line = |(key, value): (&String, &serde_json::Value)| {
            let found = found.get(key).map_or("nothing".into(), ToString::to_string);
            format!("{}: wanted {value}, found {found}", key.replace('_', " "))
        };
        differ.map(line).collect::<Vec<_>>().join("; ")
    }

    /// What is wrong with an identity that was read: what was wanted, and what was found.
    fn fault(&self) -> Option<(String, String)> {
        if !(1..=MOST_VOCABULARY).contains(&self.vocabulary) {
            return Some((format!("a vocabulary of 1 to {MOST_VOCABULARY}"), self.vocabulary.to_string()));
        }
        if !(1..=self.vocabulary).contains(&self.top) {
            return Some((format!("1 to {} tokens kept", self.vocabulary), self.top.to_string()));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Some(("a temperature above 0".into(), self.temperature.to_string()));
        }
        let shape = format!("{} x {}", self.batch, self.sequence);
        Layout::of(self).is_none().then(|| ("a batch of at least 1 x 1 that can be counted".into(), shape))
    }

    /// The header of a file.
    pub(super) fn header(&self) -> Vec<u8> {
        let text = serde_json::to_vec(self).unwrap_or_else(|e| unreachable!("an identity is plain data: {e}"));
        let mut header = Vec::with_capacity(FIXED + text.len());
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(text.len() as u32).to_le_bytes());
        let hash = head_hash(&header, &text);
        header.extend_from_slice(&hash.to_le_bytes());
        header.extend_from_slice(&text);
        header
    }
}

fn head_hash(fixed: &[u8], text: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(fixed);
    hash.update(text);
    hash.digest()
}

/// Where the parts of a block lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Tokens of a batch.
    pub(super) tokens: usize,
    /// Kept for each.
    pub(super) top: usize,
    /// Bytes of an id.
    pub(super) id: usize,
    /// Bytes of a block.
    pub(super) block: usize,
}

impl Layout {
    /// `None` if a block has no token or too many bytes to be counted.
    pub(super) fn of(identity: &Identity) -> Option<Layout> {
        let tokens = identity.batch.checked_mul(identity.sequence).filter(|&n| n > 0)?;
        let (top, id) = (identity.top, if identity.vocabulary <= SHORT_IDS { 2 } else { 4 });
        let of_token = top.checked_mul(id + 2)?.checked_add(4)?;
        let block = tokens.checked_mul(of_token)?.checked_add(8)?;
        (block <= isize::MAX as usize).then_some(Layout { tokens, top, id, block })
    }

    /// Bytes of the ids.
    pub(super) fn ids(&self) -> usize {
        self.tokens * self.top * self.id
    }

    /// Bytes of the log-probabilities.
    pub(super) fn log_p(&self) -> usize {
        self.tokens * self.top * 2
    }

    /// Blocks in so many bytes behind the header.
    pub(super) fn blocks(&self, bytes: usize) -> u64 {
        (bytes / self.block) as u64
    }
}

/// Hash of a block's bytes but the last eight.
pub(super) fn block_hash(bytes: &[u8], number: u64) -> u64 {
    xxh3_64_with_seed(bytes, number)
}

/// Whether the bytes of a block are those that were written.
pub(super) fn is_whole(block: &[u8], number: u64) -> bool {
    block.split_last_chunk().is_some_and(|(bytes, hash)| u64::from_le_bytes(*hash) == block_hash(bytes, number))
}

/// The header of a file's bytes: of what it is, its layout, and where the blocks begin.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<(Identity, Layout, usize), CacheError> {
    let damaged = |wanted: String, found: String| CacheError::Damaged {
        path: path.to_owned(),
        place: "header".into(),
        wanted,
        found,
    };
    if !bytes.starts_with(MAGIC) {
        let found = String::from_utf8_lossy(&bytes[..bytes.len().min(MAGIC.len())]).into_owned();
        return Err(CacheError::NotACache { path: path.to_owned(), found });
    }
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else {
        return Err(damaged(format!("{FIXED} bytes"), format!("{} bytes", bytes.len())));
    };
    let half = |at: usize| fixed[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
    if half(8) != VERSION {
        return Err(CacheError::Version { path: path.to_owned(), wanted: VERSION, found: half(8) });
    }
    let length = half(12) as usize;
    let Some(text) = rest.get(..length) else {
        return Err(damaged(format!("{} bytes", FIXED + length), format!("{} bytes", bytes.len())));
    };
    let hash = fixed.last_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    if head_hash(&fixed[..FIXED - 8], text) != hash {
        return Err(damaged("the bytes of its hash".into(), "others".into()));
    }
    let identity: Identity =
        serde_json::from_slice(text).map_err(|error| damaged("of what the cache is".into(), error.to_string()))?;
    if let Some((wanted, found)) = identity.fault() {
        return Err(damaged(wanted, found));
    }
    match Layout::of(&identity) {
        Some(layout) => Ok((identity, layout, FIXED + length)),
        None => Err(damaged("a batch that can be counted".into(), "a larger one".into())),
    }
}
