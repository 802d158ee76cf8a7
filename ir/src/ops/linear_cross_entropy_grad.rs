//! `linear_cross_entropy_grad`: the cotangents of the operands of a linear cross entropy.
//!
//! `x [N,D], w [V,D], targets i32 [N], lse f32 [N], dloss f32 [N] -> dx, dw` (types of `x` and `w`), with `lse` as
//! [`super::LinearCrossEntropy`] gave it: with `c[n,v] = dloss[n] (exp(x[n] · w[v] - lse[n]) - [v = targets[n]])`,
//! `dx = c w` and `dw = cᵀ x`. A row with a negative target adds nothing; one with a target of V or more counts as if
//! its `dloss` were NaN. Not differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::attention::dot;
use super::embedding::index;
use super::linear_cross_entropy::per_row;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The gradient of [`super::LinearCrossEntropy`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearCrossEntropyGrad {}

impl Rule for LinearCrossEntropyGrad {
    const NAME: &'static str = "linear_cross_entropy_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 5)?;
        let row = per_row(operands)?;
        check::ty(operands, 3, &row)?;
        check::ty(operands, 4, &row)?;
        Ok(smallvec![operands[0].clone(), operands[1].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of linear_cross_entropy is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, w, targets, lse, dloss) = (operands[0], operands[1], operands[2], operands[3], operands[4]);
        let (n, v, d) = (x.ty.shape[0], w.ty.shape[0], x.ty.shape[1]);
        let (mut dx, mut dw) = (Tensor::zeros(results[0].clone()), Tensor::zeros(results[1].clone()));
        for i in 0..n {
            let target = index(targets.data[i], v);
            let dloss = match target {
                Some(_) => dloss.data[i],
                None if targets.data[i] < 0.0 => continue,
                None => f64::NAN,
            };
            let row = &x.data[i * d..(i + 1) * d];
            for j in 0..v {
                let p = (dot(row, &w.data[j * d..(j + 1) * d]) - lse.data[i]).exp();
                let c = dloss * (p - f64::from(u8::from(target == Some(j))));
                for l in 0..d {
                    dx.data[i * d + l] += c * w.data[j * d + l];
                    dw.data[j * d + l] += c * row[l];
                }
            }
        }
        vec![dx, dw]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangents `[dx, dw]` of the operands of a linear cross entropy; see [`LinearCrossEntropyGrad`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn linear_cross_entropy_grad(
        &mut self,
        x: Value,
        w: Value,
        targets: Value,
        lse: Value,
        dloss: Value,
    ) -> Result<[Value; 2]> {
        self.push_all(LinearCrossEntropyGrad {}, &[x, w, targets, lse, dloss])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(targets: [i32; 2]) -> Vec<Tensor> {
        // Both logits of a row are equal, so that every probability is a half.
        let (x, w) = (Tensor::f32([2, 1], vec![1.0, 2.0]), Tensor::f32([2, 1], vec![3.0, 3.0]));
        let lse = Tensor::f32([2], vec![3.0 + 2f64.ln(), 6.0 + 2f64.ln()]);
        let (targets, dloss) = (Tensor::i32([2], &targets), Tensor::f32([2], vec![1.0, 10.0]));
        let operands = [&x, &w, &targets, &lse, &dloss];
        let types = LinearCrossEntropyGrad {}.infer(&operands.map(|t| t.ty.clone())).unwrap();
        LinearCrossEntropyGrad {}.reference(&operands, &types)
    }

    #[test]
    fn ignored_rows_add_nothing_and_bad_targets_nan() {
        let ignored = run([1, -7]);
        let near = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-12);
        assert!(near(&ignored[0].data, &[0.0, 0.0]), "{:?}", ignored[0]);
        assert!(near(&ignored[1].data, &[0.5, -0.5]), "{:?}", ignored[1]);
        let both = run([1, 0]);
        assert!(near(&both[1].data, &[0.5 - 10.0, -0.5 + 10.0]), "{:?}", both[1]);
        let bad = run([1, 2]);
        assert!(near(&bad[0].data[..1], &[0.0]) && bad[0].data[1].is_nan(), "{:?}", bad[0]);
        assert!(bad[1].data.iter().all(|v| v.is_nan()), "{:?}", bad[1]);
    }

    #[test]
    fn the_lse_is_one_per_row() {
        let (x, w) = (TensorType::f32([2, 1]), TensorType::f32([3, 1]));
        let (targets, row) = (TensorType::i32([2]), TensorType::f32([2]));
        let refused = LinearCrossEntropyGrad {}.infer(&[x, w, targets, TensorType::f32([3]), row]).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(3), "f32[2]"));
    }
}
