//! The token cache: text tokenised once, then mapped.
//!
//! One file per (text, tokenizer), named by a hash of both. Layout, little endian: 64 bytes of header (magic, id width,
//! highest id, counts, hash of the payload), then the ids, then for each id the bytes of text it stands for (one byte).

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::atomic::write_atomic;
use super::store::{Bytes, OpenFile, TokenStore, Width};
use super::{DataError, Source};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Changes when the layout or the way text is cut changes, and with it the name of every cache file.
const MAGIC: [u8; 8] = *b"MOEBTOK1";
const HEADER: usize = 64;
/// Text handed to the tokenizer at once: what the `tokenizers` crate keeps per token (about 100 bytes) bounds the memory.
const PIECE: usize = 128 << 10;
/// Pieces encoded in parallel.
const GROUP: usize = 16;

/// Where tokenised text is kept: `$XDG_CACHE_HOME/moebius/tokens`, else `$HOME/.cache/moebius/tokens`, else a folder
/// among the system's temporary files.
pub fn default_cache_dir() -> PathBuf {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("moebius/tokens")
}

/// Name of the cache of this text under this tokenizer.
fn cache_path(dir: &Path, text: &Bytes, tokenizer: &Tokenizer) -> Result<PathBuf, DataError> {
    let mut hash = Xxh3::new();
    hash.update(&MAGIC);
    hash.update(tokenizer.fingerprint().as_bytes());
    text.visit(0..text.len(), |bytes| hash.update(bytes))?;
    Ok(dir.join(format!("{:032x}.tokens", hash.digest128())))
}

/// The ids of `text`: from the cache if it is there and whole, else tokenised and written. `progress` hears bytes done.
pub(super) fn tokenised(
    source: &Source,
    text: &Bytes,
    tokenizer: &Tokenizer,
    dir: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<TokenStore, DataError> {
    let path = cache_path(dir, text, tokenizer)?;
    if let Ok(file) = OpenFile::open(&path)
        && let Ok(Some(store)) = file.mapped().and_then(|bytes| open(bytes, text.len()))
    {
        return Ok(store);
    }
    let not_utf8 = |byte: usize| {
        let mut line = 1;
        text.visit(0..byte, |bytes| line += bytes.iter().filter(|&&b| b == b'\n').count())?;
        Err(DataError::NotUtf8 { path: PathBuf::from(&*source.name()), byte, line })
    };
    // All of it first: a bad byte at the end of a large file should not cost the minutes of tokenising what is before.
    if let Some(byte) = first_bad_byte(text)? {
        return not_utf8(byte);
    }
    let io = |source| DataError::Io { action: "write the token cache", path: path.clone(), source };
    std::fs::create_dir_all(dir).map_err(io)?;
    match write_atomic(&path, |file| write(file, text, tokenizer, progress)) {
        Ok(()) => {}
        Err(Failure::Io(source)) => return Err(io(source)),
        Err(Failure::Data(error)) => return Err(error),
        Err(Failure::Tokenizer(cause)) => {
            return Err(DataError::Tokenizer { name: source.name().into_owned(), source: cause });
        }
        Err(Failure::NotUtf8(byte)) => return not_utf8(byte),
        Err(Failure::NoToken) => {
            return Err(DataError::Empty { name: source.name().into_owned(), bytes: text.len() as u64 });
        }
    }
    let corrupt = || DataError::Io {
        action: "read back the token cache",
        path: path.clone(),
        source: std::io::ErrorKind::InvalidData.into(),
    };
    open(OpenFile::open(&path)?.mapped()?, text.len())?.ok_or_else(corrupt)
}

/// Position of the first byte that is not part of UTF-8.
fn first_bad_byte(text: &Bytes) -> Result<Option<usize>, DataError> {
    // `rest` holds a character of which the pieces so far have only the beginning, `at` is where it begins.
    let (mut rest, mut at, mut bad) = (Vec::new(), 0, None);
    text.visit(0..text.len(), |bytes| {
        if bad.is_some() {
            return;
        }
        rest.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&rest) {
            Ok(_) => rest.len(),
            Err(error) => {
                if error.error_len().is_some() {
                    bad = Some(at + error.valid_up_to());
                }
                error.valid_up_to()
            }
        };
        at += whole;
        rest.drain(..whole);
    })?;
    Ok(bad.or((!rest.is_empty()).then_some(at)))
}

/// Why a cache could not be made.
enum Failure {
    Io(std::io::Error),
    Data(DataError),
    Tokenizer(TokenizerError),
    NotUtf8(usize),
    NoToken,
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

fn write(file: &mut File, text: &Bytes, tokenizer: &Tokenizer, progress: &mut dyn FnMut(u64)) -> Result<(), Failure> {
    let width = if tokenizer.vocab_size() <= 1 << 16 { Width::U16 } else { Width::U32 };
    let mut out = BufWriter::with_capacity(1 << 20, &mut *file);
    out.write_all(&[0; HEADER])?;
    let mut hash = Xxh3::new();
    let (mut lens, mut max_id, mut carry) = (Vec::new(), 0, 0);
    let mut done = 0;
    while done < text.len() {
        let group = group_of_pieces(text, done)?;
        let pieces: Vec<&str> = group.iter().map(String::as_str).collect();
        for encoded in tokenizer.encode_pieces(&pieces, done).map_err(Failure::Tokenizer)? {
            let mut buffer = Vec::with_capacity(encoded.ids.len() * width.bytes());
            for (&id, &bytes) in encoded.ids.iter().zip(&encoded.bytes) {
                max_id = max_id.max(id);
                buffer.extend_from_slice(&id.to_le_bytes()[..width.bytes()]);
                // One byte of length a token; what a very long token has above 255 goes to the next.
                carry += bytes;
                let kept = carry.min(255);
                lens.push(kept as u8);
                carry -= kept;
            }
            hash.update(&buffer);
            out.write_all(&buffer)?;
        }
        done += group.iter().map(String::len).sum::<usize>();
        progress(done as u64);
    }
    if lens.is_empty() {
        return Err(Failure::NoToken);
    }
    hash.update(&lens);
    out.write_all(&lens)?;
    let mut header = Vec::with_capacity(HEADER);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&(width.bytes() as u32).to_le_bytes());
    header.extend_from_slice(&max_id.to_le_bytes());
    header.extend_from_slice(&(lens.len() as u64).to_le_bytes());
    header.extend_from_slice(&(text.len() as u64).to_le_bytes());
    header.extend_from_slice(&hash.digest().to_le_bytes());
    header.resize(HEADER - 8, 0);
    header.extend_from_slice(&xxh3_64(&header).to_le_bytes());
    out.seek(SeekFrom::Start(0))?;
    out.write_all(&header)?;
    out.flush()?;
    Ok(())
}

/// Up to `GROUP` pieces of text from `start`. They are checked again, as the file may have changed.
fn group_of_pieces(text: &Bytes, start: usize) -> Result<Vec<String>, Failure> {
    // The byte after the last piece is needed to tell where that piece ends.
    let end = text.len().min(start + GROUP * PIECE + 1);
    let window = text.read(start..end).map_err(Failure::Data)?;
    let (mut pieces, mut from) = (Vec::with_capacity(GROUP), 0);
    while from < window.len() && pieces.len() < GROUP {
        let to = cut(&window, from, PIECE);
        let piece = String::from_utf8(window[from..to].to_vec());
        let bad = |error: std::string::FromUtf8Error| start + from + error.utf8_error().valid_up_to();
        pieces.push(piece.map_err(|error| Failure::NotUtf8(bad(error)))?);
        from = to;
    }
    Ok(pieces)
}

/// End of the piece that starts at `from`: after a line break that is followed by no white space (so that no usual
/// pre-tokenizer would have joined the two sides), else after any line break, else between characters.
fn cut(text: &[u8], from: usize, piece: usize) -> usize {
    if text.len() - from <= piece {
        return text.len();
    }
    let candidates = || (from + 1..=from + piece).rev();
    candidates()
        .find(|&at| text[at - 1] == b'\n' && !text[at].is_ascii_whitespace())
        .or_else(|| candidates().find(|&at| text[at - 1] == b'\n'))
        .or_else(|| candidates().take(4).find(|&at| text[at] & 0xC0 != 0x80))
        .unwrap_or(from + piece)
}

/// Checks a cache file, every byte of it; none if it is not the whole cache of a text of this length.
fn open(data: Bytes, text_len: usize) -> Result<Option<TokenStore>, DataError> {
    if data.len() < HEADER {
        return Ok(None);
    }
    let header = data.read(0..HEADER)?;
    let mut hash = Xxh3::new();
    data.visit(HEADER..data.len(), |bytes| hash.update(bytes))?;
    let (payload_len, payload_hash) = (data.len() - HEADER, hash.digest());
    let layout = || {
        let word = |at: usize| header[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let half = |at: usize| header[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let width = match half(8)? {
            2 => Width::U16,
            4 => Width::U32,
            _ => return None,
        };
        let count = usize::try_from(word(16)?).ok()?;
        let ids_len = count.checked_mul(width.bytes())?;
        let whole = header[..8] == MAGIC
            && word(56)? == xxh3_64(&header[..56])
            && word(24)? == text_len as u64
            && count > 0
            && payload_len == ids_len.checked_add(count)?
            && word(32)? == payload_hash;
        whole.then_some((width, half(12)?, count, ids_len))
    };
    let Some((width, max_id, count, ids_len)) = layout() else { return Ok(None) };
    let ids = HEADER..HEADER + ids_len;
    Ok(Some(TokenStore { data, width, lens: Some(ids.end..ids.end + count), ids, max_id }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_cut_at_line_breaks_and_join_to_the_text() {
        let text = "one line\n\n  indented\nnext line\nand a last one without end 語語語語語語語".as_bytes();
        for piece in 4..text.len() {
            let (mut from, mut cuts) = (0, Vec::new());
            while from < text.len() {
                let to = cut(text, from, piece);
                assert!(to > from && to - from <= piece);
                assert!(std::str::from_utf8(&text[from..to]).is_ok());
                cuts.push(to);
                from = to;
            }
            if piece == 30 {
                // Not after the first break (a break follows) nor the second (blanks follow).
                assert_eq!(cuts[0], 21);
            }
        }
    }
    #[test]
    fn the_first_byte_that_is_no_text_is_found_in_a_file_read_in_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        // Characters of three bytes, so that the pieces a file is read in end within one.
        let good = "語".repeat(900_000).into_bytes();
        let find = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            first_bad_byte(&Bytes::File(OpenFile::open(&path).unwrap())).unwrap()
        };
        assert_eq!(find(&good), None);
        for at in [0, 4, (1 << 20) - 1, 1 << 20, 2_000_001] {
            let mut bad = good.clone();
            bad[at] = 0xFF;
            // The character is bad from its first byte on.
            assert_eq!(find(&bad), Some(at - at % 3), "{at}");
        }
        assert_eq!(find(&good[..good.len() - 1]), Some(good.len() - 3));
    }
}
