//! `softmax`: `y_i = e^(x_i) / sum_j e^(x_j)` over the last axis.
//!
//! `x [..,D] float -> same type`. The maximum is subtracted first, so nothing overflows; a row of -inf only is NaN.
//! Differentiable in `x` by [`super::SoftmaxGrad`].

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Softmax over the last axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Softmax {}

impl Rule for Softmax {
    const NAME: &'static str = "softmax";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        check::float(operands, 0)?;
        check::last_axis(operands, 0)?;
        Ok(smallvec![operands[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (y, d) = (cx.results[0], cx.cotangent());
        Ok(smallvec![Cotangent::Value(cx.graph.softmax_grad(y, d)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let mut data = Vec::with_capacity(operands[0].data.len());
        for row in operands[0].data.chunks(results[0].shape.last()) {
            let max = row.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
            let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
            data.extend(row.iter().map(|v| (v - max).exp() / sum));
        }
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Softmax of `x [..,D]` over the last axis.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `x` is no float or has no last axis.
    #[track_caller]
    pub fn softmax(&mut self, x: Value) -> Result<Value> {
        self.push_one(Softmax {}, &[x])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_and_masked_scores_are_safe() {
        let x = Tensor::f32([2, 2], vec![1000.0, 1000.0 + 3f64.ln(), 5.0, f64::NEG_INFINITY]);
        let out = Softmax {}.reference(&[&x], std::slice::from_ref(&x.ty));
        for (got, wanted) in out[0].data.iter().zip([0.25, 0.75, 1.0, 0.0]) {
            assert!((got - wanted).abs() < 1e-12, "{:?}", out[0].data);
        }
        assert!(Softmax {}.infer(&[TensorType::f32([])]).is_err());
        assert!(Softmax {}.infer(&[TensorType::f32([3, 0])]).unwrap_err().wanted.contains("last axis"));
    }

    #[test]
    fn the_gradient_agrees_with_differences() {
        let x = Tensor::f32([2, 3], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        check::assert_gradients(&[x], |g, v| g.softmax(v[0]));
    }
}
