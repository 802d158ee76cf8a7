//! `route_grad`: the cotangent of the router's logits, the choices held fixed.
//!
//! `logits f32 [N,E], expert_index i32 [N,k], d_gate f32 [N,k], d_load_balancing_loss f32 [], d_z_loss f32 [] -> d_logits
//! f32 [N,E]`, with `v`, `p`, `m` and the losses of [`super::Route`]. `d_logits` is the sum of
//!
//! - through the gates `v`: softmax `p (dv - sum_e p dv)` with `dv[n,e] = sum_j [expert_index[n,j] = e] d_gate[n,j]`; the same
//!   for each choice by its own softmax for SparseMixer; `dv v (1 - v)` for sigmoid, `dv sigmoid(l) / 2v` for the square
//!   root of softplus, `dv` for the identity;
//! - through the load-balancing loss: `r p (dp - sum_e p dp)` with `dp[n,e] = d_load_balancing_loss E/N mean_n m[n,e]` and `r`
//!   the derivative of `ln v` for the p that are `v / sum_e v`, else 1;
//! - through the z-loss: `d_z_loss 2/N logsumexp(logits[n]) softmax(logits[n])`.
//!
//! A choice outside `0..E` adds nothing; a row that [`super::Route`] calls NaN has the gradient NaN. Not differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::embedding::index;
use super::route::check_logits;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::router::{Balance, Router, Score, Scores, mixer, value_slope};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The gradient of [`super::Route`]. What only chooses (groups, bias, noise) has no part in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteGrad {
    /// Experts of each token, in `1..=E`.
    pub k: usize,
    /// What the gates are.
    pub score: Score,
    /// Which choices the load-balancing loss counts.
    pub balance: Balance,
}

impl RouteGrad {
    /// Adds what the gates of one token give: `choices` as far as they are experts, each with the cotangent of its gate.
    fn add_gates(&self, scores: &Scores, logits: &[f64], choices: impl Iterator<Item = (usize, f64)>, d: &mut [f64]) {
        let mut taken = vec![false; logits.len()];
        for (x, d_gate) in choices {
            match self.score {
                Score::Softmax => add_softmax(&scores.softmax, x, d_gate, d),
                Score::SparseMixer { jitter_eps } => {
                    add_softmax(&mixer(logits, &taken, jitter_eps), x, d_gate, d);
                    taken[x] = true;
                }
                Score::Sigmoid | Score::SqrtSoftplus | Score::Identity => {
                    d[x] += d_gate * value_slope(self.score, logits[x], scores.value[x]);
                }
            }
        }
    }
}

/// Adds the cotangent of the logits of a softmax `q` from the one of `q[x]`.
fn add_softmax(q: &[f64], x: usize, d_q: f64, d: &mut [f64]) {
    for (e, d) in d.iter_mut().enumerate() {
        *d += d_q * q[x] * (if e == x { 1.0 } else { 0.0 } - q[e]);
    }
}

impl Rule for RouteGrad {
    const NAME: &'static str = "route_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 5)?;
        let (n, _) =
            check_logits(operands, &Router { k: self.k, score: self.score, groups: None, balance: self.balance })?;
        check::ty(operands, 1, &TensorType::i32([n, self.k]))?;
        check::ty(operands, 2, &TensorType::f32([n, self.k]))?;
        check::ty(operands, 3, &TensorType::f32([]))?;
        check::ty(operands, 4, &TensorType::f32([]))?;
        Ok(smallvec![operands[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of route is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (logits, expert_index, d_gate) = (operands[0], operands[1], operands[2]);
        let (d_load_balancing_loss, d_z_loss) = (operands[3].data[0], operands[4].data[0]);
        let (n, e, k) = (logits.ty.shape[0], logits.ty.shape[1], self.k);
        let counted = self.balance.counted(k);
        let mut mean_m = vec![0.0; e];
        for t in 0..n {
            for x in expert_index.data[t * k..][..counted].iter().filter_map(|&x| index(x, e)) {
                mean_m[x] += 1.0 / (n * counted) as f64;
            }
        }
        let mut out = Tensor::zeros(results[0].clone());
        for t in 0..n {
            let row = &logits.data[t * e..][..e];
            let d = &mut out.data[t * e..][..e];
            let scores = Scores::new(self.score, row);
            if !scores.finite {
                d.fill(f64::NAN);
                continue;
            }
            let dp: Vec<f64> = mean_m.iter().map(|m| d_load_balancing_loss * e as f64 / n as f64 * m).collect();
            let dot: f64 = scores.p.iter().zip(&dp).map(|(p, d)| p * d).sum();
            for x in 0..e {
                d[x] = scores.p_rate[x] * scores.p[x] * (dp[x] - dot)
                    + d_z_loss * 2.0 / n as f64 * scores.lse * scores.softmax[x];
            }
            let choices =
                (t * k..(t + 1) * k).filter_map(|c| index(expert_index.data[c], e).map(|x| (x, d_gate.data[c])));
            self.add_gates(&scores, row, choices, d);
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangent of the logits of `router` from those of the gates and losses; see [`RouteGrad`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn route_grad(
        &mut self,
        logits: Value,
        expert_index: Value,
        d_gate: Value,
        d_load_balancing_loss: Value,
        d_z_loss: Value,
        router: &Router,
    ) -> Result<Value> {
        let operands = [logits, expert_index, d_gate, d_load_balancing_loss, d_z_loss];
        let &Router { k, score, groups: _, balance } = router;
        self.push_one(RouteGrad { k, score, balance }, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_by_hand() {
        // One token with probabilities 1/2, 1/2 and logsumexp ln 2.
        let logits = Tensor::f32([1, 2], vec![0.0, 0.0]);
        let op = RouteGrad { k: 1, score: Score::Softmax, balance: Balance::AllChoices };
        let run = |choice: i32, gate: f64, balance: f64, z: f64| {
            let (choice, gate) = (Tensor::i32([1, 1], &[choice]), Tensor::f32([1, 1], vec![gate]));
            let (balance, z) = (Tensor::f32([], vec![balance]), Tensor::f32([], vec![z]));
            let operands = [&logits, &choice, &gate, &balance, &z];
            let types = op.infer(&operands.map(|t| t.ty.clone())).unwrap();
            op.reference(&operands, &types)[0].data.clone()
        };
        assert_eq!(run(1, 4.0, 0.0, 0.0), [-1.0, 1.0]);
        assert_eq!(run(0, 0.0, 4.0, 0.0), [2.0, -2.0]);
        assert_eq!(run(0, 0.0, 0.0, 3.0), [3.0 * 2f64.ln(); 2]);
        assert_eq!(run(-1, 4.0, 4.0, 0.0), [0.0, 0.0]);
    }

    #[test]
    fn an_index_of_another_width_is_named() {
        let scalar = TensorType::f32([]);
        let operands =
            [TensorType::f32([3, 4]), TensorType::i32([3, 2]), TensorType::f32([3, 1]), scalar.clone(), scalar];
        let refused =
            RouteGrad { k: 2, score: Score::Softmax, balance: Balance::FirstChoice }.infer(&operands).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(2), "f32[3,2]"));
    }
}
