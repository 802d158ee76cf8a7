//! A corpus: training and validation text as two streams of ids.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::cache::tokenised;
use super::store::{Bytes, OpenFile, TokenStore, Width};
use super::{DataError, Source, tiny_shakespeare};
use crate::tokenizer::Tokenizer;

/// Where validation text comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Validation<'a> {
    /// The last part of every training text (0.1: the last tenth), from 0 to below 1. Part of each and not the end of
    /// all, so that with several files validation sees all of them.
    Fraction(f64),
    /// Texts of their own; all of the training text is trained on.
    Sources(&'a [Source]),
}

/// What a corpus is made of.
#[derive(Debug, Clone, Copy)]
pub struct CorpusSpec<'a> {
    /// Training texts, joined in this order.
    pub train: &'a [Source],
    /// Validation text.
    pub validation: Validation<'a>,
    /// How text becomes ids.
    pub tokenizer: &'a Tokenizer,
    /// Vocabulary size of the model if known: a text with an id at or above it is refused.
    pub vocab: Option<usize>,
    /// Folder for tokenised text, made if needed; unused without a `tokenizer.json`. See [`super::default_cache_dir`].
    pub cache_dir: &'a Path,
}

/// Training and validation text.
#[derive(Debug)]
pub struct Corpus {
    /// Text to train on.
    pub train: Stream,
    /// Text to validate on; empty for `Validation::Fraction(0.0)`.
    pub validation: Stream,
}

/// A sequence of token ids out of one or several texts. Reading is `&self` and allocates nothing.
#[derive(Debug, Clone)]
pub struct Stream {
    name: String,
    parts: Vec<Part>,
    len: usize,
}

/// A range of one text, and where it begins in the stream.
#[derive(Debug, Clone)]
struct Part {
    start: usize,
    store: Arc<TokenStore>,
    range: Range<usize>,
}

impl Corpus {
    /// Opens and if need be tokenises the texts. `progress` hears (name, bytes done, bytes in all) while a text is
    /// tokenised, and nothing when its ids are in the cache.
    ///
    /// # Errors
    /// Every variant of [`DataError`] but [`DataError::TooShort`] and [`DataError::EmptyBatch`].
    pub fn open(spec: &CorpusSpec<'_>, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<Self, DataError> {
        if let Validation::Fraction(found) = spec.validation
            && !(0.0..1.0).contains(&found)
        {
            return Err(DataError::Fraction { found });
        }
        let mut stores = open_all(spec.train, spec, progress)?.into_iter();
        let mut train = Stream::new("training text", spec.train);
        let mut validation = match spec.validation {
            Validation::Fraction(_) => Stream::new("validation text", spec.train),
            Validation::Sources(sources) => Stream::new("validation text", sources),
        };
        match spec.validation {
            Validation::Fraction(fraction) => {
                for store in stores {
                    let split = (store.len() as f64 * (1.0 - fraction)) as usize;
                    train.push(Arc::clone(&store), 0..split);
                    validation.push(Arc::clone(&store), split..store.len());
                }
            }
            Validation::Sources(sources) => {
                stores.by_ref().for_each(|store| train.push(Arc::clone(&store), 0..store.len()));
                for store in open_all(sources, spec, progress)? {
                    validation.push(Arc::clone(&store), 0..store.len());
                }
            }
        }
        Ok(Self { train, validation })
    }
}

fn open_all(
    sources: &[Source],
    spec: &CorpusSpec<'_>,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vec<Arc<TokenStore>>, DataError> {
    if sources.is_empty() {
        return Err(DataError::NoSource);
    }
    sources.iter().map(|source| open_one(source, spec, progress).map(Arc::new)).collect()
}

fn open_one(
    source: &Source,
    spec: &CorpusSpec<'_>,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<TokenStore, DataError> {
    let text = match source {
        Source::TinyShakespeare => Bytes::Static(tiny_shakespeare()),
        Source::File(path) => Bytes::File(OpenFile::open(path)?),
    };
    let name = source.name();
    let store = match spec.tokenizer {
        Tokenizer::Bytes => {
            let ids = 0..text.len();
            // Only a vocabulary below 256 makes it worth reading the whole file.
            let small = spec.vocab.is_some_and(|vocab| vocab < 256);
            let mut max_id = if small { 0 } else { u8::MAX };
            if small {
                text.visit(ids.clone(), |bytes| max_id = bytes.iter().copied().fold(max_id, u8::max))?;
            }
            TokenStore { data: text, width: Width::U8, ids, lens: None, max_id: max_id.into() }
        }
        Tokenizer::File(_) => {
            let total = text.len() as u64;
            tokenised(source, &text, spec.tokenizer, spec.cache_dir, &mut |done| progress(&name, done, total))?
        }
    };
    // Ids are handed out as i32.
    let vocab = spec.vocab.unwrap_or(i32::MAX as usize);
    if store.max_id as usize >= vocab {
        return Err(DataError::IdOutOfRange { name: name.into_owned(), id: store.max_id, vocab });
    }
    Ok(store)
}

impl Stream {
    fn new(kind: &str, sources: &[Source]) -> Self {
        let names: Vec<_> = sources.iter().map(Source::name).collect();
        Self { name: format!("{kind} ({})", names.join(", ")), parts: Vec::new(), len: 0 }
    }

    fn push(&mut self, store: Arc<TokenStore>, range: Range<usize>) {
        if !range.is_empty() {
            let (start, grown) = (self.len, range.len());
            self.parts.push(Part { start, store, range });
            self.len += grown;
        }
    }

    /// What this is, for people: part and files.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `out` with the ids from position `start` on, across the joins between texts.
    ///
    /// # Errors
    /// [`DataError::Io`] if a file can no longer be read.
    ///
    /// # Panics
    /// If `start + out.len()` is beyond [`Stream::len`]: a bug of the caller.
    pub fn read(&self, start: usize, out: &mut [i32]) -> Result<(), DataError> {
        assert!(start + out.len() <= self.len, "{start} + {} tokens of {}", out.len(), self.len);
        let mut done = 0;
        self.pieces(start..start + out.len(), |store, range| {
            let count = range.len();
            store.read(range.start, &mut out[done..done + count])?;
            done += count;
            Ok(())
        })
    }

    /// Bytes of text behind the tokens of a range; without a tokenizer the length of the range.
    ///
    /// # Errors
    /// [`DataError::Io`] if a file can no longer be read.
    ///
    /// # Panics
    /// If the range ends beyond [`Stream::len`]: a bug of the caller.
    pub fn text_bytes(&self, range: Range<usize>) -> Result<u64, DataError> {
        assert!(range.end <= self.len, "tokens {range:?} of {}", self.len);
        let mut bytes = 0;
        self.pieces(range, |store, range| {
            bytes += store.text_bytes(range)?;
            Ok(())
        })?;
        Ok(bytes)
    }

    /// The tokens of a range as a stream of their own.
    ///
    /// # Panics
    /// If the range ends beyond [`Stream::len`]: a bug of the caller.
    pub fn part(&self, range: Range<usize>) -> Stream {
        assert!(range.end <= self.len, "tokens {range:?} of {}", self.len);
        let mut part = Stream { name: self.name.clone(), parts: Vec::new(), len: 0 };
        for Part { start, store, range: all } in &self.parts {
            let (from, to) = (range.start.max(*start), range.end.min(start + all.len()));
            if from < to {
                part.push(Arc::clone(store), from - start + all.start..to - start + all.start);
            }
        }
        part
    }

    /// Hash of all ids: 32 hexadecimal digits of xxh3-128. Reads the whole text.
    ///
    /// # Errors
    /// [`DataError::Io`] if a file can no longer be read.
    pub fn hash(&self) -> Result<String, DataError> {
        let mut hash = Xxh3::new();
        let mut ids = vec![0i32; self.len.min(1 << 16)];
        let mut at = 0;
        while at < self.len {
            let count = ids.len().min(self.len - at);
            self.read(at, &mut ids[..count])?;
            hash.update(bytemuck::cast_slice(&ids[..count]));
            at += count;
        }
        Ok(format!("{:032x}", hash.digest128()))
    }

    /// Cuts a range at the joins between texts.
    fn pieces(
        &self,
        range: Range<usize>,
        mut visit: impl FnMut(&TokenStore, Range<usize>) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let first = self.parts.partition_point(|part| part.start + part.range.len() <= range.start);
        for part in &self.parts[first..] {
            let from = range.start.max(part.start);
            let to = range.end.min(part.start + part.range.len());
            if from >= to {
                break;
            }
            let shift = part.range.start;
            visit(&part.store, from - part.start + shift..to - part.start + shift)?;
        }
        Ok(())
    }
}
