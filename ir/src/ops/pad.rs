//! `pad`: zeros before and after, on one axis.
//!
//! `x -> y` with `before` zeros in front of and `after` zeros behind axis `axis`. Any dtype. Differentiable: the middle.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::slice::{around, with_extent};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Zeros before and after, on one axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pad {
    /// The axis.
    pub axis: usize,
    /// How many zeros in front.
    pub before: usize,
    /// How many zeros behind.
    pub after: usize,
}

impl Rule for Pad {
    const NAME: &'static str = "pad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        check::axis(operands, 0, self.axis)?;
        let x = &operands[0];
        let extent = x.shape[self.axis].checked_add(self.before).and_then(|n| n.checked_add(self.after));
        let Some(extent) = extent else {
            return Err(Mismatch::op(format!("an extent that can be counted, not + {} + {}", self.before, self.after)));
        };
        Ok(smallvec![TensorType::new(x.dtype, with_extent(&x.shape, self.axis, extent))])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let extent = cx.graph.shape(cx.operands[0])[self.axis];
        let d = cx.cotangent();
        Ok(smallvec![Cotangent::Value(cx.graph.slice(d, self.axis, self.before, extent)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let x = operands[0];
        let (outer, inner) = around(&x.ty.shape, self.axis);
        let (extent, padded) = (x.ty.shape[self.axis], results[0].shape[self.axis]);
        let mut out = Tensor::zeros(results[0].clone());
        for o in 0..outer {
            for j in 0..extent {
                for i in 0..inner {
                    out.data[(o * padded + self.before + j) * inner + i] = x.data[(o * extent + j) * inner + i];
                }
            }
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `x` with zeros before and after, on one axis.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `x` has no such axis.
    #[track_caller]
    pub fn pad(&mut self, x: Value, axis: usize, before: usize, after: usize) -> Result<Value> {
        self.push_one(Pad { axis, before, after }, &[x])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_go_around_each_row() {
        let x = Tensor::f32([2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        let op = Pad { axis: 1, before: 1, after: 2 };
        let types = op.infer(std::slice::from_ref(&x.ty)).unwrap();
        let out = op.reference(&[&x], &types);
        assert_eq!(out[0].data, [0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0]);
        check::assert_gradients(&[x], |g, v| g.pad(v[0], 0, 2, 1));
        assert!(Pad { axis: 0, before: usize::MAX, after: 0 }.infer(&types).is_err());
        assert_eq!(Pad { axis: 2, before: 0, after: 0 }.infer(&types).unwrap_err().operand, Some(0));
    }
}
