//! From text to token ids and back.
//!
//! [`Tokenizer::Bytes`] needs no file: the id of a token is the byte. [`Tokenizer::File`] is a `tokenizer.json` read with
//! the `tokenizers` crate. Both decode as a stream ([`DecodeStream`]) that never hands out half a UTF-8 character.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_128;

/// What can go wrong between text and ids.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file could not be read.
    #[error("tokenizer {}: cannot be read", path.display())]
    Read {
        /// The `tokenizer.json` asked for.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file was read and is not a `tokenizer.json` the `tokenizers` crate understands.
    #[error("tokenizer {name}: wanted a tokenizer.json (Hugging Face tokenizers), found something else")]
    Parse {
        /// Name of the tokenizer (its file name).
        name: String,
        /// What the parser said.
        source: tokenizers::Error,
    },
    /// The file is a tokenizer without a single token.
    #[error("tokenizer {name}: its vocabulary is empty")]
    EmptyVocab {
        /// Name of the tokenizer.
        name: String,
    },
    /// The tokenizer cannot encode this text (for example a word outside the vocabulary and no unknown token).
    #[error("tokenizer {name} refuses the text at bytes {start}..{end}")]
    Refused {
        /// Name of the tokenizer.
        name: String,
        /// First byte of the refused piece, counted from the start of the text.
        start: usize,
        /// One past the last byte of the refused piece.
        end: usize,
        /// What the tokenizer said.
        source: tokenizers::Error,
    },
    /// Ids could not be turned back into text.
    #[error("tokenizer {name} cannot decode these ids")]
    Decode {
        /// Name of the tokenizer.
        name: String,
        /// What the tokenizer said.
        source: tokenizers::Error,
    },
}

/// Turns text into token ids and back.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// One token per byte; ids 0..=255.
    Bytes,
    /// A `tokenizer.json`.
    File(Box<FileTokenizer>),
}

/// A tokenizer read from a `tokenizer.json`.
#[derive(Debug, Clone)]
pub struct FileTokenizer {
    name: String,
    json: Vec<u8>,
    vocab: usize,
    inner: tokenizers::Tokenizer,
}

/// A text as ids, with how many bytes of the text each id stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id the bytes of text from the end of the previous token to the end of this one; bytes after the last
    /// token belong to the last. Their sum is the length of the text (if there is at least one token).
    pub bytes: Vec<usize>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Read`], [`TokenizerError::Parse`], [`TokenizerError::EmptyVocab`].
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let json = std::fs::read(path).map_err(|source| TokenizerError::Read { path: path.to_owned(), source })?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self::from_json(&name, json)
    }

    /// Reads the text of a `tokenizer.json`; `name` is used in errors and by [`Tokenizer::name`].
    ///
    /// # Errors
    /// [`TokenizerError::Parse`], [`TokenizerError::EmptyVocab`].
    pub fn from_json(name: &str, json: Vec<u8>) -> Result<Self, TokenizerError> {
        let parse = |source| TokenizerError::Parse { name: name.to_owned(), source };
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(parse)?;
        // A tokenizer.json often carries the truncation and padding of the model it was made for. A corpus must lose
        // nothing and gain nothing.
        inner.with_truncation(None).map_err(parse)?;
        inner.with_padding(None);
        let top = inner.get_vocab(true).into_values().max();
        let top = top.ok_or_else(|| TokenizerError::EmptyVocab { name: name.to_owned() })?;
        Ok(Self::File(Box::new(FileTokenizer { name: name.to_owned(), json, vocab: top as usize + 1, inner })))
    }

    /// `"bytes"`, or the file name of the `tokenizer.json`.
    pub fn name(&self) -> &str {
        match self {
            Self::Bytes => "bytes",
            Self::File(file) => &file.name,
        }
    }

    /// Number of ids a model must know: the highest id plus one (ids may have gaps). 256 for bytes.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::File(file) => file.vocab,
        }
    }

    /// Names this tokenizer in a checkpoint: `"bytes"`, or `"xxh3:"` and 32 hexadecimal digits of the file's content.
    /// Equal fingerprints mean equal ids for equal text; the file's name plays no part.
    pub fn fingerprint(&self) -> String {
        match self {
            Self::Bytes => "bytes".to_owned(),
            Self::File(file) => format!("xxh3:{:032x}", xxh3_128(&file.json)),
        }
    }

    /// Content of the `tokenizer.json`, to be kept beside a checkpoint; none for bytes.
    pub fn json(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes => None,
            Self::File(file) => Some(&file.json),
        }
    }

    /// Ids of a text. No token is added at its start or end.
    ///
    /// # Errors
    /// [`TokenizerError::Refused`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::File(_) => Ok(self.encode_pieces(&[text], 0)?.into_iter().flat_map(|piece| piece.ids).collect()),
        }
    }

    /// Encodes consecutive pieces of one text, in parallel for a file tokenizer. `start` is the byte position of the
    /// first piece in the whole text and is only used in errors.
    ///
    /// # Errors
    /// [`TokenizerError::Refused`] names the first piece that was refused.
    pub fn encode_pieces(&self, pieces: &[&str], start: usize) -> Result<Vec<Encoded>, TokenizerError> {
        match self {
            Self::Bytes => Ok(pieces
                .iter()
                .map(|p| Encoded { ids: p.bytes().map(u32::from).collect(), bytes: vec![1; p.len()] })
                .collect()),
            Self::File(file) => match file.inner.encode_batch(pieces.to_vec(), false) {
                Ok(encodings) => Ok(pieces.iter().zip(&encodings).map(|(p, e)| Encoded::new(p, e)).collect()),
                // The batch call does not say which piece it was; encode again one by one to tell the user.
                Err(source) => {
                    let (mut from, mut to, mut cause) = (start, start, source);
                    for piece in pieces {
                        (from, to) = (to, to + piece.len());
                        if let Err(source) = file.inner.encode(*piece, false) {
                            cause = source;
                            break;
                        }
                    }
                    Err(TokenizerError::Refused { name: file.name.clone(), start: from, end: to, source: cause })
                }
            },
        }
    }

    /// Text of the ids; bytes that are not UTF-8 become U+FFFD. An id outside the vocabulary is U+FFFD for bytes and
    /// nothing for a file tokenizer.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        match self {
            // 0xFF is never part of UTF-8, so it shows as U+FFFD.
            Self::Bytes => {
                let bytes: Vec<u8> = ids.iter().map(|&id| u8::try_from(id).unwrap_or(0xFF)).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Self::File(file) => file
                .inner
                .decode(ids, false)
                .map_err(|source| TokenizerError::Decode { name: file.name.clone(), source }),
        }
    }

    /// Starts a stream that prints ids as they come.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), shown: 0, waiting: 0, bytes: Vec::new() }
    }
}

impl Encoded {
    fn new(text: &str, encoding: &tokenizers::Encoding) -> Self {
        let ids = encoding.get_ids().to_vec();
        let mut end = 0;
        // Tokens that share a character (byte-level) have overlapping offsets, so only the furthest end counts.
        let mut bytes: Vec<usize> = encoding
            .get_offsets()
            .iter()
            .map(|&(_, to)| {
                let grown = to.saturating_sub(end);
                end = end.max(to);
                grown
            })
            .collect();
        if let Some(last) = bytes.last_mut() {
            *last += text.len() - end.min(text.len());
        }
        Self { ids, bytes }
    }
}

/// Decodes ids one at a time. What [`DecodeStream::push`] and [`DecodeStream::finish`] return, joined, is what
/// [`Tokenizer::decode`] gives for all ids; a character that needs several tokens is held back until it is whole.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    /// File tokenizer: the latest ids, beginning where a character begins.
    ids: Vec<u32>,
    /// Bytes of the text of `ids` that were handed out.
    shown: usize,
    /// How many ids in a row have left the text ending in U+FFFD.
    waiting: usize,
    /// Byte tokenizer: bytes of an unfinished character, at most three.
    bytes: Vec<u8>,
}

/// A character has at most four bytes, so at most three tokens can be waiting for the fourth.
const MAX_WAITING: usize = 3;
/// A file tokenizer decodes in context (a leading space may vanish at the start of a text), so some ids are kept.
const CONTEXT: usize = 6;
/// Length of `DecodeStream::ids` at which it is cut back to about `CONTEXT`.
const WINDOW: usize = 24;

impl DecodeStream<'_> {
    /// Takes the next id and returns the text that is now certain; often empty.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        match self.tokenizer {
            Tokenizer::Bytes => {
                self.bytes.push(u8::try_from(id).unwrap_or(0xFF));
                Ok(take_whole(&mut self.bytes))
            }
            Tokenizer::File(_) => {
                self.ids.push(id);
                let text = self.tokenizer.decode(&self.ids)?;
                self.waiting = if text.ends_with('\u{FFFD}') { self.waiting + 1 } else { 0 };
                // While a character may be waiting for its last token nothing is handed out at all: some decoders
                // (byte fallback) show even the whole characters before it as U+FFFD until it is there.
                if (1..=MAX_WAITING).contains(&self.waiting) {
                    return Ok(String::new());
                }
                let new = self.unshown(&text, whole_len(&text));
                if self.ids.len() >= WINDOW && self.waiting == 0 {
                    self.forget(&text)?;
                }
                Ok(new)
            }
        }
    }

    /// Ends the stream: whatever was held back, as U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn finish(mut self) -> Result<String, TokenizerError> {
        match self.tokenizer {
            Tokenizer::Bytes => Ok(String::from_utf8_lossy(&self.bytes).into_owned()),
            Tokenizer::File(_) => {
                let text = self.tokenizer.decode(&self.ids)?;
                Ok(self.unshown(&text, text.len()))
            }
        }
    }

    /// Drops the oldest ids, at a place where what is left decodes to the same text as before.
    fn forget(&mut self, text: &str) -> Result<(), TokenizerError> {
        for keep in CONTEXT..WINDOW {
            let rest = self.ids.len() - keep;
            let tail = self.tokenizer.decode(&self.ids[rest..])?;
            // A decoder may strip the space at the start, so `tail` need only be the end of `text`.
            if !tail.starts_with('\u{FFFD}') && text.ends_with(&tail) {
                self.ids.drain(..rest);
                self.shown = tail.len();
                break;
            }
        }
        Ok(())
    }

    fn unshown(&mut self, text: &str, until: usize) -> String {
        // `get` because a decoder that tidies its text may have shortened what was shown.
        let new = text.get(self.shown..until).unwrap_or_default().to_owned();
        self.shown = self.shown.max(until);
        new
    }
}

/// Length of `text` without the U+FFFD at its end that later tokens may still complete.
fn whole_len(text: &str) -> usize {
    let mut whole = text;
    for _ in 0..MAX_WAITING {
        match whole.strip_suffix('\u{FFFD}') {
            Some(shorter) => whole = shorter,
            None => break,
        }
    }
    whole.len()
}

/// Takes everything from `bytes` but the beginning of an unfinished character.
fn take_whole(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
                match error.error_len() {
                    None => {
                        bytes.drain(..valid);
                        return text;
                    }
                    Some(bad) => {
                        text.push('\u{FFFD}');
                        bytes.drain(..valid + bad);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
