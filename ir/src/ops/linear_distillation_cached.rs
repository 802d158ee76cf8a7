//! `linear_distillation_cached`: [`super::LinearDistillation`] with a teacher of whom only the likeliest tokens are known.
//!
//! `x [N,D], w [V,D], targets i32 [N], ids i32 [N,K], log_p f32 [N,K], log_tail f32 [N] -> loss, kd, lse, soft_lse, tail_lse` (f32
//! `[N]`). `ids[n]` are K different tokens, `log_p` the teacher's log-probabilities of them at temperature T and `log_tail` the
//! logarithm of the probability of all others together (-inf for none). With `q = softmax(logits / T)` and the others as one
//! bucket, `q_tail = sum of q over the tokens that are not in ids[n]`:
//! `kd[n] = T² (sum_k p_k (ln p_k - ln q_k) + p_tail (ln p_tail - ln q_tail))`, where a probability of 0 adds 0. It is exact for
//! the kept tokens and never above the full divergence: joining tokens cannot tell two distributions further apart. `tail_lse` is
//! the `ln sum exp(logits / T)` of the tokens that are not kept (-inf for none), so that `q_tail` needs no difference. Ignored
//! rows, targets, gradients and the other results are as of [`super::LinearDistillation`]; an id that is no token makes `kd` NaN.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::embedding::index;
use super::linear_cross_entropy::per_row;
use super::linear_distillation::{logits, losses, lse, row_cotangents, temperature};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Cross entropy of a linear classifier and its divergence from what is kept of a teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearDistillationCached {
    /// T, at which `log_p` was taken. Finite and above 0.
    pub temperature: f32,
}

/// Operands 0 to 5 are those of [`LinearDistillationCached`]; gives the type of one f32 per row.
pub(super) fn with_kept(operands: &[TensorType]) -> Result<TensorType, Mismatch> {
    let row = per_row(operands)?;
    check::rank(operands, 3, 2)?;
    let (n, v, k) = (operands[0].shape[0], operands[1].shape[0], operands[3].shape[1]);
    if !(1..=v).contains(&k) {
        return Err(Mismatch::operand(3, format!("i32[{n},K] with K from 1 to the {v} rows of operand 1")));
    }
    check::ty(operands, 3, &TensorType::i32([n, k]))?;
    check::ty(operands, 4, &TensorType::f32([n, k]))?;
    check::ty(operands, 5, &row)?;
    Ok(row)
}

/// What is kept of the teacher for one row: for each token its probability if it is kept, and the probability of the others.
pub(super) struct Kept {
    /// `None` for a token that is not kept.
    pub(super) p: Vec<Option<f64>>,
    /// Of the others together.
    pub(super) tail: f64,
}

impl Kept {
    /// Row `i`; `None` if an id is no token.
    pub(super) fn of(operands: &[&Tensor], i: usize) -> Option<Kept> {
        let (v, k) = (operands[1].ty.shape[0], operands[3].ty.shape[1]);
        let mut p = vec![None; v];
        for at in i * k..(i + 1) * k {
            p[index(operands[3].data[at], v)?] = Some(operands[4].data[at].exp());
        }
        Some(Kept { p, tail: operands[5].data[i].exp() })
    }
}

impl Rule for LinearDistillationCached {
    const NAME: &'static str = "linear_distillation_cached";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        temperature(self.temperature)?;
        check::count(operands, 6)?;
        let row = with_kept(operands)?;
        Ok(smallvec![row; 5])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let [dloss, dkd] = row_cotangents(cx, Self::NAME)?;
        let &[x, w, targets, ids, log_p, log_tail] = cx.operands else { unreachable!("infer checked the count") };
        let lse = [cx.results[2], cx.results[3], cx.results[4]];
        let grad = super::LinearDistillationCachedGrad { temperature: self.temperature };
        let operands = [x, w, targets, ids, log_p, log_tail, lse[0], lse[1], lse[2], dloss, dkd];
        let [dx, dw] = cx.graph.push_all(grad, &operands)?;
        let zero = Cotangent::Zero;
        Ok(smallvec![Cotangent::Value(dx), Cotangent::Value(dw), zero, zero, zero, zero])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, w, targets) = (operands[0], operands[1], operands[2]);
        let (n, v, t) = (x.ty.shape[0], w.ty.shape[0], f64::from(self.temperature));
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for i in 0..n {
            let student = logits(x, w, i);
            let (hard, soft) = (lse(student.iter().copied()), lse(student.iter().map(|l| l / t)));
            let kept = Kept::of(operands, i);
            let others = |kept: &Kept| {
                let rest: Vec<f64> = (0..v).filter(|&j| kept.p[j].is_none()).map(|j| student[j] / t).collect();
                lse(rest.iter().copied())
            };
            let tail = kept.as_ref().map_or(f64::NAN, others);
            let kd = kept.map_or(f64::NAN, |kept| {
                let term = |p: f64, log_q: f64| if p == 0.0 { 0.0 } else { p * (p.ln() - log_q) };
                let exact = (0..v).filter_map(|j| kept.p[j].map(|p| term(p, student[j] / t - soft))).sum::<f64>();
                t * t * (exact + term(kept.tail, tail - soft))
            });
            let [loss, kd] = losses(targets.data[i], &student, hard, kd);
            for (out, value) in out.iter_mut().zip([loss, kd, hard, soft, tail]) {
                out.data[i] = value;
            }
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The loss and the distillation term `[loss, kd]`, f32 `[N]`, of `x [N,D]` classified by `w [V,D]` against `targets` i32 `[N]`
    /// and what is kept of the teacher, `[ids, log_p, log_tail]`; see [`LinearDistillationCached`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn linear_distillation_cached(
        &mut self,
        [x, w]: [Value; 2],
        targets: Value,
        [ids, log_p, log_tail]: [Value; 3],
        temperature: f32,
    ) -> Result<[Value; 2]> {
        let operands = [x, w, targets, ids, log_p, log_tail];
        self.push_all::<5>(LinearDistillationCached { temperature }, &operands).map(|[loss, kd, ..]| [loss, kd])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(ids: &[i32], log_p: Vec<f64>, log_tail: f64) -> Vec<Tensor> {
        let op = LinearDistillationCached { temperature: 2.0 };
        // Logits 2, 0, -2 and 4 times the row.
        let (x, w) = (Tensor::f32([1, 1], vec![1.0]), Tensor::f32([4, 1], vec![2.0, 0.0, -2.0, 4.0]));
        let (targets, k) = (Tensor::i32([1], &[1]), ids.len());
        let (ids, log_p) = (Tensor::i32([1, k], ids), Tensor::f32([1, k], log_p));
        let tail = Tensor::f32([1], vec![log_tail]);
        let operands = [&x, &w, &targets, &ids, &log_p, &tail];
        let types = op.infer(&operands.map(|t| t.ty.clone())).unwrap();
        op.reference(&operands, &types)
    }

    #[test]
    fn the_tail_is_one_bucket_and_nothing_of_it_is_none() {
        let q = |l: f64| l.exp() / [1.0f64, 0.0, -1.0, 2.0].map(f64::exp).iter().sum::<f64>();
        let out = run(&[3, 0], vec![0.5f64.ln(), 0.3f64.ln()], 0.2f64.ln());
        let term = |p: f64, q: f64| p * (p / q).ln();
        let wanted = 4.0 * (term(0.5, q(2.0)) + term(0.3, q(1.0)) + term(0.2, q(0.0) + q(-1.0)));
        assert!((out[1].data[0] - wanted).abs() < 1e-12, "{} for {wanted}", out[1].data[0]);
        assert!((out[4].data[0] - (1.0 + (-1f64).exp()).ln()).abs() < 1e-12, "{:?}", out[4]);
        // All tokens kept and no tail: the whole divergence, here none at all.
        let all: Vec<f64> = [2.0, 1.0, 0.0, -1.0].map(|l| q(l).ln()).to_vec();
        let out = run(&[3, 0, 1, 2], all, f64::NEG_INFINITY);
        assert!(out[1].data[0].abs() < 1e-12 && out[4].data[0] == f64::NEG_INFINITY, "{out:?}");
        let out = run(&[3, 4], vec![-1.0, -1.0], -1.0);
        assert!(out[1].data[0].is_nan() && out[0].data[0].is_finite(), "{out:?}");
    }

    #[test]
    fn gradients_agree_with_differences() {
        let x = Tensor::f32([3, 2], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        let w = Tensor::f32([4, 2], vec![0.3, 0.2, -0.9, 1.1, 0.4, -0.6, 0.8, 0.5]);
        check::assert_gradients(&[x, w], |g, v| {
            let targets = g.constant(TensorType::i32([3]), vec![3.0, -1.0, 0.0])?;
            let ids = g.constant(TensorType::i32([3, 2]), vec![0.0, 3.0, 1.0, 0.0, 2.0, 1.0])?;
            // Rounded, so that they do not add up to 1.
            let log_p = g.constant(TensorType::f32([3, 2]), vec![-0.5, -1.5, -0.7, -1.0, -2.0, -3.0])?;
            let tail = g.constant(TensorType::f32([3]), vec![-1.8, -1.9, -0.25])?;
            let [loss, kd] = g.linear_distillation_cached([v[0], v[1]], targets, [ids, log_p, tail], 2.0)?;
            let kd = g.mul_scalar(kd, 1.7)?;
            g.add(loss, kd)
        });
    }

    #[test]
    fn no_more_than_all_tokens_are_kept() {
        let op = LinearDistillationCached { temperature: 1.0 };
        let of = |k: usize| {
            let (x, w, targets) = (TensorType::f32([2, 3]), TensorType::f32([4, 3]), TensorType::i32([2]));
            let kept = [TensorType::i32([2, k]), TensorType::f32([2, k]), TensorType::f32([2])];
            op.infer(&[vec![x, w, targets], kept.to_vec()].concat()).map_err(|m| m.operand)
        };
        assert!(of(4).is_ok() && of(1).is_ok());
        assert_eq!((of(5), of(0)), (Err(Some(3)), Err(Some(3))));
    }
}
