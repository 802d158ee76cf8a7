//! `linear_distillation_cached_grad`: the cotangents of the student's operands of a cached linear distillation.
//!
//! `x [N,D], w [V,D], targets i32 [N], ids i32 [N,K], log_p f32 [N,K], log_tail f32 [N], lse, soft_lse, tail_lse, dloss, dkd (f32
//! [N]) -> dx, dw` (types of `x` and `w`), with the `lse`s as [`super::LinearDistillationCached`] gave them. With
//! `q = softmax(logits)`, `Q` the same at temperature T and `s` the sum of all of the teacher's probabilities (1 but for their
//! rounding), `c[n,v] = dloss[n] (q[n,v] - [v = targets[n]]) + dkd[n] T (s[n] Q[n,v] - P[n,v])`, where `P` is `p_k` of a kept token
//! and `p_tail exp(logits / T - tail_lse)` of another: the tail's probability is shared out as the student does. `dx = c w` and
//! `dw = cᵀ x`. A row with a negative target adds nothing; one with a target or id that is no token counts as if its cotangents
//! were NaN. Not differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::embedding::index;
use super::linear_distillation::{logits, temperature};
use super::linear_distillation_cached::{Kept, with_kept};
use super::linear_distillation_grad::add_row;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The gradient of [`super::LinearDistillationCached`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearDistillationCachedGrad {
    /// T, as in the forward.
    pub temperature: f32,
}

impl Rule for LinearDistillationCachedGrad {
    const NAME: &'static str = "linear_distillation_cached_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        temperature(self.temperature)?;
        check::count(operands, 11)?;
        let row = with_kept(operands)?;
        (6..11).try_for_each(|i| check::ty(operands, i, &row))?;
        Ok(smallvec![operands[0].clone(), operands[1].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of linear_distillation_cached is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, w, targets) = (operands[0], operands[1], operands[2]);
        let (n, v, t) = (x.ty.shape[0], w.ty.shape[0], f64::from(self.temperature));
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for i in 0..n {
            let target = index(targets.data[i], v);
            let [lse, soft, tail, dloss, dkd] = [6, 7, 8, 9, 10].map(|o| operands[o].data[i]);
            if targets.data[i] < 0.0 {
                continue;
            }
            let kept = Kept::of(operands, i).filter(|_| target.is_some());
            let student = logits(x, w, i);
            let c: Vec<f64> = match kept {
                None => vec![f64::NAN; v],
                Some(kept) => {
                    let all = kept.p.iter().flatten().sum::<f64>() + kept.tail;
                    let of = |j: usize| {
                        let hard = (student[j] - lse).exp() - f64::from(u8::from(target == Some(j)));
                        let share = || if kept.tail == 0.0 { 0.0 } else { kept.tail * (student[j] / t - tail).exp() };
                        let p = kept.p[j].unwrap_or_else(share);
                        dloss * hard + dkd * t * (all * (student[j] / t - soft).exp() - p)
                    };
                    (0..v).map(of).collect()
                }
            };
            add_row(i, &c, (x, w), &mut out);
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangents `[dx, dw]` of the student of a cached linear distillation; `kept`, `lse` and `cotangents` are `[ids, log_p,
    /// log_tail]`, `[lse, soft_lse, tail_lse]` and `[dloss, dkd]`; see [`LinearDistillationCachedGrad`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn linear_distillation_cached_grad(
        &mut self,
        [x, w]: [Value; 2],
        targets: Value,
        kept: [Value; 3],
        lse: [Value; 3],
        [dloss, dkd]: [Value; 2],
        temperature: f32,
    ) -> Result<[Value; 2]> {
        let operands = [x, w, targets, kept[0], kept[1], kept[2], lse[0], lse[1], lse[2], dloss, dkd];
        self.push_all(LinearDistillationCachedGrad { temperature }, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_shared_out_as_the_student_does_and_bad_ids_give_nan() {
        let op = LinearDistillationCachedGrad { temperature: 1.0 };
        // Four even logits, one kept: the tail's three share its probability evenly.
        let (x, w) = (Tensor::f32([1, 1], vec![1.0]), Tensor::f32([4, 1], vec![0.0; 4]));
        let row = |v: f64| Tensor::f32([1], vec![v]);
        let run = |target: i32, id: i32| {
            let (targets, ids) = (Tensor::i32([1], &[target]), Tensor::i32([1, 1], &[id]));
            let log_p = Tensor::f32([1, 1], vec![0.7f64.ln()]);
            let (tail, lse, of_tail) = (row(0.3f64.ln()), row(4f64.ln()), row(3f64.ln()));
            let (dloss, dkd) = (row(0.0), row(2.0));
            let operands = [&x, &w, &targets, &ids, &log_p, &tail, &lse, &lse, &of_tail, &dloss, &dkd];
            let types = op.infer(&operands.map(|t| t.ty.clone())).unwrap();
            op.reference(&operands, &types)
        };
        let dw = &run(0, 2)[1].data;
        let near = |got: f64, want: f64| (got - want).abs() < 1e-12;
        assert!(near(dw[2], 2.0 * (0.25 - 0.7)) && near(dw[0], 2.0 * (0.25 - 0.1)), "{dw:?}");
        assert!(run(0, 4)[1].data.iter().all(|v| v.is_nan()) && run(4, 0)[1].data.iter().all(|v| v.is_nan()));
        assert_eq!(run(-1, 4)[1].data, [0.0; 4]);
    }

    #[test]
    fn what_is_kept_fits_the_rows() {
        let op = LinearDistillationCachedGrad { temperature: 1.0 };
        let (x, w, row) = (TensorType::f32([2, 1]), TensorType::f32([3, 1]), TensorType::f32([2]));
        let mut types = vec![x, w, TensorType::i32([2]), TensorType::i32([2, 2]), TensorType::f32([2, 3])];
        types.extend(vec![row; 6]);
        let refused = op.infer(&types).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(4), "f32[2,2]"));
    }
}
