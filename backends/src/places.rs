//! What every backend needs to know of a plan before it can run it: where each step finds its values, and which memory a step
//! may find undefined or must leave alone.

use moebius_ir::{FENCE_BYTES, Fences, Graph, NodeId, Plan, Step, Storage, Value};

use crate::{Error, Result};

/// What a fresh buffer and a fence are filled with: NaN in every float type, -1 in the integers.
pub(crate) const POISON: u8 = 0xff;

/// Where a step finds a value: in the arena or in the table of stored tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this offset.
    Arena(usize),
    /// At this place of [`states`].
    State(usize),
}

/// The memory of one step.
pub(crate) struct StepPlaces {
    /// Of the node's operands, and behind them of those of the nodes whose work is done with it.
    pub(crate) operands: Vec<Place>,
    /// Of the results, likewise.
    pub(crate) results: Vec<Place>,
    /// Offset and length of its scratch memory.
    pub(crate) scratch: (usize, usize),
    /// Arena ranges, offset and length, that hold nothing before the step: results that overwrite no operand, and scratch.
    pub(crate) fresh: Vec<(usize, usize)>,
    /// Arena ranges, from and to, that nobody may write during the step: the fences of the buffers that are alive then.
    pub(crate) fences: Vec<(usize, usize)>,
}

/// The parameters and states of a plan, in the order of the table that [`Place::State`] points into.
pub(crate) fn states(plan: &Plan) -> Vec<Value> {
    let inputs = plan.graph().inputs().iter().map(|&(_, v)| v);
    inputs.filter(|&v| matches!(plan.storage(v), Storage::State(_))).collect()
}

/// The output of this name.
///
/// # Errors
/// [`Error::NoSuch`].
pub(crate) fn output_named(graph: &Graph, name: &str) -> Result<Value> {
    graph.output_named(name).ok_or_else(|| {
        let there = graph.outputs().iter().map(|(n, _)| n.clone()).collect();
        Error::NoSuch { what: "output", name: name.into(), there }
    })
}

/// Where a value lies, with `states` as [`states`] gives them.
pub(crate) fn place(plan: &Plan, states: &[Value], value: Value) -> Place {
    match plan.storage(value) {
        Storage::Arena(offset) => Place::Arena(offset),
        Storage::State(s) => {
            Place::State(states.iter().position(|&t| t == s).unwrap_or_else(|| unreachable!("every state is listed")))
        }
    }
}

/// The memory of step `at`, which runs `node` with this scratch memory, and the nodes `beside` it.
pub(crate) fn of_step(
    plan: &Plan,
    states: &[Value],
    at: usize,
    node: NodeId,
    beside: impl IntoIterator<Item = NodeId>,
    scratch: (usize, usize),
) -> StepPlaces {
    debug_assert!(matches!(plan.steps()[at], Step::Run { .. }));
    let graph = plan.graph();
    let (mut operands, mut results, mut fresh) = (Vec::new(), Vec::new(), vec![scratch]);
    for node in [node].into_iter().chain(beside).map(|id| graph.node(id)) {
        let places = |values: &[Value]| values.iter().map(|&v| place(plan, states, v)).collect::<Vec<_>>();
        let (read, written) = (places(&node.operands), places(&node.results));
        for (&value, place) in node.results.iter().zip(&written) {
            if let Place::Arena(offset) = *place
                && !read.contains(place)
            {
                fresh.push((offset, graph.ty(value).bytes()));
            }
        }
        operands.extend(read);
        results.extend(written);
    }
    let alive = plan.lifetimes().iter().filter(|l| l.first <= at && at <= l.last);
    let fences = match plan.fences() {
        Fences::Off => Vec::new(),
        Fences::On => alive.map(|l| (l.offset + l.bytes - FENCE_BYTES, l.offset + l.bytes)).collect(),
    };
    StepPlaces { operands, results, scratch, fresh, fences }
}
