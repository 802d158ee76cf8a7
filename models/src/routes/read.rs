//! Reading a route file, pass by pass. Nothing is allocated that the file's own length does not bound.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::file::{FIXED, MAGIC, VERSION, head_hash, seed};
use super::{LayerRoutes, Pass, RouteError, RouteHeader};

/// A route file that is being read. It holds one pass in memory.
#[derive(Debug)]
pub struct RouteReader {
    path: PathBuf,
    from: BufReader<File>,
    header: RouteHeader,
    /// Where the passes begin.
    begin: u64,
    seed: u64,
    tokens: u64,
    passes: u64,
    /// Hash of the last pass, as the file says.
    end: u64,
    /// Of what was read so far.
    done: Done,
    buffer: Vec<u8>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Done {
    tokens: u64,
    passes: u64,
    hash: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

/// The four-byte numbers of a slice.
fn numbers(bytes: &[u8]) -> impl ExactSizeIterator<Item = [u8; 4]> {
    bytes.as_chunks::<4>().0.iter().copied()
}

impl RouteReader {
    /// Opens a file and checks its header and its length.
    ///
    /// # Errors
    /// [`RouteError::Io`], [`RouteError::NotRoutes`], [`RouteError::Version`], [`RouteError::Damaged`].
    pub fn open(path: &Path) -> Result<RouteReader, RouteError> {
        let io = |operation| move |source| RouteError::Io { operation, path: path.to_owned(), source };
        let damaged = |place: &str, wanted: String, found: String| RouteError::Damaged {
            path: path.to_owned(),
            place: place.into(),
            wanted,
            found,
        };
        let file = File::open(path).map_err(io("open"))?;
        let length = file.metadata().map_err(io("read"))?.len();
        let mut from = BufReader::new(file);
        let mut fixed = Vec::with_capacity(FIXED);
        from.by_ref().take(FIXED as u64).read_to_end(&mut fixed).map_err(io("read"))?;
        if !fixed.starts_with(MAGIC) {
            let found = String::from_utf8_lossy(&fixed[..fixed.len().min(MAGIC.len())]).into_owned();
            return Err(RouteError::NotRoutes { path: path.to_owned(), found });
        }
        let bytes = |n: u64| format!("{n} bytes");
        if fixed.len() < FIXED {
            return Err(damaged("header", bytes(FIXED as u64), bytes(length)));
        }
        let version = u32_at(&fixed, 8);
        if version != VERSION {
            return Err(RouteError::Version { path: path.to_owned(), wanted: VERSION, found: version });
        }
        let text_length = u64::from(u32_at(&fixed, 12));
        let begin = FIXED as u64 + text_length;
        if begin > length {
            return Err(damaged("header", bytes(begin), bytes(length)));
        }
        let mut text = vec![0; text_length as usize];
        from.read_exact(&mut text).map_err(io("read"))?;
        if head_hash(&fixed[..40], &text) != u64_at(&fixed, 40) {
            return Err(damaged("header", "the bytes of its hash".into(), "others".into()));
        }
        let header: RouteHeader = serde_json::from_slice(&text)
            .map_err(|error| damaged("header", "the description of a model".into(), error.to_string()))?;
        if let Some((wanted, found)) = header.fault() {
            return Err(damaged("header", wanted, found));
        }
        let (tokens, passes, end) = (u64_at(&fixed, 16), u64_at(&fixed, 24), u64_at(&fixed, 32));
        let whole = header.body_bytes(tokens, passes).and_then(|body| body.checked_add(begin));
        if whole != Some(length) {
            let wanted = whole.map_or("a length that can be counted".into(), bytes);
            return Err(damaged("length", wanted, bytes(length)));
        }
        let seed = seed(&text);
        let done = Done { hash: seed, ..Done::default() };
        let path = path.to_owned();
        Ok(RouteReader { path, from, header, begin, seed, tokens, passes, end, done, buffer: Vec::new() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model that the routes are of.
    pub fn header(&self) -> &RouteHeader {
        &self.header
    }

    /// Tokens in all.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Passes in all.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// Goes back to the first pass.
    ///
    /// # Errors
    /// [`RouteError::Io`].
    pub fn rewind(&mut self) -> Result<(), RouteError> {
        let io = |source| RouteError::Io { operation: "read", path: self.path.clone(), source };
        self.from.seek(SeekFrom::Start(self.begin)).map_err(io)?;
        self.done = Done { hash: self.seed, ..Done::default() };
        Ok(())
    }

    /// Reads every pass once and goes back to the first.
    ///
    /// # Errors
    /// As [`RouteReader::next_pass`].
    pub fn verify(&mut self) -> Result<(), RouteError> {
        self.rewind()?;
        while self.next_pass()?.is_some() {}
        self.rewind()
    }

    fn damaged(&self, place: &str, wanted: impl Into<String>, found: impl Into<String>) -> RouteError {
        let place = format!("pass {}{place}", self.done.passes + 1);
        RouteError::Damaged { path: self.path.clone(), place, wanted: wanted.into(), found: found.into() }
    }

    /// The next pass; `None` after the last.
    ///
    /// # Errors
    /// [`RouteError::Io`]; [`RouteError::Damaged`] with the pass and the layer.
    pub fn next_pass(&mut self) -> Result<Option<Pass>, RouteError> {
        if self.done.passes == self.passes {
            let hash = self.done.hash;
            if self.done.tokens != self.tokens || hash != self.end {
                let place = ", after the last";
                return Err(self.damaged(place, "the tokens and the hash of the header", "others"));
            }
            return Ok(None);
        }
        let mut n = [0; 4];
        self.read(&mut n)?;
        let n = u32::from_le_bytes(n);
        let left = self.tokens - self.done.tokens;
        // What the passes still to come need at least: a token each.
        let most = left.saturating_sub(self.passes - self.done.passes - 1);
        if n == 0 || u64::from(n) > most {
            return Err(self.damaged("", format!("1 to {most} tokens"), n.to_string()));
        }
        // The length of the whole file was checked against the number of tokens.
        let length = self.header.pass_bytes(u64::from(n)).unwrap_or(0) as usize;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.resize(length, 0);
        buffer[..4].copy_from_slice(&n.to_le_bytes());
        self.read(&mut buffer[4..])?;
        let (bytes, hash) = buffer.split_at(length - 8);
        let own = xxh3_64_with_seed(bytes, self.done.hash);
        if own != u64_at(hash, 0) {
            return Err(self.damaged("", "the bytes of its hash", "others"));
        }
        let pass = self.parse(n as usize, &bytes[4..])?;
        self.buffer = buffer;
        self.done = Done { tokens: self.done.tokens + u64::from(n), passes: self.done.passes + 1, hash: own };
        Ok(Some(pass))
    }

    fn read(&mut self, into: &mut [u8]) -> Result<(), RouteError> {
        let read = self.from.read_exact(into);
        read.map_err(|source| RouteError::Io { operation: "read", path: self.path.clone(), source })
    }

    /// The parts of a pass, whose numbers are in range.
    fn parse(&self, n: usize, bytes: &[u8]) -> Result<Pass, RouteError> {
        let (ids, mut rest) = bytes.split_at(4 * n);
        let ids: Vec<i32> = numbers(ids).map(i32::from_le_bytes).collect();
        let known = |id: &i32| usize::try_from(*id).is_ok_and(|id| id < self.header.vocab);
        if let Some(id) = ids.iter().find(|id| !known(id)) {
            return Err(self.damaged("", format!("token ids below {}", self.header.vocab), id.to_string()));
        }
        let choices = n * self.header.top_k;
        let mut layers = Vec::with_capacity(self.header.layers.len());
        for of in &self.header.layers {
            let (numbers_of, later) = rest.split_at(4 + 8 * choices);
            rest = later;
            let dropped = u32_at(numbers_of, 0);
            let (index, score) = numbers_of[4..].split_at(4 * choices);
            let expert_index: Vec<i32> = numbers(index).map(i32::from_le_bytes).collect();
            let most = of.experts as i64 - 1;
            if let Some(expert) = expert_index.iter().find(|e| !(-1..=most).contains(&i64::from(**e))) {
                let place = format!(", layer {}", of.layer);
                return Err(self.damaged(&place, format!("experts from -1 to {most}"), expert.to_string()));
            }
            let routed = expert_index.iter().filter(|e| **e >= 0).count();
            if dropped as usize > routed {
                let place = format!(", layer {}", of.layer);
                return Err(self.damaged(&place, format!("at most {routed} dropped choices"), dropped.to_string()));
            }
            layers.push(LayerRoutes { dropped, expert_index, score: numbers(score).map(f32::from_le_bytes).collect() });
        }
        Ok(Pass { ids, layers })
    }
}
