//! Cases of `layer` and `ep`: whole MoE layers, forward and every gradient, on one rank or as each of several ranks in turn.

use std::collections::HashMap;

use moebius_ir::{DType, Tensor, TensorType, gradients};
use moebius_models::config::ComputeDtype;

use super::compare::{Case, difference};
use super::machine::{Machine, Sheet, output};
use super::moe::{Names, inner_width, layer};
use super::rules::{Capacity, Function, Given, model};
use super::set::{Fields, Problem, Set};

/// Where the weights of a layer are among the tensors of `layer`, and their gradients after `grad.`.
const NAMES: Names<'static> = Names {
    router: "wg",
    expert: "experts.{}.",
    mlp: "mlp.",
    coefficient: "coefficient.",
    network: ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"],
};

fn dtype(fields: &Fields<'_>) -> Result<(DType, f64), Problem> {
    match fields.text("dtype")? {
        "f32" => Ok((DType::F32, 2e-5)),
        "bf16" => Ok((DType::Bf16, 2e-2)),
        other => Err(Problem::Field { field: "dtype".into(), wanted: "f32 or bf16", found: other.into() }),
    }
}

/// The random numbers that fields name: tensors of the case, after `prefix`.
fn given(case: &Case<'_>, prefix: &str, fields: &Fields<'_>, sheet: &mut Sheet) -> Result<Given, Problem> {
    let function = Function::of_layer(fields.count("k")?);
    let mut given = |name: &str, wanted: bool| match (wanted, case.optional(&format!("{prefix}{name}"))) {
        (true, Some(tensor)) => Ok(Some(sheet.input(name, tensor.clone())?)),
        (true, None) => Err(Problem::Tensor { tensor: format!("{prefix}{name}") }),
        (false, _) => Ok(None),
    };
    // First come, first served is what happens without random numbers; sets of several ranks do not store that ramp.
    let rts = match fields.has("rts").then(|| fields.text("rts")).transpose()? {
        Some("fcfs") if case.optional(&format!("{prefix}rts_uniform")).is_none() => None,
        Some(_) => given("rts_uniform", function.draws_places())?,
        None => None,
    };
    // The noise of the second choice stays on in evaluation, jitter does not (spec 1.0).
    let gumbel = given("gumbel", fields.flag("sampling")? && function == Function::Top2)?;
    let jitter = given("jitter", fields.flag("jitter")? && fields.flag("train")?)?;
    Ok(Given { jitter, rts, gumbel, used: None })
}

/// A weight of the case, or of all cases.
fn weight(set: &Set, name: &str) -> Result<Tensor, Problem> {
    let name = format!("common/{name}");
    set.file("layer").and_then(|t| t.get(&name)).cloned().ok_or(Problem::Tensor { tensor: name })
}

/// Results and gradients by the names of the case.
fn run(
    case: &Case<'_>,
    prefix: &str,
    fields: &Fields<'_>,
    experts: usize,
    machine: &Machine,
) -> Result<HashMap<String, Vec<f64>>, Problem> {
    let (dtype, _) = dtype(fields)?;
    let x = case.tensor(&format!("{prefix}x"))?;
    let weights = case.tensor(&format!("{prefix}R"))?;
    let (tokens, width) = (x.ty.shape.rows(), x.ty.shape.last());
    if weights.ty.elements() != tokens * width {
        let (wanted, found) = (x.ty.to_string(), weights.ty.to_string());
        return Err(Problem::Size { what: format!("{prefix}R"), wanted, found });
    }
    let mut sheet = Sheet::default();
    let x = sheet.input("x", Tensor::new(TensorType::new(dtype, [tokens, width]), x.data.clone()))?;
    let weights = sheet.input("R", Tensor::new(TensorType::f32([tokens, width]), weights.data.clone()))?;
    let set = case.set();
    let (residual, training) = (fields.flag("residual")?, fields.flag("train")?);
    let given = given(case, prefix, fields, &mut sheet)?;
    let capacity = Capacity {
        training: fields.number("cf")?,
        evaluation: fields.number("eval_cf")?,
        least: fields.count("min_cap")?,
    };
    let capacity = fields.flag("drop")?.then_some(capacity);
    let mut config = model(Function::of_layer(fields.count("k")?), &[experts], residual, capacity, given)?;
    config.width = width;
    config.ffn = Some(inner_width(&weight(set, "experts.0.fc1.bias")?));
    config.dtype = if dtype == DType::Bf16 { ComputeDtype::Bf16 } else { ComputeDtype::F32 };
    let made = layer(&mut sheet, &config, 0, x, (training, given), NAMES, &|name| weight(set, name))?;

    let g = &mut sheet.graph;
    let y = made.y;
    let wide = g.cast(y, DType::F32)?;
    let weighted = g.mul(wide, weights)?;
    let sum = g.sum_all(weighted)?;
    let aux = g.mul_scalar(made.statistics.load_balancing_loss, set.aux_weight)?;
    let loss = g.add(sum, aux)?;
    let mut wrt = vec![x];
    wrt.extend(made.parts.iter().map(|part| part.value));
    let grads = gradients(g, loss, &wrt)?;
    for (name, value) in [
        ("out", y),
        ("l_aux", made.statistics.load_balancing_loss),
        ("exp_counts", made.statistics.counts),
        ("loss", loss),
    ] {
        sheet.output(name, value)?;
    }
    for (i, grad) in grads.iter().enumerate() {
        sheet.output(&format!("gradient {i}"), *grad)?;
    }
    let mut got = machine.run(&sheet)?;
    let mut results = HashMap::new();
    for name in ["out", "l_aux", "exp_counts", "loss"] {
        results.insert(name.to_owned(), output(&got, name)?.to_vec());
    }
    results.insert("grad_x".into(), output(&got, "gradient 0")?.to_vec());
    for (i, part) in made.parts.iter().enumerate() {
        let of_all = got.remove(&format!("gradient {}", i + 1)).unwrap_or_default();
        results.extend(part.split(&of_all).into_iter().map(|(name, part)| (format!("grad.{name}"), part)));
    }
    Ok(results)
}

/// Compares a case of one rank.
pub(super) fn check(case: &mut Case<'_>, fields: &Fields<'_>, machine: &Machine) -> Result<(), Problem> {
    let (_, tolerance) = dtype(fields)?;
    let results = run(case, "", fields, fields.count("experts")?, machine)?;
    for (name, got) in &results {
        match name.as_str() {
            "loss" => {
                // It is a sum over all elements of the result, so its size is not that of the terms.
                let terms: f64 = results["out"].iter().map(|y| y.abs()).sum();
                let wanted = fields.number("loss")?;
                if (got[0] - wanted).abs() > tolerance * terms.max(wanted.abs()) {
                    case.wrong(format!("loss of the index: {:e} for {wanted:e}", got[0]));
                }
            }
            "exp_counts" => case.close(name, got, 0.0)?,
            _ => case.close(name, got, tolerance)?,
        }
    }
    if let Some(wrong) = difference(&results["l_aux"], &[fields.number("l_aux")?], tolerance) {
        case.wrong(format!("l_aux of the index: {wrong}"));
    }
    Ok(())
}

/// Compares a case of several expert-parallel ranks, each run by itself on its tokens with all experts: capacity from a rank's
/// tokens and all experts; the gradient of an expert is the sum over ranks and belongs to the rank that holds the expert.
pub(super) fn check_ranks(case: &mut Case<'_>, fields: &Fields<'_>, machine: &Machine) -> Result<(), Problem> {
    let (_, tolerance) = dtype(fields)?;
    let (world, local) = (fields.count("world")?, fields.count("local_experts")?);
    let mut ranks = Vec::with_capacity(world);
    for rank in 0..world {
        let x = case.tensor(&format!("rank{rank}/x"))?;
        case.same(&format!("rank{rank}: tokens"), &x.ty.shape.rows(), &fields.count("tokens_per_rank")?);
        ranks.push(run(case, &format!("rank{rank}/"), fields, world * local, machine)?);
    }
    let sum = |name: &str| {
        let mut sum: Vec<f64> = vec![0.0; ranks[0][name].len()];
        for rank in &ranks {
            sum.iter_mut().zip(&rank[name]).for_each(|(s, v)| *s += v);
        }
        sum
    };
    for (rank, results) in ranks.iter().enumerate() {
        for (name, got) in results {
            let at = format!("rank{rank}/{name}");
            let expert = name.strip_prefix("grad.experts.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
            match (name.as_str(), expert) {
                // The index holds no loss of a rank.
                ("loss", _) => {}
                ("exp_counts", _) => case.close(&at, got, 0.0)?,
                (_, Some(expert)) if expert / local.max(1) != rank => {}
                // Gradients of the experts' biases were not stored in every set, those of weights always.
                (_, Some(_)) if name.ends_with(".bias") && case.optional(&at).is_none() => {}
                (_, Some(_)) => case.close(&at, &sum(name), tolerance)?,
                // Those of the dense network are per rank and were not stored in every set.
                (_, None) if name.starts_with("grad.mlp.") && case.optional(&at).is_none() => {}
                (_, None) => case.close(&at, got, tolerance)?,
            }
        }
    }
    Ok(())
}
