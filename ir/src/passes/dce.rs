//! Dead code: nodes that no output and no update needs are left out. Inputs stay, so that what a caller feeds and stores
//! does not depend on what the graph happens to use.

use crate::error::Result;
use crate::graph::Graph;

/// The graph without its dead nodes.
///
/// # Errors
/// None on a verified graph.
pub fn eliminate_dead_code(graph: &Graph) -> Result<Graph> {
    let mut live = vec![false; graph.value_count()];
    graph.outputs().iter().for_each(|(_, v)| live[v.index()] = true);
    graph.updates().iter().for_each(|u| live[u.new.index()] = true);
    let mut keep = vec![false; graph.nodes().len()];
    for (id, node) in graph.nodes_with_ids().rev() {
        if node.op.as_input().is_some() || node.results.iter().any(|r| live[r.index()]) {
            keep[id.index()] = true;
            node.operands.iter().for_each(|v| live[v.index()] = true);
        }
    }
    graph.rebuild(
        |out, id, node, operands| {
            if keep[id.index()] { out.push_copy(node, operands) } else { Ok(Default::default()) }
        },
    )
}
