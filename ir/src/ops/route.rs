//! `route`: the choice of k experts for every token, with the statistics of their load.
//!
//! `logits f32 [N,E] (, selection_bias f32 [E]) (, noise f32 [N,E]) (, used bool [N]) (, choices i32 [N,k]) -> gate f32 [N,k],
//! expert_index i32 [N,k], load_balancing_loss f32 [], z_loss f32 [], counts i32 [E], entropy f32 []`.
//!
//! - The selection value of an expert is its score value `v` (see [`Score`]), or logits + noise for the choices that
//!   [`NoiseUse`] names, plus the selection bias; NaN counts as -inf. With [`Groups`] only experts of the kept groups are
//!   candidates, whatever the sign of the values; where noise is for later choices only, the first choice decides the groups.
//! - `expert_index` are the k largest selection values in descending order, ties to the lowest index, and `gate` their `v`,
//!   not renormalised. Given `choices` are taken instead; one outside `0..E` becomes -1. A token that is not used gets -1.
//!   The gate of -1 is 0.
//! - `load_balancing_loss = E sum_e mean_n p[n,e] mean_n m[n,e]` (Fedus et al., arXiv 2101.03961, eq. 4) with the mask `m` of
//!   [`Balance`], in which -1 has no part, while the means are over all tokens (as in DeepSpeed). `p` is `softmax(logits)`, or
//!   `v / sum_e v` for `Sigmoid` and `SqrtSoftplus`, uniform where all v are 0.
//! - `z_loss = mean_n logsumexp(logits[n])²` (Zoph et al., arXiv 2202.08906, eq. 5). `counts` are the choices of each expert over
//!   all k, before any is dropped. `entropy = mean_n -sum_e p ln p`, a statistic without a gradient.
//!
//! Losses and entropy are without a coefficient, and 0 without tokens. A row of logits with a NaN, an infinite largest logit or
//! no finite one has v = p = NaN, and chooses the experts `0..k`. Differentiable in the logits through `gate` and the two
//! losses; choices and mask are constants, and bias and noise get no gradient.

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::embedding::index;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::router::{Balance, NoiseUse, RouteInputs, Router, Scores};
#[cfg(doc)]
use crate::router::{Groups, Score};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Routing by a [`Router`], and which operands follow the logits, in the order of the fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// How experts are chosen and weighted.
    pub router: Router,
    /// There is a `selection_bias f32 [E]`.
    pub selection_bias: bool,
    /// There is a `noise f32 [N,E]`, for these choices.
    pub noise: Option<NoiseUse>,
    /// There is a `used bool [N]`.
    pub used: bool,
    /// There are `choices i32 [N,k]`.
    pub choices: bool,
}

/// Places of the optional operands of a [`Route`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteOperands {
    /// Of the selection bias.
    pub selection_bias: Option<usize>,
    /// Of the noise.
    pub noise: Option<usize>,
    /// Of the mask of used tokens.
    pub used: Option<usize>,
    /// Of the given choices.
    pub choices: Option<usize>,
    /// How many operands there are with the logits.
    pub count: usize,
}

impl Route {
    /// Which operand is where.
    pub fn operands(&self) -> RouteOperands {
        let mut count = 1;
        let mut place = |there: bool| {
            let at = there.then_some(count);
            count += usize::from(there);
            at
        };
        let selection_bias = place(self.selection_bias);
        let (noise, used, choices) = (place(self.noise.is_some()), place(self.used), place(self.choices));
        RouteOperands { selection_bias, noise, used, choices, count }
    }
}

/// Operand 0 is `logits f32 [N,E]` that fit the router; gives N and E.
pub(super) fn check_logits(operands: &[TensorType], router: &Router) -> Result<(usize, usize), Mismatch> {
    check::rank(operands, 0, 2)?;
    check::dtype(operands, 0, DType::F32)?;
    let (n, e) = (operands[0].shape[0], operands[0].shape[1]);
    router.check(e)?;
    Ok((n, e))
}

impl Rule for Route {
    const NAME: &'static str = "route";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        let at = self.operands();
        check::count(operands, at.count)?;
        let (n, e) = check_logits(operands, &self.router)?;
        let choices = [n, self.router.k];
        let wanted = [
            (at.selection_bias, TensorType::f32([e])),
            (at.noise, TensorType::f32([n, e])),
            (at.used, TensorType::new(DType::Bool, [n])),
            (at.choices, TensorType::i32(choices)),
        ];
        for (at, ty) in wanted {
            at.map_or(Ok(()), |at| check::ty(operands, at, &ty))?;
        }
        let scalar = || TensorType::f32([]);
        let (gate, expert_index) = (TensorType::f32(choices), TensorType::i32(choices));
        Ok(smallvec![gate, expert_index, scalar(), scalar(), TensorType::i32([e]), scalar()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        if cx.cotangents[5].is_some() {
            return cx.refuse(Self::NAME, "its entropy is a statistic that carries no gradient");
        }
        let (logits, expert_index) = (cx.operands[0], cx.results[1]);
        let mut cotangents: Cotangents = smallvec![Cotangent::Zero; cx.operands.len()];
        cotangents[0] = cx.when(0, |cx| {
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
            cx.graph.route_grad(logits, expert_index, d_gate, d_load_balancing_loss, d_z_loss, &self.router)
        })?;
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let logits = operands[0];
        let (n, e, k) = (logits.ty.shape[0], logits.ty.shape[1], self.router.k);
        let at = self.operands();
        let data = |at: Option<usize>| at.map(|at| operands[at].data.as_slice());
        let (bias, noise, used, given) = (data(at.selection_bias), data(at.noise), data(at.used), data(at.choices));
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        let (mut mean_p, mut mean_m) = (vec![0.0; e], vec![0.0; e]);
        let counted = self.router.balance.counted(k);
        for t in 0..n {
            let row = &logits.data[t * e..][..e];
            let scores = Scores::new(self.router.score, row);
            let mut choices: Vec<Option<usize>> = match given {
                Some(given) => given[t * k..][..k].iter().map(|&x| index(x, e)).collect(),
                None => {
                    let noise = noise.map(|noise| &noise[t * e..][..e]).zip(self.noise);
                    self.router.choose(&scores, row, bias, noise).into_iter().map(Some).collect()
                }
            };
            if used.is_some_and(|used| used[t] == 0.0) {
                choices.fill(None);
            }
            let gates = self.router.gates(&scores, row, &choices);
            for (j, (choice, gate)) in choices.into_iter().zip(gates).enumerate() {
                out[0].data[t * k + j] = gate;
                out[1].data[t * k + j] = choice.map_or(-1.0, |x| x as f64);
                let Some(x) = choice else { continue };
                out[4].data[x] += 1.0;
                if j < counted {
                    mean_m[x] += 1.0 / (n * counted) as f64;
                }
            }
            for (mean, &p) in mean_p.iter_mut().zip(&scores.p) {
                *mean += p / n as f64;
                out[5].data[0] -= if p == 0.0 { 0.0 } else { p * p.ln() / n as f64 };
            }
            out[3].data[0] += scores.lse * scores.lse / n as f64;
        }
        out[2].data[0] = e as f64 * mean_p.iter().zip(&mean_m).map(|(p, m)| p * m).sum::<f64>();
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Chooses `k` experts for each row of `logits` f32 `[N,E]` by their softmax; returns `[gate, expert_index,
    /// load_balancing_loss, z_loss, counts, entropy]`. See [`Route`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the logits are no f32 matrix or `k` is not in `1..=E`.
    #[track_caller]
    pub fn route(&mut self, logits: Value, k: usize, balance: Balance) -> Result<[Value; 6]> {
        self.route_with(logits, &Router::softmax(k, balance), RouteInputs::default())
    }

    /// [`Graph::route`] by any [`Router`] and with the other operands.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if an operand is not of the type that [`RouteInputs`] names, `k` is larger than E or than
    /// the kept groups, the groups do not divide E, or the score has an attribute out of range.
    #[track_caller]
    pub fn route_with(&mut self, logits: Value, router: &Router, inputs: RouteInputs) -> Result<[Value; 6]> {
        let RouteInputs { selection_bias, noise, used, choices } = inputs;
        let (noise, noise_use) = noise.unzip();
        let op = Route {
            router: *router,
            selection_bias: selection_bias.is_some(),
            noise: noise_use,
            used: used.is_some(),
            choices: choices.is_some(),
        };
        let optional = [selection_bias, noise, used, choices].into_iter().flatten();
        let operands: SmallVec<[Value; 5]> = [logits].into_iter().chain(optional).collect();
        self.push_all(op, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::{GroupScore, Groups, Score};

    fn plain(k: usize, balance: Balance) -> Route {
        Route { router: Router::softmax(k, balance), selection_bias: false, noise: None, used: false, choices: false }
    }

    fn run(logits: Tensor, k: usize, balance: Balance) -> Vec<Tensor> {
        let op = plain(k, balance);
        op.reference(&[&logits], &op.infer(std::slice::from_ref(&logits.ty)).unwrap())
    }

    #[test]
    fn ties_go_to_the_lowest_expert_and_a_nan_row_to_the_first() {
        let out = run(Tensor::f32([2, 3], vec![1.0, 3.0, 3.0, 0.0, f64::NAN, 9.0]), 2, Balance::AllChoices);
        assert_eq!(out[1].data, [1.0, 2.0, 0.0, 1.0]);
        assert_eq!(out[4].data, [1.0, 2.0, 1.0]);
        assert!(out[0].data[0] == out[0].data[1] && out[0].data[2].is_nan());
        let refused = plain(4, Balance::AllChoices).infer(&[TensorType::f32([2, 3])]).unwrap_err();
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
                let [gate, _, load_balancing_loss, z_loss, ..] = g.route(v[0], 3, balance)?;
                let losses = g.mul(load_balancing_loss, z_loss)?;
                g.mul(gate, losses)
            });
        }
    }

    /// Gates and choices of one token without optional operands but a bias.
    fn one(router: Router, logits: &[f64], bias: Option<&[f64]>) -> [Vec<f64>; 2] {
        let op = Route { router, selection_bias: bias.is_some(), ..plain(router.k, router.balance) };
        let e = logits.len();
        let logits = Tensor::f32([1, e], logits.to_vec());
        let bias = bias.map(|b| Tensor::f32([e], b.to_vec()));
        let operands: Vec<&Tensor> = [&logits].into_iter().chain(&bias).collect();
        let types = op.infer(&operands.iter().map(|t| t.ty.clone()).collect::<Vec<_>>()).unwrap();
        let out = op.reference(&operands, &types);
        [out[0].data.clone(), out[1].data.clone()]
    }

    #[test]
    fn a_group_left_out_does_not_win_over_negative_values() {
        let groups = Some(Groups { count: 2, keep: 1, by: GroupScore::Top2Sum });
        let router = Router { score: Score::Identity, groups, ..Router::softmax(2, Balance::AllChoices) };
        // Sums of -3 and -4 with the bias, which the gates do not show.
        let [gate, index] = one(router, &[3.0, 4.0, 5.0, 5.0], Some(&[-5.0, -5.0, -7.0, -7.0]));
        assert_eq!((index, gate), (vec![1.0, 0.0], vec![4.0, 3.0]));
        let refused = |groups, k, e| {
            let router = Router { groups: Some(groups), ..Router::softmax(k, Balance::AllChoices) };
            router.check(e).unwrap_err().wanted
        };
        let of = |count, keep, by| Groups { count, keep, by };
        assert!(refused(of(3, 1, GroupScore::Max), 1, 4).contains("divides 4"));
        assert!(refused(of(2, 3, GroupScore::Max), 1, 4).contains("1 to 2 kept groups"));
        assert!(refused(of(2, 1, GroupScore::Max), 3, 4).contains("at most 2"));
        assert!(refused(of(4, 2, GroupScore::Top2Sum), 1, 4).contains("two experts"));
    }

    #[test]
    fn sparse_mixer_by_hand() {
        let mixer =
            |jitter_eps| Router { score: Score::SparseMixer { jitter_eps }, ..Router::softmax(3, Balance::AllChoices) };
        // Without jitter the equals share, and the last one left has it all.
        let [gate, index] = one(mixer(0.0), &[1.0, 2.0, 2.0], None);
        assert_eq!((index, gate), (vec![1.0, 2.0, 0.0], vec![0.5, 1.0, 1.0]));
        // Within 2 * 0.25 of 2 is 1, not 0.5; within that of 1 is 0.5.
        let [gate, _] = one(mixer(0.25), &[0.5, 2.0, 1.0], None);
        let of = |d: f64| 1.0 / (1.0 + (-d).exp());
        assert!((gate[0] - of(1.0)).abs() < 1e-15 && (gate[1] - of(0.5)).abs() < 1e-15 && gate[2] == 1.0);
        assert!(mixer(f64::NAN).check(3).unwrap_err().wanted.contains("jitter_eps"));
    }

    #[test]
    fn scores_that_are_all_zero_are_uniform_and_the_entropy_has_no_gradient() {
        for score in [Score::Sigmoid, Score::SqrtSoftplus] {
            let scores = Scores::new(score, &[-1e4; 4]);
            assert_eq!((scores.value, scores.p), (vec![0.0; 4], vec![0.25; 4]));
        }
        let mut g = Graph::new();
        let logits = g.feed("logits", TensorType::f32([3, 4])).unwrap();
        let [.., entropy] = g.route(logits, 1, Balance::AllChoices).unwrap();
        let refused = crate::gradients(&mut g, entropy, &[logits]).unwrap_err();
        assert!(refused.to_string().contains("statistic"), "{refused}");
    }
}
