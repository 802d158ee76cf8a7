//! The fewest bytes that the forward pass can leave to the backward pass if whatever is cheap may be computed again: a least cut of
//! the graph between what is not cheap and what is read (the rule of `min_cut_rematerialization_partition` in PyTorch).
//!
//! Of cuts of equal bytes it is the one with the least to compute again.

use std::collections::VecDeque;

use crate::graph::{Graph, Node, Value};
use crate::ops::Op;

/// More than all values together.
const ENDLESS: u128 = u128::MAX / 2;
/// A product is cheap if its larger operand has at least so many times its bytes, a reduction if its operand has at most so many.
const THIN: usize = 16;

/// For each value whether it is kept, as `read` says which the backward pass reads. Those of `free` are there in any case.
pub(super) fn least_kept(graph: &Graph, free: &[bool], read: &[bool]) -> Vec<bool> {
    // Values that share storage are one.
    let base: Vec<Value> = graph.values().map(|v| graph.alias_base(v)).collect();
    let is_free = |v: Value| free[base[v.index()].index()];
    let cheap = cheap_nodes(graph, &base, &is_free);
    let mut net = Net::new(2 * graph.value_count() + 2);
    let [source, sink] = [2 * graph.value_count(), 2 * graph.value_count() + 1];
    let [before, after] = [|v: Value| 2 * v.index(), |v: Value| 2 * v.index() + 1];
    for value in graph.values() {
        if read[value.index()] && !is_free(value) {
            net.edge(after(base[value.index()]), sink, ENDLESS);
        }
        if base[value.index()] != value || is_free(value) {
            continue;
        }
        net.edge(before(value), after(value), graph.ty(value).bytes() as u128);
        let producer = graph.producer(value);
        if cheap[producer.index()] {
            for &operand in graph.node(producer).operands.iter().filter(|v| !is_free(**v)) {
                net.edge(after(base[operand.index()]), before(value), ENDLESS);
            }
        } else {
            net.edge(source, before(value), ENDLESS);
        }
    }
    net.fill(source, sink);
    let again = net.drains(sink);
    graph.values().map(|v| is_free(v) || !again[before(base[v.index()])]).collect()
}

/// For each node whether it costs little more than to read its operands and to write its results, and needs no chain
/// of such nodes through the layers: the sum of a residual stream is not computed again from the sum before, which would have to be
/// there long before its own layer's turn.
fn cheap_nodes(graph: &Graph, base: &[Value], free: &dyn Fn(Value) -> bool) -> Vec<bool> {
    let mut cheap = vec![false; graph.nodes().len()];
    // For each value the nodes that are not cheap on the longest path to it.
    let mut level = vec![0; graph.value_count()];
    for (id, node) in graph.nodes_with_ids() {
        let below = node.operands.iter().map(|v| level[v.index()]).max().unwrap_or(0);
        let is_sum_of_layers =
            |v: &Value| cheap[graph.producer(base[v.index()]).index()] && !free(*v) && level[v.index()] < below;
        let elementwise =
            matches!(node.op, Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select(_) | Op::Cast(_));
        let moves = matches!(node.op, Op::Broadcast(_) | Op::Dispatch(_));
        let routes = matches!(node.op, Op::Route(_)) || is_thin_product(graph, node) || is_short_sum(graph, node);
        cheap[id.index()] = moves || routes || elementwise && !node.operands.iter().any(is_sum_of_layers);
        let passes = cheap[id.index()] || node.op.is_alias();
        node.results.iter().for_each(|r| level[r.index()] = below + usize::from(!passes));
    }
    cheap
}

/// Whether a node is a product that is little beside what it reads, such as a router's logits.
fn is_thin_product(graph: &Graph, node: &Node) -> bool {
    matches!(node.op, Op::Matmul(_)) && THIN * largest(graph, &node.results) <= largest(graph, &node.operands)
}

/// Whether a node is a reduction of few elements each, such as the sum of a token's gates.
fn is_short_sum(graph: &Graph, node: &Node) -> bool {
    matches!(node.op, Op::Reduce(_)) && largest(graph, &node.operands) <= THIN * largest(graph, &node.results)
}

/// Bytes of the largest of these values.
fn largest(graph: &Graph, values: &[Value]) -> usize {
    values.iter().map(|&v| graph.ty(v).bytes()).max().unwrap_or(0)
}

/// A net of pipes. Edge `2i` is a pipe, `2i + 1` the way back.
struct Net {
    /// Where each edge leads.
    to: Vec<usize>,
    /// What each edge can still take.
    room: Vec<u128>,
    /// The edges from each place.
    from: Vec<Vec<usize>>,
}

impl Net {
    fn new(places: usize) -> Net {
        Net { to: Vec::new(), room: Vec::new(), from: vec![Vec::new(); places] }
    }

    fn edge(&mut self, from: usize, to: usize, room: u128) {
        for (from, to, room) in [(from, to, room), (to, from, 0)] {
            self.from[from].push(self.to.len());
            self.to.push(to);
            self.room.push(room);
        }
    }

    /// Fills the net, by shortest ways first (Edmonds and Karp), until nothing more gets from `source` to `sink`.
    fn fill(&mut self, source: usize, sink: usize) {
        while let Some(way) = self.way(source, sink) {
            let most = way.iter().map(|&edge| self.room[edge]).min().unwrap_or(0);
            for edge in way {
                self.room[edge] -= most;
                self.room[edge ^ 1] += most;
            }
        }
    }

    /// The edges of a shortest way that can take something, from its end.
    fn way(&self, source: usize, sink: usize) -> Option<Vec<usize>> {
        let mut by: Vec<Option<usize>> = vec![None; self.from.len()];
        let mut open = VecDeque::from([source]);
        while let Some(place) = open.pop_front() {
            for &edge in &self.from[place] {
                let to = self.to[edge];
                if self.room[edge] > 0 && to != source && by[to].is_none() {
                    by[to] = Some(edge);
                    open.push_back(to);
                }
            }
            if by[sink].is_some() {
                break;
            }
        }
        let mut way = Vec::new();
        let mut place = sink;
        while place != source {
            let edge = by[place]?;
            way.push(edge);
            place = self.to[edge ^ 1];
        }
        Some(way)
    }

    /// From which places something more could get to `sink`.
    fn drains(&self, sink: usize) -> Vec<bool> {
        let mut drains = vec![false; self.from.len()];
        drains[sink] = true;
        let mut open = vec![sink];
        while let Some(place) = open.pop() {
            for &edge in &self.from[place] {
                let from = self.to[edge];
                if self.room[edge ^ 1] > 0 && !drains[from] {
                    drains[from] = true;
                    open.push(from);
                }
            }
        }
        drains
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::types::TensorType;

    /// Which of `among` are kept if `read` are read.
    fn kept(g: &Graph, read: &[Value], among: &[Value]) -> Vec<bool> {
        let free: Vec<bool> = g.values().map(|v| g.input_of(v).is_some()).collect();
        let read: Vec<bool> = g.values().map(|v| read.contains(&v)).collect();
        let kept = least_kept(g, &free, &read);
        among.iter().map(|v| kept[v.index()]).collect()
    }

    #[test]
    fn a_chain_is_kept_where_it_is_narrowest() {
        let mut g = Graph::new();
        let x = g.parameter("x", TensorType::f32([8, 8])).unwrap();
        let product = g.matmul(x, x).unwrap();
        let narrow = g.cast(product, DType::Bf16).unwrap();
        let folded = g.reshape(narrow, [64]).unwrap();
        let wide = g.cast(folded, DType::F32).unwrap();
        let high = g.exp(wide).unwrap();
        let all = [product, narrow, folded, wide, high];
        assert_eq!(kept(&g, &[high], &all), [true, true, true, false, false]);
        assert_eq!(kept(&g, &[high, product], &all), [true, false, false, false, false]);
        assert_eq!(kept(&g, &[folded], &all), [true, true, true, true, true]);
    }

    #[test]
    fn what_only_joins_kept_values_is_not_worth_to_keep_them() {
        let mut g = Graph::new();
        let x = g.parameter("x", TensorType::f32([8, 8])).unwrap();
        let (a, b) = (g.matmul(x, x).unwrap(), g.softmax(x).unwrap());
        let sum = g.add(a, b).unwrap();
        let of_parameter = g.exp(x).unwrap();
        let all = [a, b, sum, of_parameter];
        // One sum instead of two terms; what depends on parameters alone is for free.
        let apart = kept(&g, &[sum, of_parameter], &all);
        assert_eq!((apart[2], apart[3]), (true, false));
        assert!(kept(&g, &[sum, a], &all)[2], "as large as the other term, and needs no sum");
        assert!(!kept(&g, &[sum, a, b], &all)[2]);
    }
}
