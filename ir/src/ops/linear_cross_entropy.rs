//! `linear_cross_entropy`: a linear classifier and its cross entropy, without ever holding all its logits.
//!
//! `x [N,D], w [V,D] (same dtype), targets i32 [N] -> loss f32 [N], lse f32 [N]` with `logits = x wᵀ`,
//! `lse[n] = ln sum_v exp logits[n,v]` and `loss[n] = lse[n] - logits[n, targets[n]]`, in nats. A negative target is
//! ignored: loss 0 (its `lse` is still that of the row). A target of V or more gives NaN. Differentiable in `x` and `w`
//! through `loss`; `lse` is kept for [`super::LinearCrossEntropyGrad`] and carries no gradient.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::attention::dot;
use super::embedding::index;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Cross entropy of a linear classifier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearCrossEntropy {}

/// Operands 0, 1 and 2 are `x [N,D]`, `w [V,D]` and `targets i32 [N]`; gives the type of one f32 per row.
pub(super) fn per_row(operands: &[TensorType]) -> Result<TensorType, Mismatch> {
    check::rank(operands, 0, 2)?;
    check::float(operands, 0)?;
    check::rank(operands, 1, 2)?;
    check::dtype(operands, 1, operands[0].dtype)?;
    let (x, w) = (&operands[0].shape, &operands[1].shape);
    if w[0] == 0 || w[1] != x[1] {
        return Err(Mismatch::operand(1, format!("[V,{}] with V at least 1, as operand 0 has {0} columns", x[1])));
    }
    check::ty(operands, 2, &TensorType::i32([x[0]]))?;
    Ok(TensorType::f32([x[0]]))
}

impl Rule for LinearCrossEntropy {
    const NAME: &'static str = "linear_cross_entropy";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 3)?;
        let row = per_row(operands)?;
        Ok(smallvec![row.clone(), row])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        if cx.cotangents[1].is_some() {
            return cx.refuse(Self::NAME, "its lse carries no gradient");
        }
        let (x, w, targets) = (cx.operands[0], cx.operands[1], cx.operands[2]);
        let (lse, d) = (cx.results[1], cx.cotangent());
        let [dx, dw] = cx.graph.linear_cross_entropy_grad(x, w, targets, lse, d)?;
        Ok(smallvec![Cotangent::Value(dx), Cotangent::Value(dw), Cotangent::Zero])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, w, targets) = (operands[0], operands[1], operands[2]);
        let (n, v, d) = (x.ty.shape[0], w.ty.shape[0], x.ty.shape[1]);
        let (mut loss, mut lse) = (Tensor::zeros(results[0].clone()), Tensor::zeros(results[1].clone()));
        for i in 0..n {
            let row = &x.data[i * d..(i + 1) * d];
            let logits: Vec<f64> = (0..v).map(|j| dot(row, &w.data[j * d..(j + 1) * d])).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            lse.data[i] = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
            loss.data[i] = match index(targets.data[i], v) {
                Some(target) => lse.data[i] - logits[target],
                None if targets.data[i] < 0.0 => 0.0,
                None => f64::NAN,
            };
        }
        vec![loss, lse]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The loss f32 `[N]` of `x [N,D]` classified by `w [V,D]` against `targets` i32 `[N]`; see [`LinearCrossEntropy`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn linear_cross_entropy(&mut self, x: Value, w: Value, targets: Value) -> Result<Value> {
        self.push_all::<2>(LinearCrossEntropy {}, &[x, w, targets]).map(|[loss, _]| loss)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, gradients};

    #[test]
    fn equal_logits_cost_ln_v_and_odd_targets_nothing_or_nan() {
        let x = Tensor::f32([4, 1], vec![0.0, 1.0, 5.0, 0.0]);
        let w = Tensor::f32([2, 1], vec![1.0, 1.0]);
        let targets = Tensor::i32([4], &[0, 1, -1, 2]);
        let operands = [&x, &w, &targets];
        let types = LinearCrossEntropy {}.infer(&operands.map(|t| t.ty.clone())).unwrap();
        let out = LinearCrossEntropy {}.reference(&operands, &types);
        let ln2 = 2f64.ln();
        assert!((out[0].data[0] - ln2).abs() < 1e-15 && (out[0].data[1] - ln2).abs() < 1e-15, "{:?}", out[0]);
        assert!(out[0].data[2] == 0.0 && out[0].data[3].is_nan(), "{:?}", out[0]);
        assert!((out[1].data[2] - (5.0 + ln2)).abs() < 1e-15, "{:?}", out[1]);
        let refused = LinearCrossEntropy {}.infer(&[x.ty, TensorType::f32([2, 3]), targets.ty]).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.starts_with("[V,1]")), (Some(1), true));
    }

    #[test]
    fn gradients_agree_with_differences_and_lse_has_none() {
        let x = Tensor::f32([3, 2], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        let w = Tensor::f32([4, 2], vec![0.3, 0.2, -0.9, 1.1, 0.4, -0.6, 0.8, 0.5]);
        let (x_ty, w_ty) = (x.ty.clone(), w.ty.clone());
        check::assert_gradients(&[x, w], |g, v| {
            let targets = g.constant(TensorType::i32([3]), vec![3.0, -1.0, 0.0])?;
            g.linear_cross_entropy(v[0], v[1], targets)
        });
        let mut g = Graph::new();
        let (x, w) = (g.parameter("x", x_ty).unwrap(), g.parameter("w", w_ty).unwrap());
        let targets = g.feed("targets", TensorType::i32([3])).unwrap();
        let [_, lse] = g.push_all(LinearCrossEntropy {}, &[x, w, targets]).unwrap();
        let loss = g.sum_all(lse).unwrap();
        let error = gradients(&mut g, loss, &[w]).unwrap_err();
        assert!(matches!(error, Error::NotDifferentiable { op: "linear_cross_entropy", operand: 1, .. }), "{error}");
    }
}
