//! How far the roundings of a dtype alone move what a graph computes, measured on the graph and the data of a case.
//!
//! The graph is run by the reference in f64, once as it is and a few times with every number that a node computes moved at random
//! by at most half a unit in the last place of its dtype, as a rounding would (Monte Carlo arithmetic: Parker, "Monte Carlo
//! Arithmetic: exploiting randomness in floating-point arithmetic", UCLA CSD-970002, 1997). Where large terms cancel that is
//! much of the little that is left, for DeepSpeed's own numbers as for ours. A wrong formula has no part in it: it is compared
//! with itself.
//!
//! The gradient of a softmax, `p (d - sum p d)`, is one node here and several numbers in DeepSpeed, of which little is left where an
//! expert has nearly all of the probability. There its terms are moved too ([`terms`]).

use std::collections::HashMap;

use moebius_ir::ops::Score;
use moebius_ir::{Op, Tensor, philox};

use super::machine::Sheet;
use super::set::Problem;
use crate::tolerance::ulp;

/// Runs with other random numbers.
const DRAWS: u32 = 8;

/// How far each element of each output of `sheet` is moved at most.
///
/// # Errors
/// [`Problem::Tensor`] for an input without a value.
pub(super) fn moves(sheet: &Sheet) -> Result<HashMap<String, Vec<f64>>, Problem> {
    let exact = outputs(sheet, None)?;
    let mut most: HashMap<String, Vec<f64>> =
        exact.iter().map(|(name, values)| (name.clone(), vec![0.0; values.len()])).collect();
    for draw in 0..DRAWS {
        for (name, moved) in outputs(sheet, Some(draw))? {
            let most = most.entry(name.clone()).or_default();
            for ((most, moved), exact) in most.iter_mut().zip(moved).zip(&exact[&name]) {
                *most = most.max((moved - exact).abs());
            }
        }
    }
    Ok(most)
}

/// The outputs of the graph in f64, moved by the random numbers of a draw.
fn outputs(sheet: &Sheet, draw: Option<u32>) -> Result<HashMap<String, Vec<f64>>, Problem> {
    let graph = &sheet.graph;
    let mut values: Vec<Tensor> = Vec::with_capacity(graph.value_count());
    for (number, node) in graph.nodes().iter().enumerate() {
        if let Some(input) = node.op.as_input() {
            let given = sheet.inputs.iter().find(|(name, _)| *name == input.name);
            let (_, given) = given.ok_or_else(|| Problem::Tensor { tensor: input.name.clone() })?;
            values.push(given.clone());
            continue;
        }
        let operands: Vec<&Tensor> = node.operands.iter().map(|v| &values[v.index()]).collect();
        let types: Vec<_> = node.results.iter().map(|&r| graph.ty(r).clone()).collect();
        let mut results = node.op.reference(&operands, &types);
        if let Some(draw) = draw.filter(|_| !copies(&node.op)) {
            let terms = terms(&node.op, &operands, &results[0]);
            for (place, result) in results.iter_mut().enumerate() {
                let half = ulp(result.ty.dtype) / 2.0;
                let stream = (4 * number + place) as u32;
                for (i, v) in result.data.iter_mut().enumerate() {
                    let by = 2.0 * f64::from(philox::uniform([draw, 0], stream, i as u64)) - 1.0;
                    let size = terms.as_ref().map_or(*v, |terms| v.abs().max(terms[i]));
                    *v += size * half * by;
                }
            }
        }
        values.extend(results);
    }
    Ok(graph.outputs().iter().map(|(name, value)| (name.clone(), values[value.index()].data.clone())).collect())
}

/// For the gradient of a softmax the size of the terms whose difference each element is: its probability `p` times the largest
/// `d - sum p d` of its row, which is the gradient over `p`.
fn terms(op: &Op, operands: &[&Tensor], gradient: &Tensor) -> Option<Vec<f64>> {
    let softmax = |row: &[f64]| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|l| (l - max).exp()).sum();
        row.iter().map(|l| (l - max).exp() / sum).collect::<Vec<_>>()
    };
    let probabilities = if let Op::RouteGrad(op) = op
        && op.score == Score::Softmax
    {
        operands[0].data.chunks(operands[0].ty.shape.last()).flat_map(softmax).collect()
    } else if let Op::SoftmaxGrad(_) = op {
        operands[0].data.clone()
    } else {
        return None;
    };
    let n = gradient.ty.shape.last();
    let rows = probabilities.chunks(n).zip(gradient.data.chunks(n));
    let of_row = |(p, d): (&[f64], &[f64])| {
        // A probability that f32 does not tell from 0 has no part in the sum.
        let ratios = p.iter().zip(d).filter(|(p, _)| **p > f64::from(f32::MIN_POSITIVE)).map(|(p, d)| (d / p).abs());
        let largest = ratios.fold(0.0, f64::max);
        p.iter().map(|p| p * largest).collect::<Vec<_>>()
    };
    Some(rows.flat_map(of_row).collect())
}

/// Whether every element of the results is one of an operand's or of the node itself.
fn copies(op: &Op) -> bool {
    matches!(
        op,
        Op::Constant(_)
            | Op::Reshape(_)
            | Op::Transpose(_)
            | Op::Broadcast(_)
            | Op::Slice(_)
            | Op::Concat(_)
            | Op::Pad(_)
            | Op::Select(_)
            | Op::Embedding(_)
            | Op::After(_)
    )
}
