//! `linear_distillation_grad`: the cotangents of the student's operands of a linear distillation.
//!
//! `x [N,D], w [V,D], targets i32 [N], teacher_x [N,E], teacher_w [V,E], lse, soft_lse, teacher_lse, dloss, dkd (f32 [N]) -> dx,
//! dw` (types of `x` and `w`), with the `lse`s as [`super::LinearDistillation`] gave them: with `q = softmax(logits)`, and `Q` and
//! `P` the softmaxes of student and teacher at temperature T,
//! `c[n,v] = dloss[n] (q[n,v] - [v = targets[n]]) + dkd[n] T (Q[n,v] - P[n,v])`, `dx = c w` and `dw = cᵀ x`. A row with a
//! negative target adds nothing; one with a target of V or more counts as if its cotangents were NaN. Not differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::embedding::index;
use super::linear_distillation::{logits, temperature, with_teacher};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The gradient of [`super::LinearDistillation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearDistillationGrad {
    /// T, as in the forward.
    pub temperature: f32,
}

/// Adds `c w` to row `i` of `dx` and `cᵀ x` to `dw`, for the cotangents `c` of that row's logits.
pub(super) fn add_row(i: usize, c: &[f64], (x, w): (&Tensor, &Tensor), out: &mut [Tensor]) {
    let d = x.ty.shape[1];
    let row = &x.data[i * d..(i + 1) * d];
    for (j, c) in c.iter().enumerate() {
        for l in 0..d {
            out[0].data[i * d + l] += c * w.data[j * d + l];
            out[1].data[j * d + l] += c * row[l];
        }
    }
}

impl Rule for LinearDistillationGrad {
    const NAME: &'static str = "linear_distillation_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        temperature(self.temperature)?;
        check::count(operands, 10)?;
        let row = with_teacher(operands)?;
        (5..10).try_for_each(|i| check::ty(operands, i, &row))?;
        Ok(smallvec![operands[0].clone(), operands[1].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of linear_distillation is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, w, targets) = (operands[0], operands[1], operands[2]);
        let (n, v, t) = (x.ty.shape[0], w.ty.shape[0], f64::from(self.temperature));
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for i in 0..n {
            let target = index(targets.data[i], v);
            let [lse, soft, of_teacher, dloss, dkd] = [5, 6, 7, 8, 9].map(|o| operands[o].data[i]);
            let (dloss, dkd) = match target {
                Some(_) => (dloss, dkd),
                None if targets.data[i] < 0.0 => continue,
                None => (f64::NAN, f64::NAN),
            };
            let (student, teacher) = (logits(x, w, i), logits(operands[3], operands[4], i));
            let c = |j: usize| {
                let hard = (student[j] - lse).exp() - f64::from(u8::from(target == Some(j)));
                dloss * hard + dkd * t * ((student[j] / t - soft).exp() - (teacher[j] / t - of_teacher).exp())
            };
            add_row(i, &(0..v).map(c).collect::<Vec<_>>(), (x, w), &mut out);
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangents `[dx, dw]` of the student of a linear distillation; `lse` and `cotangents` are `[lse, soft_lse, teacher_lse]`
    /// and `[dloss, dkd]`; see [`LinearDistillationGrad`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn linear_distillation_grad(
        &mut self,
        [x, w]: [Value; 2],
        targets: Value,
        [teacher_x, teacher_w]: [Value; 2],
        lse: [Value; 3],
        [dloss, dkd]: [Value; 2],
        temperature: f32,
    ) -> Result<[Value; 2]> {
        let operands = [x, w, targets, teacher_x, teacher_w, lse[0], lse[1], lse[2], dloss, dkd];
        self.push_all(LinearDistillationGrad { temperature }, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_rows_add_nothing_and_bad_targets_nan() {
        let op = LinearDistillationGrad { temperature: 1.0 };
        // The student is even; the teacher is sure of class 0 by a factor of e.
        let (x, w) = (Tensor::f32([2, 1], vec![1.0, 2.0]), Tensor::f32([2, 1], vec![3.0, 3.0]));
        let (teacher_x, teacher_w) = (Tensor::f32([2, 1], vec![1.0, 1.0]), Tensor::f32([2, 1], vec![1.0, 0.0]));
        let lse = Tensor::f32([2], vec![3.0 + 2f64.ln(), 6.0 + 2f64.ln()]);
        let e = 1f64.exp();
        let of_teacher = Tensor::f32([2], vec![(1.0 + e).ln(); 2]);
        let (dloss, dkd) = (Tensor::f32([2], vec![1.0, 10.0]), Tensor::f32([2], vec![4.0, 4.0]));
        let run = |targets: [i32; 2]| {
            let targets = Tensor::i32([2], &targets);
            let operands = [&x, &w, &targets, &teacher_x, &teacher_w, &lse, &lse, &of_teacher, &dloss, &dkd];
            let types = op.infer(&operands.map(|t| t.ty.clone())).unwrap();
            op.reference(&operands, &types)
        };
        let ignored = run([1, -7]);
        let c = 0.5 + 4.0 * (0.5 - e / (1.0 + e));
        assert!((ignored[1].data[0] - c).abs() < 1e-12 && (ignored[1].data[1] + c).abs() < 1e-12, "{:?}", ignored[1]);
        assert!(ignored[0].data.iter().all(|d| d.abs() < 1e-12), "{:?}", ignored[0]);
        let bad = run([1, 2]);
        assert!(bad[0].data[1].is_nan() && bad[1].data.iter().all(|v| v.is_nan()), "{bad:?}");
    }

    #[test]
    fn there_is_an_lse_for_each_row() {
        let op = LinearDistillationGrad { temperature: 1.0 };
        let (x, w, row) = (TensorType::f32([2, 1]), TensorType::f32([3, 1]), TensorType::f32([2]));
        let mut types = vec![x.clone(), w.clone(), TensorType::i32([2]), x, w];
        types.extend(vec![row; 5]);
        types[7] = TensorType::f32([3]);
        let refused = op.infer(&types).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(7), "f32[2]"));
    }
}
