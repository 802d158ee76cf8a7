//! Cases of `gating`: choices, places, gates, counts and gradients from logits.

use std::collections::HashMap;

use moebius_ir::ops::CompareFn;
use moebius_ir::{DType, Tensor, TensorType, gradients};
use moebius_models::gpt::router;

use super::compare::{Case, Roundings, difference};
use super::machine::{Machine, Sheet, output};
use super::rounding;
use super::routes::Routes;
use super::rules::{Capacity, Function, Given, model};
use super::set::{Fields, Problem};

/// Relative to the largest magnitude of the tensor; integers must be equal.
const TOLERANCE: f64 = 1e-5;

/// `[k,N]` of DeepSpeed from our `[N,k]`, or the other way.
fn transposed(data: &[f64], rows: usize) -> Vec<f64> {
    let columns = data.len() / rows.max(1);
    (0..data.len()).map(|i| data[i % rows * columns + i / rows]).collect()
}

/// DeepSpeed's place of every kept choice within its expert, from our kept choices: in token order, and for `Top2` all first
/// choices before all second ones. We keep slots in token order always; how rows of one expert are ordered changes no result.
fn locations(function: Function, expert_index: &[f64], choice_slot: &[f64], k: usize) -> Vec<f64> {
    let tokens = choice_slot.len() / k;
    let mut order: Vec<usize> = (0..choice_slot.len()).filter(|&c| choice_slot[c] >= 0.0).collect();
    if function == Function::Top2 {
        order.sort_by_key(|c| c % k * tokens + c / k);
    }
    let mut next: HashMap<usize, usize> = HashMap::new();
    let mut places = vec![0.0; choice_slot.len()];
    for c in order {
        let place = next.entry(expert_index[c] as usize).or_default();
        places[c] = *place as f64;
        *place += 1;
    }
    places
}

/// The gate of a case with its results as outputs, and its capacity; `forced` are routes instead of its own.
fn build(case: &Case<'_>, fields: &Fields<'_>, forced: Option<&Routes>) -> Result<(Sheet, Option<usize>), Problem> {
    let function = Function::named(fields)?;
    let (tokens, experts, k) = (fields.count("S")?, fields.count("E")?, function.k());
    let drop = fields.flag("drop")?;
    let mut sheet = Sheet::default();
    let logits = sheet.input("logits", case.tensor("logits")?.clone())?;
    // A tensor that the function has no use for is not asked for, and fails the case.
    let mut optional = |name: &str, wanted: bool| {
        let tensor = if wanted { case.optional(name) } else { None };
        tensor.map(|t| sheet.input(name, t.clone())).transpose()
    };
    let given = Given {
        jitter: None,
        rts: optional("rts_uniform", function.draws_places())?,
        gumbel: optional("gumbel", function.draws_choices())?,
        used: optional("used_token", true)?,
    };
    for (field, there) in
        [("rts", given.rts.is_some()), ("gum", given.gumbel.is_some()), ("used", given.used.is_some())]
    {
        if fields.has(field) && !there && fields.flag(field).unwrap_or(true) {
            return Err(Problem::Tensor { tensor: format!("the one of `{field}`") });
        }
    }
    let weights = case.tensor("R")?;
    let weights = Tensor::new(TensorType::f32([tokens, k]), transposed(&weights.data, k));
    let weights = sheet.input("R", weights)?;

    let factor = fields.number("cf")?;
    let capacity = Capacity { training: factor, evaluation: factor, least: fields.count("min_cap")? };
    let mut config = model(function, &[experts], false, drop.then_some(capacity), given)?;
    let capacity = router::capacity(&config, true, tokens, experts);
    let mut inputs = given.inputs(&mut sheet.graph)?;
    if let Some(routes) = forced {
        let (choices, kept) = routes.forced(&mut sheet, &mut config, tokens, experts)?;
        (inputs.choices, inputs.noise.priority) = (Some(choices), kept);
    }
    let g = &mut sheet.graph;
    let gated = router::gate(g, &config.routing(), k, capacity, logits, &inputs)?;
    // DeepSpeed's gate of an evicted choice is 0; here it has no meaning, as no row is weighted by it.
    let zero = g.splat(TensorType::i32([]), 0.0)?;
    let kept = g.compare(CompareFn::Ge, gated.choice_slot, zero)?;
    let kept = g.cast(kept, DType::F32)?;
    let gates = g.mul(gated.gate, kept)?;
    let weighted = g.mul(gates, weights)?;
    let sum = g.sum_all(weighted)?;
    let aux = g.mul_scalar(gated.load_balancing_loss, case.set().aux_weight)?;
    let loss = g.add(sum, aux)?;
    let gradient = gradients(g, loss, &[logits])?[0];
    let of_aux = gradients(g, gated.load_balancing_loss, &[logits])?[0];
    for (name, value) in [
        ("gates", gates),
        ("expert_index", gated.expert_index),
        ("choice_slot", gated.choice_slot),
        ("exp_counts", gated.counts),
        ("offsets", gated.offsets),
        ("dropped", gated.dropped),
        ("l_aux", gated.load_balancing_loss),
        ("grad_logits", gradient),
        ("grad_logits_aux", of_aux),
    ] {
        sheet.output(name, value)?;
    }
    Ok((sheet, capacity))
}

/// Compares one case; the fields are those of the index.
pub(super) fn check(case: &mut Case<'_>, fields: &Fields<'_>, machine: &Machine) -> Result<(), Problem> {
    let function = Function::named(fields)?;
    let (tokens, k) = (fields.count("S")?, function.k());
    let (sheet, capacity) = build(case, fields, None)?;
    let got = machine.run(&sheet)?;

    let counts = output(&got, "exp_counts")?;
    case.close("exp_counts", counts, 0.0)?;
    let fullest = counts.iter().fold(0.0f64, |m, &c| m.max(c)) as usize;
    case.same("capacity", &capacity.unwrap_or(fullest), &fields.count("capacity")?);
    if fields.flag("tie_dependent")? {
        // Which of equal tokens stay is not defined by DeepSpeed.
        let undefined = ["R", "gates", "indices", "locations", "l_aux", "grad_logits", "grad_logits_aux"];
        undefined.iter().for_each(|name| case.ignore(name));
        return Ok(());
    }
    let (index, slot) = (output(&got, "expert_index")?, output(&got, "choice_slot")?);
    let kept_index: Vec<f64> = index.iter().zip(slot).map(|(&e, &s)| if s < 0.0 { -1.0 } else { e }).collect();
    case.close("indices", &transposed(&kept_index, tokens), 0.0)?;
    case.close("locations", &transposed(&locations(function, index, slot, k), tokens), 0.0)?;
    case.same("routes", &k, &fields.count("routes")?);
    // The tensor of indices has no expert for every choice without a slot, those of unused tokens too; `dropped` leaves them out.
    let without = slot.iter().filter(|&&s| s < 0.0).count();
    let nowhere = index.iter().filter(|&&e| e < 0.0).count();
    case.same("dropped and nowhere", &(output(&got, "dropped")?[0] as usize + nowhere), &without);
    case.same("dropped", &(output(&got, "dropped")?[0] as usize), &fields.count("dropped")?);
    case.close("gates", &transposed(output(&got, "gates")?, tokens), TOLERANCE)?;
    case.close("l_aux", output(&got, "l_aux")?, TOLERANCE)?;
    if let Some(wrong) = difference(output(&got, "l_aux")?, &[fields.number("l_aux")?], TOLERANCE) {
        case.wrong(format!("l_aux of the index: {wrong}"));
    }
    // With these routes given: a token that goes elsewhere is no matter of rounding.
    let (given, _) = build(case, fields, Some(&Routes::taken(&got)?))?;
    let moves = rounding::moves(&given)?;
    for name in ["grad_logits", "grad_logits_aux"] {
        let values = output(&moves, name)?.iter().copied().fold(0.0, f64::max);
        case.close_but_for(name, output(&got, name)?, Roundings { inputs: None, values }, TOLERANCE)?;
    }
    Ok(())
}
