//! The models' sparse layer with the router of every family against dense equivalents, values and gradients: on the CPU backend with
//! memory checks, the equivalents in f64. Idle experts, one busy expert, equal experts and tokens, one token, k = E and capacities
//! that leave no slot are drawn often.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::OnceLock;

use moebius_backends::cpu::Cpu;
use moebius_ir::reference::{Precision, run as reference};
use moebius_ir::{DType, Role, Tensor, TensorType, Value};
use moebius_models::config::{ApplyTo, Family, Mlp, Normalise, Score};
use moebius_models::gpt::router::{self, GateInputs, RouterNoise};
use moebius_tests::device;
use moebius_tests::families::check::{self, CLOSE, Found, Results};
use moebius_tests::families::oracle::Routes;
use moebius_tests::families::{Draw, Kind, Layer, dense};
use moebius_tests::tolerance::difference;
use moebius_tests::{Sketch, cases_of};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(|| device::cpu(1))
}

fn run(s: &Sketch) -> Results {
    check::run(cpu(), s)
}

/// Every output of the dense equivalent is that of the layer.
fn agree(got: &Results, wanted: &Sketch, of: &Layer) -> Result<(), TestCaseError> {
    check::agree(got, wanted, check::close(&of.routing)).map_err(TestCaseError::fail)
}

fn draws(family: Family) -> impl Strategy<Value = Draw> {
    let sizes = (2usize..9, 0usize..10, 1usize..11, 2usize..6, 1usize..6);
    let capacity = prop_oneof![1 => Just(None), 2 => (0.05f64..2.0).prop_map(Some)];
    let kind = prop::sample::select(Kind::ALL.to_vec());
    // A quarter of the draws have one token.
    let alone = prop::sample::select(vec![true, false, false, false]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), 0usize..3, alone);
    (sizes, capacity, kind, flags, 2u32..1_000_000).prop_map(
        move |((experts, k, tokens, width, hidden), capacity, kind, flags, seed)| {
            let (residual, noisy, by_id, least, alone) = flags;
            // From 6 on all experts, so that this is drawn often.
            let k = if k >= 6 { experts } else { k + 1 };
            let tokens = if alone { 1 } else { tokens };
            let draw =
                Draw { family, experts, k, tokens, width, hidden, capacity, least, residual, noisy, by_id, kind, seed };
            draw.fitted()
        },
    )
}

/// 256 draws of each family.
fn holds(families: &[Family], property: impl Fn(Draw) -> Result<(), TestCaseError>) {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/families.txt");
    for &family in families {
        let found = TestRunner::new(cases_of(file)).run(&draws(family), &property);
        found.unwrap_or_else(|e| panic!("{family}: {e}"));
    }
}

/// An edge that the draws must meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Edge {
    /// An expert that no token wants.
    IdleExpert,
    /// One expert that all of several tokens want first.
    OneExpert,
    /// A token with two experts of the same logit, and all comparisons clear.
    EqualExperts,
    /// Two tokens that want the same, where one of the two is dropped, and all comparisons clear.
    EqualTokens,
    /// One token.
    OneToken,
    /// As many choices as experts.
    AllExperts,
    /// A choice without a slot.
    Dropped,
    /// A token whose choices all find no slot.
    NoSlotLeft,
    /// No capacity.
    Dropless,
}

const EDGES: [Edge; 9] = [
    Edge::IdleExpert,
    Edge::OneExpert,
    Edge::EqualExperts,
    Edge::EqualTokens,
    Edge::OneToken,
    Edge::AllExperts,
    Edge::Dropped,
    Edge::NoSlotLeft,
    Edge::Dropless,
];

/// The edges of a draw, by the rules alone.
fn edges(draw: &Draw) -> Vec<Edge> {
    let layer = layer(draw);
    let logits = dense::logits(&layer).unwrap().data;
    let Routes { expert, place, clear, .. } = check::routes(draw, &layer, None);
    let (e, tokens) = (draw.experts, draw.tokens);
    // Where experts choose, whom they keep is what they want.
    let wanted = |t: usize, j: usize| !layer.routing.expert_choice || place[t][j].is_some();
    let wants: Vec<Vec<usize>> = (0..tokens).map(|t| (0..place[t].len()).filter(|&j| wanted(t, j)).collect()).collect();
    let first: Vec<Option<usize>> = (0..tokens).map(|t| wants[t].first().map(|&j| expert[t][j])).collect();
    let mut load = vec![0; e];
    (0..tokens).for_each(|t| wants[t].iter().for_each(|&j| load[expert[t][j]] += 1));
    let kept = |t: usize| place[t].iter().map(Option::is_some).collect::<Vec<_>>();
    let row = |t: usize| &logits[t * e..][..e];
    let holds = |edge: &Edge| match edge {
        Edge::IdleExpert => load.contains(&0),
        Edge::OneExpert => tokens > 1 && first[0].is_some() && first.iter().all(|f| *f == first[0]),
        Edge::EqualExperts => clear && (0..tokens).any(|t| (0..e).any(|x| row(t)[..x].contains(&row(t)[x]))),
        Edge::EqualTokens => clear && (1..tokens).any(|t| row(t - 1) == row(t) && kept(t - 1) != kept(t)),
        Edge::OneToken => tokens == 1,
        Edge::AllExperts => draw.k == e,
        Edge::Dropped => (0..tokens).any(|t| wants[t].iter().any(|&j| place[t][j].is_none())),
        Edge::NoSlotLeft => place.iter().any(|of_token| of_token.iter().all(Option::is_none)),
        Edge::Dropless => router::capacity(&layer.config, true, tokens, e).is_none(),
    };
    EDGES.into_iter().filter(holds).collect()
}

#[test]
fn the_draws_meet_every_edge() {
    for family in Family::ALL {
        let (all, met) = (Cell::new(0), RefCell::new(BTreeMap::new()));
        holds(&[family], |draw| {
            all.set(all.get() + 1);
            edges(&draw).into_iter().for_each(|edge| *met.borrow_mut().entry(edge).or_insert(0) += 1);
            Ok(())
        });
        assert!(all.get() >= 256, "{family}: {} draws", all.get());
        for edge in EDGES {
            let never = match edge {
                Edge::AllExperts => family.fixed_top_k() == Some(1) || family == Family::ExpertChoice,
                // Where experts choose, each has its tokens, none is turned away, and there is always a capacity.
                Edge::IdleExpert | Edge::OneExpert | Edge::Dropped | Edge::Dropless => family == Family::ExpertChoice,
                Edge::EqualExperts | Edge::EqualTokens | Edge::OneToken | Edge::NoSlotLeft => false,
            };
            let met = met.borrow().get(&edge).copied().unwrap_or(0);
            assert!(never || met >= 5, "{family}: {met} draws with {edge:?}");
        }
    }
}

fn layer(draw: &Draw) -> Layer {
    Layer::new(draw, &|_, _| {}).unwrap_or_else(|e| panic!("{draw:?}: {e}"))
}

fn one_hot_form(draw: Draw) -> Result<(), TestCaseError> {
    let found = check::one_hot_form(cpu(), &draw).map_err(TestCaseError::fail)?;
    prop_assume!(found == Found::Agrees);
    Ok(())
}

macro_rules! one_hot_form_of {
    ($($name:ident: $family:ident,)*) => {
        mod one_hot_form_of { $(#[test] fn $name() { super::holds(&[super::Family::$family], super::one_hot_form); })* }
        #[test]
        fn every_family_has_its_one_hot_form() {
            assert_eq!([$(Family::$family),*], Family::ALL);
        }
    };
}

one_hot_form_of! {
    top1: Top1, top2: Top2, topk: TopK, switch: Switch, gshard: Gshard, deepspeed_top1: DeepspeedTop1,
    deepspeed_top2: DeepspeedTop2, deepspeed_topk: DeepspeedTopK, fair: Fair, tutel: Tutel, mixtral: Mixtral,
    qwen2_moe: Qwen2Moe, qwen3_moe: Qwen3Moe, qwen3_next: Qwen3Next, olmoe: Olmoe, deepseek_v2: DeepseekV2,
    deepseek_v3: DeepseekV3, deepseek_v4: DeepseekV4, minimax_m2: MinimaxM2, ernie: Ernie45, gpt_oss: GptOss,
    granite: Granite, phi: Phi35, llama4: Llama4, arctic: Arctic, gemma4: Gemma4,
    nemotron3: Nemotron3, expert_choice: ExpertChoice,
}

fn all_but(left_out: &[Family]) -> Vec<Family> {
    Family::ALL.into_iter().filter(|f| !left_out.contains(f)).collect()
}

#[test]
fn all_experts_are_the_dense_mixture() {
    // Families of one choice have no k = E, and the gates of a mixer depend on an order.
    holds(&all_but(&[Family::Top1, Family::DeepspeedTop1, Family::Phi35]), |draw| {
        let draw = draw.with_all_experts();
        let expert_choice = draw.family == Family::ExpertChoice;
        prop_assert!(draw.k == draw.experts || expert_choice);
        // Each expert takes every token.
        let capacity = expert_choice.then_some(draw.experts as f64);
        let mut layer = layer(&Draw { capacity, noisy: false, ..draw });
        layer.outputs(false).unwrap();
        agree(&run(&layer.s), &dense::mixture(&layer).unwrap().unwrap(), &layer)
    });
}

#[test]
fn enough_capacity_is_dropless() {
    holds(&all_but(&[Family::ExpertChoice]), |draw| {
        let results = |capacity| {
            let mut layer = layer(&Draw { capacity, ..draw });
            layer.outputs(true).unwrap();
            run(&layer.s)
        };
        // Of the share of an expert, as many as there are experts: every token finds a slot, whatever the rule.
        let (without, enough) = (results(None), results(Some(draw.experts as f64)));
        prop_assert_eq!(&enough["dropped"].data, &[0.0]);
        prop_assert!(device::same_bits(&without, &enough));
        Ok(())
    });
}

#[test]
fn relabelled_experts_change_nothing_but_the_order_of_their_weights() {
    holds(&Family::ALL, |draw| {
        // The table of ids names experts, and which of two equal experts is chosen is a matter of their names.
        let kind = if draw.kind == Kind::EqualExperts { Kind::Idle } else { draw.kind };
        let draw = Draw { by_id: false, kind, ..draw };
        let mut layer = layer(&draw);
        layer.outputs(true).unwrap();
        prop_assume!(check::routes(&draw, &layer, None).clear);
        let e = draw.experts;
        // Whole groups go round, and the experts of a group.
        let size = e / layer.routing.groups;
        let place = |x: usize| (x / size + 1) % (e / size) * size + (x % size + 1) % size;
        let relabel = |name: &str, t: &Tensor| {
            let mut out = t.clone();
            let own = name.strip_prefix("d.").or(name.strip_prefix("state.")).unwrap_or(name);
            if own == "priority" || (own == "choice" && t.ty.shape.last() == e && layer.routing.score_noise()) {
                for (i, v) in t.data.iter().enumerate() {
                    out.data[i / e * e + place(i % e)] = *v;
                }
            } else if own.contains("moe.router") || own.contains("moe.experts") {
                let n = t.data.len() / e;
                for x in 0..e {
                    out.data[place(x) * n..][..n].copy_from_slice(&t.data[x * n..][..n]);
                }
            }
            out
        };
        let before = run(&layer.s);
        layer.s.inputs = layer.s.inputs.iter().map(|(n, t)| (n.clone(), relabel(n, t))).collect();
        let after = run(&layer.s);
        for (name, tensor) in before.iter().filter(|(name, _)| *name != "expert_index") {
            let found = difference(&after[name], &relabel(name, tensor), check::close(&layer.routing));
            prop_assert!(found.is_none(), "{}: {}", name, found.unwrap_or_default());
        }
        Ok(())
    });
}

/// Whether the noise on the choice is one number for each expert.
trait ScoreNoise {
    fn score_noise(&self) -> bool;
}

impl ScoreNoise for moebius_models::config::Routing {
    fn score_noise(&self) -> bool {
        use moebius_models::config::Noise;
        matches!(self.noise, Noise::Sample | Noise::SampleSecond)
    }
}

#[test]
fn a_residual_of_nothing_leaves_the_dense_network_alone() {
    holds(&Family::ALL, |draw| {
        let draw = Draw { residual: true, ..draw };
        let mut layer = Layer::new(&draw, &|name, data| {
            // A softmax of (0, 1) for every token, exactly.
            if name.ends_with("coefficient.weight") {
                data.fill(0.0);
            } else if name.ends_with("coefficient.bias") {
                data.copy_from_slice(&[-200.0, 200.0]);
            }
        })
        .unwrap();
        prop_assert_eq!(layer.config.mlp, Mlp::Residual);
        layer.outputs(false).unwrap();
        let got = run(&layer.s);
        agree(&got, &dense::network_alone(&layer).unwrap(), &layer)?;
        for (name, d) in got.iter().filter(|(n, _)| n.starts_with("d.") && !n.contains(".mlp.") && *n != "d.x") {
            prop_assert!(d.data.iter().all(|v| *v == 0.0), "{} is not 0", name);
        }
        Ok(())
    });
}

/// The gating of a draw with logits of its own, in a sketch.
fn gating(s: &mut Sketch, draw: &Draw, logits: Value) -> moebius_ir::Result<router::Gating> {
    let config = draw.config();
    let mut inputs = GateInputs::default();
    if config.routing().selection_bias {
        let data = s.normals(draw.experts);
        inputs.selection_bias = Some(s.fixed(TensorType::f32([draw.experts]), data)?);
    }
    if draw.noisy {
        let key = s.fixed(TensorType::new(DType::U32, [2]), vec![f64::from(draw.seed), 1.0])?;
        inputs.noise = RouterNoise::drawn(key, 0);
    }
    let capacity = router::capacity(&config, true, draw.tokens, draw.experts);
    router::gate(&mut s.graph, &config.routing(), draw.k, capacity, logits, &inputs)
}

#[test]
fn combine_is_the_transpose_of_dispatch() {
    holds(&Family::ALL, |draw| {
        let mut s = Sketch::new(DType::F32).seeded(draw.seed);
        let logits = s.float([draw.tokens, draw.experts], |x| 2.0 * x).unwrap();
        let gating = gating(&mut s, &draw, logits).unwrap();
        let (of_slot, of_choice) = (gating.slot_choice, gating.choice_slot);
        let slots = s.graph.shape(of_slot)[0];
        let x = s.float([draw.tokens, draw.width], |x| x).unwrap();
        let y = s.float([slots, draw.width], |x| x).unwrap();
        let weight = (draw.seed % 2 == 0).then_some(gating.gate);
        let rows = s.graph.dispatch(x, of_slot, of_choice, weight).unwrap();
        let tokens = s.graph.combine(y, of_slot, of_choice, weight).unwrap();
        s.graph.output("rows", rows).unwrap();
        s.graph.output("tokens", tokens).unwrap();
        let results = run(&s);
        let named = |v: Value| s.graph.input_of(v).map(|i| s.inputs[&i.name].clone()).unwrap();
        let dot = |a: &Tensor, b: &Tensor| -> (f64, f64) {
            let terms = a.data.iter().zip(&b.data).map(|(a, b)| a * b);
            (terms.clone().sum(), terms.map(|t| t * t).sum::<f64>().sqrt())
        };
        let ((left, size), (right, _)) = (dot(&results["rows"], &named(y)), dot(&named(x), &results["tokens"]));
        prop_assert!((left - right).abs() <= 1e-6 * size + 1e-12, "{} {}", left, right);
        Ok(())
    });
}

#[test]
fn one_expert_is_the_dense_layer() {
    // A layer of one expert is a dense one to the models, so that its parts are put together here.
    holds(&Family::ALL, |draw| {
        let expert_choice = draw.family == Family::ExpertChoice;
        let (t, w, h) = (draw.tokens, draw.width, draw.hidden);
        let mut routing = draw.family.routing(1);
        routing.groups = 1;
        let mut s = Sketch::new(DType::F32).seeded(draw.seed);
        let x = s.float([t, w], |x| x).unwrap();
        let router_weight = s.float([w, 1], |x| x).unwrap();
        let (up, up_bias) = (s.float([1, w, h], |x| x).unwrap(), s.float([1, h], |x| x).unwrap());
        let (down, down_bias) = (s.float([1, h, w], |x| x).unwrap(), s.float([1, w], |x| x).unwrap());
        let dy = s.normals(t * w);
        let dy = s.named("dy", Role::Feed, TensorType::f32([t, w]), dy, false).unwrap();
        let build = |s: &mut Sketch, sparse: bool| {
            let wrt = s.wrt.clone();
            let g = &mut s.graph;
            let logits = g.matmul(x, router_weight)?;
            let y = if sparse {
                let capacity = expert_choice.then_some(t);
                let gating = router::gate(g, &routing, 1, capacity, logits, &GateInputs::default())?;
                let (slot, choice) = (gating.slot_choice, gating.choice_slot);
                let (before, after) = match routing.apply_to {
                    ApplyTo::Input => (Some(gating.gate), None),
                    ApplyTo::Output => (None, Some(gating.gate)),
                };
                let rows = g.dispatch(x, slot, choice, before)?;
                let rows = g.expert_matmul(rows, up, gating.offsets, Some(up_bias), false)?;
                let rows = g.gelu(rows)?;
                let rows = g.expert_matmul(rows, down, gating.offsets, Some(down_bias), false)?;
                g.combine(rows, slot, choice, after)?
            } else {
                // One gate is its score, or 1 where the gates of a token sum to 1.
                let one = g.splat(TensorType::f32([t, 1]), 1.0)?;
                let gate = match (routing.normalise, routing.score) {
                    (Normalise::None, Score::Sigmoid) => g.sigmoid(logits)?,
                    (Normalise::None, Score::Softmax | Score::SparseMixer) => one,
                    (Normalise::Softmax | Normalise::BeforeDropping | Normalise::AfterDropping, _) => one,
                    (Normalise::None, Score::SqrtSoftplus | Score::Identity) => {
                        unreachable!("no family has such gates")
                    }
                };
                let gate = g.mul_scalar(gate, routing.scale)?;
                let into = if routing.apply_to == ApplyTo::Input { g.mul(x, gate)? } else { x };
                let matrix = |g: &mut moebius_ir::Graph, v: Value| {
                    let shape = g.shape(v)[1..].to_vec();
                    g.reshape(v, shape)
                };
                let (up, up_bias) = (matrix(g, up)?, matrix(g, up_bias)?);
                let (down, down_bias) = (matrix(g, down)?, matrix(g, down_bias)?);
                let rows = g.matmul_with(into, up, Some(up_bias), false, false)?;
                let rows = g.gelu(rows)?;
                let rows = g.matmul_with(rows, down, Some(down_bias), false, false)?;
                if routing.apply_to == ApplyTo::Output { g.mul(rows, gate)? } else { rows }
            };
            let weighted = g.mul(y, dy)?;
            let loss = g.sum_all(weighted)?;
            let way = if sparse { "sparse" } else { "dense" };
            g.output(format!("{way}.y"), y)?;
            let values: Vec<Value> = wrt.iter().map(|&(_, v)| v).collect();
            for ((name, _), d) in wrt.iter().zip(moebius_ir::gradients(g, loss, &values)?) {
                g.output(format!("{way}.d.{name}"), d)?;
            }
            Ok::<_, moebius_ir::Error>(())
        };
        build(&mut s, true).unwrap();
        build(&mut s, false).unwrap();
        let got = run(&s);
        let wanted = reference(&s.graph, &s.inputs, Precision::Exact).unwrap();
        for (name, value) in s.graph.outputs().iter().filter(|(n, _)| n.starts_with("dense")) {
            let sparse = &got[&name.replacen("dense", "sparse", 1)];
            let found = difference(sparse, wanted.value(*value), CLOSE);
            prop_assert!(found.is_none(), "{}: {}", name, found.unwrap_or_default());
        }
        Ok(())
    });
}
