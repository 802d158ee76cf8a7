//! The meaning of a graph: every node's `reference` in node order, in f64.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;

/// Whether intermediate values are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Everything in f64: what gradient checks need.
    Exact,
    /// Each value is rounded to its dtype after its node: what a backend should come close to.
    Rounded,
}

/// All values of one run of a graph.
#[derive(Clone, Debug)]
pub struct Evaluation {
    values: Vec<Tensor>,
}

impl Evaluation {
    /// One value.
    pub fn value(&self, value: Value) -> &Tensor {
        &self.values[value.index()]
    }

    /// The output of this name, if the graph has it.
    pub fn output(&self, graph: &Graph, name: &str) -> Option<&Tensor> {
        graph.output_named(name).map(|v| self.value(v))
    }
}

/// Runs `graph` on the inputs of these names. Updates are not carried out: the new values are read from the result.
///
/// # Errors
/// [`Error::Feed`] if an input is missing or of another type.
pub fn run(graph: &Graph, inputs: &HashMap<String, Tensor>, precision: Precision) -> Result<Evaluation> {
    let mut values: Vec<Tensor> = Vec::with_capacity(graph.value_count());
    for node in graph.nodes() {
        if let Some(input) = node.op.as_input() {
            let refuse = |found: String| Error::Feed { name: input.name.clone(), wanted: input.ty.to_string(), found };
            let given = inputs.get(&input.name).ok_or_else(|| refuse("nothing".into()))?;
            if given.ty != input.ty {
                return Err(refuse(given.ty.to_string()));
            }
            values.push(given.clone());
            continue;
        }
        let operands: Vec<&Tensor> = node.operands.iter().map(|v| &values[v.index()]).collect();
        let types: Vec<_> = node.results.iter().map(|&r| graph.ty(r).clone()).collect();
        let results = node.op.reference(&operands, &types);
        assert_eq!(results.len(), types.len(), "{}: results of the reference", node.op.name());
        for (result, ty) in results.into_iter().zip(&types) {
            assert_eq!(&result.ty, ty, "{}: type of a result of the reference", node.op.name());
            values.push(match precision {
                Precision::Exact => result,
                Precision::Rounded => result.rounded(),
            });
        }
    }
    Ok(Evaluation { values })
}
