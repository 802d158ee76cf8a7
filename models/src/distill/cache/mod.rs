//! The cache of a teacher's log-probabilities: for every token of the batches that a student follows its teacher in, the likeliest
//! tokens with their log-probabilities (f16), and the probability of all others together.
//!
//! One file, [`CACHE_FILE`]: a header that says of what it is ([`Identity`]), then a block for each batch in the order of the run,
//! which is a function of the seed. Blocks are appended one by one, each with its hash, so that a cache that was interrupted
//! anywhere is gone on with, and one that is too short is made longer. Reading maps the file; a block is checked when it is read.
//!
//! Layout, little endian: 8 bytes of magic, version u32, length of the header's text u32, hash of these and the text u64, the text
//! (JSON); then blocks: ids `[N,K]` (u16 for a vocabulary of up to 65536, else u32), log-probabilities f16 `[N,K]`, logarithm of the
//! others' probability f32 `[N]`, and xxh3-64 of these seeded by the number of the block.

mod build;
mod file;
mod read;
mod write;

use std::path::PathBuf;

pub use build::{Build, Progress, build};
pub use file::Identity;
pub use read::{Block, CacheReader};

/// Name of the file in the cache's folder.
pub const CACHE_FILE: &str = "teacher.logits";

/// What can go wrong with a cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system failed.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another program builds it, or trains from it while this one wants to build.
    #[error("{}: in use by another program", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Some other file.
    #[error("{}: not a cache of a teacher: wanted a file that begins with \"moelogit\", found {found:?}", path.display())]
    NotACache {
        /// The file.
        path: PathBuf,
        /// How it begins.
        found: String,
    },
    /// Written by another version of the program.
    #[error("{}: wanted version {wanted} of the format, found {found}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version that is read.
        wanted: u32,
        /// The file's.
        found: u32,
    },
    /// Bytes that were not written so.
    #[error("{}: damaged ({place}): wanted {wanted}, found {found}; remove the file to have it built anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        place: String,
        /// What should be there.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// It was made of something else than this run needs.
    #[error("{}: a cache for another run: {difference}; choose another folder or remove the file", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs, with both values.
        difference: String,
    },
    /// It is not as long as wanted.
    #[error("{}: wanted {wanted} batches, found {found}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Batches that are needed.
        wanted: u64,
        /// Batches that are there.
        found: u64,
    },
    /// It would be longer than a file can be.
    #[error("{}: wanted at most 2^63 bytes, found {batches} batches of {block} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Batches that are needed.
        batches: u64,
        /// Bytes of a batch.
        block: u64,
    },
}
