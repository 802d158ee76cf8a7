//! Bytes in the program or in a file, and token ids upon them, each behind one way of reading.
//!
//! A file is never held in memory as a whole: text may be many times larger than memory. Files of ids, which this program
//! writes once and never changes, are mapped. Text is read instead, because a mapped file that another program shortens
//! ends the process by a signal, while a read gives an error.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use moebius::MappedFile;

use super::DataError;

/// Read at once where a whole text is gone through.
const CHUNK: usize = 1 << 20;
/// Bytes of ids read at once, on the stack.
const FEW: usize = 4096;

/// The bytes behind ids.
#[derive(Debug)]
pub(super) enum Bytes {
    /// Built into the program.
    Static(&'static [u8]),
    /// An open file.
    File(OpenFile),
    /// A file of ids.
    Mapped(MappedFile),
}

/// A regular file that is not empty.
#[derive(Debug)]
pub(super) struct OpenFile {
    path: PathBuf,
    /// Locked because a read moves the file's position.
    file: Mutex<File>,
    len: usize,
}

impl OpenFile {
    pub(super) fn open(path: &Path) -> Result<OpenFile, DataError> {
        let fail = |source: Error| {
            if source.kind() == ErrorKind::NotFound {
                return DataError::Missing { path: path.to_owned() };
            }
            DataError::Io { action: "read", path: path.to_owned(), source }
        };
        // Asked before opening: opening a pipe would wait for a writer.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(DataError::NotAFile { path: path.to_owned() });
        }
        let file = File::open(path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        if len == 0 {
            return Err(DataError::Empty { name: path.display().to_string(), bytes: 0 });
        }
        let len = usize::try_from(len).map_err(|_| fail(ErrorKind::FileTooLarge.into()))?;
        Ok(OpenFile { path: path.to_owned(), file: Mutex::new(file), len })
    }

    /// The same file mapped, for one that nothing changes any more.
    pub(super) fn mapped(self) -> Result<Bytes, DataError> {
        let file = self.file.into_inner().unwrap_or_else(PoisonError::into_inner);
        let fail = |source| DataError::Io { action: "map", path: self.path, source };
        Ok(Bytes::Mapped(MappedFile::new(&file).map_err(fail)?))
    }

    fn read_at(&self, at: usize, out: &mut [u8]) -> Result<(), DataError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let done = file.seek(SeekFrom::Start(at as u64)).and_then(|_| file.read_exact(out));
        done.map_err(|source| {
            let source = if source.kind() == ErrorKind::UnexpectedEof {
                Error::new(source.kind(), "it became shorter while it was in use")
            } else {
                source
            };
            DataError::Io { action: "read", path: self.path.clone(), source }
        })
    }
}

impl Bytes {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Static(bytes) => bytes.len(),
            Self::File(file) => file.len,
            Self::Mapped(bytes) => bytes.len(),
        }
    }

    /// Copies the bytes from `at` on. All of `out` must lie within [`Bytes::len`].
    pub(super) fn read_at(&self, at: usize, out: &mut [u8]) -> Result<(), DataError> {
        match self {
            Self::Static(bytes) => out.copy_from_slice(&bytes[at..at + out.len()]),
            Self::File(file) => file.read_at(at, out)?,
            Self::Mapped(bytes) => out.copy_from_slice(&bytes[at..at + out.len()]),
        }
        Ok(())
    }

    /// The bytes of a range as a vector.
    pub(super) fn read(&self, range: Range<usize>) -> Result<Vec<u8>, DataError> {
        let mut bytes = vec![0; range.len()];
        self.read_at(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Shows the bytes of a range to `visit`, in order, in pieces of any length.
    pub(super) fn visit(&self, range: Range<usize>, mut visit: impl FnMut(&[u8])) -> Result<(), DataError> {
        match self {
            Self::Static(bytes) => visit(&bytes[range]),
            Self::Mapped(bytes) => visit(&bytes[range]),
            Self::File(file) => {
                let mut buffer = vec![0; CHUNK.min(range.len())];
                let mut at = range.start;
                while at < range.end {
                    let now = buffer.len().min(range.end - at);
                    file.read_at(at, &mut buffer[..now])?;
                    visit(&buffer[..now]);
                    at += now;
                }
            }
        }
        Ok(())
    }
}

/// How an id lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    /// One byte: text without a tokenizer.
    U8,
    /// Two bytes, little endian.
    U16,
    /// Four bytes, little endian.
    U32,
}

impl Width {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// The ids of one text, in order.
#[derive(Debug)]
pub(super) struct TokenStore {
    pub(super) data: Bytes,
    pub(super) width: Width,
    /// Where in `data` the ids lie.
    pub(super) ids: Range<usize>,
    /// Where in `data` the number of text bytes of each id lies (one byte each); without it every id is one byte of text.
    pub(super) lens: Option<Range<usize>>,
    /// Highest id in the text; larger values read later (the file was changed meanwhile) are cut to it.
    pub(super) max_id: u32,
}

impl TokenStore {
    pub(super) fn len(&self) -> usize {
        self.ids.len() / self.width.bytes()
    }

    /// Copies ids from `start` on.
    pub(super) fn read(&self, start: usize, out: &mut [i32]) -> Result<(), DataError> {
        let width = self.width.bytes();
        let cut = |id: u32| id.min(self.max_id) as i32;
        let mut buffer = [0; FEW];
        let mut at = self.ids.start + start * width;
        for out in out.chunks_mut(FEW / width) {
            let bytes = &mut buffer[..out.len() * width];
            self.data.read_at(at, bytes)?;
            at += bytes.len();
            match self.width {
                Width::U8 => out.iter_mut().zip(&*bytes).for_each(|(o, &b)| *o = cut(u32::from(b))),
                Width::U16 => out
                    .iter_mut()
                    .zip(bytes.as_chunks::<2>().0)
                    .for_each(|(o, &b)| *o = cut(u32::from(u16::from_le_bytes(b)))),
                Width::U32 => {
                    out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, &b)| *o = cut(u32::from_le_bytes(b)));
                }
            }
        }
        Ok(())
    }

    /// Bytes of text behind the ids of a range.
    pub(super) fn text_bytes(&self, range: Range<usize>) -> Result<u64, DataError> {
        let Some(lens) = &self.lens else { return Ok(range.len() as u64) };
        let mut sum = 0;
        let range = lens.start + range.start..lens.start + range.end;
        self.data.visit(range, |bytes| sum += bytes.iter().map(|&n| u64::from(n)).sum::<u64>())?;
        Ok(sum)
    }
}
