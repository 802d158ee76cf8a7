//! Files of a run: safetensors, whole checkpoints with a changed `state.json`, and `metrics.jsonl`, read from disk as
//! the program reads them.

use std::fs;
use std::io;

use moebius::checkpoint::{
    Checkpoint, Checkpoints, Dtype, STATE_FILE, Snapshot, Tensor, TensorFile, TensorInfo, TrainState,
};
use moebius_models::metrics::{
    AlarmKind, AlarmRecord, EvalRecord, LayerLoad, MetricsReader, MetricsWriter, Record, TrainRecord,
};
use xxhash_rust::xxh3::xxh3_128;

use super::{Target, Then, Words};

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter()
        .chain(&["{", "}", "[", "]", "\"", ":", ",", "\n", "null", "true", "\\ud800", "é"])
        .map(ToString::to_string)
        .collect()
}

/// A small checkpoint in `dir`; gives its folder.
fn checkpoint(dir: &std::path::Path) -> io::Result<std::path::PathBuf> {
    let info = |name: &str, dtype, shape: &[usize]| TensorInfo::new(name, dtype, shape);
    let bytes = [7u8; 64];
    let model = vec![
        Tensor::borrowed(info("embedding", Dtype::F32, &[3, 2]), &bytes[..24]),
        Tensor::borrowed(info("layers.0.bias", Dtype::Bf16, &[5]), &bytes[..10]),
        Tensor::borrowed(info("scale", Dtype::F16, &[]), &bytes[..2]),
        Tensor::borrowed(info("empty", Dtype::I32, &[0, 4]), &[]),
    ];
    let optimizer = vec![Tensor::borrowed(info("embedding.m", Dtype::F32, &[3, 2]), &bytes[..24])];
    let state = TrainState {
        step: 7,
        tokens: 99,
        config: "[model]\nname = \"x\"\n".into(),
        model: "x".into(),
        best_validation_loss: Some(2.5),
        extra: [("note".to_owned(), serde_json::json!({"a": [1, 2.5, null]}))].into(),
        ..TrainState::default()
    };
    Checkpoints::create(dir, 0).and_then(|c| c.save(Snapshot { state, model, optimizer })).map_err(other)
}

/// The target `safetensors`: any file. Half of the inputs get the length of their header and the bytes it speaks of.
pub(super) fn safetensors() -> io::Result<Target> {
    let dir = tempfile::tempdir()?;
    let folder = checkpoint(dir.path())?;
    let seeds = ["model.safetensors", "optimizer.safetensors"].map(|name| fs::read(folder.join(name)));
    let seeds: Vec<Vec<u8>> = seeds.into_iter().collect::<io::Result<_>>()?;
    let path = dir.path().join("fuzzed.safetensors");
    Ok(Target {
        name: "safetensors",
        seeds,
        words: words(&[
            "\"dtype\":\"F32\"",
            "\"shape\":[]",
            "\"data_offsets\":[0,4]",
            "__metadata__",
            "BF16",
            "F64",
            "BOOL",
            "U32",
            "F8_E4M3",
            "F4",
        ]),
        repair: Box::new(frame),
        parse: Box::new(move |input| {
            let _keep = &dir;
            fs::write(&path, input).ok()?;
            let mut file = TensorFile::open(&path).map_err(|e| e.to_string()).ok()?;
            // The tensors themselves are read in pieces.
            file.verify().map_err(|e| e.to_string()).ok()?;
            let length = input.len();
            Some(Box::new(move || {
                let infos: Vec<TensorInfo> = file.tensors().cloned().collect();
                for info in &infos {
                    let bytes = info.bytes().ok_or("a tensor whose size cannot be counted")?;
                    if bytes > length as u64 {
                        return Err(format!("{} is said to have {bytes} bytes in a file of {length}", info.name));
                    }
                    let mut buffer = vec![0; bytes as usize];
                    file.load_into(&info.name, &mut buffer)
                        .map_err(|e| format!("an accepted tensor is not read: {e}"))?;
                }
                file.expect(&infos).map_err(|e| e.to_string())
            }) as Then)
        }),
    })
}

fn frame(input: Vec<u8>, words: &mut Words) -> Vec<u8> {
    let Some(json) = input.get(8..).filter(|_| words.once_in(2)) else { return input };
    let end = json.iter().rposition(|&b| b == b'}').map_or(json.len(), |i| i + 1);
    let json = &json[..end];
    // The largest number in the text that can be a length.
    let numbers = String::from_utf8_lossy(json);
    let numbers = numbers.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<usize>().ok());
    let data = numbers.filter(|&n| n < 4096).max().unwrap_or(0);
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(json);
    out.resize(out.len() + data, 0);
    out
}

/// The target `state`: a whole checkpoint whose `state.json` is the input. Most inputs get the hash of their content.
pub(super) fn state() -> io::Result<Target> {
    let dir = tempfile::tempdir()?;
    let folder = checkpoint(dir.path())?;
    let seed = fs::read(folder.join(STATE_FILE))?;
    Ok(Target {
        name: "state",
        seeds: vec![seed],
        words: words(&[
            "\"format\": 1",
            "\"state\": {}",
            "\"files\": {}",
            "model.safetensors",
            "\"tensors\": {",
            "\"length\": 0",
            "\"extra\": {",
        ]),
        repair: Box::new(hashed),
        parse: Box::new(move |input| {
            let _keep = &dir;
            fs::write(folder.join(STATE_FILE), input).ok()?;
            let mut read = Checkpoint::open(&folder).map_err(|e| e.to_string()).ok()?;
            drop(read.verify().map_err(|e| e.to_string()));
            let state = read.state;
            Some(Box::new(move || {
                let text = serde_json::to_string(&state).map_err(|e| e.to_string())?;
                let back: TrainState =
                    serde_json::from_str(&text).map_err(|e| format!("a state is not read back: {e}"))?;
                if back == state { Ok(()) } else { Err("another state is read back".into()) }
            }) as Then)
        }),
    })
}

/// The hash in `state.json` stands behind its first 13 bytes and covers all others.
fn hashed(mut input: Vec<u8>, words: &mut Words) -> Vec<u8> {
    const HEAD: &[u8] = b"{\n  \"xxh3\": \"";
    let end = HEAD.len() + 32;
    if input.len() >= end && !words.once_in(8) {
        input[..HEAD.len()].copy_from_slice(HEAD);
        let covered = [HEAD, &input[end..]].concat();
        input[HEAD.len()..end].copy_from_slice(format!("{:032x}", xxh3_128(&covered)).as_bytes());
    }
    input
}

/// The target `metrics`: `metrics.jsonl`.
pub(super) fn metrics() -> io::Result<Target> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("metrics.jsonl");
    let mut writer = MetricsWriter::create(&path).map_err(other)?;
    for step in 1..6 {
        let load = LayerLoad {
            layer: 1,
            load: vec![0.25, 0.75, 0.0],
            dropped: 0.125,
            entropy: Some(0.5),
            logit_scale: Some(2.0),
            coefficient: Some(0.75),
            idle: vec![0, 0, 12],
            dead: Some(1),
        };
        let loss = if step == 3 { f64::NAN } else { 2.5 };
        let train =
            TrainRecord { step, tokens: step * 64, loss, lr: 3e-4, experts: vec![load], ..TrainRecord::default() };
        writer.write(&Record::Train(train)).map_err(other)?;
        let eval = EvalRecord { step, tokens: step * 64, val_loss: 1.75, bits_per_byte: 2.5 };
        writer.write(&Record::Eval(eval)).map_err(other)?;
        let alarm = AlarmRecord { step, alarm: AlarmKind::Drop, layer: 1, expert: None, value: 0.5, limit: 0.25 };
        writer.write(&Record::Alarm(alarm)).map_err(other)?;
    }
    drop(writer);
    let seed = fs::read(&path)?;
    Ok(Target {
        name: "metrics",
        seeds: vec![seed],
        words: words(&[
            "\"kind\":\"train\"",
            "\"kind\":\"eval\"",
            "\"kind\":\"alarm\"",
            "\"alarm\":\"dead-experts\"",
            "\"idle\":[7,0]",
            "\"step\":1",
            "\"loss\":null",
            "\"experts\":[",
            "\"load\":[0.5]",
            "{}\n",
        ]),
        repair: Box::new(|input, _| input),
        parse: Box::new(move |input| {
            fs::write(&path, input).ok()?;
            let mut last = None;
            for record in MetricsReader::open(&path).ok()? {
                last = Some(record.map_err(|e| e.to_string()).ok()?.step());
            }
            let _keep = &dir;
            let path = path.clone();
            // A file that reads to its end can be gone on with, and then still reads.
            Some(Box::new(move || {
                drop(MetricsWriter::resume(&path, last.unwrap_or(0)).map_err(|e| format!("not gone on with: {e}"))?);
                let again = MetricsReader::open(&path).map_err(|e| e.to_string())?;
                again.collect::<Result<Vec<_>, _>>().map(drop).map_err(|e| format!("damaged by going on: {e}"))
            }) as Then)
        }),
    })
}
