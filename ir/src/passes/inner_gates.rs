//! Gates on the inner side: the backward pass of a sparse layer no longer reads the experts' outputs, so that they need not be
//! kept (as in SonicMoE, arXiv 2512.14080).
//!
//! For a slot `s` of gate `g`, with the inner activation `a`, the output `a W` and the cotangent `d` of its token, the gate's gradient
//! is `<a W, d> = <a, d Wᵀ>`. The product `u = d Wᵀ` without the gate gives that of the activation too, `g u`; and the gate goes to
//! the other factor of the weights' gradient, `(g a)ᵀ d`. That is as many products as before, and gates weight rows of the inner
//! width instead of the outer one.
//!
//! Not one of [`super::optimise`]'s passes: the gates' gradient is summed in another order, which the caller has to want. It runs
//! between [`crate::gradients`] and [`super::recompute`].

use std::collections::HashMap;

use smallvec::SmallVec;

use crate::dtype::DType;
use crate::error::Result;
use crate::graph::{Graph, Node, NodeId, Value};
use crate::ops::Op;

/// The graph with the backward pass of every gated combine of experts' outputs in that form. Experts whose outputs have a bias, or
/// are read by anything but one combine, are left alone, and so are dispatched cotangents with other readers than the
/// two products.
///
/// # Errors
/// None on a verified graph.
pub fn inner_gates(graph: &Graph) -> Result<Graph> {
    let layers = find(graph);
    let mut parts: HashMap<NodeId, (usize, Part)> = HashMap::new();
    for (i, layer) in layers.iter().enumerate() {
        parts.extend(layer.parts.iter().map(|&(node, part)| (node, (i, part))));
    }
    let mut slots: Vec<Option<Slots>> = vec![None; layers.len()];
    let mut identities = HashMap::new();
    let mut out = Graph::new();
    let mut map: Vec<Option<Value>> = vec![None; graph.value_count()];
    for (id, node) in graph.nodes_with_ids() {
        let operands: SmallVec<[Value; 4]> = node.operands.iter().filter_map(|v| map[v.index()]).collect();
        let results = match parts.get(&id) {
            None => out.push_copy(node, &operands)?,
            Some(&(layer, part)) => {
                let [a, w, offsets] =
                    layers[layer].product.map(|v| map[v.index()].unwrap_or_else(|| unreachable!("made before")));
                let transpose = layers[layer].transpose;
                let result = out.scoped(&*node.scope, |g| match (part, slots[layer]) {
                    (Part::Rows, _) => {
                        let made = Slots::make(g, &operands, [w, offsets], !transpose)?;
                        slots[layer] = Some(made);
                        Ok(made.rows)
                    }
                    (Part::Gate, Some(s)) => s.gate_grad(g, a, [operands[2], operands[3]], &mut identities),
                    (Part::Inner, Some(s)) => s.weighted(g, s.inner),
                    (Part::Weights, Some(s)) => {
                        let a = s.weighted(g, a)?;
                        let (first, second) = if transpose { (s.rows, a) } else { (a, s.rows) };
                        g.expert_matmul_wgrad(first, second, offsets)
                    }
                    (Part::Gate | Part::Inner | Part::Weights, None) => unreachable!("the rows come first"),
                })?;
                [result].into_iter().collect()
            }
        };
        node.results.iter().zip(&results).for_each(|(old, new)| map[old.index()] = Some(*new));
    }
    out.adopt_ends(graph, &map);
    Ok(out)
}

/// What a node of the old form is.
#[derive(Clone, Copy)]
enum Part {
    /// The dispatched cotangent, weighted by the gates.
    Rows,
    /// The inner products of outputs and cotangents.
    Gate,
    /// The cotangent of the inner activation.
    Inner,
    /// The gradient of the weights.
    Weights,
}

/// The last product of some experts whose backward pass changes.
struct Layer {
    /// Its operands: inner activation, weights, offsets.
    product: [Value; 3],
    /// Whether its weights are read transposed.
    transpose: bool,
    parts: Vec<(NodeId, Part)>,
}

/// What the new form of a layer reads slot by slot.
#[derive(Clone, Copy)]
struct Slots {
    /// The dispatched cotangent `[S,D]`, without gates.
    rows: Value,
    /// Its product with the weights, `[S,I]`.
    inner: Value,
    /// The gate of each slot, f32 `[S,1]`.
    gate: Value,
}

impl Slots {
    /// From the operands of the weighted dispatch.
    fn make(g: &mut Graph, operands: &[Value], [w, offsets]: [Value; 2], transpose: bool) -> Result<Slots> {
        let &[d, slot_choice, choice_slot, gate] = operands else { unreachable!("a dispatch with gates") };
        let rows = g.dispatch(d, slot_choice, choice_slot, None)?;
        let inner = g.expert_matmul(rows, w, offsets, None, transpose)?;
        let choices = g.ty(gate).elements();
        let [gate, choice_slot] = [g.reshape(gate, [choices, 1])?, g.reshape(choice_slot, [choices, 1])?];
        let gate = g.dispatch(gate, slot_choice, choice_slot, None)?;
        Ok(Slots { rows, inner, gate })
    }

    /// `x [S,I]` with each slot's row times its gate, in the dtype of `x`.
    fn weighted(&self, g: &mut Graph, x: Value) -> Result<Value> {
        let dtype = g.ty(x).dtype;
        let wide = g.cast(x, DType::F32)?;
        let product = g.mul(wide, self.gate)?;
        g.cast(product, dtype)
    }

    /// The inner products of `a [S,I]` with what the cotangent gives, of each choice. `identities` holds for each number of
    /// slots the indices by which a slot is its own and only choice.
    fn gate_grad(
        &self,
        g: &mut Graph,
        a: Value,
        [slot_choice, choice_slot]: [Value; 2],
        identities: &mut HashMap<usize, [Value; 2]>,
    ) -> Result<Value> {
        let (slots, shape) = (g.shape(a)[0], g.ty(choice_slot).shape.clone());
        let itself = match identities.get(&slots) {
            Some(&there) => there,
            None => {
                let made = g.own_slots(slots)?;
                *identities.entry(slots).or_insert(made)
            }
        };
        let of_slots = g.gate_grad(self.inner, a, itself[0], itself[1])?;
        let choice_slot = g.reshape(choice_slot, [shape.iter().product(), 1])?;
        let of_choices = g.combine(of_slots, slot_choice, choice_slot, None)?;
        g.reshape(of_choices, shape)
    }
}

/// The layers that the pass changes.
fn find(graph: &Graph) -> Vec<Layer> {
    let mut readers: Vec<Vec<NodeId>> = vec![Vec::new(); graph.value_count()];
    for (id, node) in graph.nodes_with_ids() {
        node.operands.iter().for_each(|v| readers[v.index()].push(id));
    }
    let mut ends = vec![false; graph.value_count()];
    graph.outputs().iter().for_each(|(_, v)| ends[v.index()] = true);
    graph.updates().iter().for_each(|u| ends[u.new.index()] = true);
    let all = graph.nodes_with_ids().filter(|(_, node)| matches!(node.op, Op::GateGrad(_)));
    all.filter_map(|(id, node)| layer(graph, &readers, &ends, id, node)).collect()
}

/// The layer whose gates' gradient a node computes, if it has the old form and nothing else reads what goes away. `readers` are the
/// nodes that read each value, `ends` says of each whether it is an output or update.
fn layer(graph: &Graph, readers: &[Vec<NodeId>], ends: &[bool], id: NodeId, gate_grad: &Node) -> Option<Layer> {
    let &[outputs, d, slot_choice, choice_slot] = &gate_grad.operands[..] else { return None };
    let node = graph.node(graph.producer(outputs));
    let Op::ExpertMatmul(op) = &node.op else { return None };
    let &[a, w, offsets] = &node.operands[..] else { return None };
    let is_combine = |reader: &NodeId| matches!(graph.node(*reader).op, Op::Combine(_));
    let [combine, last] = readers[outputs.index()][..] else { return None };
    if !is_combine(&combine) || last != id || ends[outputs.index()] {
        return None;
    }
    let part_of = |reader: &NodeId, rows: Value| {
        let node = graph.node(*reader);
        let factors = if op.transpose { [rows, a, offsets] } else { [a, rows, offsets] };
        let part = if let Op::ExpertMatmul(back) = &node.op {
            let is_back = back.transpose != op.transpose && node.operands[..] == [rows, w, offsets];
            is_back.then_some(Part::Inner)
        } else {
            let is_gradient = matches!(node.op, Op::ExpertMatmulWgrad(_)) && node.operands[..] == factors;
            is_gradient.then_some(Part::Weights)
        };
        part.map(|part| (*reader, part))
    };
    // The vjp of a combine dispatches its cotangent before it asks for the gates' gradient.
    readers[d.index()].iter().filter(|dispatch| **dispatch < id).find_map(|dispatch| {
        let node = graph.node(*dispatch);
        let is_weighted = matches!(node.op, Op::Dispatch(_)) && node.operands.len() == 4;
        let rows = *node.results.first().filter(|rows| is_weighted && !ends[rows.index()])?;
        let mut parts = vec![(*dispatch, Part::Rows), (id, Part::Gate)];
        parts.extend(readers[rows.index()].iter().map(|r| part_of(r, rows)).collect::<Option<Vec<_>>>()?);
        let has_inner = parts.iter().any(|(_, part)| matches!(part, Part::Inner));
        let fits = node.operands[..3] == [d, slot_choice, choice_slot] && has_inner;
        fits.then_some(Layer { product: [a, w, offsets], transpose: op.transpose, parts })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Order;
    use crate::reference::{self, Precision};
    use crate::tensor::Tensor;
    use crate::types::TensorType;
    use crate::verify::{Stage, verify};
    use crate::{gradients, passes};

    const TOKENS: usize = 6;
    const WIDTH: usize = 5;
    const HIDDEN: usize = 3;

    /// Experts between a dispatch and a combine. Expert 2 of 4 is idle unless all are chosen.
    #[derive(Clone, Copy, Default)]
    struct Experts {
        k: usize,
        capacity: Option<usize>,
        /// A side branch, with coefficients.
        residual: bool,
        /// No gates, the coefficients weight alone.
        ungated: bool,
        transpose: bool,
        bias: bool,
        /// Something else reads the outputs.
        watched: bool,
        frozen: bool,
    }

    /// The layer with its gradients as outputs, and numbers for its feeds.
    fn graph(of: Experts) -> (Graph, HashMap<String, Tensor>) {
        let Experts { k, capacity, residual, ungated, transpose, bias, watched, frozen } = of;
        let mut g = Graph::new();
        let mut feeds = HashMap::new();
        let mut feed = |g: &mut Graph, name: &str, shape: &[usize]| {
            let ty = TensorType::f32(shape);
            let seed = name.bytes().map(f64::from).sum::<f64>();
            let data = (0..ty.elements()).map(|i| (i as f64 * 1.7 + seed).sin()).collect();
            feeds.insert(name.to_owned(), Tensor::new(ty.clone(), data));
            g.feed(name, ty).unwrap()
        };
        let experts = 4.max(k);
        let x = feed(&mut g, "x", &[TOKENS, WIDTH]);
        let gate = feed(&mut g, "gate", &[TOKENS, k]);
        let up = feed(&mut g, "up", &[experts, WIDTH, HIDDEN]);
        let down = feed(&mut g, "down", &if transpose { [experts, WIDTH, HIDDEN] } else { [experts, HIDDEN, WIDTH] });
        let chosen = |t: usize, j: usize| {
            let free: Vec<usize> = (0..experts).filter(|&e| experts == k || e != 2).collect();
            free[(t * t + j) % free.len()] as f64
        };
        let index = (0..TOKENS).flat_map(|t| (0..k).map(move |j| (t, j))).map(|(t, j)| chosen(t, j)).collect();
        let index = g.constant(TensorType::i32([TOKENS, k]), index).unwrap();
        let assigned = g.assign(index, None, experts, capacity, Order::ChoiceMajor).unwrap();
        let [slot_choice, choice_slot, offsets, dropped] = assigned;
        let rows = g.dispatch(x, slot_choice, choice_slot, None).unwrap();
        let inner = g.expert_matmul(rows, up, offsets, None, false).unwrap();
        let inner = g.gelu(inner).unwrap();
        let bias = bias.then(|| feed(&mut g, "bias", &[experts, WIDTH]));
        let rows = g.expert_matmul(inner, down, offsets, bias, transpose).unwrap();
        let side = residual.then(|| feed(&mut g, "side", &[TOKENS, WIDTH]));
        let coefficient = residual.then(|| feed(&mut g, "coefficient", &[TOKENS, 2]));
        let of_output = (!ungated).then_some(gate);
        let y = g.combine_with(rows, slot_choice, choice_slot, of_output, side, coefficient).unwrap();
        let dy = feed(&mut g, "dy", &[TOKENS, WIDTH]);
        let product = g.mul(y, dy).unwrap();
        let mut loss = g.sum_all(product).unwrap();
        if watched {
            let other = g.mean_all(rows).unwrap();
            loss = g.add(loss, other).unwrap();
        }
        let mut wrt = vec![("x", x), ("gate", gate), ("up", up)];
        wrt.extend((!frozen).then_some(("down", down)));
        wrt.extend(bias.map(|v| ("bias", v)));
        wrt.extend([side.map(|v| ("side", v)), coefficient.map(|v| ("coefficient", v))].into_iter().flatten());
        let values: Vec<Value> = wrt.iter().map(|w| w.1).collect();
        let grads = gradients(&mut g, loss, &values).unwrap();
        for (name, value) in [("y", y), ("dropped", dropped)].into_iter().chain(wrt.iter().map(|w| w.0).zip(grads)) {
            g.output(name, value).unwrap();
        }
        (g, feeds)
    }

    /// The rewritten graph, after it was compared with the one before.
    fn checked(of: Experts) -> Graph {
        let (before, feeds) = graph(of);
        let after = inner_gates(&before).unwrap();
        verify(&after, Stage::Built).unwrap();
        let run = |g: &Graph| reference::run(g, &feeds, Precision::Exact).unwrap();
        let (old, new) = (run(&before), run(&after));
        for (name, _) in before.outputs() {
            let (a, b) = (&old.output(&before, name).unwrap().data, &new.output(&after, name).unwrap().data);
            assert!(name == "dropped" || of.ungated && name == "gate" || a.iter().any(|v| v.abs() > 1e-3), "{name}");
            let apart = a.iter().zip(b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(apart < 1e-12, "{name}: {apart}");
        }
        let dropped = old.output(&before, "dropped").unwrap().data[0];
        assert_eq!(dropped > 0.0, of.capacity.is_some(), "{dropped}");
        passes::optimise(&after).unwrap();
        after
    }

    /// Whether something of the backward pass reads what an expert's last product made.
    fn reads_outputs(g: &Graph) -> bool {
        let of_forward = |v: Value| {
            let node = g.node(g.producer(v));
            matches!(node.op, Op::ExpertMatmul(_)) && !node.scope.starts_with("backward")
        };
        let width = |v: Value| g.shape(v).last() == Some(&WIDTH);
        let backward = g.nodes().iter().filter(|n| n.scope.starts_with("backward"));
        backward.flat_map(|n| &n.operands).any(|&v| of_forward(v) && width(v))
    }

    #[test]
    fn values_and_gradients_are_the_same_and_outputs_are_not_read() {
        for k in [1, 2, 8] {
            for capacity in [None, Some(1)] {
                for (residual, ungated) in [(false, false), (true, false), (true, true)] {
                    let of = Experts { k, capacity, residual, ungated, ..Experts::default() };
                    assert!(reads_outputs(&graph(of).0) && !reads_outputs(&checked(of)), "{k} {capacity:?} {residual}");
                }
            }
        }
        for (transpose, frozen) in [(true, false), (false, true), (true, true)] {
            let of = Experts { k: 2, transpose, frozen, ..Experts::default() };
            assert!(!reads_outputs(&checked(of)));
        }
    }

    #[test]
    fn as_many_products_as_before_none_of_them_of_gated_outputs() {
        let of = Experts { k: 2, ..Experts::default() };
        let (before, after) = (graph(of).0, checked(of));
        let count = |g: &Graph, op: &str| {
            let g = passes::optimise(g).unwrap();
            g.nodes().iter().filter(|n| n.op.name() == op).count()
        };
        for op in ["expert_matmul", "expert_matmul_wgrad"] {
            assert_eq!(count(&before, op), count(&after, op), "{op}");
        }
        assert_eq!((count(&before, "dispatch"), count(&after, "dispatch")), (2, 3));
    }

    #[test]
    fn what_has_a_bias_or_other_readers_is_left_alone() {
        let of = Experts { k: 2, ..Experts::default() };
        for of in [Experts { bias: true, ..of }, Experts { watched: true, ..of }] {
            assert_eq!(checked(of).to_text(), graph(of).0.to_text());
        }
        // Outputs that the caller wants to see.
        let (mut g, _) = graph(of);
        let outputs = g.nodes().iter().find(|n| matches!(n.op, Op::Combine(_))).map(|n| n.operands[0]).unwrap();
        g.output("rows", outputs).unwrap();
        assert_eq!(inner_gates(&g).unwrap().to_text(), g.to_text());
    }
}
