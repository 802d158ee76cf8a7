//! How far the roundings of a dtype alone move what a graph computes, measured on the graph and the data of a case.
//!
//! The graph is run by the reference in f64, once as it is and a few times with every number that a node computes moved at random
//! by at most half a unit in the last place of its dtype, as a rounding would (Monte Carlo arithmetic: Parker, "Monte Carlo
//! Arithmetic: exploiting randomness in floating-point arithmetic", UCLA CSD-970002, 1997). Where large terms cancel that is
//! much of the little that is left, for DeepSpeed's own numbers as for ours. A wrong formula has no part in it: it is compared
//! with itself.

use std::collections::HashMap;

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
            for (place, result) in results.iter_mut().enumerate() {
                let half = ulp(result.ty.dtype) / 2.0;
                let stream = (4 * number + place) as u32;
                for (i, v) in result.data.iter_mut().enumerate() {
                    let by = 2.0 * f64::from(philox::uniform([draw, 0], stream, i as u64)) - 1.0;
                    *v += *v * half * by;
                }
            }
        }
        values.extend(results);
    }
    Ok(graph.outputs().iter().map(|(name, value)| (name.clone(), values[value.index()].data.clone())).collect())
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
