//! `route`: the choice of k experts for every token, with the statistics of their load.
//!
//! `logits f32 [N,E] -> gate f32 [N,k], expert_index i32 [N,k], load_balancing_loss f32 [], z_loss f32 [], counts i32 [E]`.
//! With `p = softmax(logits)`, `expert_index` are the k largest `p` of a token in descending order, ties to the lowest
//! index, and `gate` their `p`, not renormalised. `load_balancing_loss = E sum_e mean_n p[n,e] mean_n m[n,e]` (Fedus et
//! al., arXiv 2101.03961, eq. 4) with the mask `m` of [`Balance`]; `z_loss = mean_n logsumexp(logits[n])²` (Zoph et al.,
//! arXiv 2202.08906, eq. 5); both without a coefficient, and 0 without tokens. `counts` are the choices of each expert
//! over all k, before any is dropped. A row with a NaN, an infinite largest logit or no finite logit gets the experts
//! `0..k` with NaN gates. Differentiable through `gate` and the two losses; choices and mask are constants.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Which choices the load-balancing loss counts as routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// `m[n,e]` is 1 for the first choice of n (GShard, and the top-2 of DeepSpeed-MoE).
    FirstChoice,
    /// `m[n,e]` is 1/k for each of the k choices of n (for k = 1 that of Switch).
    AllChoices,
}

impl Balance {
    /// How many of a token's `k` choices count.
    pub(super) fn counted(self, k: usize) -> usize {
        match self {
            Balance::FirstChoice => 1,
            Balance::AllChoices => k,
        }
    }
}

/// Top-k routing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Experts of each token, in `1..=E`.
    pub k: usize,
    /// Which choices the load-balancing loss counts.
    pub balance: Balance,
}

/// Operand 0 is `logits f32 [N,E]` with k in `1..=E`; gives N and E.
pub(super) fn check_logits(operands: &[TensorType], k: usize) -> Result<(usize, usize), Mismatch> {
    check::rank(operands, 0, 2)?;
    check::dtype(operands, 0, DType::F32)?;
    let (n, e) = (operands[0].shape[0], operands[0].shape[1]);
    check::attribute((1..=e).contains(&k), || format!("k in 1..={e}, the number of experts, not {k}"))?;
    Ok((n, e))
}

/// Softmax of one row and its logsumexp.
pub(super) fn softmax(logits: &[f64]) -> (Vec<f64>, f64) {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
    (logits.iter().map(|l| (l - max).exp() / sum).collect(), max + sum.ln())
}

impl Rule for Route {
    const NAME: &'static str = "route";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        let (n, e) = check_logits(operands, self.k)?;
        let (choices, scalar) = ([n, self.k], TensorType::f32([]));
        Ok(smallvec![TensorType::f32(choices), TensorType::i32(choices), scalar.clone(), scalar, TensorType::i32([e])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (logits, expert_index) = (cx.operands[0], cx.results[1]);
        let mut d = [cx.results[0], cx.results[2], cx.results[3]];
        for (d, cotangent) in d.iter_mut().zip([cx.cotangents[0], cx.cotangents[2], cx.cotangents[3]]) {
            *d = match cotangent {
                Some(cotangent) => cotangent,
                None => {
                    let ty = cx.graph.ty(*d).clone();
                    cx.graph.splat(ty, 0.0)?
                }
            };
        }
        let [d_gate, d_load_balancing_loss, d_z_loss] = d;
        Ok(smallvec![Cotangent::Value(cx.graph.route_grad(
            logits,
            expert_index,
            d_gate,
            d_load_balancing_loss,
            d_z_loss,
            self.k,
            self.balance,
        )?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let logits = operands[0];
        let (n, e, k) = (logits.ty.shape[0], logits.ty.shape[1], self.k);
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        let (mut mean_p, mut mean_m) = (vec![0.0; e], vec![0.0; e]);
        let counted = self.balance.counted(k);
        for t in 0..n {
            let (p, lse) = softmax(&logits.data[t * e..(t + 1) * e]);
            let mut experts: Vec<usize> = (0..e).collect();
            // Stable, so that ties (and a row of NaN) stay in the order of the index.
            experts.sort_by(|&a, &b| p[b].partial_cmp(&p[a]).unwrap_or(std::cmp::Ordering::Equal));
            for (j, &x) in experts[..k].iter().enumerate() {
                out[0].data[t * k + j] = p[x];
                out[1].data[t * k + j] = x as f64;
                out[4].data[x] += 1.0;
                if j < counted {
                    mean_m[x] += 1.0 / (n * counted) as f64;
                }
            }
            for x in 0..e {
                mean_p[x] += p[x] / n as f64;
            }
            out[3].data[0] += lse * lse / n as f64;
        }
        out[2].data[0] = e as f64 * mean_p.iter().zip(&mean_m).map(|(p, m)| p * m).sum::<f64>();
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Chooses `k` experts for each row of `logits` f32 `[N,E]`; returns `[gate, expert_index, load_balancing_loss, z_loss,
    /// counts]`. See [`Route`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the logits are no f32 matrix or `k` is not in `1..=E`.
    #[track_caller]
    pub fn route(&mut self, logits: Value, k: usize, balance: Balance) -> Result<[Value; 5]> {
        self.push_all(Route { k, balance }, &[logits])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(logits: Tensor, k: usize, balance: Balance) -> Vec<Tensor> {
        let op = Route { k, balance };
        op.reference(&[&logits], &op.infer(std::slice::from_ref(&logits.ty)).unwrap())
    }

    #[test]
    fn ties_go_to_the_lowest_expert_and_a_nan_row_to_the_first() {
        let out = run(Tensor::f32([2, 3], vec![1.0, 3.0, 3.0, 0.0, f64::NAN, 9.0]), 2, Balance::AllChoices);
        assert_eq!(out[1].data, [1.0, 2.0, 0.0, 1.0]);
        assert_eq!(out[4].data, [1.0, 2.0, 1.0]);
        assert!(out[0].data[0] == out[0].data[1] && out[0].data[2].is_nan());
        let refused = Route { k: 4, balance: Balance::AllChoices }.infer(&[TensorType::f32([2, 3])]).unwrap_err();
        assert!(refused.wanted.contains("1..=3"), "{refused:?}");
    }

    #[test]
    fn losses_by_hand() {
        // Probabilities 3/4 and 1/4, then 1/2 and 1/2; sums of exponentials 4 and 2.
        let logits = || Tensor::f32([2, 2], vec![3f64.ln(), 0.0, 0.0, 0.0]);
        let (first, all) = (run(logits(), 2, Balance::FirstChoice), run(logits(), 2, Balance::AllChoices));
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-14, "{got} for {want}");
        // The mean probabilities are 5/8 and 3/8; all first choices are expert 0.
        near(first[2].data[0], 2.0 * 0.625);
        near(all[2].data[0], 2.0 * (0.625 * 0.5 + 0.375 * 0.5));
        near(all[3].data[0], (4f64.ln().powi(2) + 2f64.ln().powi(2)) / 2.0);
        assert!(run(Tensor::f32([0, 2], vec![]), 1, Balance::AllChoices)[2].data == [0.0]);
    }

    #[test]
    fn gradients_agree_with_differences() {
        let logits = Tensor::f32([3, 4], (0..12).map(|i| (f64::from(i) * 2.1).sin() * 1.5).collect());
        for balance in [Balance::FirstChoice, Balance::AllChoices] {
            for which in [0, 2, 3] {
                check::assert_gradients(std::slice::from_ref(&logits), |g, v| Ok(g.route(v[0], 2, balance)?[which]));
            }
            check::assert_gradients(std::slice::from_ref(&logits), |g, v| {
                let [gate, _, load_balancing_loss, z_loss, _] = g.route(v[0], 3, balance)?;
                let losses = g.mul(load_balancing_loss, z_loss)?;
                g.mul(gate, losses)
            });
        }
    }
}
