//! `layer_norm`: each row at mean 0 and variance 1, then scaled and shifted (Ba et al., arXiv 1607.06450).
//!
//! `x [..,D] float, gamma f32 [D], beta f32 [D] -> y (type of x), mean f32 [..], rstd f32 [..]` with
//! `rstd = 1/sqrt(mean((x - mean)^2) + eps)`, `y = (x - mean) rstd gamma + beta`. Differentiable in all three operands
//! through `y`; the statistics are kept for [`super::LayerNormGrad`] and carry no gradient.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// Layer normalisation over the last axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
}

/// The type of one f32 statistic per row of `x [..,D]`.
pub(super) fn statistic(x: &TensorType) -> TensorType {
    TensorType::f32(Shape::from(&x.shape[..x.shape.len() - 1]))
}

/// Operand 0 is a float `x [..,D]` and the `weights` operands are f32 `[D]`.
pub(super) fn check_norm(operands: &[TensorType], weights: std::ops::Range<usize>) -> Result<(), Mismatch> {
    check::float(operands, 0)?;
    check::last_axis(operands, 0)?;
    let weight = TensorType::f32([operands[0].shape.last()]);
    weights.into_iter().try_for_each(|i| check::ty(operands, i, &weight))
}

impl Rule for LayerNorm {
    const NAME: &'static str = "layer_norm";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 3)?;
        check::eps(self.eps)?;
        check_norm(operands, 1..3)?;
        let row = statistic(&operands[0]);
        Ok(smallvec![operands[0].clone(), row.clone(), row])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        if cx.cotangents[1..].iter().any(Option::is_some) {
            return cx.refuse(Self::NAME, "its mean and rstd carry no gradient");
        }
        let (x, gamma, mean, rstd) = (cx.operands[0], cx.operands[1], cx.results[1], cx.results[2]);
        let d = cx.cotangent();
        Ok(cx.graph.layer_norm_grad(x, gamma, mean, rstd, d)?.map(Cotangent::Value).into_iter().collect())
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, gamma, beta) = (operands[0], operands[1], operands[2]);
        let n = x.ty.shape.last();
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for (r, row) in x.data.chunks(n).enumerate() {
            let mean = row.iter().sum::<f64>() / n as f64;
            let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n as f64;
            let rstd = 1.0 / (variance + f64::from(self.eps)).sqrt();
            for i in 0..n {
                out[0].data[r * n + i] = (row[i] - mean) * rstd * gamma.data[i] + beta.data[i];
            }
            out[1].data[r] = mean;
            out[2].data[r] = rstd;
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Layer normalisation of `x [..,D]` with `gamma` and `beta` f32 `[D]`; returns `y`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit or `eps` is negative or not finite.
    #[track_caller]
    pub fn layer_norm(&mut self, x: Value, gamma: Value, beta: Value, eps: f32) -> Result<Value> {
        self.push_all::<3>(LayerNorm { eps }, &[x, gamma, beta]).map(|[y, _, _]| y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::{DType, gradients};

    #[test]
    fn rows_are_normalised_one_by_one() {
        let x = Tensor::f32([2, 2], vec![1.0, 3.0, 5.0, 5.0]);
        let (gamma, beta) = (Tensor::f32([2], vec![2.0, 10.0]), Tensor::f32([2], vec![0.5, 0.0]));
        let op = LayerNorm { eps: 0.25 };
        let types = op.infer(&[x.ty.clone(), gamma.ty.clone(), beta.ty.clone()]).unwrap();
        let out = op.reference(&[&x, &gamma, &beta], &types);
        let rstd = 1.0 / 1.25f64.sqrt();
        assert_eq!(out[0].data, [0.5 - rstd * 2.0, rstd * 10.0, 0.5, 0.0]);
        assert_eq!((&out[1].data[..], &out[2].data[..]), ([2.0, 5.0].as_slice(), [rstd, 2.0].as_slice()));
        let bf16 = [TensorType::new(DType::Bf16, [4]), TensorType::f32([4]), TensorType::f32([4])];
        assert_eq!(op.infer(&bf16).unwrap()[1], TensorType::f32([]));
        assert_eq!(op.infer(&[x.ty.clone(), gamma.ty.clone(), x.ty.clone()]).unwrap_err().operand, Some(2));
        assert!(LayerNorm { eps: f32::NAN }.infer(&bf16).unwrap_err().wanted.contains("eps"));
    }

    #[test]
    fn gradients_agree_with_differences_and_statistics_have_none() {
        let x = Tensor::f32([2, 3], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        let (gamma, beta) = (Tensor::f32([3], vec![1.2, 0.8, -0.5]), Tensor::f32([3], vec![0.1, 0.2, 0.3]));
        check::assert_gradients(&[x.clone(), gamma, beta], |g, v| g.layer_norm(v[0], v[1], v[2], 1e-3));

        let mut g = Graph::new();
        let x = g.parameter("x", x.ty).unwrap();
        let ones = g.splat(TensorType::f32([3]), 1.0).unwrap();
        let [_, mean, _] = g.push_all(LayerNorm { eps: 1e-3 }, &[x, ones, ones]).unwrap();
        let loss = g.sum_all(mean).unwrap();
        let error = gradients(&mut g, loss, &[x]).unwrap_err();
        assert!(matches!(error, Error::NotDifferentiable { op: "layer_norm", operand: 0, .. }), "{error}");
    }
}
