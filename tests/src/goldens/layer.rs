//! Cases of `layer` and `ep`: whole MoE layers, forward and every gradient, on one rank or as each of several ranks in turn.

use super::compare::{Case, Roundings, difference};
use super::machine::Machine;
use super::rank::{Run, rank};
use super::set::{Fields, Problem};

/// Compares a case of one rank.
pub(super) fn check(case: &mut Case<'_>, fields: &Fields<'_>, machine: &Machine, run: Run) -> Result<(), Problem> {
    let (_, tolerance) = run.dtype(fields)?;
    let results = rank(case, "", fields, fields.count("experts")?, machine, run)?;
    let values = &results.values;
    for (name, got) in values {
        match name.as_str() {
            "loss" => {
                // It is a sum over all elements of the result, so its size is not that of the terms.
                let terms: f64 = values["out"].iter().map(|y| y.abs()).sum();
                let wanted = fields.number("loss")?;
                let error = (got[0] - wanted).abs();
                if error.is_nan() || error > tolerance * terms.max(wanted.abs()) {
                    case.wrong(format!("loss of the index: {:e} for {wanted:e}", got[0]));
                }
            }
            "exp_counts" => case.close(name, got, 0.0)?,
            _ => case.close_but_for(name, got, results.roundings(name), tolerance)?,
        }
    }
    if let Some(wrong) = difference(&values["l_aux"], &[fields.number("l_aux")?], tolerance) {
        case.wrong(format!("l_aux of the index: {wrong}"));
    }
    same_capacity(case, fields, "", results.capacity)
}

/// Compares a case of several expert-parallel ranks, each run by itself on its tokens with all experts: capacity from a rank's
/// tokens and all experts, of which without dropping all ranks take the largest; the gradient of an expert is the sum over
/// ranks and belongs to the rank that holds the expert.
pub(super) fn check_ranks(
    case: &mut Case<'_>,
    fields: &Fields<'_>,
    machine: &Machine,
    run: Run,
) -> Result<(), Problem> {
    let (_, tolerance) = run.dtype(fields)?;
    let (world, local) = (fields.count("world")?, fields.count("local_experts")?);
    if world == 0 || local == 0 {
        let found = format!("{world} and {local}");
        return Err(Problem::Size { what: "world and local_experts".into(), wanted: "at least 1".into(), found });
    }
    let mut ranks = Vec::with_capacity(world);
    for number in 0..world {
        let x = case.tensor(&format!("rank{number}/x"))?;
        case.same(&format!("rank{number}: tokens"), &x.ty.shape.rows(), &fields.count("tokens_per_rank")?);
        ranks.push(rank(case, &format!("rank{number}/"), fields, world * local, machine, run)?);
    }
    let sum = |of_ranks: &[&[f64]]| {
        let mut sum: Vec<f64> = vec![0.0; of_ranks.first().map_or(0, |one| one.len())];
        for one in of_ranks {
            sum.iter_mut().zip(*one).for_each(|(s, v)| *s += v);
        }
        sum
    };
    let capacity = ranks.iter().map(|rank| rank.capacity).max().unwrap_or_default();
    for (number, rank) in ranks.iter().enumerate() {
        for (name, got) in &rank.values {
            let at = format!("rank{number}/{name}");
            let expert = name.strip_prefix("grad.experts.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
            match (name.as_str(), expert) {
                // The index holds no loss of a rank.
                ("loss", _) => {}
                ("exp_counts", _) => case.close(&at, got, 0.0)?,
                (_, Some(expert)) if expert / local != number => {}
                // Gradients of the experts' biases were not stored in every set, those of weights always.
                (_, Some(_)) if name.ends_with(".bias") && case.optional(&at).is_none() => {}
                (_, Some(_)) => {
                    let all: Vec<&[f64]> = ranks.iter().map(|rank| rank.values[name].as_slice()).collect();
                    let of_ranks: Vec<Roundings<'_>> = ranks.iter().map(|rank| rank.roundings(name)).collect();
                    let inputs: Option<Vec<&[f64]>> = of_ranks.iter().map(|of_rank| of_rank.inputs).collect();
                    let inputs = inputs.map(|all| sum(&all));
                    let values = of_ranks.iter().map(|of_rank| of_rank.values).sum();
                    case.close_but_for(&at, &sum(&all), Roundings { inputs: inputs.as_deref(), values }, tolerance)?;
                }
                // Those of the dense network are per rank and were not stored in every set.
                (_, None) if name.starts_with("grad.mlp.") && case.optional(&at).is_none() => {}
                (_, None) => case.close_but_for(&at, got, rank.roundings(name), tolerance)?,
            }
        }
        same_capacity(case, fields, &format!("rank{number}/"), capacity)?;
    }
    Ok(())
}

/// Compares the slots of an expert with the field `capacity` of the index and the tensor of that name, of which a set may have
/// either, both or none.
fn same_capacity(case: &mut Case<'_>, fields: &Fields<'_>, prefix: &str, capacity: usize) -> Result<(), Problem> {
    if fields.has("capacity") {
        case.same(&format!("{prefix}capacity of the index"), &capacity, &fields.count("capacity")?);
    }
    let name = format!("{prefix}capacity");
    if case.optional(&name).is_some() {
        case.close(&name, &[capacity as f64], 0.0)?;
    }
    Ok(())
}
