//! `moebius inspect`: what a model is and what it takes, without allocating it.

use moebius::Engine;
use moebius_models::config::{Config, Moments, Recompute};
use moebius_models::training;
use serde_json::json;

use crate::cli::InspectArgs;
use crate::failure::Failure;
use crate::{model, text};

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    if args.list {
        return list(args.json);
    }
    let mut config = match (&args.preset, &args.config, &args.model) {
        (Some(name), _, _) => Config::preset(name)?,
        (None, Some(file), _) => Config::from_file(file)?,
        (None, None, Some(folder)) => {
            let found = model::find(folder)?;
            Config::from_toml(&found.checkpoint.state.config, "the checkpoint's configuration")?
        }
        (None, None, None) => return Err(Failure::Usage("inspect: wanted --preset, --config or --model".into())),
    };
    for setting in &args.set {
        config.set(setting)?;
    }
    if let Some(batch) = args.batch {
        config.train.batch = batch;
    }
    config.validate()?;
    let (parameters, flops, bytes) = (config.parameters(), config.flops_per_token(), config.training_bytes());
    let batch = config.train.batch;
    let engine = Engine::open(&args.device)?;
    let memory = training::memory(&engine, &config)?;
    let activations = memory.arena;
    let kept = training::kept(&config)?;
    let (accumulate, recomputes) = (config.train.accumulate, config.train.recompute != Recompute::Nothing);
    // What the device would have to hold without it.
    let arena_without = if recomputes {
        let mut keeps = config.clone();
        keeps.train.recompute = Recompute::Nothing;
        training::memory(&engine, &keeps)?.arena
    } else {
        activations
    };
    let accumulators = if accumulate > 1 { bytes.gradients } else { 0 };
    let free = engine.free_memory();
    let largest = match free {
        Some(free) if memory.total() > free => Some(training::largest_batch(&engine, &config, free)?),
        Some(_) | None => None,
    };
    if args.json {
        let layers: Vec<_> = parameters
            .per_layer
            .iter()
            .map(|l| {
                json!({
                    "layer": l.layer, "experts": l.experts, "attention": l.attention, "norms": l.norms,
                    "router": l.router, "expert": l.expert, "dense": l.dense, "coefficient": l.coefficient,
                    "total": l.total, "active": l.active,
                })
            })
            .collect();
        let whole = json!({
            "model": config.model.name,
            "total_params": parameters.total,
            "active_params": parameters.active,
            "flops_per_token": flops.total,
            "recomputed_flops_per_token": flops.recomputed,
            "weight_bytes": bytes.weights,
            "compute_weight_bytes": bytes.compute_weights,
            "gradient_bytes": bytes.gradients,
            "moments": config.train.moments,
            "optimizer_bytes": bytes.optimizer,
            "batch": batch,
            "sequence": config.model.sequence,
            "accumulate": accumulate,
            "accumulator_bytes": accumulators,
            "activation_bytes": activations,
            "activation_bytes_without_recomputation": arena_without,
            "recompute": config.train.recompute,
            "kept_bytes": kept.bytes,
            "kept_index_bytes": kept.index_bytes,
            "device": engine.name(),
            "peak_bytes": memory.total(),
            "free_bytes": free,
            "largest_batch": largest.unwrap_or(batch),
            "router": config.model.routing().to_string(),
            "top_k": config.model.top_k(),
            "token_embedding": parameters.token_embedding,
            "position_embedding": parameters.position_embedding,
            "layers": layers,
        });
        println!("{whole}");
        return Ok(());
    }
    let m = &config.model;
    println!(
        "{}: {} layers, width {}, {} heads, sequence {}, vocabulary {}",
        m.name, m.layers, m.width, m.heads, m.sequence, m.vocab
    );
    println!();
    println!("parameters       {:>10}", text::count(parameters.total as f64));
    println!("active per token {:>10}", text::count(parameters.active as f64));
    print!("training FLOPs   {:>10} per token", text::count(flops.total as f64));
    match flops.recomputed {
        0 => println!(),
        again => println!(", and {} computed again in the backward pass", text::count(again as f64)),
    }
    if m.experts_per_layer().iter().any(|&e| e > 0) {
        println!("router           top {}: {}", m.top_k(), m.routing());
    }
    println!();
    println!("layer  experts   attention      router     experts       dense       total      active");
    for l in &parameters.per_layer {
        let experts = if l.experts == 0 { "-".into() } else { l.experts.to_string() };
        let sparse = l.expert * l.experts as u64;
        let cell = |n: u64| if n == 0 { "-".into() } else { text::count(n as f64) };
        println!(
            "{:>5}  {experts:>7}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}",
            l.layer,
            cell(l.attention),
            cell(l.router),
            cell(sparse),
            cell(l.dense + l.coefficient),
            cell(l.total),
            cell(l.active)
        );
    }
    println!(
        "embeddings: tokens {}, positions {}",
        text::count(parameters.token_embedding as f64),
        text::count(parameters.position_embedding as f64)
    );
    println!();
    match accumulate {
        1 => println!("memory of training, batch {batch} x {}:", m.sequence),
        n => println!("memory of training, {n} micro-batches of {batch} x {} in a step:", m.sequence),
    }
    println!("  weights      {:>10}", text::bytes(bytes.weights as f64));
    if bytes.compute_weights > 0 {
        println!("  bf16 copy    {:>10}", text::bytes(bytes.compute_weights as f64));
    }
    if accumulators > 0 {
        println!("  gradients    {:>10}  (their sums over the micro-batches)", text::bytes(accumulators as f64));
    } else {
        println!("  gradients    {:>10}", text::bytes(bytes.gradients as f64));
    }
    match config.train.moments {
        Moments::F32 => println!("  optimizer    {:>10}", text::bytes(bytes.optimizer as f64)),
        other @ (Moments::Bf16 | Moments::Eight) => {
            println!("  optimizer    {:>10}  (moments in {other})", text::bytes(bytes.optimizer as f64))
        }
    }
    if accumulators > 0 {
        println!("  activations  {:>10}  (the device's arena)", text::bytes(activations as f64));
    } else {
        println!(
            "  activations  {:>10}  (with gradients in the device's arena: {})",
            text::bytes(activations.saturating_sub(bytes.gradients) as f64),
            text::bytes(activations as f64)
        );
    }
    println!(
        "  kept for the backward pass {}, and {} of indices",
        text::bytes(kept.bytes as f64),
        text::bytes(kept.index_bytes as f64)
    );
    if recomputes {
        let share = 100.0 * activations as f64 / arena_without as f64;
        println!("  arena without recomputation {} (now {share:.0} % of it)", text::bytes(arena_without as f64));
    }
    let total = text::bytes(memory.total() as f64);
    print!("  on {:<9} {total:>10}", engine.name());
    match (free, largest) {
        (Some(free), None) => println!("  of {} that are free", text::bytes(free as f64)),
        (Some(free), Some(0)) => {
            println!("  of {} that are free: not even a batch of 1 fits", text::bytes(free as f64))
        }
        (Some(free), Some(batch)) => {
            println!("  of {} that are free: the largest batch that fits is {batch}", text::bytes(free as f64));
        }
        (None, _) => println!(),
    }
    Ok(())
}

fn list(as_json: bool) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for name in Config::presets() {
        let parameters = Config::preset(name)?.parameters();
        rows.push((name, parameters.total, parameters.active));
    }
    if as_json {
        let list: Vec<_> =
            rows.iter().map(|(n, t, a)| json!({ "name": n, "total_params": t, "active_params": a })).collect();
        println!("{}", json!({ "presets": list }));
        return Ok(());
    }
    println!("{:<22} {:>10}  {:>10}", "preset", "parameters", "active");
    for (name, total, active) in rows {
        println!("{name:<22} {:>10}  {:>10}", text::count(total as f64), text::count(active as f64));
    }
    Ok(())
}
