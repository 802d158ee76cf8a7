//! What kernels may read before those before them have ended (`EARLY` in their texts): memory that no kernel of the run writes. The first
//! kernel of a run waits for all that came before it, and so do those behind it.

use moebius_ir::{Graph, Node, Role, Value};

/// The operands that a node works over.
fn overwritten<'a>(graph: &'a Graph, node: &'a Node) -> impl Iterator<Item = Value> + 'a {
    node.op.in_place().iter().map(|&(_, operand)| graph.alias_base(node.operands[operand]))
}

/// Whether a run leaves a tensor as it found it: a feed, or a parameter or state that no update or op of the graph writes.
pub(super) fn stays(graph: &Graph, value: Value) -> bool {
    let tensor = graph.alias_base(value);
    let is_updated = graph.updates().iter().any(|update| update.state == tensor);
    let is_written = || graph.nodes().iter().any(|node| overwritten(graph, node).any(|v| v == tensor));
    graph.input_of(tensor).is_some() && !is_updated && !is_written()
}

/// Whether nothing of a run but this node writes the states that it works over, so that what it leaves alone of them is as it was before.
pub(super) fn alone_writes(graph: &Graph, node: &Node) -> bool {
    let own: Vec<Value> = overwritten(graph, node).collect();
    let is_state = |v: &Value| graph.input_of(*v).is_some_and(|input| input.role != Role::Feed);
    let by_this = |v: Value| node.results.contains(&graph.alias_base(v));
    let updated_by_this = |v: &Value| graph.updates().iter().all(|update| update.state != *v || by_this(update.new));
    let writes = |other: &Node| overwritten(graph, other).any(|v| own.contains(&v) || node.results.contains(&v));
    let others = graph.nodes().iter().filter(|other| other.results != node.results);
    own.iter().all(|v| is_state(v) && updated_by_this(v)) && !others.into_iter().any(writes)
}
