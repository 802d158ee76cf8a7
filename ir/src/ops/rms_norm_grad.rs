//! `rms_norm_grad`: the cotangents of rms_norm's operands.
//!
//! `x [..,D], gamma f32 [D], rstd f32 [..], dy (type of x) -> dx (type of x), dgamma f32 [D]`. With `h = x rstd` and
//! `g = dy gamma`, the mean over the last axis and the sum over all rows: `dx = rstd (g - h mean(g h))`,
//! `dgamma = sum(dy h)`. No gradient.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::layer_norm::{check_norm, statistic};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The cotangents of rms_norm's operands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RmsNormGrad {}

impl Rule for RmsNormGrad {
    const NAME: &'static str = "rms_norm_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 4)?;
        check_norm(operands, 1..2)?;
        check::ty(operands, 2, &statistic(&operands[0]))?;
        check::ty(operands, 3, &operands[0])?;
        Ok(smallvec![operands[0].clone(), operands[1].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of a norm is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let [x, gamma, rstd, dy] = std::array::from_fn(|i| &operands[i].data);
        let n = results[0].shape.last();
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for r in 0..results[0].shape.rows() {
            let h: Vec<f64> = (0..n).map(|i| x[r * n + i] * rstd[r]).collect();
            let g: Vec<f64> = (0..n).map(|i| dy[r * n + i] * gamma[i]).collect();
            let mean_gh = g.iter().zip(&h).map(|(g, h)| g * h).sum::<f64>() / n as f64;
            for i in 0..n {
                out[0].data[r * n + i] = rstd[r] * (g[i] - h[i] * mean_gh);
                out[1].data[i] += dy[r * n + i] * h[i];
            }
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangents `[dx, dgamma]` of rms_norm's operands from `x`, `gamma`, the statistic and `dy`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn rms_norm_grad(&mut self, x: Value, gamma: Value, rstd: Value, dy: Value) -> Result<[Value; 2]> {
        self.push_all(RmsNormGrad {}, &[x, gamma, rstd, dy])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_gather_all_rows_and_a_scale_of_a_row_is_free() {
        // h is (1, 1) in the first row and (-1, 1) in the second; a cotangent along h cannot move x.
        let x = Tensor::f32([2, 2], vec![2.0, 2.0, -1.0, 1.0]);
        let (gamma, rstd) = (Tensor::f32([2], vec![1.0, 1.0]), Tensor::f32([2], vec![0.5, 1.0]));
        let dy = Tensor::f32([2, 2], vec![3.0, 3.0, 1.0, 2.0]);
        let operands = [&x, &gamma, &rstd, &dy];
        let types = RmsNormGrad {}.infer(&operands.map(|t| t.ty.clone())).unwrap();
        let out = RmsNormGrad {}.reference(&operands, &types);
        assert_eq!(out[0].data, [0.0, 0.0, 1.5, 1.5]);
        assert_eq!(out[1].data, [2.0, 5.0]);
        let mismatch = RmsNormGrad {}.infer(&[&x, &gamma, &gamma, &x].map(|t| t.ty.clone()));
        assert!(mismatch.is_ok(), "rows and columns agree in number here");
        let mismatch = RmsNormGrad {}.infer(&[&x, &gamma, &x, &dy].map(|t| t.ty.clone())).unwrap_err();
        assert_eq!((mismatch.operand, mismatch.wanted.as_str()), (Some(2), "f32[2]"));
    }
}
