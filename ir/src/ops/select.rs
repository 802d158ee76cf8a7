//! `select`: one of two values, element by element.
//!
//! `condition bool, a, b (same dtype) -> that dtype, of the shape all three broadcast to`: `a` where the condition
//! holds, else `b`. Differentiable in `a` and `b`; what is not chosen gets 0, whatever the cotangent is there.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::binary::{unbroadcast, zero_like};
use super::broadcast::{read_at, unify};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// One of two values, element by element.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Select {}

/// The dtype of the result of a select on these dtypes.
pub(super) fn result(condition: DType, a: DType, b: DType) -> Result<DType, Mismatch> {
    if condition != DType::Bool {
        return Err(Mismatch::operand(0, "bool"));
    }
    if a == b { Ok(a) } else { Err(Mismatch::operand(2, format!("{a}, the dtype of operand 1"))) }
}

/// `a` if the condition is not 0, else `b`.
pub(super) fn evaluate(condition: f64, a: f64, b: f64) -> f64 {
    if condition != 0.0 { a } else { b }
}

impl Rule for Select {
    const NAME: &'static str = "select";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 3)?;
        let dtype = result(operands[0].dtype, operands[1].dtype, operands[2].dtype)?;
        Ok(smallvec![TensorType::new(dtype, unify(operands)?)])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (condition, a, b) = (cx.operands[0], cx.operands[1], cx.operands[2]);
        let d = cx.cotangent();
        let zero = zero_like(cx.graph, d)?;
        let for_a = cx.when(1, |cx| {
            let chosen = cx.graph.select(condition, d, zero)?;
            let shape = cx.graph.ty(a).shape.clone();
            unbroadcast(cx.graph, chosen, &shape)
        })?;
        let for_b = cx.when(2, |cx| {
            let chosen = cx.graph.select(condition, zero, d)?;
            let shape = cx.graph.ty(b).shape.clone();
            unbroadcast(cx.graph, chosen, &shape)
        })?;
        Ok(smallvec![Cotangent::Zero, for_a, for_b])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let shape = &results[0].shape;
        let read = |tensor: &Tensor, i| tensor.data[read_at(i, shape, &tensor.ty.shape)];
        let choose = |i| evaluate(read(operands[0], i), read(operands[1], i), read(operands[2], i));
        vec![Tensor::new(results[0].clone(), (0..shape.elements()).map(choose).collect())]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `a` where `condition` holds, else `b`, all broadcast against each other.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the condition is no bool, the dtypes of `a` and `b` differ, or the shapes clash.
    #[track_caller]
    pub fn select(&mut self, condition: Value, a: Value, b: Value) -> Result<Value> {
        self.push_one(Select {}, &[condition, a, b])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_chosen_does_not_matter() {
        let condition = Tensor::new(TensorType::new(DType::Bool, [2, 1]), vec![1.0, 0.0]);
        let (a, b) = (Tensor::f32([2], vec![1.0, 2.0]), Tensor::f32([], vec![f64::NAN]));
        let types = Select {}.infer(&[condition.ty.clone(), a.ty.clone(), b.ty.clone()]).unwrap();
        let out = Select {}.reference(&[&condition, &a, &b], &types);
        assert_eq!((out[0].ty.to_string(), &out[0].data[..2]), ("f32[2,2]".into(), [1.0, 2.0].as_slice()));
        assert!(out[0].data[2..].iter().all(|v| v.is_nan()));
        assert_eq!(Select {}.infer(&[a.ty.clone(), a.ty.clone(), b.ty.clone()]).unwrap_err().operand, Some(0));
    }

    #[test]
    fn gradients_go_to_what_was_chosen() {
        let inputs = [Tensor::f32([3], vec![0.1, 0.2, 0.3]), Tensor::f32([2, 1], vec![0.5, -0.7])];
        check::assert_gradients(&inputs, |g, v| {
            let condition = g.constant(TensorType::new(DType::Bool, [2, 3]), vec![1.0, 0.0, 0.0, 1.0, 1.0, 0.0])?;
            g.select(condition, v[0], v[1])
        });
    }
}
