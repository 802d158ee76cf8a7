//! Plans: what lies where, and when.

use std::collections::HashMap;

use moebius::{Optimizer, training_step};
use moebius_backends::Backend;
use moebius_ir::ops::Adamw;
use moebius_ir::{
    DType, Error, FENCE_BYTES, Fences, Graph, Moments, Node, NodeId, Op, Plan, Role, Step, Storage, TensorType, Value,
    gradients, passes,
};
use moebius_tests::device::{self, Live};
use moebius_tests::layers::{self, Moe};
use moebius_tests::{Inputs, Sketch};

const LAYER: Moe = Moe { width: 16, hidden: 24, experts: 4, k: 2, capacity: Some(9), renormalise: true };

/// The training step of a small transformer, and its inputs.
fn training() -> (Graph, Inputs) {
    let mut s = Sketch::new(DType::F32).seeded(3);
    let loss = layers::transformer(&mut s, 2, 11, 37, LAYER).unwrap();
    training_step(&mut s.graph, loss, &Optimizer::default()).unwrap();
    for (name, value) in s.graph.inputs().to_vec() {
        let ty = s.graph.ty(value).clone();
        s.inputs.entry(name.clone()).or_insert_with(|| {
            let value = if name == "learning_rate" { 1e-2 } else { f64::from(u8::from(name == "step")) };
            moebius_ir::Tensor::new(ty.clone(), vec![value; ty.elements()])
        });
    }
    (s.graph, s.inputs)
}

/// Scratch memory of many sizes, as no backend needs it.
fn scratch(_: &Plan, node: NodeId) -> usize {
    node.index() % 5 * 200
}

/// Carries a plan out on memory that holds, instead of numbers, which value each byte belongs to.
struct Owners<'p> {
    plan: &'p Plan,
    arena: Vec<u32>,
    states: HashMap<Value, u32>,
    /// What a value's bytes are marked with: an alias has the mark of its operand.
    mark: Vec<u32>,
}

impl Owners<'_> {
    const SCRATCH: u32 = u32::MAX;

    fn write(&mut self, value: Value) {
        let mark = self.mark[value.index()];
        match self.plan.storage(value) {
            Storage::State(state) => drop(self.states.insert(state, mark)),
            Storage::Arena(at) => self.arena[at..at + self.plan.graph().ty(value).bytes()].fill(mark),
        }
    }

    fn holds(&self, value: Value) -> bool {
        let mark = self.mark[value.index()];
        match self.plan.storage(value) {
            Storage::State(state) => self.states.get(&state) == Some(&mark),
            Storage::Arena(at) => self.arena[at..at + self.plan.graph().ty(value).bytes()].iter().all(|&m| m == mark),
        }
    }

    /// Panics if a step reads what is no longer there, or an output or update is lost.
    fn check(plan: &Plan) {
        let graph = plan.graph();
        let mut mark: Vec<u32> = (0..graph.value_count() as u32).collect();
        for node in graph.nodes() {
            if node.op.is_alias() {
                mark[node.results[0].index()] = mark[node.operands[0].index()];
            }
        }
        let mut me = Owners { plan, arena: vec![Self::SCRATCH; plan.arena_bytes()], states: HashMap::new(), mark };
        let source = |n: &&Node| matches!(n.op, Op::Input(_) | Op::Constant(_));
        graph.nodes().iter().filter(source).for_each(|n| me.write(n.results[0]));
        // Twice: feeds and constants must outlast a run.
        for _ in 0..2 {
            for (_, v) in
                graph.inputs().iter().filter(|(_, v)| graph.input_of(*v).is_some_and(|i| i.role != Role::Feed))
            {
                me.write(*v);
            }
            for (at, step) in plan.steps().iter().enumerate() {
                match *step {
                    Step::Run { node: id, scratch, scratch_bytes } => {
                        let node = graph.node(id);
                        for &v in &node.operands {
                            assert!(me.holds(v), "step {at}, {}: %{} is gone", node.op.name(), v.index());
                        }
                        me.arena[scratch..scratch + scratch_bytes].fill(Self::SCRATCH);
                        node.results.iter().for_each(|&v| me.write(v));
                        if let Some(next) = plan.joined(id) {
                            let follows = |s: &Step| matches!(*s, Step::Run { node, .. } if node == next);
                            assert!(
                                plan.steps().get(at + 1).is_some_and(follows),
                                "step {at}: what is joined comes later"
                            );
                            // All that are joined may write now, and the first ones may still read: none disturbs another.
                            let rest =
                                std::iter::successors(Some(next), |&id| plan.joined(id)).map(|id| graph.node(id));
                            let rest: Vec<&Node> = rest.collect();
                            let before = me.arena.clone();
                            rest.iter().flat_map(|n| &n.results).for_each(|&v| me.write(v));
                            let read = [node].into_iter().chain(rest.iter().rev().skip(1).copied());
                            let last = rest.last().unwrap();
                            for &v in read.flat_map(|n| &n.operands).chain(&last.results) {
                                let made = rest.iter().any(|n| n.results.contains(&v));
                                assert!(made || me.holds(v), "step {at}: what is joined writes over %{}", v.index());
                            }
                            me.arena = before;
                        }
                        // Neither scratch nor another result may lie over an operand or result of the same step.
                        let overwrites = |v: Value| {
                            let here = |&(_, operand): &(usize, usize)| node.operands[operand] == v;
                            let chain = matches!(node.op, Op::Elementwise(_));
                            node.op.in_place().iter().any(here) || chain
                        };
                        for &v in node.results.iter().chain(node.operands.iter().filter(|v| !overwrites(**v))) {
                            assert!(me.holds(v), "step {at}, {}: %{} is written over", node.op.name(), v.index());
                        }
                        me.arena[scratch..scratch + scratch_bytes].fill(Self::SCRATCH);
                        for &v in &node.results {
                            assert!(me.holds(v), "step {at}, {}: scratch over %{}", node.op.name(), v.index());
                        }
                    }
                    Step::Copy { state, new } => {
                        assert!(me.holds(new), "step {at}: the update %{} is gone", new.index());
                        let mark = me.mark[new.index()];
                        me.states.insert(state, mark);
                    }
                }
            }
            for (name, v) in graph.outputs() {
                assert!(me.holds(*v), "output {name:?} is gone");
            }
            for update in graph.updates() {
                assert_eq!(me.states.get(&update.state), Some(&me.mark[update.new.index()]), "an update is lost");
            }
        }
    }
}

#[test]
fn every_step_of_a_training_step_finds_what_it_reads() {
    let (graph, _) = training();
    let optimised = passes::optimise(&graph).unwrap();
    for fences in [Fences::Off, Fences::On] {
        let plan = Plan::new(optimised.clone(), &scratch, fences).unwrap();
        assert_eq!(plan.overlap(), None);
        Owners::check(&plan);
        // All nodes are run, and once.
        let mut run: Vec<usize> = Vec::new();
        for step in plan.steps() {
            if let Step::Run { node, .. } = step {
                run.push(node.index());
            }
        }
        let count = run.len();
        run.sort_unstable();
        run.dedup();
        let silent = |n: &&Node| matches!(n.op, Op::Input(_) | Op::Constant(_)) || n.op.is_alias();
        assert_eq!(count, run.len());
        assert_eq!(count + optimised.nodes().iter().filter(silent).count(), optimised.nodes().len());
    }
    // The plan of the graph as it was built, and that of the backend.
    Owners::check(&Plan::new(graph, &scratch, Fences::Off).unwrap());
    let plan = device::cpu(2).plan(optimised.clone()).unwrap();
    assert_eq!(plan.overlap(), None);
    Owners::check(&plan);
    let joined = optimised.nodes_with_ids().filter(|(id, _)| plan.joined(*id).is_some()).count();
    assert!(joined > 0, "no chain is joined onto a product");
    // Sharing memory is worth something: the buffers of the arena together are far larger.
    let plan = Plan::new(optimised, &|_, _| 0, Fences::Off).unwrap();
    let all: usize = plan.lifetimes().iter().map(|l| l.bytes).sum();
    assert!(2 * plan.arena_bytes() < all, "arena {} of {all}", plan.arena_bytes());
    assert!(plan.lifetimes().iter().all(|l| l.offset % 128 == 0 && l.offset + l.bytes <= plan.arena_bytes()));
    assert_eq!(FENCE_BYTES % 128, 0);
}

/// A norm, the product behind it and the chain behind that follow one another, and nothing of them lies over what another reads: not even
/// the chain's result over the residual stream, which dies with it but is what the norm reads.
#[test]
fn what_is_joined_lies_apart() {
    let mut g = Graph::new();
    let x = g.feed("x", TensorType::f32([1, 64])).unwrap();
    let (gamma, w) = (g.parameter("gamma", TensorType::f32([64])), g.parameter("w", TensorType::f32([64, 64])));
    let stream = g.mul_scalar(x, 2.0).unwrap();
    let norm = g.rms_norm(stream, gamma.unwrap(), 1e-5).unwrap();
    let product = g.matmul(norm, w.unwrap()).unwrap();
    let y = g.add(stream, product).unwrap();
    g.output("y", y).unwrap();
    let graph = passes::optimise(&g).unwrap();
    let of = |wanted: &str, after: usize| {
        let is = |(id, node): &(NodeId, &Node)| id.index() >= after && node.op.name() == wanted;
        graph.nodes_with_ids().find(is).map(|(id, _)| id).unwrap()
    };
    let norm = of("rms_norm", 0);
    let (product, chain) = (of("matmul", 0), of("elementwise", norm.index()));
    let next = |_: &Graph, id| if id == norm { Some(product) } else { (id == product).then_some(chain) };
    let plan = Plan::with_joined(graph.clone(), &scratch, &next, Fences::Off).unwrap();
    Owners::check(&plan);
    assert_eq!([plan.joined(norm), plan.joined(product), plan.joined(chain)], [Some(product), Some(chain), None]);
    assert_eq!([norm, product, chain].map(|id| plan.joined_onto(id)), [None, Some(norm), Some(product)]);
    let stream = graph.node(norm).operands[0];
    assert_ne!(plan.storage(stream), plan.storage(graph.node(chain).results[0]));
    // By itself the chain writes over it.
    let plan = Plan::new(graph.clone(), &scratch, Fences::Off).unwrap();
    assert_eq!(plan.storage(stream), plan.storage(graph.node(chain).results[0]));
}

/// What is computed for a stored tensor that nothing reads needs no place of its own; what something reads does.
#[test]
fn an_update_of_what_nothing_reads_is_written_where_it_stays() {
    for reads in [false, true] {
        let mut g = Graph::new();
        let (ty, narrow) = (TensorType::f32([300]), TensorType::new(DType::Bf16, [300]));
        for name in ["a", "b"] {
            let wide = g.parameter(name, ty.clone()).unwrap();
            let copy = g.state(format!("{name}.copy"), narrow.clone()).unwrap();
            let rounded = g.cast(wide, DType::Bf16).unwrap();
            g.update(copy, rounded).unwrap();
            if reads {
                let old = g.cast(copy, DType::F32).unwrap();
                g.output(name, old).unwrap();
            }
        }
        let plan = Plan::new(passes::optimise(&g).unwrap(), &|_, _| 0, Fences::Off).unwrap();
        assert_eq!(plan.overlap(), None);
        Owners::check(&plan);
        let copies = plan.steps().iter().filter(|s| matches!(s, Step::Copy { .. })).count();
        assert_eq!((copies, plan.arena_bytes() == 0), if reads { (2, false) } else { (0, true) });
    }
}

#[test]
fn updates_in_place_wait_for_every_reader() {
    let mut g = Graph::new();
    let f32 = |shape: &[usize]| TensorType::f32(shape);
    let w = g.parameter("w", f32(&[4])).unwrap();
    let [m, v] = ["m", "v"].map(|n| g.state(n, f32(&[4])).unwrap());
    let [lr, step, scale] = ["lr", "step", "scale"].map(|n| g.feed(n, f32(&[])).unwrap());
    let grad = g.feed("grad", f32(&[4])).unwrap();
    let rule = Adamw {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        rounded: false,
        moments: Moments::F32,
        stream: 0,
    };
    let [new, new_m, new_v] = g.adamw(rule.clone(), w, grad, m, v, lr, step, scale).unwrap();
    [(w, new), (m, new_m), (v, new_v)].into_iter().for_each(|(s, n)| g.update(s, n).unwrap());
    // Made after the update, but these read the old value, one through a reshape.
    let flat = g.reshape(w, [2, 2]).unwrap();
    let moved = g.transpose(flat, &[1, 0]).unwrap();
    let after = g.pad(w, 0, 1, 0).unwrap();
    g.output("moved", moved).unwrap();
    g.output("after", after).unwrap();
    let plan = Plan::new(g.clone(), &|_, _| 0, Fences::Off).unwrap();
    Owners::check(&plan);
    let order: Vec<&str> = plan
        .steps()
        .iter()
        .map(|s| match s {
            Step::Run { node, .. } => plan.graph().node(*node).op.name(),
            Step::Copy { .. } => "copy",
        })
        .collect();
    assert_eq!(order, ["transpose", "pad", "adamw"]);
    for (state, new) in [(w, new), (m, new_m), (v, new_v)] {
        assert_eq!((plan.storage(state), plan.storage(new)), (Storage::State(state), Storage::State(state)));
    }

    // Needs the old and the new value: no order serves it.
    let mut both = g.clone();
    let joined = both.concat(&[w, new], 0).unwrap();
    both.output("joined", joined).unwrap();
    let refused = Plan::new(both, &|_, _| 0, Fences::Off).unwrap_err();
    assert!(matches!(refused, Error::Overwrite { op: "adamw", operand: 0, .. }), "{refused}");
    // The old value as an output, itself and through a reshape.
    for old in [w, flat] {
        let mut kept = g.clone();
        kept.output("old", old).unwrap();
        let refused = Plan::new(kept, &|_, _| 0, Fences::Off).unwrap_err();
        assert!(matches!(refused, Error::Overwrite { op: "adamw", operand: 0, .. }), "{refused}");
    }
    // A feed is not overwritten: it must last from run to run.
    let mut fed = Graph::new();
    let [w, grad, m, v] = ["w", "grad", "m", "v"].map(|n| fed.feed(n, f32(&[4])).unwrap());
    let one = fed.scalar(1.0).unwrap();
    let [new, ..] = fed.adamw(rule, w, grad, m, v, one, one, one).unwrap();
    fed.output("new", new).unwrap();
    assert!(matches!(Plan::new(fed, &|_, _| 0, Fences::Off), Err(Error::Overwrite { op: "adamw", .. })));
}

#[test]
fn the_old_value_of_a_copied_state_is_no_output() {
    let mut g = Graph::new();
    let ty = TensorType::f32([2, 2]);
    let (a, b) = (g.state("a", ty.clone()).unwrap(), g.state("b", ty.clone()).unwrap());
    let x = g.feed("x", ty).unwrap();
    g.update(a, x).unwrap();
    Owners::check(&Plan::new(g.clone(), &|_, _| 0, Fences::Off).unwrap());
    let mut kept = g.clone();
    kept.output("old", a).unwrap();
    assert!(matches!(Plan::new(kept, &|_, _| 0, Fences::Off), Err(Error::Update { name, .. }) if name == "a"));
    // Two states that change places through reshapes.
    let flat = g.reshape(a, [4]).unwrap();
    let same = g.reshape(flat, [2, 2]).unwrap();
    g.update(b, same).unwrap();
    assert!(matches!(Plan::new(g, &|_, _| 0, Fences::Off), Err(Error::Update { name, .. }) if name == "a"));
}

#[test]
fn a_small_plan_as_text() {
    let mut g = Graph::new();
    let x = g.feed("x", TensorType::f32([8, 16])).unwrap();
    let w = g.parameter("w", TensorType::f32([16, 4])).unwrap();
    let h = g.matmul(x, w).unwrap();
    let h = g.gelu(h).unwrap();
    let h = g.reshape(h, [32]).unwrap();
    let loss = g.mean_all(h).unwrap();
    let [dw] = gradients(&mut g, loss, &[w]).unwrap()[..] else { unreachable!("one parameter, one gradient") };
    g.output("loss", loss).unwrap();
    g.update(w, dw).unwrap();
    let plan =
        Plan::new(passes::optimise(&g).unwrap(), &|plan, id| plan.graph().node(id).operands.len() * 10, Fences::Off)
            .unwrap();
    assert_eq!(plan.to_text(), SNAPSHOT, "\n{}", plan.to_text());
}

const SNAPSHOT: &str = "\
plan: 6 steps, arena 1280 bytes
0: %2@768 = matmul(%0, %1) scratch 20@512
1: %3@512 = elementwise(%2) scratch 10@640
2: %5@1024 = reduce(%4) scratch 10@640
3: %7@768 = elementwise(%2, %6) scratch 20@512
4: %8@512 = matmul(%0, %7) scratch 20@1152
5: copy %8 over %1
";

/// Three training steps; the bits of everything after each.
fn three_steps(checks: bool, threads: usize) -> Vec<HashMap<String, moebius_ir::Tensor>> {
    let (graph, mut inputs) = training();
    let cpu = device::cpu(threads).with_checks(checks);
    let mut live = Live::new(&cpu, &graph).unwrap();
    let mut all = Vec::new();
    for step in 1..=3 {
        inputs.get_mut("step").unwrap().data[0] = f64::from(step);
        let results = live.run(&inputs).unwrap();
        for (name, tensor) in &results {
            if let Some(state) = name.strip_prefix("state.") {
                inputs.insert(state.into(), tensor.clone());
            }
        }
        all.push(results);
    }
    all
}

#[test]
fn a_training_step_has_the_same_bits_poisoned_and_not_and_on_any_threads() {
    let wanted = three_steps(true, 1);
    let losses: Vec<f64> = wanted.iter().map(|r| r["loss"].data[0]).collect();
    assert!(losses.iter().all(|l| l.is_finite()) && losses[2] < losses[0], "{losses:?}");
    for (checks, threads) in [(false, 1), (true, 3), (false, 3), (false, 2)] {
        let got = three_steps(checks, threads);
        assert!(wanted.iter().zip(&got).all(|(a, b)| device::same_bits(a, b)), "checks {checks}, {threads} threads");
    }
    // The reference agrees about the first step.
    let (graph, inputs) = training();
    let reference = device::reference(&graph, &inputs, moebius_ir::reference::Precision::Exact);
    let (got, exact) = (losses[0], reference["loss"].data[0]);
    assert!((got - exact).abs() < 1e-5 * exact, "{got} for {exact}");
}

#[test]
fn an_output_that_lies_in_a_stored_tensor_outlives_the_tensor() {
    let mut g = Graph::new();
    let w = g.parameter("w", TensorType::f32([3])).unwrap();
    g.output("w now", w).unwrap();
    let cpu = device::cpu(1);
    let mut live = Live::new(&cpu, &g).unwrap();
    let inputs = HashMap::from([("w".to_owned(), moebius_ir::Tensor::f32([3], vec![1.0, 2.0, 3.0]))]);
    let first = live.run(&inputs).unwrap();
    let (instance, store) = live.instance();
    store.write("w", &[0; 12]).unwrap();
    store.insert("w", &TensorType::f32([1000])).unwrap();
    store.remove("w");
    let mut bytes = [0; 12];
    instance.read("w now", &mut bytes).unwrap();
    assert_eq!(bytes.to_vec(), first["w now"].to_bytes());
    assert!(matches!(instance.run(store), Err(moebius_backends::Error::NoSuch { .. })));
}
