//! Which graphs are legal at which stage; run after building and after every pass.

use std::fmt;

use crate::error::{Error, Result};
use crate::graph::{Graph, Node};
use crate::ops::{Op, Role};

/// How far a graph has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// As the model built it: no fused ops, so that it can be differentiated.
    Built,
    /// After the passes: elementwise work only in fused form, nothing dead.
    Optimised,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Built => "built",
            Stage::Optimised => "optimised",
        })
    }
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Built => "built",
            Stage::Optimised => "optimised",
        }
    }
}

/// Checks every rule of the stage.
///
/// Always: operands are defined earlier, each op's shape rule accepts its operands and gives the recorded types, updates
/// fit their states, and an op that overwrites a state in place is that state's update. Per stage: see [`Stage`].
///
/// # Errors
/// [`Error::Invalid`] naming the first node that breaks a rule.
pub fn verify(graph: &Graph, stage: Stage) -> Result<()> {
    let invalid = |index: usize, node: &Node, wanted: String, found: String| Error::Invalid {
        stage: stage.name(),
        node: index,
        op: node.op.name(),
        wanted,
        found,
        site: node.site.clone(),
    };
    let mut used = vec![false; graph.value_count()];
    graph.outputs().iter().for_each(|(_, v)| used[v.index()] = true);
    graph.updates().iter().for_each(|u| used[u.new.index()] = true);
    for node in graph.nodes() {
        node.operands.iter().for_each(|v| used[v.index()] = true);
    }
    let mut next_value = 0;
    for (index, node) in graph.nodes().iter().enumerate() {
        if let Some(v) = node.operands.iter().find(|v| v.index() >= next_value) {
            return Err(invalid(index, node, format!("operands below %{next_value}"), format!("%{}", v.index())));
        }
        let operands: Vec<_> = node.operands.iter().map(|&v| graph.ty(v).clone()).collect();
        let recorded: Vec<_> = node.results.iter().map(|&r| graph.ty(r).clone()).collect();
        match node.op.infer(&operands) {
            Ok(types) if types.as_slice() == recorded => {}
            Ok(types) => return Err(invalid(index, node, format!("results {types:?}"), format!("{recorded:?}"))),
            Err(m) => return Err(invalid(index, node, m.wanted, format!("{operands:?}"))),
        }
        next_value += node.results.len();
        for &(result, operand) in node.op.in_place() {
            let Some(input) = graph.input_of(node.operands[operand]) else { continue };
            let updates =
                graph.updates().iter().any(|u| u.state == node.operands[operand] && u.new == node.results[result]);
            if !updates {
                let wanted = format!("result {result} to be the update of {:?}, which it overwrites", input.name);
                return Err(invalid(index, node, wanted, "no such update".into()));
            }
        }
        let fused = matches!(node.op, Op::Elementwise(_));
        let single = matches!(node.op, Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select(_) | Op::Cast(_));
        match stage {
            Stage::Built if fused => {
                return Err(invalid(index, node, "ops that can be differentiated".into(), "a fused chain".into()));
            }
            Stage::Optimised if single => {
                return Err(invalid(index, node, "elementwise work in fused form".into(), "a single op".into()));
            }
            Stage::Optimised if node.op.as_input().is_none() && !node.results.iter().any(|r| used[r.index()]) => {
                return Err(invalid(index, node, "a result that is used".into(), "none".into()));
            }
            Stage::Built | Stage::Optimised => {}
        }
    }
    for update in graph.updates() {
        let node = graph.node(graph.producer(update.state));
        let index = graph.producer(update.state).index();
        if !node.op.as_input().is_some_and(|i| i.role != Role::Feed) {
            return Err(invalid(index, node, "an update of a parameter or state".into(), "something else".into()));
        }
        if graph.ty(update.state) != graph.ty(update.new) {
            let (wanted, found) = (graph.ty(update.state).to_string(), graph.ty(update.new).to_string());
            return Err(invalid(index, node, format!("an update of type {wanted}"), found));
        }
    }
    Ok(())
}
