//! Recomputation: the backward pass computes values again instead of keeping them from the forward pass on: all that lies between
//! two border values (Chen and others, arXiv 1604.06174, with the borders given), or what is cheap.
//!
//! Not among [`super::optimise`]'s passes: it trades time for memory, and only the caller knows the borders. It runs before them.
//! Every copy reads what is kept through [`crate::ops::After`] with a cotangent as trigger. So no copy is a common subexpression of
//! its original, none is fused with it, and none can run before the backward pass has come to its segment.

use std::collections::{BTreeSet, HashMap};

use super::least::least_kept;
use crate::error::Result;
use crate::graph::{Graph, Node, NodeId, Value};
use crate::ops::Op;

/// The scope of nodes that [`crate::gradients`] emits.
const BACKWARD: &str = "backward";

/// The graph in which backward nodes read copies of the values between `borders`, such as the residual stream after each block.
/// Values keep their bits, as the copies are the same ops on the same operands. What comes after the last border is kept: the
/// backward pass begins with it.
///
/// # Errors
/// None on a verified graph.
pub fn recompute(graph: &Graph, borders: &[Value]) -> Result<Graph> {
    copied(graph, Segments::between(graph, borders))
}

/// The graph in which the backward pass computes again what is cheap, where less has to be kept for it: elementwise chains, casts,
/// broadcasts, dispatched rows, routers with their logits, short sums. Results of other products and sums, attention and norms are kept, if
/// they are read. Values keep their bits, as by [`recompute`]. [`super::kept_for_backward`] says what is left.
///
/// # Errors
/// None on a verified graph.
pub fn recompute_light(graph: &Graph) -> Result<Graph> {
    copied(graph, Segments::light(graph))
}

/// The graph in which backward nodes read copies of what `segments` does not keep.
fn copied(graph: &Graph, segments: Segments) -> Result<Graph> {
    let mut copies = Copies { graph, segments, copy: HashMap::new(), kept: HashMap::new(), trigger: HashMap::new() };
    let mut out = Graph::new();
    let mut map: Vec<Option<Value>> = vec![None; graph.value_count()];
    let mut latest = None;
    for node in graph.nodes() {
        // What comes from the backward pass but is no part of it, as an optimizer does, reads what is there.
        let backward = is_emitted(node);
        if backward {
            let incoming = node.operands.iter().rev().find(|v| copies.segments.backward[graph.producer(**v).index()]);
            let trigger = incoming.and_then(|v| map[v.index()]).or(latest);
            for &operand in &node.operands {
                copies.make(&mut out, &map, operand, trigger)?;
            }
        }
        let translate = |v: &Value| copies.copy.get(v).copied().filter(|_| backward).or(map[v.index()]);
        let operands: Vec<Value> = node.operands.iter().filter_map(translate).collect();
        let results = out.push_copy(node, &operands)?;
        node.results.iter().zip(&results).for_each(|(old, new)| map[old.index()] = Some(*new));
        if backward {
            latest = results.first().copied();
        }
    }
    out.adopt_ends(graph, &map);
    Ok(out)
}

/// Whether [`crate::gradients`] made a node.
pub(super) fn is_emitted(node: &Node) -> bool {
    node.scope.split('/').next() == Some(BACKWARD)
}

/// For each node whether it belongs to the backward pass or comes from it.
pub(super) fn backward_nodes(graph: &Graph) -> Vec<bool> {
    let mut backward = vec![false; graph.nodes().len()];
    for (id, node) in graph.nodes_with_ids() {
        let comes = || node.operands.iter().any(|v| backward[graph.producer(*v).index()]);
        backward[id.index()] = is_emitted(node) || comes();
    }
    backward
}

/// For each value whether it is there in any case: an input, or what depends on constants alone and costs nothing to keep.
fn lasting(graph: &Graph) -> Vec<bool> {
    let mut constant = vec![false; graph.value_count()];
    let mut lasting = vec![false; graph.value_count()];
    for node in graph.nodes() {
        let input = node.op.as_input().is_some();
        let folds = !input && node.operands.iter().all(|v| constant[v.index()]);
        for r in &node.results {
            (constant[r.index()], lasting[r.index()]) = (folds, folds || input);
        }
    }
    lasting
}

/// Which values are kept, and between which borders the others lie.
struct Segments {
    /// Whether a node belongs to the backward pass or comes from it.
    backward: Vec<bool>,
    /// For each value how many borders come before it on the longest path.
    number: Vec<usize>,
    /// Whether a value is never copied.
    fixed: Vec<bool>,
}

impl Segments {
    fn between(graph: &Graph, borders: &[Value]) -> Segments {
        let mut is_border = vec![false; graph.value_count()];
        borders.iter().for_each(|v| is_border[v.index()] = true);
        let (backward, lasting) = (backward_nodes(graph), lasting(graph));
        let mut number = vec![0; graph.value_count()];
        for node in graph.nodes() {
            let after = |v: &Value| number[v.index()] + usize::from(is_border[v.index()]);
            let of_node = node.operands.iter().map(after).max().unwrap_or(0);
            node.results.iter().for_each(|r| number[r.index()] = of_node);
        }
        let last = borders.iter().map(|v| number[v.index()] + 1).max().unwrap_or(0);
        let keeps = |v: Value| {
            let i = v.index();
            lasting[i] || backward[graph.producer(v).index()] || is_border[i] || number[i] >= last
        };
        let fixed = graph.values().map(keeps).collect();
        Segments { backward, number, fixed }
    }

    /// One segment, of which the fewest bytes are kept from which the rest is cheap.
    fn light(graph: &Graph) -> Segments {
        let backward = backward_nodes(graph);
        let mut free = lasting(graph);
        graph.values().for_each(|v| free[v.index()] |= backward[graph.producer(v).index()]);
        let ends = graph.outputs().iter().map(|(_, v)| *v).chain(graph.updates().iter().map(|u| u.new));
        ends.for_each(|v| free[graph.alias_base(v).index()] = true);
        let mut read = vec![false; graph.value_count()];
        let emitted = graph.nodes().iter().filter(|node| is_emitted(node));
        emitted.flat_map(|node| &node.operands).for_each(|v| read[v.index()] = true);
        let fixed = least_kept(graph, &free, &read);
        Segments { backward, number: vec![0; graph.value_count()], fixed }
    }
}

/// The copies made so far.
struct Copies<'g> {
    graph: &'g Graph,
    segments: Segments,
    /// Of a value of the forward pass.
    copy: HashMap<Value, Value>,
    /// A kept value as the copies of a segment read it.
    kept: HashMap<(Value, usize), Value>,
    /// What the copies of a segment wait for.
    trigger: HashMap<usize, Value>,
}

impl Copies<'_> {
    /// Makes a copy of `wanted` in `out`, with all that it needs, unless it is there or `wanted` is kept.
    fn make(&mut self, out: &mut Graph, map: &[Option<Value>], wanted: Value, trigger: Option<Value>) -> Result<()> {
        let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
        let mut open = vec![wanted];
        while let Some(value) = open.pop() {
            let node = self.graph.producer(value);
            if !self.segments.fixed[value.index()] && !self.copy.contains_key(&value) && nodes.insert(node) {
                open.extend(&self.graph.node(node).operands);
            }
        }
        // In the order of the forward pass.
        for id in nodes {
            let node = self.graph.node(id);
            let segment = node.results.first().map_or(0, |r| self.segments.number[r.index()]);
            let mut operands = Vec::with_capacity(node.operands.len());
            for &operand in &node.operands {
                operands.extend(match self.copy.get(&operand) {
                    Some(&copy) => Some(copy),
                    None => self.read_kept(out, map, operand, segment, trigger)?,
                });
            }
            let scope = format!("{BACKWARD}/recomputed/{}", node.scope);
            let results = out.push_scoped(node.op.clone(), &operands, node.site.clone(), scope.into())?;
            self.copy.extend(node.results.iter().copied().zip(results));
        }
        Ok(())
    }

    /// A kept value for the copies of a segment: what waits for the trigger of the segment, which is the first there was.
    fn read_kept(
        &mut self,
        out: &mut Graph,
        map: &[Option<Value>],
        value: Value,
        segment: usize,
        trigger: Option<Value>,
    ) -> Result<Option<Value>> {
        let Some(here) = map[value.index()] else { return Ok(None) };
        let trigger = match (self.trigger.get(&segment), trigger) {
            (Some(&first), _) => first,
            (None, Some(trigger)) => *self.trigger.entry(segment).or_insert(trigger),
            (None, None) => return Ok(Some(here)),
        };
        if let Op::Constant(_) = out.node(out.producer(here)).op {
            return Ok(Some(here));
        }
        if let Some(&late) = self.kept.get(&(value, segment)) {
            return Ok(Some(late));
        }
        let late = out.after(here, trigger)?;
        self.kept.insert((value, segment), late);
        Ok(Some(late))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::ops::{Order, ReduceFn};
    use crate::plan::{Fences, Plan};
    use crate::reference::{self, Precision};
    use crate::router::Balance;
    use crate::tensor::Tensor;
    use crate::types::TensorType;
    use crate::verify::{Stage, verify};
    use crate::{gradients, passes};

    /// Blocks of some ops on a large value; returns the loss graph with gradients, and the borders.
    fn chain(blocks: usize) -> (Graph, Vec<Value>) {
        let mut g = Graph::new();
        let mut x = g.feed("x", TensorType::f32([64, 32])).unwrap();
        let mut weights = Vec::new();
        let mut borders = Vec::new();
        for i in 0..blocks {
            let w = g.parameter(format!("w{i}"), TensorType::f32([32, 32])).unwrap();
            let h = g.matmul(x, w).unwrap();
            let h = g.gelu(h).unwrap();
            let h = g.matmul(h, w).unwrap();
            let h = g.softmax(h).unwrap();
            x = g.add(x, h).unwrap();
            weights.push(w);
            borders.push(x);
        }
        let squared = g.mul(x, x).unwrap();
        let loss = g.mean_all(squared).unwrap();
        let grads = gradients(&mut g, loss, &weights).unwrap();
        let norm = g.global_norm(&grads).unwrap();
        g.output("loss", loss).unwrap();
        g.output("norm", norm).unwrap();
        (g, borders)
    }

    fn arena(g: &Graph) -> usize {
        let optimised = passes::optimise(g).unwrap();
        Plan::new(optimised, &|_, _| 0, Fences::Off).unwrap().arena_bytes()
    }

    fn count(g: &Graph, op: &str) -> usize {
        passes::optimise(g).unwrap().nodes().iter().filter(|n| n.op.name() == op).count()
    }

    #[test]
    fn a_long_chain_keeps_its_borders_only() {
        let (plain, borders) = chain(8);
        let late = recompute(&plain, &borders).unwrap();
        // Eight borders instead of four values a block.
        assert!(2 * arena(&late) < arena(&plain), "{} of {}", arena(&late), arena(&plain));
        // Every block once more: no copy fell together with its original.
        assert_eq!(count(&late, "softmax"), 2 * count(&plain, "softmax"));
        assert!(count(&late, "matmul") > count(&plain, "matmul"));
    }

    #[test]
    fn what_is_cheap_is_computed_again_and_no_product_is() {
        let (plain, _) = chain(8);
        let light = recompute_light(&plain).unwrap();
        assert!(arena(&light) < arena(&plain), "{} of {}", arena(&light), arena(&plain));
        for op in ["matmul", "softmax"] {
            assert_eq!(count(&light, op), count(&plain, op), "{op}");
        }
        let kept = |g: &Graph| passes::kept_for_backward(&passes::optimise(g).unwrap()).bytes;
        // Of each block its first product and its softmax, what the first one reads, and every other sum: one is the last and
        // a softmax, but no chain of them is added up again. No result of a GELU.
        let value = 64 * 32 * 4;
        assert_eq!(kept(&light), (8 * 2 + 1 + 8 / 2) * value, "{} values", kept(&light) / value);
        assert!(kept(&plain) > kept(&light) + 8 * value, "{} values", kept(&plain) / value);
    }

    /// The paper's layer keeps its tokens and the experts' first products of a token, 2 T (H + 2 K I) bytes, and indices.
    #[test]
    fn of_a_sparse_layer_the_tokens_and_the_first_products_are_kept() {
        let [tokens, width, inner_width, experts, k] = [64, 128, 32, 4, 2];
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::new(DType::Bf16, [tokens, width])).unwrap();
        let mut parameter = |name: &str, ty| g.parameter(name, ty).unwrap();
        let bf16 = |shape: &[usize]| TensorType::new(DType::Bf16, shape);
        let router = parameter("router", TensorType::f32([width, experts]));
        let [opening, up] = ["opening", "up"].map(|name| parameter(name, bf16(&[experts, width, inner_width])));
        let down = parameter("down", bf16(&[experts, inner_width, width]));
        // Something that the layer's tokens come from, and that is not free.
        let x = g.softmax(x).unwrap();
        let wide = g.cast(x, DType::F32).unwrap();
        let logits = g.matmul(wide, router).unwrap();
        let [gate, expert_index, ..] = g.route(logits, k, Balance::AllChoices).unwrap();
        let total = g.reduce(ReduceFn::Sum, gate, &[1]).unwrap();
        let total = g.reshape(total, [tokens, 1]).unwrap();
        let gate = g.div(gate, total).unwrap();
        let assigned = g.assign(expert_index, None, experts, None, Order::ChoiceMajor).unwrap();
        let [slot_choice, choice_slot, offsets, _] = assigned;
        let rows = g.dispatch(x, slot_choice, choice_slot, None).unwrap();
        let [open, linear] = [opening, up].map(|w| g.expert_matmul(rows, w, offsets, None, false).unwrap());
        let open = g.silu(open).unwrap();
        let inner = g.mul(open, linear).unwrap();
        let rows = g.expert_matmul(inner, down, offsets, None, false).unwrap();
        let y = g.combine(rows, slot_choice, choice_slot, Some(gate)).unwrap();
        let loss = g.mean_all(y).unwrap();
        let grads = gradients(&mut g, loss, &[router, opening, up, down]).unwrap();
        for (i, grad) in grads.into_iter().enumerate() {
            g.output(format!("grad{i}"), grad).unwrap();
        }
        let light = recompute_light(&passes::inner_gates(&g).unwrap()).unwrap();
        verify(&light, Stage::Built).unwrap();
        let kept = passes::kept_for_backward(&passes::optimise(&light).unwrap());
        assert_eq!(kept.bytes as usize, 2 * tokens * (width + 2 * k * inner_width), "{}", light.to_text());
    }

    #[test]
    fn what_is_computed_again_has_the_same_bits() {
        let (plain, borders) = chain(3);
        let wave = |(name, v): &(String, Value)| {
            let ty = plain.ty(*v).clone();
            let data = (0..ty.elements()).map(|i| (i as f64 * 0.7 + name.len() as f64).sin()).collect();
            (name.clone(), Tensor::new(ty, data).rounded())
        };
        let inputs: HashMap<String, Tensor> = plain.inputs().iter().map(wave).collect();
        let norm = |g: &Graph| {
            verify(g, Stage::Built).unwrap();
            reference::run(g, &inputs, Precision::Rounded).unwrap().output(g, "norm").unwrap().data[0].to_bits()
        };
        let wanted = norm(&plain);
        assert_eq!([norm(&recompute(&plain, &borders).unwrap()), norm(&recompute_light(&plain).unwrap())], [wanted; 2]);
    }

    #[test]
    fn without_borders_nothing_changes() {
        let (plain, _) = chain(2);
        assert_eq!(recompute(&plain, &[]).unwrap().to_text(), plain.to_text());
    }
}
