//! Caches of a teacher's log-probabilities, read from disk as the program reads them.

use std::fs;
use std::io;

use moebius_models::distill::cache::{CacheReader, Identity};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::{Target, Then, Words};

/// Bytes before the header's text, of which the last eight are the hash of the others and the text.
const FIXED: usize = 24;

fn identity(vocabulary: usize, batch: usize, top: usize) -> Identity {
    Identity {
        teacher: "tiny".into(),
        teacher_model: "0123456789abcdef0123456789abcdef".into(),
        teacher_weights: "fedcba9876543210fedcba9876543210".into(),
        data: "00112233445566778899aabbccddeeff".into(),
        tokenizer: String::new(),
        vocabulary,
        sequence: 3,
        batch,
        seed: 7,
        top,
        temperature: 1.0,
    }
}

/// Bytes of a block, and of an id in it; `None` for sizes that no small file has.
fn block(header: &serde_json::Value) -> Option<(usize, usize)> {
    let number = |key: &str| header[key].as_u64().filter(|n| *n < 1 << 20).map(|n| n as usize);
    let id = if number("vocabulary")? <= 1 << 16 { 2 } else { 4 };
    let tokens = number("batch")?.checked_mul(number("sequence")?)?;
    let bytes = tokens.checked_mul(number("top")?.checked_mul(id + 2)?.checked_add(4)?)?.checked_add(8)?;
    (bytes > 8).then_some((bytes, id))
}

/// The target `caches`. Most inputs get the lengths and hashes of their content.
pub(super) fn target() -> io::Result<Target> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("fuzzed.logits");
    let mut seeds = Vec::new();
    for (vocabulary, batch, top, blocks) in [(256, 2, 4, 3), (70_000, 1, 2, 2), (5, 1, 5, 1)] {
        let text = serde_json::to_vec(&identity(vocabulary, batch, top))?;
        let mut file = [&[0; FIXED][..], &text].concat();
        let (bytes, _) = serde_json::from_slice(&text).ok().as_ref().and_then(block).unwrap_or((9, 2));
        file.extend((0..blocks * bytes).map(|i| if i % 2 == 0 { (i / 2 % 4) as u8 } else { 0 }));
        seeds.push(sealed(file));
    }
    let words = [
        "moelogit",
        "\"top\":2",
        "\"vocabulary\":",
        "\"batch\":1",
        "\"temperature\":",
        "null",
        "1e300",
        "65537",
        "{",
        "}",
    ];
    Ok(Target {
        name: "caches",
        seeds,
        words: words.iter().map(ToString::to_string).collect(),
        repair: Box::new(|input, words: &mut Words| if words.once_in(8) { input } else { sealed(input) }),
        parse: Box::new(move |input| {
            let _keep = &dir;
            fs::write(&path, input).ok()?;
            let reader = CacheReader::open(&path).map_err(|e| e.to_string()).ok()?;
            let mut ids = Vec::new();
            for batch in 0..reader.batches() {
                reader.read(batch, &mut ids).map_err(|e| e.to_string()).ok()?;
            }
            let length = input.len() as u64;
            Some(Box::new(move || {
                let of = reader.identity();
                let n = (of.batch * of.sequence) as u64;
                let count = reader.batches();
                if count * n * of.top as u64 > length {
                    return Err(format!("{count} batches of {n} tokens in {length} bytes"));
                }
                let mut ids = Vec::new();
                for batch in 0..count {
                    let block = reader.read(batch, &mut ids).map_err(|e| format!("an accepted file: {e}"))?;
                    if ids.len() as u64 != n * of.top as u64
                        || block.log_p.len() != 2 * ids.len()
                        || block.log_tail.len() as u64 != 4 * n
                    {
                        return Err(format!("batch {batch}: {} ids of {n} tokens", ids.len()));
                    }
                    if let Some(id) = ids.iter().find(|&&id| id < 0 || id as usize >= of.vocabulary) {
                        return Err(format!("batch {batch}: id {id} of {}", of.vocabulary));
                    }
                }
                if reader.read(count, &mut ids).is_ok() {
                    return Err("a batch too many".into());
                }
                if !of.difference(of).is_empty() {
                    return Err("it differs from itself".into());
                }
                Ok(())
            }) as Then)
        }),
    })
}

/// The input with the lengths and hashes of its content, ids within the vocabulary where it is a small one, and nothing behind the
/// last whole block.
fn sealed(mut input: Vec<u8>) -> Vec<u8> {
    if input.len() < FIXED {
        return input;
    }
    let mut values = serde_json::Deserializer::from_slice(&input[FIXED..]).into_iter::<serde_json::Value>();
    let Some(Ok(header)) = values.next() else { return input };
    let length = values.byte_offset();
    let text = input[FIXED..FIXED + length].to_vec();
    input[..8].copy_from_slice(b"moelogit");
    input[8..12].copy_from_slice(&1u32.to_le_bytes());
    input[12..16].copy_from_slice(&(length as u32).to_le_bytes());
    let mut hash = Xxh3::new();
    hash.update(&input[..FIXED - 8]);
    hash.update(&text);
    input[FIXED - 8..FIXED].copy_from_slice(&hash.digest().to_le_bytes());
    let Some((bytes, id)) = block(&header) else { return input };
    let vocabulary = header["vocabulary"].as_u64().unwrap_or(1).max(1);
    let ids = (bytes - 8) / (id + 2) * id;
    let begin = FIXED + length;
    let blocks = (input.len() - begin) / bytes;
    input.truncate(begin + blocks * bytes);
    for (number, block) in input[begin..].chunks_exact_mut(bytes).enumerate() {
        // Among the bytes that are treated as ids may be others: they are only numbers.
        for place in block[..ids.min(bytes - 8)].chunks_exact_mut(id) {
            let mut wide = [0; 8];
            wide[..id].copy_from_slice(place);
            let within = u64::from_le_bytes(wide) % vocabulary;
            place.copy_from_slice(&within.to_le_bytes()[..id]);
        }
        let hash = xxh3_64_with_seed(&block[..bytes - 8], number as u64);
        block[bytes - 8..].copy_from_slice(&hash.to_le_bytes());
    }
    input
}
