//! Writing a route file, pass by pass.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::file::{fixed_part, seed};
use super::{Pass, RouteError, RouteHeader};
use crate::data::AtomicFile;

/// A route file that is being written under a temporary name; without [`RouteWriter::finish`] it goes away. It holds one pass in
/// memory.
#[derive(Debug)]
pub struct RouteWriter {
    path: PathBuf,
    out: AtomicFile,
    text: Vec<u8>,
    tokens: u64,
    passes: u64,
    /// Hash of the latest pass.
    last: u64,
    buffer: Vec<u8>,
}

impl RouteWriter {
    /// Begins a file.
    ///
    /// # Errors
    /// [`RouteError::Io`].
    pub fn create(path: &Path, header: &RouteHeader) -> Result<RouteWriter, RouteError> {
        let io = |source| RouteError::Io { operation: "create", path: path.to_owned(), source };
        let text = serde_json::to_vec(header).map_err(|error| io(error.into()))?;
        let mut out = AtomicFile::create(path).map_err(io)?;
        let last = seed(&text);
        out.file.write_all(&fixed_part(&text, 0, 0, last)).and_then(|()| out.file.write_all(&text)).map_err(io)?;
        Ok(RouteWriter { path: path.to_owned(), out, text, tokens: 0, passes: 0, last, buffer: Vec::new() })
    }

    /// Writes the routes of a pass, which must be of the header's layers and of at least one token.
    ///
    /// # Errors
    /// [`RouteError::Io`] (a full disk among them).
    pub fn pass(&mut self, pass: &Pass) -> Result<(), RouteError> {
        let buffer = &mut self.buffer;
        buffer.clear();
        buffer.extend_from_slice(&(pass.ids.len() as u32).to_le_bytes());
        buffer.extend(pass.ids.iter().flat_map(|id| id.to_le_bytes()));
        for layer in &pass.layers {
            buffer.extend_from_slice(&layer.dropped.to_le_bytes());
            buffer.extend(layer.expert_index.iter().flat_map(|expert| expert.to_le_bytes()));
            buffer.extend(layer.score.iter().flat_map(|score| score.to_le_bytes()));
        }
        self.last = xxh3_64_with_seed(buffer, self.last);
        buffer.extend_from_slice(&self.last.to_le_bytes());
        self.tokens += pass.ids.len() as u64;
        self.passes += 1;
        let io = |source| RouteError::Io { operation: "write", path: self.path.clone(), source };
        self.out.file.write_all(&self.buffer).map_err(io)
    }

    /// Gives the file its totals, its hashes and its name.
    ///
    /// # Errors
    /// [`RouteError::Io`]; what was at the path is then as it was.
    pub fn finish(mut self) -> Result<(), RouteError> {
        let fixed = fixed_part(&self.text, self.tokens, self.passes, self.last);
        let file = &mut self.out.file;
        let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&fixed));
        let io = |source| RouteError::Io { operation: "write", path: self.path, source };
        match written {
            Ok(()) => self.out.commit().map_err(io),
            Err(source) => Err(io(source)),
        }
    }
}
