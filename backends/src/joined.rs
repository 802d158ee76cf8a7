//! Which fused chains run together with the matrix product they follow: part by part, while the part is in a near cache.

#[cfg(any(feature = "cuda", feature = "vulkan"))]
use std::collections::HashSet;

use moebius_ir::{Graph, NodeId, Op, Value};

/// The chain to run with a node: a fused chain over as many elements as the node's result, which it takes unstretched, and
/// whose other operands are made before the node.
pub(crate) fn joined(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let node = graph.node(id);
    let product = *node.results.first()?;
    // A node that is several products, each of which would have to find its place in the chain, gets none.
    let one = if let Op::Matmul(op) = &node.op {
        graph.shape(product).len() == 2 || (graph.shape(node.operands[1]).len() == 2 && !op.transpose_a)
    } else {
        matches!(node.op, Op::ExpertMatmul(_))
    };
    if !one {
        return None;
    }
    let before = |v: Value| {
        let producer = graph.producer(v);
        producer.index() < id.index() || matches!(graph.node(producer).op, Op::Input(_) | Op::Constant(_))
    };
    graph.nodes_with_ids().skip(id.index() + 1).find_map(|(chain, node)| {
        let Op::Elementwise(op) = &node.op else { return None };
        let mut takes = false;
        for &operand in &node.operands {
            if base(graph, operand) == product {
                if *graph.shape(operand) != *op.shape {
                    return None;
                }
                takes = true;
            } else if !before(base(graph, operand)) {
                return None;
            }
        }
        takes.then_some(chain)
    })
}

/// The chains that `joined` joins onto nodes of a graph: their work is done with those nodes.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn chains(graph: &Graph, joined: impl Fn(NodeId) -> Option<NodeId>) -> HashSet<NodeId> {
    graph.nodes_with_ids().filter_map(|(id, _)| joined(id)).collect()
}

/// What a value is a reshape of.
pub(crate) fn base(graph: &Graph, mut value: Value) -> Value {
    while let Op::Reshape(_) = graph.node(graph.producer(value)).op {
        value = graph.node(graph.producer(value)).operands[0];
    }
    value
}

/// Whether anything but the chain needs the product: a node, an output or an update.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn is_kept(graph: &Graph, product: Value, chain: NodeId) -> bool {
    let is = |v: Value| base(graph, v) == product;
    let reads = |(id, node): (NodeId, &moebius_ir::Node)| {
        id != chain && !matches!(node.op, Op::Reshape(_)) && node.operands.iter().any(|&v| is(v))
    };
    graph.outputs().iter().any(|(_, v)| is(*v))
        || graph.updates().iter().any(|u| is(u.new))
        || graph.nodes_with_ids().any(reads)
}
