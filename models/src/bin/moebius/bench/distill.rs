//! `moebius bench distill`: what a teacher costs a training step, live and from a cache.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use moebius::Engine;
use moebius::checkpoint::{Checkpoints, Dtype, Snapshot, Tensor, TensorInfo, TrainState};
use moebius_models::config::Config;
use moebius_models::data::{Batches, Corpus, CorpusSpec, Source, Validation, default_cache_dir};
use moebius_models::distill::cache::{Build, CacheReader, Identity, build};
use moebius_models::distill::{CacheSettings, Course, Settings, Stop, Teacher};
use moebius_models::gpt::{self, Distilling, Lesson};
use moebius_models::timed::{TimedStep, median};
use moebius_models::tokenizer::Tokenizer;
use moebius_models::training::parameter_infos;
use serde_json::{Value, json};

use super::WARM_UP;
use crate::cli::BenchArgs;
use crate::failure::Failure;
use crate::text::{self, note};

/// The ways that are measured, in this order.
const WAYS: [&str; 3] = ["plain", "cached", "live"];

/// A folder that goes away with the measurement.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Writes a checkpoint of start values, which the teacher is opened from as any other.
fn untrained(config: &Config, folder: &std::path::Path) -> Result<Teacher, Failure> {
    let mut tensors = Vec::new();
    gpt::initialise(&config.model, config.train.seed, |p, values| {
        tensors.push((p.name.clone(), bytemuck::cast_slice(values).to_vec()));
        Ok::<_, Failure>(())
    })?;
    // What is not trained by a gradient starts at zero.
    let model = parameter_infos(config).into_iter().map(|info: TensorInfo| {
        debug_assert!(info.dtype == Dtype::F32);
        let zeros = || vec![0u8; info.bytes().unwrap_or(0) as usize];
        let found = tensors.iter_mut().find(|(name, _)| *name == info.name);
        let bytes = found.map_or_else(zeros, |(_, bytes)| std::mem::take(bytes));
        Tensor::lazy(info, move || Ok(bytes.into()))
    });
    let state = TrainState {
        config: config.to_toml()?,
        config_hash: config.model_hash(),
        model: config.model.name.clone(),
        tokenizer: Tokenizer::Bytes.name().to_owned(),
        tokenizer_hash: Tokenizer::Bytes.fingerprint(),
        ..TrainState::default()
    };
    let snapshot = Snapshot { state, model: model.collect(), optimizer: Vec::new() };
    Checkpoints::create(folder, 1)?.save(snapshot)?;
    Ok(Teacher::open(folder)?)
}

pub(super) fn measure(args: &BenchArgs, config: &Config, engine: &Engine) -> Result<Value, Failure> {
    let Some(name) = &args.teacher else {
        return Err(Failure::Usage("bench distill: wanted --teacher NAME, a preset".into()));
    };
    let mut config = config.clone();
    config.train.learning_rate = 3e-4;
    let of_teacher = Config::preset(name)?;
    of_teacher.validate()?;
    let steps = args.steps.unwrap_or(12).max(1);
    let scratch = Scratch(std::env::temp_dir().join(format!("moebius-bench-{}", std::process::id())));
    let teacher = untrained(&of_teacher, &scratch.0.join("teacher"))?;
    let cache = CacheSettings { folder: scratch.0.join("cache"), top: args.cache_top };
    let settings = Settings { cache: Some(cache.clone()), ..Settings::default() };
    let mut course = Course::new(teacher, &config, &Tokenizer::Bytes, Stop::Fraction(1.0), settings)?;
    let options = course.options();
    let settings = course.settings().clone();
    let top = settings.cache.as_ref().map_or(0, |cache| cache.top);
    let tokens = default_cache_dir();
    let spec = CorpusSpec {
        train: &[Source::TinyShakespeare],
        validation: Validation::Fraction(0.1),
        tokenizer: &Tokenizer::Bytes,
        vocab: Some(config.model.vocab),
        cache_dir: &tokens,
    };
    let corpus = Corpus::open(&spec, &mut |_, _, _| ())?;
    let batches = Batches::new(&corpus.train, config.train.seed, config.train.batch, config.model.sequence)?;
    let accumulate = config.train.accumulate as u64;
    let wanted = (steps + WARM_UP) as u64 * accumulate;
    let teacher = course.teacher()?;
    let identity = Identity::of(teacher, &config, &corpus.train, &Tokenizer::Bytes, &settings)?;
    let of = Build { identity: &identity, batches: &batches, wanted, folder: &cache.folder };
    let begun = Instant::now();
    let reader: CacheReader = build(engine, teacher, &of, &AtomicBool::new(false), &mut |_| ())?;
    let build_seconds = begun.elapsed().as_secs_f64();

    let lesson = |lesson| Distilling { lesson, options, lm_weight: 1.0 };
    let live = lesson(Lesson::Live(&of_teacher.model));
    let mut ways = [
        TimedStep::new(engine, &config, None)?,
        TimedStep::new(engine, &config, Some(&lesson(Lesson::Cached(top))))?,
        TimedStep::new(engine, &config, Some(&live))?,
    ];
    teacher.load(&mut ways[2].session)?;
    let n = config.train.batch * config.model.sequence;
    for step in 0..steps + WARM_UP {
        // In turns, so that whatever else the machine does is shared by all.
        for (i, way) in ways.iter_mut().enumerate() {
            let seconds = way.run(&batches, (WAYS[i] == "cached").then_some(&reader))?;
            if step >= WARM_UP {
                way.times.push(seconds);
            }
        }
    }
    if args.profile {
        for (name, way) in WAYS.iter().zip(&mut ways) {
            note!("{name}:");
            super::print_profile(&way.session.profile(way.trainer.program(), 3)?);
        }
    }
    let of_step = config.tokens_per_step() as f64;
    let mut rows = Vec::new();
    for (name, way) in WAYS.iter().zip(&mut ways) {
        let seconds = median(std::mem::take(&mut way.times));
        let plan = way.trainer.program().plan();
        rows.push(json!({
            "way": name,
            "step_ms": seconds * 1e3,
            "tokens_per_s": of_step / seconds,
            "state_bytes": plan.state_bytes(),
            "arena_bytes": plan.arena_bytes(),
        }));
    }
    Ok(json!({
        "bench": "distill",
        "teacher": of_teacher.model.name,
        "steps": steps,
        "tokens": of_step,
        "cache_top": top,
        "cache_bytes_per_token": (reader.bytes() as f64) / (wanted as f64 * n as f64),
        "cache_tokens_per_s": wanted as f64 * n as f64 / build_seconds,
        "ways": rows,
    }))
}

pub(super) fn print(result: &Value) {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let bytes = |row: &Value| number(&row["state_bytes"]) + number(&row["arena_bytes"]);
    let rows = result["ways"].as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(plain) = rows.first() else { return };
    println!(
        "teacher {}; cache of {} tokens: {:.0} bytes a token, built at {} tokens/s",
        result["teacher"].as_str().unwrap_or_default(),
        result["cache_top"],
        number(&result["cache_bytes_per_token"]),
        text::count(number(&result["cache_tokens_per_s"]))
    );
    println!("{:<8} {:>10} {:>12} {:>8} {:>10} {:>8}", "", "ms/step", "tokens/s", "time", "memory", "memory");
    for row in rows {
        println!(
            "{:<8} {:>10.1} {:>12} {:>7.3}x {:>10} {:>7.3}x",
            row["way"].as_str().unwrap_or_default(),
            number(&row["step_ms"]),
            text::count(number(&row["tokens_per_s"])),
            number(&row["step_ms"]) / number(&plain["step_ms"]),
            text::bytes(bytes(row)),
            bytes(row) / bytes(plain)
        );
    }
}
