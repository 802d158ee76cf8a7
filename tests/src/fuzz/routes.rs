//! Route files, read from disk as the program reads them.

use std::fs;
use std::io;

use moebius_models::config::Config;
use moebius_models::routes::{LayerRoutes, Pass, RouteHeader, RouteReader, RouteWriter};
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use super::{Target, Then, Words};

/// Bytes before the header's text, of which the last eight are the hash of the others and the text.
const FIXED: usize = 48;

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

fn bits(pass: &Pass) -> Vec<(u32, &[i32], Vec<u32>)> {
    let layer = |l: &LayerRoutes| l.score.iter().map(|s| s.to_bits()).collect();
    pass.layers.iter().map(|l| (l.dropped, &*l.expert_index, layer(l))).collect()
}

/// The target `routes`. Most inputs get the lengths, totals and hashes of their content.
pub(super) fn target() -> io::Result<Target> {
    let dir = tempfile::tempdir()?;
    let (path, again) = (dir.path().join("fuzzed.routes"), dir.path().join("again.routes"));
    let mut seeds = Vec::new();
    for (k, layers) in [(1usize, 2usize), (2, 6)] {
        let mut config = Config::preset("tiny-pr-moe").map_err(other)?;
        for change in [format!("model.top_k={k}"), format!("model.layers={layers}"), "model.experts=[5]".to_owned()] {
            config.set(&change).map_err(other)?;
        }
        let mut writer =
            RouteHeader::of(&config).and_then(|header| RouteWriter::create(&path, &header)).map_err(other)?;
        for n in [3usize, 1, 2] {
            let layer = |at: usize| LayerRoutes {
                dropped: 1,
                expert_index: (0..n * k).map(|i| (i + at) as i32 % 5).collect(),
                score: (0..n * k).map(|i| 1.0 / (i + 1) as f32).collect(),
            };
            let pass = Pass { ids: (0..n as i32).collect(), layers: (0..layers / 2).map(layer).collect() };
            writer.pass(&pass).map_err(other)?;
        }
        writer.finish().map_err(other)?;
        seeds.push(fs::read(&path)?);
    }
    let words = [
        "moeroute",
        "\"top_k\":2",
        "\"layers\":[",
        "\"experts\":5",
        "\"order\":\"batch\"",
        "fair",
        "null",
        "1e300",
        "{",
        "}",
    ];
    Ok(Target {
        name: "routes",
        seeds,
        words: words.iter().map(ToString::to_string).collect(),
        repair: Box::new(repaired),
        parse: Box::new(move |input| {
            let _keep = &dir;
            fs::write(&path, input).ok()?;
            let mut reader = RouteReader::open(&path).map_err(|e| e.to_string()).ok()?;
            reader.verify().map_err(|e| e.to_string()).ok()?;
            let again = again.clone();
            let length = input.len();
            // A file that is written is synced, which takes far longer than all the rest.
            let written_again = xxh3_64(input).is_multiple_of(64);
            Some(Box::new(move || {
                let text = |e: moebius_models::routes::RouteError| format!("an accepted file: {e}");
                let header = reader.header().clone();
                if reader.tokens() * 4 > length as u64 {
                    return Err(format!("{} tokens in {length} bytes", reader.tokens()));
                }
                if !written_again {
                    return Ok(());
                }
                let mut writer = RouteWriter::create(&again, &header).map_err(text)?;
                let mut tokens = 0;
                while let Some(pass) = reader.next_pass().map_err(text)? {
                    tokens += pass.ids.len() as u64;
                    writer.pass(&pass).map_err(text)?;
                }
                if tokens != reader.tokens() {
                    return Err(format!("{tokens} tokens of {}", reader.tokens()));
                }
                writer.finish().map_err(text)?;
                reader.rewind().map_err(text)?;
                let mut second = RouteReader::open(&again).map_err(text)?;
                if *second.header() != header {
                    return Err("another header is read back".into());
                }
                while let Some(pass) = reader.next_pass().map_err(text)? {
                    let same =
                        second.next_pass().map_err(text)?.is_some_and(|s| s.ids == pass.ids && bits(&s) == bits(&pass));
                    if !same {
                        return Err("another pass is read back".into());
                    }
                }
                second.next_pass().map_err(text)?.map_or(Ok(()), |_| Err("a pass too many".into()))
            }) as Then)
        }),
    })
}

/// Cuts the input into a header and as many passes as fit its layers, and gives all parts their lengths and hashes.
fn repaired(mut input: Vec<u8>, words: &mut Words) -> Vec<u8> {
    if input.len() < FIXED || words.once_in(8) {
        return input;
    }
    let mut values = serde_json::Deserializer::from_slice(&input[FIXED..]).into_iter::<serde_json::Value>();
    let Some(Ok(header)) = values.next() else { return input };
    let length = values.byte_offset();
    let number = |value: &serde_json::Value| value.as_u64().filter(|n| *n < 64).unwrap_or(0) as usize;
    let (k, layers) = (number(&header["top_k"]), header["layers"].as_array().map_or(0, Vec::len));
    let text = input[FIXED..FIXED + length].to_vec();
    let (mut last, mut at) = (xxh3_64(&text), FIXED + length);
    let (mut tokens, mut passes) = (0u64, 0u64);
    while let Some(first) = input[at..].first_chunk::<4>() {
        let n = u32::from_le_bytes(*first).clamp(1, 6) as usize;
        let bytes = 4 + 4 * n + layers * (4 + 8 * n * k);
        if input.len() < at + bytes + 8 {
            break;
        }
        input[at..at + 4].copy_from_slice(&(n as u32).to_le_bytes());
        last = xxh3_64_with_seed(&input[at..at + bytes], last);
        input[at + bytes..at + bytes + 8].copy_from_slice(&last.to_le_bytes());
        (at, tokens, passes) = (at + bytes + 8, tokens + n as u64, passes + 1);
    }
    input.truncate(at);
    input[..8].copy_from_slice(b"moeroute");
    input[8..12].copy_from_slice(&1u32.to_le_bytes());
    input[12..16].copy_from_slice(&(length as u32).to_le_bytes());
    for (place, value) in [(16, tokens), (24, passes), (32, last)] {
        input[place..place + 8].copy_from_slice(&value.to_le_bytes());
    }
    let mut hash = Xxh3::new();
    hash.update(&input[..FIXED - 8]);
    hash.update(&text);
    input[FIXED - 8..FIXED].copy_from_slice(&hash.digest().to_le_bytes());
    input
}
