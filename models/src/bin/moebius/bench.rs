//! `moebius bench`: training steps and decoding, measured on this machine.

mod distill;
mod layer;

use std::time::{Duration, Instant};

use moebius::{Engine, StepTime};
use moebius_models::config::Config;
use moebius_models::generate::Generator;
use moebius_models::gpt;
use moebius_models::routes::RouteTap;
use moebius_models::sampling::most_likely;
use moebius_models::timed::median;
use moebius_models::training;
use serde_json::{Value, json};

use crate::cli::{BenchArgs, BenchKind};
use crate::failure::Failure;
use crate::text::{self, note};

/// Steps that warm caches and branch predictors up and are not counted.
const WARM_UP: usize = 3;
/// How long such steps go on at least: an H100 that was idle runs at 345 of its 1,980 MHz until it has had some tenths of a second of
/// work, under Vulkan.
const WARM_UP_TIME: Duration = Duration::from_secs(1);

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let mut config = match &args.config {
        Some(file) => Config::from_file(file)?,
        None => Config::preset(&args.preset)?,
    };
    for setting in &args.set {
        config.set(setting)?;
    }
    if let Some(recompute) = args.recompute {
        config.train.recompute = recompute;
    }
    config.validate()?;
    if args.explain {
        return layer::explain(args);
    }
    let engine = Engine::open(&args.device)?;
    let mut result = match args.what {
        BenchKind::Step => step(args, &config, &engine)?,
        BenchKind::Decode => decode(args, &config, &engine)?,
        BenchKind::Distill => distill::measure(args, &config, &engine)?,
        BenchKind::Layer => layer::measure(args, &engine)?,
    };
    text::notes(&engine);
    if let Value::Object(map) = &mut result {
        if args.what != BenchKind::Layer {
            map.insert("model".into(), config.model.name.clone().into());
        }
        map.insert("device".into(), format!("{} ({})", engine.name(), engine.describe()).into());
        map.insert("peak_rss_bytes".into(), peak_rss().into());
    }
    if args.json {
        println!("{result}");
        return Ok(());
    }
    if args.what == BenchKind::Layer {
        println!("{} ({})", engine.name(), engine.describe());
        layer::print(&result);
        return Ok(());
    }
    println!("{} on {} ({})", config.model.name, engine.name(), engine.describe());
    let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
    match args.what {
        BenchKind::Step => {
            println!(
                "{:.1} ms per step, {} tokens/s (median of {} steps)",
                number("step_ms"),
                text::count(number("tokens_per_s")),
                number("steps")
            );
            println!(
                "{:.1} GFLOP/s of model arithmetic ({} per token)",
                number("gflops"),
                text::count(number("flops_per_token"))
            );
        }
        BenchKind::Decode => {
            println!("{:.3} ms per token (median of {} tokens)", number("decode_ms"), number("tokens"));
            println!("{:.2} GB/s of active weights", number("weight_gb_per_s"));
        }
        BenchKind::Distill => {
            distill::print(&result);
            return Ok(());
        }
        BenchKind::Layer => {}
    }
    println!(
        "on the device {} of parameters and state, {} of activations and scratch; this process held at most {}",
        text::bytes(number("state_bytes")),
        text::bytes(number("arena_bytes")),
        text::bytes(number("peak_rss_bytes"))
    );
    Ok(())
}

/// Calls `one` with 0, 1 and so on until the machine is warm; how many calls that took.
fn warm_up(mut one: impl FnMut(usize) -> Result<f64, Failure>) -> Result<usize, Failure> {
    let begun = Instant::now();
    let mut calls = 0;
    while calls < WARM_UP || begun.elapsed() < WARM_UP_TIME {
        one(calls)?;
        calls += 1;
    }
    Ok(calls)
}

/// Numbers below `limit` that look random and are the same everywhere.
fn ids(n: usize, limit: usize, seed: u64) -> Vec<i32> {
    let key = [seed as u32, 0];
    (0..n as u64).map(|i| (moebius::ir::philox::bits(key, 0, i) as usize % limit) as i32).collect()
}

fn step(args: &BenchArgs, config: &Config, engine: &Engine) -> Result<Value, Failure> {
    let steps = args.steps.unwrap_or(12).max(1);
    let mut session = engine.session();
    let mut trainer = training::trainer(engine, &mut session, config)?;
    gpt::initialise(&config.model, config.train.seed, |p, values| session.write(&p.name, values))?;
    let tokens = config.train.batch * config.model.sequence;
    let mut one = |i: usize| -> Result<f64, Failure> {
        let text = ids(tokens + 1, config.model.vocab, i as u64);
        let begun = Instant::now();
        trainer.step_with(&mut session, |_, program| {
            program.feed("tokens", &text[..tokens])?;
            program.feed("targets", &text[1..])?;
            if gpt::is_noisy(&config.model) {
                program.feed(gpt::NOISE_KEY, &[0u32, 0])?;
            }
            Ok::<_, moebius::Error>(3e-4)
        })?;
        Ok(begun.elapsed().as_secs_f64())
    };
    let first = warm_up(&mut one)?;
    let times = (first..first + steps).map(one).collect::<Result<Vec<_>, _>>()?;
    if args.profile {
        print_profile(&session.profile(trainer.program(), 3)?);
    }
    let seconds = median(times);
    let flops = config.flops_per_token();
    let (recomputed, flops) = (flops.recomputed, flops.total as f64);
    let of_step = config.tokens_per_step() as f64;
    let plan = trainer.program().plan();
    Ok(json!({
        "bench": "step",
        "state_bytes": plan.state_bytes(),
        "arena_bytes": plan.arena_bytes(),
        "steps": steps,
        "tokens": of_step,
        "step_ms": seconds * 1e3,
        "tokens_per_s": of_step / seconds,
        "flops_per_token": flops,
        "recomputed_flops_per_token": recomputed,
        "gflops": flops * of_step / seconds / 1e9,
    }))
}

/// Takes a token and as many that follow as it is told, and returns the last that was chosen.
type Chosen<'a> = &'a mut dyn FnMut(&mut Generator, i32, usize) -> Result<i32, Failure>;

/// Tokens that a device chooses by itself between two looks of the host.
const DECODE_PORTION: usize = 32;

fn decode(args: &BenchArgs, config: &Config, engine: &Engine) -> Result<Value, Failure> {
    let tokens = args.steps.unwrap_or(128).max(1);
    let mut session = engine.session();
    let mut generator = Generator::frozen(&mut session, &config.model, RouteTap::default())?;
    gpt::initialise(&config.model, config.train.seed, |p, values| session.write_rounded(&p.name, values))?;
    let mut next = 0i32;
    // The seconds of each token of a text, the context of warm-up being as long as in what is counted.
    let mut measure = |generator: &mut Generator, portion: usize, chosen: Chosen<'_>| -> Result<f64, Failure> {
        let mut take = |generator: &mut Generator, count: usize| -> Result<f64, Failure> {
            let begun = Instant::now();
            next = chosen(generator, next, count)?;
            Ok(begun.elapsed().as_secs_f64() / count as f64)
        };
        warm_up(|i| {
            if i * portion % tokens < portion {
                generator.reset();
            }
            Ok(take(generator, portion)? * portion as f64)
        })?;
        generator.reset();
        let portions = (0..tokens).step_by(portion).map(|done| portion.min(tokens - done));
        Ok(median(portions.map(|count| take(generator, count)).collect::<Result<Vec<_>, _>>()?))
    };
    let by_host = measure(&mut generator, 1, &mut |generator, next, _| {
        Ok(most_likely(generator.take(&mut session, &[next])?) as i32)
    })?;
    let seconds = measure(&mut generator, DECODE_PORTION, &mut |generator, next, count| {
        let chosen = generator.follow(&mut session, next, config.model.vocab, count)?;
        Ok(chosen.last().copied().unwrap_or(next))
    })?;
    if args.profile {
        print_profile(&session.profile(generator.program(), 20)?);
    }
    let weights = config.parameters().active * config.model.dtype.bytes() as u64;
    let plan = generator.program().plan();
    Ok(json!({
        "bench": "decode",
        "state_bytes": plan.state_bytes(),
        "arena_bytes": plan.arena_bytes(),
        "tokens": tokens,
        "decode_ms": seconds * 1e3,
        "by_host_ms": by_host * 1e3,
        "tokens_per_s": 1.0 / seconds,
        "weight_gb_per_s": weights as f64 / seconds / 1e9,
    }))
}

fn print_profile(times: &[StepTime]) {
    for t in times {
        let pass = if t.backward { "backward" } else { "forward" };
        note!("{:>9.3} ms  {:>4} x {} {} ({pass})", t.seconds * 1e3, t.count, t.op, t.result);
    }
}

/// The most memory this process ever held, in bytes; 0 where the system does not tell.
fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}
