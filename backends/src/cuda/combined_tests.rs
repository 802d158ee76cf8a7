//! Which kernels do the work of the combine behind a product of experts, and which memory a plan gives them.

use moebius_ir::ops::{Balance, Order};
use moebius_ir::{DType, Fences, Graph, NodeId, Op, Plan, TensorType, Value, passes};

use super::launch::{Action, Arg, Joint, Launch};
use super::{Chip, launches, planned};
use crate::joined::Beside;

const WIDTH: usize = 64;

/// A sparse layer and the tensors it reads.
#[derive(Clone, Copy)]
struct Layer {
    tokens: usize,
    k: usize,
    /// A dense network beside the experts, with coefficients.
    residual: bool,
    /// The result is added to the layer's operand.
    added: bool,
    /// The rows of the second product are an output too.
    rows_read: bool,
}

const ONE: Layer = Layer { tokens: 1, k: 1, residual: false, added: false, rows_read: false };

fn graph(layer: Layer) -> moebius_ir::Result<Graph> {
    let Layer { tokens, k, residual, added, rows_read } = layer;
    let (d, hidden, e) = (WIDTH, 2 * WIDTH, 4);
    let mut graph = Graph::new();
    let g = &mut graph;
    let weight =
        |g: &mut Graph, name: &str, shape: &[usize]| g.parameter(name, TensorType::new(DType::Bf16, shape.to_vec()));
    let x = g.feed("x", TensorType::new(DType::Bf16, [tokens, d]))?;
    let router = g.parameter("router", TensorType::f32([e, d]))?;
    let wide = g.cast(x, DType::F32)?;
    let logits = g.matmul_with(wide, router, None, false, true)?;
    let [gate, index, ..] = g.route(logits, k, Balance::AllChoices)?;
    let [slot_choice, choice_slot, offsets, _] = g.assign(index, None, e, None, Order::TokenMajor)?;
    let coefficient = if residual {
        let w = g.parameter("coefficient", TensorType::f32([2, d]))?;
        let scores = g.matmul_with(wide, w, None, false, true)?;
        Some(g.softmax(scores)?)
    } else {
        None
    };
    let rows = g.dispatch(x, slot_choice, choice_slot, None)?;
    let (up, down) = (weight(g, "up", &[e, d, hidden])?, weight(g, "down", &[e, hidden, d])?);
    let h = g.expert_matmul(rows, up, offsets, None, false)?;
    let h = g.gelu(h)?;
    let rows = g.expert_matmul(h, down, offsets, None, false)?;
    let side = if residual {
        let (up, down) = (weight(g, "side.up", &[d, hidden])?, weight(g, "side.down", &[hidden, d])?);
        let h = g.matmul(x, up)?;
        let h = g.gelu(h)?;
        Some(g.matmul(h, down)?)
    } else {
        None
    };
    let y = g.combine_with(rows, slot_choice, choice_slot, Some(gate), side, coefficient)?;
    let y = if added { g.add(x, y)? } else { y };
    g.output("y", y)?;
    if rows_read {
        g.output("rows", rows)?;
    }
    passes::optimise(&graph)
}

/// The plan of a layer on such a GPU, and its launches.
fn made(layer: Layer, chip: Chip) -> (Plan, Vec<Launch>) {
    let plan = planned(graph(layer).unwrap(), chip, Fences::On).unwrap();
    assert_eq!(plan.overlap(), None);
    let launches = launches(plan.graph(), chip, &|id| Beside::of(&plan, id)).unwrap();
    (plan, launches)
}

/// The nodes of an op in the order of the graph.
fn nodes(graph: &Graph, is: fn(&Op) -> bool) -> Vec<NodeId> {
    graph.nodes_with_ids().filter(|(_, node)| is(&node.op)).map(|(id, _)| id).collect()
}

fn experts(graph: &Graph) -> Vec<NodeId> {
    nodes(graph, |op| matches!(op, Op::ExpertMatmul(_)))
}

fn combine(graph: &Graph) -> NodeId {
    nodes(graph, |op| matches!(op, Op::Combine(_)))[0]
}

fn of_op(graph: &Graph, name: &str) -> NodeId {
    let found = graph.nodes_with_ids().find(|(_, node)| node.op.name() == name);
    found.map(|(id, _)| id).unwrap()
}

fn kernels(launches: &[Launch]) -> usize {
    launches.iter().flat_map(|l| &l.actions).filter(|action| matches!(action, Action::Kernel(_))).count()
}

#[test]
fn a_token_of_one_expert_takes_three_kernels() {
    for chip in [Chip::AMPERE, Chip::HOPPER] {
        for added in [false, true] {
            let (plan, launches) = made(Layer { added, ..ONE }, chip);
            let (graph, combine) = (plan.graph(), combine(plan.graph()));
            let product = experts(graph)[1];
            let beside = Beside::of(&plan, product).unwrap();
            assert_eq!((beside.combined, beside.behind_combined.is_some()), (Some(combine), added));
            assert_eq!(Beside::of(&plan, combine), None);
            // The router's logits, and the two products, the first of which chooses the expert.
            assert_eq!(kernels(&launches), 3, "{chip:?}");
            let [first, route, assign] = [experts(graph)[0], of_op(graph, "route"), of_op(graph, "assign")];
            let chooses = Beside::of(&plan, first).unwrap();
            assert_eq!((chooses.route, chooses.assigned), (Some(route), Some(assign)));
            assert_eq!(chooses.before, Some(of_op(graph, "dispatch")));
            let launch = &launches[product.index()];
            // One block has all of a column: its rows are stored nowhere, and nothing is counted.
            assert_eq!((launch.combined, launch.counters), (Joint::Unstored, 0));
            assert_eq!(launch.behind_combined, if added { Joint::Unstored } else { Joint::None });
        }
    }
}

/// Beside the twin of a residual layer, and only for one token.
#[test]
fn a_product_chooses_with_a_twin_beside_it_and_for_one_token_only() {
    for chip in [Chip::AMPERE, Chip::HOPPER] {
        let (plan, _) = made(Layer { residual: true, added: true, ..ONE }, chip);
        let graph = plan.graph();
        let beside = Beside::of(&plan, experts(graph)[0]).unwrap();
        assert!(
            beside.route.is_some() && beside.twin.is_some() && beside.behind_twin.is_some(),
            "{chip:?}: {beside:?}"
        );
        let (plan, launches) = made(Layer { tokens: 2, ..ONE }, chip);
        assert_eq!(Beside::of(&plan, experts(plan.graph())[0]).unwrap().route, None);
        assert_eq!(kernels(&launches), 4);
    }
}

#[test]
fn blocks_that_share_columns_have_counters_for_them() {
    for chip in [Chip::AMPERE, Chip::HOPPER] {
        for (tokens, k) in [(1, 2), (4, 1), (4, 2), (8, 1)] {
            let (plan, launches) = made(Layer { tokens, k, added: true, ..ONE }, chip);
            let launch = &launches[experts(plan.graph())[1].index()];
            let Action::Kernel(kernel) = &launch.actions[0] else { panic!("no kernel") };
            assert_eq!((launch.combined, launch.counters), (Joint::Stored, kernel.grid[0]), "{tokens} {k}");
            assert_eq!(kernel.args.iter().filter(|arg| **arg == Arg::Counters).count(), 1);
            assert_eq!(launch.actions.len(), 1);
        }
    }
}

#[test]
fn the_second_products_of_a_residual_layer_are_combined_where_they_are_made() {
    for chip in [Chip::AMPERE, Chip::HOPPER] {
        for tokens in [1, 3] {
            let (plan, launches) = made(Layer { tokens, residual: true, added: true, ..ONE }, chip);
            let (graph, combine) = (plan.graph(), combine(plan.graph()));
            let product = experts(graph)[1];
            let beside = Beside::of(&plan, product).unwrap();
            let side = graph.producer(graph.node(combine).operands[4]);
            assert_eq!((beside.twin, beside.combined), (Some(side), Some(combine)));
            let chain = beside.behind_combined.unwrap();
            assert!(matches!(graph.node(chain).op, Op::Elementwise(_)));
            // In the order of the operands and results that the kernel is given.
            let softmax = of_op(graph, "softmax");
            assert_eq!(beside.nodes().collect::<Vec<_>>(), [side, softmax, combine, chain]);
            let group = std::iter::successors(Some(product), |id| plan.joined(*id));
            assert_eq!(group.collect::<Vec<_>>(), [product, side, softmax, combine, chain]);
            for done in [side, softmax, combine, chain] {
                assert_eq!(Beside::of(&plan, done), None);
                assert!(launches[done.index()].actions.is_empty());
            }
            let launch = &launches[product.index()];
            assert_eq!((launch.twin, launch.combined), (Joint::Stored, Joint::Stored));
            // While the kernel runs nothing lies over what it reads or writes.
            let last = plan.lifetimes().iter().filter(|l| l.value.is_some_and(|v: Value| graph.producer(v) == product));
            let step = |id: NodeId| {
                let is = |step: &moebius_ir::Step| matches!(step, moebius_ir::Step::Run { node, .. } if *node == id);
                plan.steps().iter().position(is).unwrap()
            };
            assert!(last.into_iter().all(|l| l.first <= step(product) && l.last >= step(chain)));
        }
    }
}

#[test]
fn many_rows_and_rows_that_others_read_are_combined_by_a_kernel_of_its_own() {
    for chip in [Chip::AMPERE, Chip::HOPPER] {
        for layer in [
            Layer { tokens: 9, ..ONE },
            Layer { tokens: 5, k: 2, ..ONE },
            Layer { rows_read: true, ..ONE },
            Layer { tokens: 3, residual: true, rows_read: true, ..ONE },
        ] {
            let (plan, launches) = made(layer, chip);
            let combine = combine(plan.graph());
            assert!(Beside::of(&plan, combine).is_some());
            assert_eq!(launches[combine.index()].actions.len(), 1);
            let product = &launches[experts(plan.graph())[1].index()];
            assert_eq!((product.combined, product.counters), (Joint::None, 0));
        }
    }
}
