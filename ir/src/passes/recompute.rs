//! Recomputation: the backward pass computes again what lies between two border values, instead of keeping it from the forward
//! pass on (Chen and others, arXiv 1604.06174, with the borders given).
//!
//! Not one of [`super::optimise`]'s passes: it trades time for memory, and only the caller knows the borders. It runs before them.
//! Every copy reads what is kept through [`crate::ops::After`] with a cotangent as trigger. So no copy is a common subexpression of
//! its original, none is fused with it, and none can run before the backward pass has come to its segment.

use std::collections::{BTreeSet, HashMap};

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
    let segments = Segments::of(graph, borders);
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
fn is_emitted(node: &Node) -> bool {
    node.scope.split('/').next() == Some(BACKWARD)
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
    fn of(graph: &Graph, borders: &[Value]) -> Segments {
        let mut is_border = vec![false; graph.value_count()];
        borders.iter().for_each(|v| is_border[v.index()] = true);
        let mut backward = vec![false; graph.nodes().len()];
        let mut number = vec![0; graph.value_count()];
        // What depends on constants alone costs nothing to keep.
        let mut constant = vec![false; graph.value_count()];
        for (id, node) in graph.nodes_with_ids() {
            backward[id.index()] =
                is_emitted(node) || node.operands.iter().any(|v| backward[graph.producer(*v).index()]);
            let after = |v: &Value| number[v.index()] + usize::from(is_border[v.index()]);
            let of_node = node.operands.iter().map(after).max().unwrap_or(0);
            let folds = node.op.as_input().is_none() && node.operands.iter().all(|v| constant[v.index()]);
            for r in &node.results {
                (number[r.index()], constant[r.index()]) = (of_node, folds);
            }
        }
        let last = borders.iter().map(|v| number[v.index()] + 1).max().unwrap_or(0);
        let keeps = |v: Value| {
            let producer = graph.producer(v);
            let input = graph.node(producer).op.as_input().is_some();
            input
                || backward[producer.index()]
                || is_border[v.index()]
                || constant[v.index()]
                || number[v.index()] >= last
        };
        let fixed = graph.values().map(keeps).collect();
        Segments { backward, number, fixed }
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
    use crate::plan::{Fences, Plan};
    use crate::types::TensorType;
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
    fn without_borders_nothing_changes() {
        let (plain, _) = chain(2);
        assert_eq!(recompute(&plain, &[]).unwrap().to_text(), plain.to_text());
    }
}
