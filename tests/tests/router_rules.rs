//! Rules of the models' router that no dense equivalent tells: who stays when an expert is full, how many slots it has, what is drawn
//! at random, and what a step that is not finite leaves alone.

use std::collections::HashMap;
use std::sync::Arc;

use moebius::{Engine, Error, Optimizer, Session, Trainer};
use moebius_ir::reference::{Precision, run};
use moebius_ir::{DType, Graph, Tensor, TensorType, Value};
use moebius_models::config::{CapacityRule, Config, Family, Order};
use moebius_models::gpt;
use moebius_models::gpt::router::{self, CapacityOf, GateInputs, RouterNoise, Source};
use moebius_tests::device;

/// A graph whose feeds have values.
#[derive(Default)]
struct Fed {
    g: Graph,
    feeds: HashMap<String, Tensor>,
}

impl Fed {
    fn feed(&mut self, tensor: Tensor) -> Value {
        let name = format!("x{}", self.feeds.len());
        let value = self.g.feed(&name, tensor.ty.clone()).unwrap();
        self.feeds.insert(name, tensor);
        value
    }

    fn key(&mut self, a: u32) -> Value {
        self.feed(Tensor::new(TensorType::new(DType::U32, [2]), vec![f64::from(a), 7.0]))
    }

    fn values<const N: usize>(&self, values: [Value; N]) -> [Vec<f64>; N] {
        let run = run(&self.g, &self.feeds, Precision::Rounded).unwrap();
        values.map(|v| run.value(v).data.clone())
    }
}

/// The choices that have a slot.
fn kept(choice_slot: &[f64]) -> Vec<usize> {
    (0..choice_slot.len()).filter(|&c| choice_slot[c] >= 0.0).collect()
}

#[test]
fn batch_prioritised_order_puts_first_choices_first_whatever_the_scores_are() {
    // First choices of six tokens, alternately of two experts; second choices the other way round.
    let experts = [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0];
    for (first, what) in [
        ([40.0, -30.0, 7.0, 0.5, -3.0, 12.0], "logits"),
        ([4e4, -3e4, 7e3, 5e2, -3e3, 1.2e4], "large logits"),
        ([0.4, 0.1, 0.7, 0.5, 0.3, 0.2], "probabilities"),
        ([3.0, 3.0, 3.0, 3.0, 3.0, 3.0], "equal scores"),
    ] {
        let scores: Vec<f64> = first.iter().flat_map(|&v| [v, v + 1000.0]).collect();
        for capacity in 0..=6 {
            // By hand: all choices of an expert by rank, then by the first score of their token, then by token.
            let mut wanted = Vec::new();
            for e in 0..2 {
                let mut of_expert: Vec<usize> = (0..12).filter(|&c| experts[c] == e).collect();
                of_expert.sort_by(|&a, &b| {
                    (a % 2).cmp(&(b % 2)).then(first[b / 2].total_cmp(&first[a / 2])).then(a.cmp(&b))
                });
                wanted.extend(of_expert.into_iter().take(capacity));
            }
            wanted.sort_unstable();
            let mut f = Fed::default();
            let index = f.feed(Tensor::i32([6, 2], &experts));
            let score = f.feed(Tensor::f32([6, 2], scores.clone()));
            let slots = router::slots(&mut f.g, Order::Batch, 2, Some(capacity), score, index, Source::Off).unwrap();
            let [choice_slot] = f.values([slots[1]]);
            assert_eq!(kept(&choice_slot), wanted, "{what}, capacity {capacity}");
        }
    }
}

#[test]
fn a_score_that_is_not_a_number_comes_last_in_batch_prioritised_order_and_harms_no_other() {
    let mut f = Fed::default();
    let index = f.feed(Tensor::i32([3, 2], &[0, 1, 0, 1, 0, 1]));
    let score = f.feed(Tensor::f32([3, 2], vec![-5.0, 0.0, f64::NAN, 0.0, 9.0, 0.0]));
    let slots = router::slots(&mut f.g, Order::Batch, 2, Some(1), score, index, Source::Off).unwrap();
    let [choice_slot] = f.values([slots[1]]);
    // Of each expert the choice of the last token, whose first score is the largest.
    assert_eq!(kept(&choice_slot), [4, 5]);
}

#[test]
fn slots_of_an_expert_by_the_published_rules() {
    let slots = |rule, k, min, evaluation, (factor, tokens, experts)| {
        CapacityOf { rule, k, min, evaluation }.slots(factor, tokens, experts)
    };
    // fairseq: 2 ceil(S/E) in training, ceil(0.25 S) in evaluation where a factor is given; no least capacity.
    let fair = |min, evaluation, sizes| slots(CapacityRule::Fair, 2, min, evaluation, sizes);
    for (sizes, wanted) in [((1.0, 17, 4), 10), ((1.0, 16, 4), 8), ((1.0, 3, 8), 2), ((1.0, 1, 512), 2)] {
        assert_eq!(fair(4, false, sizes), wanted, "{sizes:?}");
        assert_eq!(fair(100, false, sizes), wanted, "a least capacity has no part, {sizes:?}");
    }
    for (sizes, wanted) in [((0.25, 17, 4), 5), ((0.25, 16, 4), 4), ((0.25, 3, 8), 1)] {
        assert_eq!(fair(100, true, sizes), wanted, "{sizes:?}");
    }
    // Tutel: k int(f ceil(S/E)); no least capacity, but never no slot at all.
    for (k, sizes, wanted) in [
        (2, (1.0, 17, 4), 10),
        (2, (1.25, 17, 4), 12),
        (3, (0.5, 17, 4), 6),
        (1, (0.9, 17, 4), 4),
        (2, (0.1, 17, 4), 1),
    ] {
        assert_eq!(slots(CapacityRule::Tutel, k, 0, false, sizes), wanted, "{k} {sizes:?}");
        assert_eq!(slots(CapacityRule::Tutel, k, 100, false, sizes), wanted, "a least capacity has no part");
    }
    // DeepSpeed and Mesh TensorFlow have one.
    assert_eq!(slots(CapacityRule::Deepspeed, 2, 4, false, (0.5, 17, 8)), 4);
    assert_eq!(slots(CapacityRule::Deepspeed, 2, 1, false, (0.5, 17, 8)), 3);
    assert_eq!(slots(CapacityRule::Gshard, 2, 4, false, (0.5, 17, 8)), 4);
    assert_eq!(slots(CapacityRule::Gshard, 2, 1, false, (0.5, 17, 8)), 2);
    assert_eq!(slots(CapacityRule::Gshard, 2, 4, false, (8.0, 3, 2)), 3, "at most the tokens");
}

#[test]
fn given_random_priorities_are_those_of_the_chosen_experts_and_a_choice_of_nothing_has_none() {
    // The first token's choices go nowhere: their place in the table would lie before it.
    let experts = [-1, -1, 0, 2, 0, 1, 2, 0, 1, -1];
    let priority: Vec<f64> = (0..15).map(|i| f64::from(i * 7 % 15) / 15.0).collect();
    for capacity in 1..4 {
        let mut wanted = Vec::new();
        for e in 0..3 {
            let mut of_expert: Vec<usize> = (0..10).filter(|&c| experts[c] == e).collect();
            of_expert.sort_by(|&a, &b| {
                let of = |c: usize| priority[c / 2 * 3 + e as usize];
                of(b).total_cmp(&of(a))
            });
            wanted.extend(of_expert.into_iter().take(capacity));
        }
        wanted.sort_unstable();
        let mut f = Fed::default();
        let index = f.feed(Tensor::i32([5, 2], &experts));
        let score = f.feed(Tensor::f32([5, 2], vec![0.0; 10]));
        let given = f.feed(Tensor::f32([5, 3], priority.clone()));
        let slots =
            router::slots(&mut f.g, Order::Random, 3, Some(capacity), score, index, Source::Given(given)).unwrap();
        let [choice_slot] = f.values([slots[1]]);
        assert_eq!(kept(&choice_slot), wanted, "capacity {capacity}");
    }
}

#[test]
fn random_token_selection_depends_on_the_key_and_evaluation_takes_the_first() {
    let of = |key: Option<u32>, layer| {
        let mut f = Fed::default();
        let index = f.feed(Tensor::i32([64, 1], &[0; 64]));
        let score = f.feed(Tensor::f32([64, 1], vec![1.0; 64]));
        let source = key.map_or(Source::Off, |key| Source::Drawn { key: f.key(key), layer });
        let slots = router::slots(&mut f.g, Order::Random, 2, Some(16), score, index, source).unwrap();
        let [choice_slot] = f.values([slots[1]]);
        kept(&choice_slot)
    };
    let first: Vec<usize> = (0..16).collect();
    assert_eq!(of(None, 0), first);
    let drawn = of(Some(1), 0);
    assert!(drawn.len() == 16 && drawn != first, "{drawn:?}");
    assert_eq!(of(Some(1), 0), drawn);
    assert!(of(Some(2), 0) != drawn && of(Some(1), 1) != drawn);
    // Later tokens stay as often as earlier ones.
    let late: usize = (0..50).map(|key| of(Some(key), 0).iter().filter(|&&t| t >= 32).count()).sum();
    assert!((300..500).contains(&late), "{late} of 800");
}

#[test]
fn a_random_second_choice_stays_with_twice_its_gate() {
    let routing = Family::Gshard.routing(2);
    let bounds: [(f64, usize, usize); 3] = [(0.05, 250, 550), (0.25, 1800, 2200), (0.499, 3950, 4000)];
    for (second, least, most) in bounds {
        let mut f = Fed::default();
        // Two experts, so that the gates are the two probabilities.
        let row = [(1.0 - second).ln(), second.ln()];
        let logits = f.feed(Tensor::f32([4000, 2], row.repeat(4000)));
        let key = f.key(11);
        let inputs = GateInputs { noise: RouterNoise::drawn(key, 3), ..GateInputs::default() };
        let gating = router::gate(&mut f.g, &routing, 2, None, logits, &inputs).unwrap();
        let [index] = f.values([gating.expert_index]);
        assert!(index.chunks(2).all(|c| c[0] == 0.0 && (c[1] == 1.0 || c[1] == -1.0)));
        let stayed = index.chunks(2).filter(|c| c[1] == 1.0).count();
        assert!((least..=most).contains(&stayed), "{stayed} of 4000 for the gate {second}");
    }
}

#[test]
fn jitter_stays_in_its_bounds_and_differs_by_layer_and_key() {
    let routing = Family::Switch.routing(1);
    let factors = |key, layer| {
        let mut f = Fed::default();
        let x = f.feed(Tensor::f32([50, 40], vec![1.0; 2000]));
        let key = f.key(key);
        let jittered = router::jittered(&mut f.g, &routing, x, Source::Drawn { key, layer }).unwrap();
        let [factors] = f.values([jittered]);
        factors
    };
    let one = factors(1, 0);
    let (least, most) = one.iter().fold((f64::MAX, f64::MIN), |(a, b), &v| (a.min(v), b.max(v)));
    assert!((0.99..0.991).contains(&least) && (1.009..=1.01 + 1e-6).contains(&most), "{least} to {most}");
    assert!((one.iter().sum::<f64>() / 2000.0 - 1.0).abs() < 1e-3);
    assert_eq!(factors(1, 0), one);
    assert!(factors(2, 0) != one && factors(1, 1) != one);
}

/// A model with a selection bias, its parameters set.
fn biased() -> (Session, Trainer) {
    let mut config = Config::preset("tiny-pr-moe").unwrap();
    for setting in [
        "model.layers=2",
        "model.experts=[6]",
        "model.width=8",
        "model.heads=2",
        "model.ffn=6",
        "model.sequence=5",
        "model.mlp=standard",
        "model.top_k=2",
        "model.router.preset=minimax-m2",
    ] {
        config.set(setting).unwrap();
    }
    config.validate().unwrap();
    let mut session = Engine::with_backend(Arc::new(device::cpu(1))).session();
    let training = gpt::training(&config.model, 2).unwrap();
    let mut trainer = Trainer::new(&mut session, training.graph, training.loss, &Optimizer::default()).unwrap();
    for name in trainer.parameters().to_vec() {
        let name = name.as_str();
        let elements = session.ty(name).unwrap().elements();
        let values: Vec<f32> = (0..elements).map(|i| 0.3 * (i as f32 * 1.7 + name.len() as f32).sin()).collect();
        session.write(name, &values).unwrap();
    }
    let ids: Vec<i32> = (0..10).map(|i| i * 37 % 256).collect();
    trainer.program().feed("tokens", &ids).unwrap();
    trainer.program().feed("targets", &ids).unwrap();
    (session, trainer)
}

#[test]
fn a_step_that_is_not_finite_moves_no_selection_bias_and_counts_no_idle_expert() {
    let everything = |session: &Session| -> Vec<(String, Vec<u8>)> {
        session.names().into_iter().map(|n| (n.to_owned(), session.bytes(n).unwrap().into_owned())).collect()
    };
    let (mut session, mut trainer) = biased();
    let name = "layers.1.moe.router.selection_bias";
    trainer.step(&mut session, 1e-3).unwrap();
    let moved = session.read::<f32>(name).unwrap();
    assert!(moved.iter().any(|b| *b != 0.0), "a finite step moves the bias: {moved:?}");
    let right = session.read::<f32>("norm.weight").unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut wrong = right.clone();
        wrong[3] = bad;
        session.write("norm.weight", &wrong).unwrap();
        let before = everything(&session);
        match trainer.step(&mut session, 1e-3) {
            Err(Error::NonFinite { step: 2, .. }) => {}
            other => panic!("{other:?}"),
        }
        for ((name, now), (_, then)) in everything(&session).iter().zip(&before) {
            assert!(now == then, "{name} changed in a step that was not finite");
        }
    }
    session.write("norm.weight", &right).unwrap();
    trainer.step(&mut session, 1e-3).unwrap();
    assert_ne!(session.read::<f32>(name).unwrap(), moved);
}
