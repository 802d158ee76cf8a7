//! Writing a cache, from its beginning or from where it was left.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::f16;
use moebius::MappedFile;

use super::file::{Layout, block_hash, is_whole, parse};
use super::read::lock;
use super::{CacheError, Identity};
use crate::data::write_atomic;

/// A cache that is being built. Nobody else has it open.
#[derive(Debug)]
pub(super) struct CacheWriter {
    path: PathBuf,
    file: File,
    layout: Layout,
    batches: u64,
    block: Vec<u8>,
}

/// What is kept for the tokens of one batch.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    /// `[N,K]`.
    pub(super) ids: Vec<u32>,
    /// `[N,K]`.
    pub(super) log_p: Vec<f32>,
    /// `[N]`.
    pub(super) log_tail: Vec<f32>,
}

impl CacheWriter {
    /// Begins a cache, or goes on with the one that is there behind its last whole block.
    ///
    /// # Errors
    /// As [`super::CacheReader::open`]; [`CacheError::Other`] naming what differs if it is of something else.
    pub(super) fn open(path: &Path, identity: &Identity) -> Result<CacheWriter, CacheError> {
        let io = |operation| move |source| CacheError::Io { operation, path: path.to_owned(), source };
        if !path.exists() {
            write_atomic(path, |file| file.write_all(&identity.header())).map_err(io("write"))?;
        }
        let mut file = File::options().read(true).write(true).open(path).map_err(io("open"))?;
        lock(&file, true, path)?;
        let (layout, end, batches) = {
            let bytes = MappedFile::new(&file).map_err(io("map"))?;
            let (found, layout, begin) = parse(&bytes, path)?;
            if found != *identity {
                let difference = identity.difference(&found);
                return Err(CacheError::Other { path: path.to_owned(), difference });
            }
            // A process that was killed leaves a torn block at the end, a system that was, perhaps several.
            let mut batches = layout.blocks(bytes.len() - begin);
            let at = |number: u64| begin + number as usize * layout.block;
            while batches > 0 && !is_whole(&bytes[at(batches - 1)..at(batches)], batches - 1) {
                batches -= 1;
            }
            (layout, at(batches) as u64, batches)
        };
        file.set_len(end).map_err(io("shorten"))?;
        file.seek(SeekFrom::Start(end)).map_err(io("write"))?;
        Ok(CacheWriter { path: path.to_owned(), file, layout, batches, block: Vec::new() })
    }

    /// Batches that are there.
    pub(super) fn batches(&self) -> u64 {
        self.batches
    }

    /// Bytes of a batch.
    pub(super) fn block_bytes(&self) -> u64 {
        self.layout.block as u64
    }

    /// Adds a batch. What does not become whole is cut off when the file is opened again.
    ///
    /// # Errors
    /// [`CacheError::Io`], for example for a full disk.
    pub(super) fn push(&mut self, kept: &Kept) -> Result<(), CacheError> {
        let (n, k) = (self.layout.tokens, self.layout.top);
        assert!(kept.ids.len() == n * k && kept.log_p.len() == n * k && kept.log_tail.len() == n);
        let block = &mut self.block;
        block.clear();
        for id in &kept.ids {
            block.extend_from_slice(&id.to_le_bytes()[..self.layout.id]);
        }
        for &log_p in &kept.log_p {
            block.extend_from_slice(&f16::from_f32(log_p).to_le_bytes());
        }
        for log_tail in &kept.log_tail {
            block.extend_from_slice(&log_tail.to_le_bytes());
        }
        block.extend_from_slice(&block_hash(block, self.batches).to_le_bytes());
        let io = |source| CacheError::Io { operation: "write", path: self.path.clone(), source };
        self.file.write_all(block).map_err(io)?;
        self.batches += 1;
        Ok(())
    }

    /// Has the system write everything to the disk.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub(super) fn finish(self) -> Result<(), CacheError> {
        self.file.sync_all().map_err(|source| CacheError::Io { operation: "write", path: self.path, source })
    }
}
