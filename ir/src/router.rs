//! The declarative router: which scores choose a token's experts and which weight them, and its meaning for one token.
//!
//! One description covers the routers in use (softmax, sigmoid with a selection bias and groups, square root of softplus, logits
//! as they are, SparseMixer). What comes after the gates (dividing by their sum, a softmax over the chosen, a scale) is made
//! of ordinary nodes. [`crate::ops::Route`] says what the functions here mean for all tokens together.

use serde::{Deserialize, Serialize};

use crate::error::Mismatch;
use crate::graph::Value;
use crate::ops::check;

/// The score value `v[n,e]` of an expert, from the logits `l` of a token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Score {
    /// `exp(l) / sum_e exp(l)` over all experts.
    Softmax,
    /// `1 / (1 + exp(-l))` (DeepSeek-V3, arXiv 2412.19437, eq. 15).
    Sigmoid,
    /// `sqrt(ln(1 + exp(l)))`.
    SqrtSoftplus,
    /// `l`: for gates that a softmax over the chosen makes.
    Identity,
    /// One softmax for each choice, over the experts not chosen before it (SparseMixer-v2 as evaluated, without sampling:
    /// Liu et al., arXiv 2409.12136). With `b` the largest logit left, experts with `b - l > 2 jitter_eps max(b, |l|)` are
    /// left out of the softmax and have v = 0, as do chosen ones, and all if nothing finite is left. So with `jitter_eps` 0
    /// the experts equal to the best share the gate. Choices are ranked by `l`, whose order is that of the successive softmaxes.
    SparseMixer {
        /// Half the relative distance to the best logit that an expert may have; finite and not negative.
        jitter_eps: f64,
    },
}

/// The score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The largest selection value in it (DeepSeek-V2).
    Max,
    /// The sum of the two largest (DeepSeek-V3).
    Top2Sum,
}

/// Group-limited choice: the experts are `count` runs of equal length, and only those of the best `keep` can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Groups there are; divides E.
    pub count: usize,
    /// Groups that stay, in `1..=count`; ties go to the lowest.
    pub keep: usize,
    /// What makes a group good.
    pub by: GroupScore,
}

/// Which choices look at logits + noise instead of the score values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseUse {
    /// Every choice (`RSample` of DeepSpeed).
    AllChoices,
    /// Those after the first (the second expert of DeepSpeed's top-2 gate, with Gumbel noise).
    LaterChoices,
}

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
    pub(crate) fn counted(self, k: usize) -> usize {
        match self {
            Balance::FirstChoice => 1,
            Balance::AllChoices => k,
        }
    }
}

/// How the experts of a token are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// Experts of each token, in `1..=E`.
    pub k: usize,
    /// The score values: what chooses (unless there is noise) and what the gates are.
    pub score: Score,
    /// Groups of experts that are chosen first.
    pub groups: Option<Groups>,
    /// Which choices the load-balancing loss counts.
    pub balance: Balance,
}

/// The operands of a router beside the logits, each of them optional and without a gradient.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteInputs {
    /// f32 `[E]`, added to what chooses and never to the gates (the auxiliary-loss-free balancing of DeepSeek-V3).
    pub selection_bias: Option<Value>,
    /// f32 `[N,E]`, added to the logits for the choices that this names.
    pub noise: Option<(Value, NoiseUse)>,
    /// bool `[N]`: false for a token, such as padding, that goes nowhere.
    pub used: Option<Value>,
    /// i32 `[N,k]`: the choices, instead of choosing (recorded routes, hash routing); an index outside `0..E` goes nowhere.
    pub choices: Option<Value>,
}

impl Router {
    /// The softmax router without groups.
    pub fn softmax(k: usize, balance: Balance) -> Router {
        Router { k, score: Score::Softmax, groups: None, balance }
    }

    /// The attributes make sense for `e` experts.
    pub(crate) fn check(&self, e: usize) -> Result<(), Mismatch> {
        let k = self.k;
        check::attribute((1..=e).contains(&k), || format!("k in 1..={e}, the number of experts, not {k}"))?;
        if let Score::SparseMixer { jitter_eps } = self.score {
            check::attribute(jitter_eps.is_finite() && jitter_eps >= 0.0, || {
                format!("a jitter_eps that is finite and not negative, not {jitter_eps}")
            })?;
        }
        let Some(Groups { count, keep, by }) = self.groups else { return Ok(()) };
        check::attribute(count > 0 && e.is_multiple_of(count), || {
            format!("a number of groups that divides {e}, the number of experts, not {count}")
        })?;
        check::attribute((1..=count).contains(&keep), || format!("1 to {count} kept groups, not {keep}"))?;
        let size = e / count;
        check::attribute(k <= keep * size, || {
            format!("k of at most {}, the experts of {keep} groups of {size}, not {k}", keep * size)
        })?;
        let alone = by == GroupScore::Top2Sum && size < 2;
        check::attribute(!alone, || "groups of at least two experts, of which top2_sum adds up two".into())
    }
}

/// What routing knows of the logits of one token.
pub(crate) struct Scores {
    /// `softmax(logits)`.
    pub(crate) softmax: Vec<f64>,
    /// Its logsumexp.
    pub(crate) lse: f64,
    /// v[e]; for [`Score::SparseMixer`] that of the first choice.
    pub(crate) value: Vec<f64>,
    /// p[e], the probabilities of the load-balancing loss and the entropy.
    pub(crate) p: Vec<f64>,
    /// Derivative of ln p[e] by l[e] up to a term that all e share, which the softmax-like form of p cancels.
    pub(crate) p_rate: Vec<f64>,
    /// No NaN, and the largest logit is finite; else everything above is NaN.
    pub(crate) finite: bool,
}

impl Scores {
    pub(crate) fn new(score: Score, logits: &[f64]) -> Scores {
        let e = logits.len();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if !max.is_finite() || logits.iter().any(|l| l.is_nan()) {
            let nan = || vec![f64::NAN; e];
            return Scores { softmax: nan(), lse: f64::NAN, value: nan(), p: nan(), p_rate: nan(), finite: false };
        }
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        let softmax: Vec<f64> = logits.iter().map(|l| (l - max).exp() / sum).collect();
        let lse = max + sum.ln();
        let (value, normalised): (Vec<f64>, bool) = match score {
            Score::Softmax => (softmax.clone(), true),
            Score::Identity => (logits.to_vec(), true),
            Score::SparseMixer { jitter_eps } => (mixer(logits, &vec![false; e], jitter_eps), true),
            Score::Sigmoid => (logits.iter().map(|&l| sigmoid(l)).collect(), false),
            Score::SqrtSoftplus => (logits.iter().map(|&l| softplus(l).sqrt()).collect(), false),
        };
        let (mut p, mut p_rate) = (softmax.clone(), vec![1.0; e]);
        if !normalised {
            let sum: f64 = value.iter().sum();
            for x in 0..e {
                // All scores 0, far below the range of a float: nothing tells the experts apart, nor a small step.
                p[x] = if sum == 0.0 { 1.0 / e as f64 } else { value[x] / sum };
                p_rate[x] = if value[x] == 0.0 { 0.0 } else { value_slope(score, logits[x], value[x]) / value[x] };
            }
        }
        Scores { softmax, lse, value, p, p_rate, finite: true }
    }
}

/// dv/dl of a score that each logit has by itself.
pub(crate) fn value_slope(score: Score, logit: f64, value: f64) -> f64 {
    match score {
        Score::Sigmoid => value * sigmoid(-logit),
        Score::SqrtSoftplus if value == 0.0 => 0.0,
        Score::SqrtSoftplus => sigmoid(logit) / (2.0 * value),
        Score::Identity | Score::Softmax | Score::SparseMixer { .. } => 1.0,
    }
}

fn sigmoid(x: f64) -> f64 {
    let small = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) }
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// The softmax of [`Score::SparseMixer`] over the experts not taken.
pub(crate) fn mixer(logits: &[f64], taken: &[bool], jitter_eps: f64) -> Vec<f64> {
    let left = || logits.iter().zip(taken).map(|(&l, &taken)| if taken { f64::NEG_INFINITY } else { l });
    let best = left().fold(f64::NEG_INFINITY, f64::max);
    if best == f64::NEG_INFINITY {
        return vec![0.0; logits.len()];
    }
    let near = |l: f64| l > f64::NEG_INFINITY && best - l <= 2.0 * jitter_eps * best.max(l.abs());
    let weights: Vec<f64> = left().map(|l| if near(l) { (l - best).exp() } else { 0.0 }).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// The `k` largest of the candidates, ties to the lowest index.
fn largest(values: &[f64], candidates: impl Iterator<Item = usize>, k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = candidates.collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(k);
    order
}

impl Router {
    /// The experts of a token that chooses by itself. `noise` is that of the token.
    pub(crate) fn choose(
        &self,
        scores: &Scores,
        logits: &[f64],
        bias: Option<&[f64]>,
        noise: Option<(&[f64], NoiseUse)>,
    ) -> Vec<usize> {
        let e = logits.len();
        if !scores.finite {
            return (0..self.k).collect();
        }
        // -0 and 0 are equal, and a NaN from the noise or the bias comes last.
        let selection = |base: &dyn Fn(usize) -> f64| -> Vec<f64> {
            let value = |x| base(x) + bias.map_or(0.0, |b| b[x]) + 0.0;
            (0..e).map(value).map(|v| if v.is_nan() { f64::NEG_INFINITY } else { v }).collect()
        };
        let ranked = match self.score {
            Score::SparseMixer { .. } => logits,
            Score::Softmax | Score::Sigmoid | Score::SqrtSoftplus | Score::Identity => &scores.value,
        };
        let by_score = selection(&|x| ranked[x]);
        let by_noise = noise.map(|(noise, _)| selection(&|x| logits[x] + noise[x]));
        let later = noise.is_some_and(|(_, of)| of == NoiseUse::LaterChoices);
        let first = if later { &by_score } else { by_noise.as_ref().unwrap_or(&by_score) };
        let kept = self.kept_groups(first);
        let candidate = |x: usize| kept.as_ref().is_none_or(|(size, kept)| kept.contains(&(x / size)));
        let all = || (0..e).filter(|&x| candidate(x));
        match &by_noise {
            Some(by_noise) if later => {
                let mut chosen = largest(first, all(), 1);
                let best = chosen[0];
                chosen.extend(largest(by_noise, all().filter(|&x| x != best), self.k - 1));
                chosen
            }
            Some(_) | None => largest(first, all(), self.k),
        }
    }

    /// The experts of a group and the groups that stay, by these selection values.
    fn kept_groups(&self, selection: &[f64]) -> Option<(usize, Vec<usize>)> {
        let Groups { count, keep, by } = self.groups?;
        let size = selection.len() / count;
        let score = |group: &[f64]| {
            let best = largest(group, 0..size, 2);
            let sum = match by {
                GroupScore::Max => group[best[0]],
                GroupScore::Top2Sum => group[best[0]] + group[best[1]],
            };
            if sum.is_nan() { f64::NEG_INFINITY } else { sum + 0.0 }
        };
        let scores: Vec<f64> = selection.chunks(size).map(score).collect();
        Some((size, largest(&scores, 0..count, keep)))
    }

    /// The gates of these choices, 0 for none.
    pub(crate) fn gates(&self, scores: &Scores, logits: &[f64], choices: &[Option<usize>]) -> Vec<f64> {
        let mut taken = vec![false; logits.len()];
        let gate = |&choice: &Option<usize>| {
            let Some(x) = choice else { return 0.0 };
            match self.score {
                Score::SparseMixer { jitter_eps } if scores.finite => {
                    let gate = mixer(logits, &taken, jitter_eps)[x];
                    taken[x] = true;
                    gate
                }
                Score::SparseMixer { .. } | Score::Softmax | Score::Sigmoid | Score::SqrtSoftplus | Score::Identity => {
                    scores.value[x]
                }
            }
        };
        choices.iter().map(gate).collect()
    }
}
