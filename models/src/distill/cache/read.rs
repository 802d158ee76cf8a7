//! Reading a cache.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use moebius::{MappedFile, Program};

use super::file::{FIXED, Layout, is_whole, parse};
use super::{CacheError, Identity};
use crate::distill::DistillError;
use crate::gpt;

/// A cache that is open for reading. It is mapped, so that it takes no memory that the system could not take back.
#[derive(Debug)]
pub struct CacheReader {
    path: PathBuf,
    bytes: MappedFile,
    identity: Identity,
    layout: Layout,
    begin: usize,
    /// Holds the lock: nobody shortens the file meanwhile.
    _file: File,
}

/// What is kept of the teacher for one batch of N tokens, as the feeds of a student's graph take it.
#[derive(Debug, Clone, Copy)]
pub struct Block<'r> {
    /// f16 `[N,K]`, little endian.
    pub log_p: &'r [u8],
    /// f32 `[N]`, little endian.
    pub log_tail: &'r [u8],
}

/// Takes a lock that readers share and a builder has alone; where the system has none, nothing is locked.
pub(super) fn lock(file: &File, alone: bool, path: &Path) -> Result<(), CacheError> {
    match if alone { file.try_lock() } else { file.try_lock_shared() } {
        Err(TryLockError::WouldBlock) => Err(CacheError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(e)) if e.kind() != std::io::ErrorKind::Unsupported => {
            Err(CacheError::Io { operation: "lock", path: path.to_owned(), source: e })
        }
        Err(TryLockError::Error(_)) | Ok(()) => Ok(()),
    }
}

impl CacheReader {
    /// Opens a cache, whatever it is of.
    ///
    /// # Errors
    /// [`CacheError::Io`], [`CacheError::InUse`], [`CacheError::NotACache`], [`CacheError::Version`], [`CacheError::Damaged`].
    pub fn open(path: &Path) -> Result<CacheReader, CacheError> {
        let io = |operation| move |source| CacheError::Io { operation, path: path.to_owned(), source };
        let file = File::open(path).map_err(io("open"))?;
        lock(&file, false, path)?;
        // An empty file cannot be mapped everywhere.
        if file.metadata().map_err(io("read"))?.len() < FIXED as u64 {
            return Err(CacheError::NotACache { path: path.to_owned(), found: "fewer bytes than a header has".into() });
        }
        let bytes = MappedFile::new(&file).map_err(io("map"))?;
        let (identity, layout, begin) = parse(&bytes, path)?;
        Ok(CacheReader { path: path.to_owned(), bytes, identity, layout, begin, _file: file })
    }

    /// Opens the cache of this identity, which must have so many batches.
    ///
    /// # Errors
    /// As [`CacheReader::open`]; [`CacheError::Other`] naming what differs; [`CacheError::Short`].
    pub fn of(path: &Path, identity: &Identity, batches: u64) -> Result<CacheReader, CacheError> {
        let reader = CacheReader::open(path)?;
        if reader.identity != *identity {
            let difference = identity.difference(&reader.identity);
            return Err(CacheError::Other { path: path.to_owned(), difference });
        }
        let found = reader.batches();
        if found < batches {
            return Err(CacheError::Short { path: path.to_owned(), wanted: batches, found });
        }
        Ok(reader)
    }

    /// Of what it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whole batches that it has.
    pub fn batches(&self) -> u64 {
        self.layout.blocks(self.bytes.len() - self.begin)
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Gives a student's program the feeds that are kept for a batch, counted from 0 over the run; `ids` is room for its tokens.
    ///
    /// # Errors
    /// As [`CacheReader::read`], and [`moebius::Error`] if the program has other feeds.
    pub fn feed(&self, batch: u64, ids: &mut Vec<i32>, program: &mut Program) -> Result<(), DistillError> {
        let block = self.read(batch, ids)?;
        program.feed(gpt::KEPT_IDS, ids)?;
        program.feed_bytes(gpt::KEPT_LOG_P, block.log_p)?;
        program.feed_bytes(gpt::KEPT_LOG_TAIL, block.log_tail)?;
        Ok(())
    }

    /// What is kept for a batch, counted from 0 over the run; its ids, `[N,K]`, go to `ids`.
    ///
    /// # Errors
    /// [`CacheError::Damaged`] if these are not the bytes that were written; [`CacheError::Short`].
    pub fn read(&self, batch: u64, ids: &mut Vec<i32>) -> Result<Block<'_>, CacheError> {
        let found = self.batches();
        if batch >= found {
            return Err(CacheError::Short { path: self.path.clone(), wanted: batch.saturating_add(1), found });
        }
        // It is one of the blocks of the file, so this is a place in it.
        let at = self.begin + batch as usize * self.layout.block;
        let block = &self.bytes[at..at + self.layout.block];
        let damaged = |wanted: &str, found: String| CacheError::Damaged {
            path: self.path.clone(),
            place: format!("batch {batch}"),
            wanted: wanted.into(),
            found,
        };
        if !is_whole(block, batch) {
            return Err(damaged("the bytes of its hash", "others".into()));
        }
        let (of_ids, rest) = block.split_at(self.layout.ids());
        let (log_p, rest) = rest.split_at(self.layout.log_p());
        let log_tail = &rest[..4 * self.layout.tokens];
        ids.clear();
        if self.layout.id == 2 {
            ids.extend(of_ids.as_chunks::<2>().0.iter().map(|b| i32::from(u16::from_le_bytes(*b))));
        } else {
            ids.extend(of_ids.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)));
        }
        let known = |id: &&i32| usize::try_from(**id).is_ok_and(|id| id < self.identity.vocabulary);
        if let Some(id) = ids.iter().find(|id| !known(id)) {
            return Err(damaged(&format!("token ids below {}", self.identity.vocabulary), id.to_string()));
        }
        Ok(Block { log_p, log_tail })
    }
}
