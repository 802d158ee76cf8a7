//! Every published router against its rule, computed here in f64 from the rule's own words, by weights and choices.

use std::collections::HashMap;

use moebius_ir::reference::{Precision, run};
use moebius_ir::{Graph, Tensor, TensorType, philox};
use moebius_models::config::{Config, Family, ModelConfig};
use moebius_models::gpt::router::{self, GateInputs};

const TOKENS: usize = 12;
const EXPERTS: usize = 8;

fn config(family: &str, k: usize) -> ModelConfig {
    let mut config = Config::preset("tiny-pr-moe").unwrap();
    for change in [format!("model.router.preset={family}"), format!("model.top_k={k}"), "model.mlp=standard".into()] {
        config.set(&change).unwrap();
    }
    config.model
}

/// Logits with a tie in every third row.
fn logits() -> Vec<f64> {
    let mut l: Vec<f64> = (0..TOKENS * EXPERTS).map(|i| f64::from(philox::normal([5, 9], 0, i as u64)) * 2.0).collect();
    for row in l.chunks_mut(EXPERTS).step_by(3) {
        row[6] = row[1];
    }
    l
}

const BIAS: [f64; EXPERTS] = [0.0, -0.5, 0.5, 0.25, -2.0, 0.75, 0.1, -0.1];

/// Experts and weights of every token by the graph, without noise and capacity.
fn graph(m: &ModelConfig, logits: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let routing = m.routing();
    let mut g = Graph::new();
    let ty = TensorType::f32([TOKENS, EXPERTS]);
    let mut feeds = HashMap::from([("logits".to_string(), Tensor::new(ty.clone(), logits.to_vec()))]);
    let l = g.feed("logits", ty).unwrap();
    let selection_bias = routing.selection_bias.then(|| {
        let ty = TensorType::f32([EXPERTS]);
        feeds.insert("bias".into(), Tensor::new(ty.clone(), BIAS.to_vec()));
        g.feed("bias", ty).unwrap()
    });
    let inputs = GateInputs { selection_bias, ..GateInputs::default() };
    let gating = router::gate(&mut g, &routing, m.top_k(), None, l, &inputs).unwrap();
    let out = run(&g, &feeds, Precision::Exact).unwrap();
    (out.value(gating.expert_index).data.clone(), out.value(gating.gate).data.clone())
}

/// Indices by descending value, the lower index first among equals.
fn ranked(v: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..v.len()).collect();
    order.sort_by(|&a, &b| v[b].total_cmp(&v[a]).then(a.cmp(&b)));
    order
}

fn softmax(v: &[f64]) -> Vec<f64> {
    let sum: f64 = v.iter().map(|x| x.exp()).sum();
    v.iter().map(|x| x.exp() / sum).collect()
}

fn sigmoid(v: &[f64]) -> Vec<f64> {
    v.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()
}

fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn pick(v: &[f64], by: &[f64], k: usize) -> Vec<(usize, f64)> {
    ranked(by)[..k].iter().map(|&e| (e, v[e])).collect()
}

fn divided(mut chosen: Vec<(usize, f64)>, scale: f64) -> Vec<(usize, f64)> {
    let sum: f64 = chosen.iter().map(|c| c.1).sum();
    chosen.iter_mut().for_each(|c| c.1 *= scale / sum);
    chosen
}

/// All but the best `keep` of four groups of two are out.
fn grouped(by: &[f64], keep: usize, score: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let groups: Vec<f64> = by.chunks(2).map(score).collect();
    let best = &ranked(&groups)[..keep];
    by.iter().enumerate().map(|(e, &v)| if best.contains(&(e / 2)) { v } else { f64::NEG_INFINITY }).collect()
}

type Rule = fn(&[f64]) -> Vec<(usize, f64)>;

fn rules() -> Vec<(&'static str, usize, Rule)> {
    let raw1: Rule = |l| pick(&softmax(l), l, 1);
    let raw2: Rule = |l| pick(&softmax(l), l, 2);
    // A softmax over the chosen logits is the same as dividing their probabilities by their sum.
    let chosen2: Rule = |l| divided(pick(&softmax(l), l, 2), 1.0);
    let chosen3: Rule = |l| divided(pick(&softmax(l), l, 3), 1.0);
    let noaux: Rule = |l| divided(pick(&sigmoid(l), &plus(&sigmoid(l), &BIAS), 3), 1.0);
    vec![
        ("top1", 1, raw1),
        ("top2", 2, chosen2),
        ("topk", 3, chosen3),
        ("switch", 1, raw1),
        ("gshard", 2, chosen2),
        ("deepspeed-top1", 1, raw1),
        ("deepspeed-top2", 2, chosen2),
        ("deepspeed-topk", 3, chosen3),
        ("fair", 2, chosen2),
        ("tutel", 3, chosen3),
        ("mixtral", 2, chosen2),
        ("qwen2-moe", 2, raw2),
        ("qwen3-moe", 3, chosen3),
        ("qwen3-next", 3, chosen3),
        ("olmoe", 2, raw2),
        ("deepseek-v2", 2, |l| {
            let p = softmax(l);
            let by = grouped(&p, 3, |g| g[0].max(g[1]));
            pick(&p, &by, 2).into_iter().map(|(e, w)| (e, 16.0 * w)).collect()
        }),
        ("deepseek-v3", 3, |l| {
            let by = grouped(&plus(&sigmoid(l), &BIAS), 2, |g| g[0] + g[1]);
            divided(pick(&sigmoid(l), &by, 3), 2.5)
        }),
        ("deepseek-v4", 3, |l| {
            let v: Vec<f64> = l.iter().map(|x| x.exp().ln_1p().sqrt()).collect();
            divided(pick(&v, &plus(&v, &BIAS), 3), 1.0)
        }),
        ("minimax-m2", 3, noaux),
        ("ernie-4.5", 3, |l| divided(pick(&softmax(l), &plus(&softmax(l), &BIAS), 3), 1.0)),
        ("gpt-oss", 3, chosen3),
        ("granite", 3, chosen3),
        ("llama-4", 1, |l| pick(&sigmoid(l), l, 1)),
        ("arctic", 2, chosen2),
        ("gemma-4", 3, chosen3),
        ("nemotron-3", 3, |l| divided(pick(&sigmoid(l), &plus(&sigmoid(l), &BIAS), 3), 2.5)),
        ("phi-3.5", 2, |l| {
            let mut left = l.to_vec();
            let mut chosen = Vec::new();
            for _ in 0..2 {
                let best = ranked(&left)[0];
                let near = |x: f64| (left[best] - x) / left[best].max(x.abs()) <= 2.0 * 0.01;
                let sum: f64 = left.iter().filter(|x| x.is_finite() && near(**x)).map(|x| (x - left[best]).exp()).sum();
                chosen.push((best, 1.0 / sum));
                left[best] = f64::NEG_INFINITY;
            }
            chosen
        }),
    ]
}

#[test]
fn every_family_routes_by_its_published_rule() {
    let logits = logits();
    let rules = rules();
    // Where experts choose there is nothing to choose for a token: the next test.
    assert_eq!(rules.len() + 1, Family::ALL.len());
    for (family, k, rule) in rules {
        let mut m = config(family, k);
        if m.routing().groups > 1 {
            let mut whole = Config { model: m, ..Config::preset("tiny-pr-moe").unwrap() };
            whole.set("model.router.groups=4").unwrap();
            let keep = if family == "deepseek-v2" { 3 } else { 2 };
            whole.set(&format!("model.router.group_keep={keep}")).unwrap();
            m = whole.model;
        }
        let (experts, gates) = graph(&m, &logits);
        for (t, row) in logits.chunks(EXPERTS).enumerate() {
            for (j, (expert, weight)) in rule(row).into_iter().enumerate() {
                let c = t * k + j;
                assert_eq!(experts[c], expert as f64, "{family}: token {t}, choice {j}");
                assert!(
                    (gates[c] - weight).abs() < 1e-12,
                    "{family}: token {t}, choice {j}: {} for {weight}",
                    gates[c]
                );
            }
        }
    }
}

#[test]
fn experts_that_choose_take_their_best_tokens() {
    let m = config("expert-choice", 1);
    let logits = logits();
    let mut g = Graph::new();
    let ty = TensorType::f32([TOKENS, EXPERTS]);
    let l = g.feed("logits", ty.clone()).unwrap();
    let gating = router::gate(&mut g, &m.routing(), 1, Some(3), l, &GateInputs::default()).unwrap();
    let out =
        run(&g, &HashMap::from([("logits".to_string(), Tensor::new(ty, logits.clone()))]), Precision::Exact).unwrap();
    let (index, slot) = (out.value(gating.expert_index), out.value(gating.choice_slot));
    let rows: Vec<Vec<f64>> = logits.chunks(EXPERTS).map(softmax).collect();
    let mut left = TOKENS;
    let mut met = [false; TOKENS];
    for e in 0..EXPERTS {
        let column: Vec<f64> = rows.iter().map(|r| r[e]).collect();
        let mut wanted = ranked(&column)[..3].to_vec();
        wanted.sort_unstable();
        let of_expert = |t: &usize| {
            (0..EXPERTS).any(|j| {
                let c = t * EXPERTS + j;
                index.data[c] == e as f64 && slot.data[c] >= 0.0
            })
        };
        assert_eq!((0..TOKENS).filter(of_expert).collect::<Vec<_>>(), wanted, "expert {e}");
        wanted.into_iter().for_each(|t| met[t] = true);
    }
    left -= met.iter().filter(|m| **m).count();
    assert_eq!(out.value(gating.dropped).data, [left as f64]);
    assert_eq!(out.value(gating.counts).data, [3.0; EXPERTS]);
}
