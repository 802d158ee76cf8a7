//! Bugs of `route` and its gradient.

use moebius_ir::ops::{Balance, GroupScore, Groups, Route, Router, Score};
use moebius_ir::{Op, Tensor, TensorType};

use super::Check::{Golden, Gradients, OneHotForm, Values};
use super::{Bug, Launch};

pub(super) const BUGS: &[Bug] = &[
    Bug {
        name: "logits for probabilities",
        what: "the gates are the logits of the chosen experts",
        seen: "DeepSpeed #7986",
        op: "route",
        wrong: |l| softmax_gates(l, |row, x| row[x]),
        noticed_by: &[OneHotForm, Values("route", "top-1, allchoices"), Golden("gating", "top2k_probs_cf0.75")],
    },
    Bug {
        name: "softmax twice",
        what: "the probabilities go through a softmax once more",
        seen: "transformers #45120, #45111, #45132",
        op: "route",
        wrong: |l| softmax_gates(l, |row, x| softmax(&softmax(row))[x]),
        noticed_by: &[OneHotForm, Values("route", "k = e, firstchoice"), Golden("gating", "top2_argmax_cf1.25")],
    },
    Bug {
        name: "top-1 renormalised",
        what: "the only gate of a token is divided by itself, so that it is 1 and the router learns nothing",
        seen: "Megatron-LM #894",
        op: "route",
        wrong: |l| if route(l)?.router.k == 1 { softmax_gates(l, |_, _| 1.0) } else { None },
        noticed_by: &[OneHotForm, Values("route", "top-1, firstchoice"), Golden("layer", "standard_top1_cf0.5")],
    },
    Bug {
        name: "bias in the weights",
        what: "the selection bias is added to the gates too",
        seen: "transformers #41647",
        op: "route",
        wrong: bias_in_weights,
        noticed_by: &[
            OneHotForm,
            Values("route", "sigmoid, bias"),
            Values("route", "softmax, bias"),
            Values("published_routers", "deepseek-v3, dropless"),
        ],
    },
    Bug {
        name: "group mask of zero",
        what: "experts of groups that are left out compete with the value 0, which wins over negative ones",
        seen: "transformers #45440",
        op: "route",
        wrong: group_mask_of_zero,
        noticed_by: &[
            OneHotForm,
            Values("route", "softmax, negative groups by two"),
            Values("route", "sigmoid, all together"),
        ],
    },
    Bug {
        name: "ties to the highest index",
        what: "of equal experts the last is chosen",
        seen: "top-k of another library",
        op: "route",
        wrong: ties_to_the_highest,
        noticed_by: &[
            OneHotForm,
            Values("route", "ties go to the lowest index"),
            Values("route", "sigmoid, ties go to the lowest index"),
        ],
    },
    Bug {
        name: "z-loss on probabilities",
        what: "the router's z-loss is that of the probabilities, nearly a constant",
        seen: "transformers #48293, #48421",
        op: "route",
        wrong: |l| {
            let route = route(l)?;
            let logits = l.operands()[0];
            let e = logits.ty.shape.last();
            let data = logits.data.chunks(e).flat_map(softmax).collect();
            let mut right = l.right();
            let router = Router::softmax(route.router.k, Balance::AllChoices);
            let op = Route { router, selection_bias: false, noise: None, used: false, choices: false };
            right[3] = l.by(&op.into(), &[&Tensor::new(logits.ty.clone(), data)]).swap_remove(3);
            Some(right)
        },
        noticed_by: &[
            OneHotForm,
            Values("route", "top-2, no multiple of a tile, allchoices"),
            Values("moe_layer", "top-1"),
        ],
    },
    Bug {
        name: "balance loss grows with k",
        what: "the load-balancing loss is not divided by the choices of a token",
        seen: "transformers #29363, #44242",
        op: "route",
        wrong: |l| {
            let route = route(l).filter(|r| r.router.balance == Balance::AllChoices)?;
            let mut right = l.right();
            right[2].data[0] *= route.router.k as f64;
            Some(right)
        },
        noticed_by: &[
            OneHotForm,
            Golden("gating", "top3k_probs_cf0.75"),
            Values("route", "top-2, no multiple of a tile, allchoices"),
        ],
    },
    Bug {
        name: "padding counts",
        what: "tokens that are not used count in loads and balance loss",
        seen: "transformers #28255, #31464, #29363",
        op: "route",
        wrong: |l| {
            let route = route(l).filter(|r| r.used)?;
            let mut operands = l.operands();
            operands.remove(route.operands().used?);
            let all = l.by(&Route { used: false, ..route.clone() }.into(), &operands);
            let mut right = l.right();
            for i in [2, 4] {
                right[i] = all[i].clone();
            }
            Some(right)
        },
        noticed_by: &[Values("route", "softmax, used tokens"), Golden("gating", "top1_used_token")],
    },
    Bug {
        name: "noise in the weights",
        what: "the noise that chooses is in the gates too",
        seen: "DeepSpeed #8620, and any router that keeps noisy logits",
        op: "route",
        wrong: |l| {
            let route = route(l)?;
            let noise = l.operands()[route.operands().noise?].data.clone();
            let mut logits = l.operands()[0].clone();
            logits.data.iter_mut().zip(&noise).for_each(|(l, n)| *l += n);
            let mut right = l.right();
            // Choices as they are, gates by the noisy logits.
            let given = right[1].clone();
            let op = Route { router: route.router, selection_bias: false, noise: None, used: false, choices: true };
            right[0] = l.by(&op.into(), &[&logits, &given]).swap_remove(0);
            Some(right)
        },
        noticed_by: &[OneHotForm, Values("route", "softmax, noise for all choices"), Golden("gating", "top1_rsample")],
    },
    Bug {
        name: "severed router gradient",
        what: "the cotangents of the gates do not reach the logits",
        seen: "candle #2168, #3011, #3569",
        op: "route_grad",
        wrong: |l| {
            let zero = Tensor::zeros(l.operands()[2].ty.clone());
            Some(l.with(2, &zero))
        },
        noticed_by: &[
            OneHotForm,
            Values("route_grad", "top-1, firstchoice"),
            Gradients("moe_layer", "top-2 with capacity"),
            Golden("layer", "residual_top1_cf1"),
        ],
    },
];

/// The op of a forward `route`.
fn route<'a>(l: &Launch<'a>) -> Option<&'a Route> {
    if let Op::Route(route) = &l.node.op { Some(route) } else { None }
}

fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|l| (l - max).exp()).sum();
    row.iter().map(|l| (l - max).exp() / sum).collect()
}

/// The right results but for the gates of a softmax router, which `gate` makes of a row of logits and an expert.
fn softmax_gates(l: &Launch<'_>, gate: impl Fn(&[f64], usize) -> f64) -> Option<Vec<Tensor>> {
    let route = route(l).filter(|r| r.router.score == Score::Softmax)?;
    let logits = l.operands()[0];
    let e = logits.ty.shape.last();
    let mut right = l.right();
    for c in 0..right[0].data.len() {
        if right[1].data[c] >= 0.0 {
            let row = &logits.data[c / route.router.k * e..][..e];
            right[0].data[c] = gate(row, right[1].data[c] as usize);
        }
    }
    Some(right)
}

fn bias_in_weights(l: &Launch<'_>) -> Option<Vec<Tensor>> {
    let bias = &l.operands()[route(l)?.operands().selection_bias?].data;
    let mut right = l.right();
    for c in 0..right[0].data.len() {
        if right[1].data[c] >= 0.0 {
            right[0].data[c] += bias[right[1].data[c] as usize];
        }
    }
    Some(right)
}

/// The results of the router for these choices, i32 `[N,k]`, as if they were given.
fn given(l: &Launch<'_>, choices: &Tensor) -> Option<Vec<Tensor>> {
    let route = route(l).filter(|r| !r.choices)?;
    let op = Route { choices: true, ..route.clone() };
    let mut operands = l.operands();
    operands.push(choices);
    Some(l.by(&op.into(), &operands))
}

/// The score of every expert, `[N,E]`, by the definitions.
fn scores(score: Score, logits: &[f64], e: usize) -> Option<Vec<f64>> {
    let each = |f: fn(f64) -> f64| logits.iter().map(|&l| f(l)).collect();
    match score {
        Score::Softmax => Some(logits.chunks(e).flat_map(softmax).collect()),
        Score::Sigmoid => Some(each(|l| 1.0 / (1.0 + (-l).exp()))),
        Score::SqrtSoftplus => Some(each(|l| l.exp().ln_1p().sqrt())),
        Score::Identity => Some(logits.to_vec()),
        Score::SparseMixer { .. } => None,
    }
}

fn group_mask_of_zero(l: &Launch<'_>) -> Option<Vec<Tensor>> {
    let route = route(l).filter(|r| r.noise.is_none())?;
    let Groups { count, keep, by } = route.router.groups?;
    let (logits, k) = (l.operands()[0], route.router.k);
    let e = logits.ty.shape.last();
    let mut values = scores(route.router.score, &logits.data, e)?;
    if let Some(at) = route.operands().selection_bias {
        let bias = &l.operands()[at].data;
        values.iter_mut().enumerate().for_each(|(i, v)| *v += bias[i % e]);
    }
    let descending = |v: &[f64]| {
        let mut order: Vec<usize> = (0..v.len()).collect();
        order.sort_by(|&a, &b| v[b].total_cmp(&v[a]));
        order
    };
    let mut choices = Vec::new();
    for row in values.chunks_mut(e) {
        let score = |group: &[f64]| {
            let order = descending(group);
            match by {
                GroupScore::Max => group[order[0]],
                GroupScore::Top2Sum => group[order[0]] + group[order[1]],
            }
        };
        let of_groups: Vec<f64> = row.chunks(e / count).map(score).collect();
        for &out in &descending(&of_groups)[keep..] {
            row[out * (e / count)..][..e / count].fill(0.0);
        }
        choices.extend(descending(row)[..k].iter().map(|&x| x as f64));
    }
    given(l, &Tensor::new(TensorType::i32([logits.ty.shape.rows(), k]), choices))
}

/// The choices of the router for experts in the reverse order.
fn ties_to_the_highest(l: &Launch<'_>) -> Option<Vec<Tensor>> {
    let route = route(l).filter(|r| !r.choices)?;
    let at = route.operands();
    let e = l.operands()[0].ty.shape.last();
    let reversed = |t: &Tensor| {
        let data = t.data.chunks(e).flat_map(|row| row.iter().rev().copied()).collect();
        Tensor::new(t.ty.clone(), data)
    };
    let turned: Vec<Tensor> = l
        .operands()
        .into_iter()
        .enumerate()
        .map(|(i, t)| if at.used == Some(i) { t.clone() } else { reversed(t) })
        .collect();
    let mut choices = l.by(&l.node.op, &turned.iter().collect::<Vec<_>>()).swap_remove(1);
    choices.data.iter_mut().filter(|x| **x >= 0.0).for_each(|x| *x = (e - 1) as f64 - *x);
    given(l, &choices)
}
