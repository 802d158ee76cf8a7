//! Constant folding: what depends on constants only is computed by the reference, and products with one disappear.

use smallvec::smallvec;

use crate::error::Result;
use crate::graph::{Graph, Node, Value};
use crate::ops::{BinaryFn, Constant, Literal, Op};
use crate::tensor::Tensor;

/// Results with more elements than this stay computed, so that a plan does not carry large literals.
const MOST_ELEMENTS: usize = 4096;

/// The graph with constants evaluated.
///
/// # Errors
/// None on a verified graph.
pub fn fold_constants(graph: &Graph) -> Result<Graph> {
    graph.rebuild(|out, _, node, operands| {
        if let Some(value) = times_one(out, node, operands) {
            return Ok(smallvec![value]);
        }
        let Some(results) = evaluate(out, node, operands) else {
            return out.push_copy(node, operands);
        };
        let mut values = smallvec![];
        for tensor in results {
            let literal = match tensor.data.split_first() {
                Some((first, rest)) if rest.iter().all(|v| v.to_bits() == first.to_bits()) => Literal::Splat(*first),
                Some(_) | None => Literal::Dense(tensor.data),
            };
            let constant = Constant { ty: tensor.ty, literal };
            values.extend(out.push_scoped(constant.into(), &[], node.site.clone(), node.scope.clone())?);
        }
        Ok(values)
    })
}

fn constant(graph: &Graph, value: Value) -> Option<&Constant> {
    if let Op::Constant(constant) = &graph.node(graph.producer(value)).op { Some(constant) } else { None }
}

/// The other factor of a product with the constant 1, if it has the product's shape.
fn times_one(graph: &Graph, node: &Node, operands: &[Value]) -> Option<Value> {
    let Op::Binary(binary) = &node.op else { return None };
    if binary.function != BinaryFn::Mul {
        return None;
    }
    let is_one = |v: Value| constant(graph, v).is_some_and(|c| c.literal == Literal::Splat(1.0));
    let keeps = |v: Value, other: Value| {
        graph.ty(v).shape.broadcast(&graph.ty(other).shape).as_ref() == Some(&graph.ty(v).shape)
    };
    match *operands {
        [a, b] if is_one(b) && keeps(a, b) => Some(a),
        [a, b] if is_one(a) && keeps(b, a) => Some(b),
        [..] => None,
    }
}

/// The rounded results of a node whose operands are all constants; `None` if they are not, or too large.
fn evaluate(graph: &Graph, node: &Node, operands: &[Value]) -> Option<Vec<Tensor>> {
    if operands.is_empty() {
        return None;
    }
    let small = |v: Value| graph.ty(v).elements() <= MOST_ELEMENTS;
    let constants: Vec<&Constant> =
        operands.iter().map(|&v| constant(graph, v).filter(|_| small(v))).collect::<Option<_>>()?;
    let found: Vec<_> = operands.iter().map(|&v| graph.ty(v).clone()).collect();
    let types = node.op.infer(&found).ok()?;
    if types.iter().any(|t| t.elements() > MOST_ELEMENTS) {
        return None;
    }
    let tensors: Vec<Tensor> = constants.iter().map(|c| c.tensor().rounded()).collect();
    let tensors: Vec<&Tensor> = tensors.iter().collect();
    Some(node.op.reference(&tensors, &types).into_iter().map(Tensor::rounded).collect())
}
