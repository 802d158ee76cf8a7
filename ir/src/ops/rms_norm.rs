//! `rms_norm`: each row divided by its root mean square, then scaled (Zhang and Sennrich, arXiv 1910.07467).
//!
//! `x [..,D] float, gamma f32 [D] -> y (type of x), rstd f32 [..]` with `rstd = 1/sqrt(mean(x^2) + eps)`,
//! `y = x rstd gamma`. Differentiable in both operands through `y`; the statistic is kept for [`super::RmsNormGrad`] and
//! carries no gradient.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::layer_norm::{check_norm, statistic};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Root mean square normalisation over the last axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f32,
}

impl Rule for RmsNorm {
    const NAME: &'static str = "rms_norm";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        check::eps(self.eps)?;
        check_norm(operands, 1..2)?;
        Ok(smallvec![operands[0].clone(), statistic(&operands[0])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        if cx.cotangents[1].is_some() {
            return cx.refuse(Self::NAME, "its rstd carries no gradient");
        }
        let (x, gamma, rstd) = (cx.operands[0], cx.operands[1], cx.results[1]);
        let d = cx.cotangent();
        Ok(cx.graph.rms_norm_grad(x, gamma, rstd, d)?.map(Cotangent::Value).into_iter().collect())
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, gamma) = (operands[0], operands[1]);
        let n = x.ty.shape.last();
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for (r, row) in x.data.chunks(n).enumerate() {
            let square = row.iter().map(|v| v * v).sum::<f64>() / n as f64;
            let rstd = 1.0 / (square + f64::from(self.eps)).sqrt();
            for i in 0..n {
                out[0].data[r * n + i] = row[i] * rstd * gamma.data[i];
            }
            out[1].data[r] = rstd;
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Root mean square normalisation of `x [..,D]` with `gamma` f32 `[D]`; returns `y`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit or `eps` is negative or not finite.
    #[track_caller]
    pub fn rms_norm(&mut self, x: Value, gamma: Value, eps: f32) -> Result<Value> {
        self.push_all::<2>(RmsNorm { eps }, &[x, gamma]).map(|[y, _]| y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_zeros_stays_and_others_get_unit_mean_square() {
        let x = Tensor::f32([2, 2], vec![0.0, 0.0, 0.5, 0.5]);
        let gamma = Tensor::f32([2], vec![1.0, 2.0]);
        let op = RmsNorm { eps: 0.0 };
        let types = op.infer(&[x.ty.clone(), gamma.ty.clone()]).unwrap();
        let out = op.reference(&[&Tensor::f32([2, 2], vec![2.0, -2.0, 0.5, 0.5]), &gamma], &types);
        assert_eq!((&out[0].data[..], &out[1].data[..]), ([1.0, -2.0, 1.0, 2.0].as_slice(), [0.5, 2.0].as_slice()));
        let out = RmsNorm { eps: 0.25 }.reference(&[&x, &gamma], &types);
        assert_eq!((&out[0].data[..2], out[1].data[0]), ([0.0, 0.0].as_slice(), 2.0));
        assert!(RmsNorm { eps: -1.0 }.infer(&[x.ty.clone(), gamma.ty]).is_err());
        assert_eq!(op.infer(&[x.ty.clone(), x.ty]).unwrap_err().wanted, "f32[2]");
    }

    #[test]
    fn gradients_agree_with_differences() {
        let x = Tensor::f32([2, 1, 3], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        let gamma = Tensor::f32([3], vec![1.2, 0.8, -0.5]);
        check::assert_gradients(&[x, gamma], |g, v| g.rms_norm(v[0], v[1], 1e-3));
    }
}
