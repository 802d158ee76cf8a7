//! `layer_norm_grad`: the cotangents of layer_norm's operands.
//!
//! `x [..,D], gamma f32 [D], mean f32 [..], rstd f32 [..], dy (type of x) -> dx (type of x), dgamma f32 [D], dbeta f32 [D]`.
//! With `h = (x - mean) rstd` and `g = dy gamma`, means over the last axis and sums over all rows:
//! `dx = rstd (g - mean(g) - h mean(g h))`, `dgamma = sum(dy h)`, `dbeta = sum(dy)`. No gradient.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::layer_norm::{check_norm, statistic};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The cotangents of layer_norm's operands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNormGrad {}

impl Rule for LayerNormGrad {
    const NAME: &'static str = "layer_norm_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 5)?;
        check_norm(operands, 1..2)?;
        let row = statistic(&operands[0]);
        check::ty(operands, 2, &row)?;
        check::ty(operands, 3, &row)?;
        check::ty(operands, 4, &operands[0])?;
        Ok(smallvec![operands[0].clone(), operands[1].clone(), operands[1].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of a norm is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let [x, gamma, mean, rstd, dy] = std::array::from_fn(|i| &operands[i].data);
        let n = results[0].shape.last();
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for r in 0..results[0].shape.rows() {
            let h: Vec<f64> = (0..n).map(|i| (x[r * n + i] - mean[r]) * rstd[r]).collect();
            let g: Vec<f64> = (0..n).map(|i| dy[r * n + i] * gamma[i]).collect();
            let mean_g = g.iter().sum::<f64>() / n as f64;
            let mean_gh = g.iter().zip(&h).map(|(g, h)| g * h).sum::<f64>() / n as f64;
            for i in 0..n {
                out[0].data[r * n + i] = rstd[r] * (g[i] - mean_g - h[i] * mean_gh);
                out[1].data[i] += dy[r * n + i] * h[i];
                out[2].data[i] += dy[r * n + i];
            }
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangents `[dx, dgamma, dbeta]` of layer_norm's operands from `x`, `gamma`, the two statistics and `dy`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn layer_norm_grad(
        &mut self,
        x: Value,
        gamma: Value,
        mean: Value,
        rstd: Value,
        dy: Value,
    ) -> Result<[Value; 3]> {
        self.push_all(LayerNormGrad {}, &[x, gamma, mean, rstd, dy])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_gather_all_rows_and_a_shift_of_a_row_is_free() {
        // Both rows have h = (-1, 1); a cotangent that is constant in a row cannot move x.
        let x = Tensor::f32([2, 2], vec![1.0, 3.0, -4.0, 0.0]);
        let gamma = Tensor::f32([2], vec![1.0, 1.0]);
        let (mean, rstd) = (Tensor::f32([2], vec![2.0, -2.0]), Tensor::f32([2], vec![1.0, 0.5]));
        let dy = Tensor::f32([2, 2], vec![5.0, 5.0, 1.0, 2.0]);
        let operands = [&x, &gamma, &mean, &rstd, &dy];
        let types = LayerNormGrad {}.infer(&operands.map(|t| t.ty.clone())).unwrap();
        let out = LayerNormGrad {}.reference(&operands, &types);
        assert_eq!(out[0].data, [0.0, 0.0, 0.0, 0.0]);
        assert_eq!((&out[1].data[..], &out[2].data[..]), ([-6.0, 7.0].as_slice(), [6.0, 7.0].as_slice()));
    }

    #[test]
    fn a_statistic_of_another_shape_is_refused() {
        let (x, d, rows) = (TensorType::f32([4, 3]), TensorType::f32([3]), TensorType::f32([4]));
        let operands = [x.clone(), d.clone(), rows, d, x];
        let mismatch = LayerNormGrad {}.infer(&operands).unwrap_err();
        assert_eq!((mismatch.operand, mismatch.wanted.as_str()), (Some(3), "f32[4]"));
    }
}
