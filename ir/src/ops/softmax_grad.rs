//! `softmax_grad`: the cotangent of softmax's operand.
//!
//! `y [..,D] (the result of softmax), dy (same type) -> dx = y (dy - sum(dy y))`, the sum over the last axis. No gradient:
//! no op of the set needs it.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The cotangent of softmax's operand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftmaxGrad {}

impl Rule for SoftmaxGrad {
    const NAME: &'static str = "softmax_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        check::float(operands, 0)?;
        check::last_axis(operands, 0)?;
        check::ty(operands, 1, &operands[0])?;
        Ok(smallvec![operands[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of softmax is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let d = results[0].shape.last();
        let mut data = Vec::with_capacity(operands[0].data.len());
        for (y, dy) in operands[0].data.chunks(d).zip(operands[1].data.chunks(d)) {
            let sum: f64 = y.iter().zip(dy).map(|(y, dy)| y * dy).sum();
            data.extend(y.iter().zip(dy).map(|(y, dy)| y * (dy - sum)));
        }
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangent of softmax's operand from its result `y [..,D]` and that result's cotangent.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the two differ in type, or `y` is no float or has no last axis.
    #[track_caller]
    pub fn softmax_grad(&mut self, y: Value, dy: Value) -> Result<Value> {
        self.push_one(SoftmaxGrad {}, &[y, dy])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_cotangent_changes_nothing() {
        let y = Tensor::f32([2, 2], vec![0.25, 0.75, 0.5, 0.5]);
        let dy = Tensor::f32([2, 2], vec![3.0, 3.0, 1.0, 2.0]);
        let out = SoftmaxGrad {}.reference(&[&y, &dy], std::slice::from_ref(&y.ty));
        assert_eq!(out[0].data, [0.0, 0.0, -0.25, 0.25]);
        let mismatch = SoftmaxGrad {}.infer(&[y.ty, TensorType::f32([2, 3])]).unwrap_err();
        assert_eq!((mismatch.operand, mismatch.wanted.as_str()), (Some(1), "f32[2,2]"));
    }
}
