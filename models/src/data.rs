//! Text for training: a [`Corpus`] of token ids from one or several files, and the batches drawn from it.
//!
//! Without a tokenizer a file is its bytes. With one, the text is tokenised once into a cache file of ids that is used from
//! then on (see [`default_cache_dir`]). Both are read batch by batch, so text may be larger than memory. [`Batches`] draws training batches as a pure function of
//! seed and step; [`Windows`] walks validation text so that no token is counted twice.

mod atomic;
mod batches;
mod cache;
mod corpus;
mod sources;
mod store;

use std::path::PathBuf;

use crate::tokenizer::TokenizerError;

pub(crate) use atomic::{AtomicFile, write_atomic};
pub use batches::{Batches, Windows, bits_per_byte};
pub use cache::default_cache_dir;
pub use corpus::{Corpus, CorpusSpec, Stream, Validation};
pub use sources::{Source, tiny_shakespeare};

/// What can be wrong with the text a model is to be trained or evaluated on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// No text was given at all.
    #[error("no text: wanted at least one file")]
    NoSource,
    /// The file is not there.
    #[error("{}: no such file", path.display())]
    Missing {
        /// The file asked for.
        path: PathBuf,
    },
    /// There is something under that name that cannot be read at any place: a folder, a pipe, a device.
    #[error("{}: wanted a regular file, found something else (a folder, pipe or device)", path.display())]
    NotAFile {
        /// The path asked for.
        path: PathBuf,
    },
    /// The text has no byte, or the tokenizer makes no token of it.
    #[error("{name}: the text is empty ({bytes} bytes, 0 tokens)")]
    Empty {
        /// File name or builtin name.
        name: String,
        /// Bytes found.
        bytes: u64,
    },
    /// Too few tokens for a single sequence.
    #[error(
        "{name}: too short, wanted at least {wanted} tokens (a sequence of {seq} and the token after it), found {found}"
    )]
    TooShort {
        /// Which text: part and files.
        name: String,
        /// Sequence length T.
        seq: usize,
        /// Tokens needed, T + 1.
        wanted: usize,
        /// Tokens there are.
        found: usize,
    },
    /// A tokenizer needs UTF-8 and the text is something else.
    #[error("{}: not UTF-8 at byte {byte} (line {line}); a tokenizer needs UTF-8, without one any file is read as bytes", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Position of the first bad byte, from 0.
        byte: usize,
        /// Its line, from 1.
        line: usize,
    },
    /// The tokenizer cannot handle this text.
    #[error("{name}: the text cannot be tokenised")]
    Tokenizer {
        /// File name or builtin name.
        name: String,
        /// Why.
        source: TokenizerError,
    },
    /// The text has an id the model does not know.
    #[error("{name}: token id {id} is in the text, the model knows only ids below {vocab}")]
    IdOutOfRange {
        /// File name or builtin name.
        name: String,
        /// Highest id found.
        id: u32,
        /// Vocabulary size of the model.
        vocab: usize,
    },
    /// The validation share is not a share.
    #[error("validation fraction: wanted a number from 0 to below 1, found {found}")]
    Fraction {
        /// The number given.
        found: f64,
    },
    /// A batch without tokens.
    #[error("batch {batch} x sequence {seq}: wanted at least 1 x 1")]
    EmptyBatch {
        /// Sequences per batch, B.
        batch: usize,
        /// Tokens per sequence, T.
        seq: usize,
    },
    /// The system failed to read or write.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// What was tried ("read", "write the token cache", ...).
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

#[cfg(test)]
mod tests;
