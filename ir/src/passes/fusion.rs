//! Fusion of elementwise chains: nodes of one shape that feed each other become one `elementwise` node, so that values in
//! between never go to memory. Broadcasts that only feed such nodes disappear into them.
//!
//! A node joins the group of an operand unless another operand needs that group through a node outside it: the group
//! would then wait for itself. A node that joins no group starts one.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

use smallvec::SmallVec;

use crate::error::Result;
use crate::graph::{Graph, Node, NodeId, Value};
use crate::ops::{ElementFn, Elementwise, Instr, Op};

/// Operands and nodes of a group together: what a backend can hold in registers without looking for free ones.
const MOST_REGISTERS: usize = 28;
/// Results of a group.
const MOST_OUTPUTS: usize = 8;

/// The graph with its elementwise nodes fused; single ones are put in fused form too.
///
/// # Errors
/// None on a verified graph.
pub fn fuse_elementwise(graph: &Graph) -> Result<Graph> {
    let graph = sink_broadcasts(graph)?;
    let mut groups = Groups::find(&graph);
    groups.split_large(&graph);
    emit(&graph, &groups)
}

fn function(op: &Op) -> Option<ElementFn> {
    if let Op::Unary(op) = op {
        Some(ElementFn::Unary(op.function))
    } else if let Op::Binary(op) = op {
        Some(ElementFn::Binary(op.function))
    } else if let Op::Compare(op) = op {
        Some(ElementFn::Compare(op.function))
    } else if let Op::Select(_) = op {
        Some(ElementFn::Select)
    } else if let Op::Cast(op) = op {
        Some(ElementFn::Cast(op.dtype))
    } else {
        None
    }
}

/// Elementwise nodes read the operand of a broadcast directly where their shape stays the same.
fn sink_broadcasts(graph: &Graph) -> Result<Graph> {
    graph.rebuild(|out, _, node, operands| {
        if function(&node.op).is_none() {
            return out.push_copy(node, operands);
        }
        let mut operands: SmallVec<[Value; 4]> = operands.into();
        for i in 0..operands.len() {
            let producer = out.node(out.producer(operands[i]));
            let Op::Broadcast(_) = producer.op else { continue };
            let old = std::mem::replace(&mut operands[i], producer.operands[0]);
            let types: Vec<_> = operands.iter().map(|&v| out.ty(v).clone()).collect();
            let wanted = graph.ty(node.results[0]);
            if !node.op.infer(&types).is_ok_and(|t| t[0] == *wanted) {
                operands[i] = old;
            }
        }
        out.push_copy(node, &operands)
    })
}

/// The set of groups that a value cannot be had before.
type Needs = BTreeSet<usize>;

struct Groups {
    /// The group of each node.
    of: Vec<Option<usize>>,
    /// The nodes of each group, in order.
    members: Vec<Vec<NodeId>>,
    /// The groups that each group needs directly.
    needs: Vec<Needs>,
}

impl Groups {
    fn find(graph: &Graph) -> Groups {
        let mut groups = Groups { of: vec![None; graph.nodes().len()], members: Vec::new(), needs: Vec::new() };
        // For nodes in no group: the groups they need.
        let mut outside: Vec<Needs> = vec![Needs::new(); graph.nodes().len()];
        for (id, node) in graph.nodes_with_ids() {
            let of_operand = |groups: &Groups, v: Value| groups.of[graph.producer(v).index()];
            let needs_of = |groups: &Groups, v: Value| match of_operand(groups, v) {
                Some(group) => Needs::from([group]),
                None => outside[graph.producer(v).index()].clone(),
            };
            if function(&node.op).is_none() {
                let needs = node.operands.iter().flat_map(|&v| needs_of(&groups, v)).collect();
                outside[id.index()] = needs;
                continue;
            }
            let shape = &graph.ty(node.results[0]).shape;
            let joinable = |group: usize| {
                let first = groups.members[group][0];
                groups.members[group].len() < MOST_REGISTERS
                    && graph.ty(graph.node(first).results[0]).shape == *shape
                    && node.operands.iter().all(|&v| {
                        of_operand(&groups, v) == Some(group) || !groups.reaches(&needs_of(&groups, v), group)
                    })
            };
            let group = node.operands.iter().rev().filter_map(|&v| of_operand(&groups, v)).find(|&g| joinable(g));
            let needs: Needs = node.operands.iter().flat_map(|&v| needs_of(&groups, v)).collect();
            let group = group.unwrap_or_else(|| {
                groups.members.push(Vec::new());
                groups.needs.push(Needs::new());
                groups.members.len() - 1
            });
            groups.of[id.index()] = Some(group);
            groups.members[group].push(id);
            groups.needs[group].extend(needs.into_iter().filter(|&n| n != group));
        }
        groups
    }

    /// Cuts groups in two until each keeps the limits. Node order is an order of execution, so a cut in it closes no cycle.
    fn split_large(&mut self, graph: &Graph) {
        let mut group = 0;
        while group < self.members.len() {
            let members = &self.members[group];
            let used = outside_uses(graph, self);
            let outputs = members.iter().filter(|id| used[graph.node(**id).results[0].index()]).count();
            let (nodes, registers) = (members.len(), members.len() + external_operands(graph, members).len());
            if nodes > 1 && (registers > MOST_REGISTERS || outputs > MOST_OUTPUTS) {
                let later = self.members[group].split_off(nodes / 2);
                let new = self.members.len();
                later.iter().for_each(|id| self.of[id.index()] = Some(new));
                self.members.push(later);
            } else {
                group += 1;
            }
        }
    }

    /// Whether something that needs `from` needs `target`, directly or through other groups.
    fn reaches(&self, from: &Needs, target: usize) -> bool {
        let mut seen = Needs::new();
        let mut open: Vec<usize> = from.iter().copied().collect();
        while let Some(group) = open.pop() {
            if group == target {
                return true;
            }
            if seen.insert(group) {
                open.extend(&self.needs[group]);
            }
        }
        false
    }
}

/// The fused graph, in an order that waits for whole groups.
fn emit(graph: &Graph, groups: &Groups) -> Result<Graph> {
    // A unit is a group or a single node; its key is the last node in it, so that order changes as little as possible.
    let unit_of = |id: NodeId| groups.of[id.index()].map_or(graph.nodes().len() + id.index(), |g| g);
    let key = |unit: usize| match unit.checked_sub(graph.nodes().len()) {
        Some(node) => node,
        None => groups.members[unit].last().map_or(0, |id| id.index()),
    };
    let mut waits: HashMap<usize, usize> = HashMap::new();
    let mut next: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut edges: BTreeSet<(usize, usize)> = BTreeSet::new();
    for (id, node) in graph.nodes_with_ids() {
        let to = unit_of(id);
        waits.entry(to).or_insert(0);
        for &v in &node.operands {
            let from = unit_of(graph.producer(v));
            if from != to && edges.insert((from, to)) {
                next.entry(from).or_default().push(to);
                *waits.entry(to).or_insert(0) += 1;
            }
        }
    }
    let mut ready: BinaryHeap<Reverse<(usize, usize)>> =
        waits.iter().filter(|(_, n)| **n == 0).map(|(&u, _)| Reverse((key(u), u))).collect();
    let mut out = Graph::new();
    let mut map: Vec<Option<Value>> = vec![None; graph.value_count()];
    let used_outside = outside_uses(graph, groups);
    let mut emitted = 0;
    while let Some(Reverse((_, unit))) = ready.pop() {
        emitted += 1;
        match unit.checked_sub(graph.nodes().len()) {
            Some(index) => {
                let node = &graph.nodes()[index];
                let operands: SmallVec<[Value; 4]> = node.operands.iter().filter_map(|v| map[v.index()]).collect();
                let results = out.push_copy(node, &operands)?;
                node.results.iter().zip(results).for_each(|(old, new)| map[old.index()] = Some(new));
            }
            None => emit_group(graph, &groups.members[unit], &used_outside, &mut out, &mut map)?,
        }
        for &to in next.get(&unit).into_iter().flatten() {
            let n = waits.entry(to).or_insert(0);
            *n -= 1;
            if *n == 0 {
                ready.push(Reverse((key(to), to)));
            }
        }
    }
    assert_eq!(emitted, waits.len(), "fusion closed a cycle");
    out.adopt_ends(graph, &map);
    Ok(out)
}

/// Whether a value is needed outside its group.
fn outside_uses(graph: &Graph, groups: &Groups) -> Vec<bool> {
    let mut used = vec![false; graph.value_count()];
    for (id, node) in graph.nodes_with_ids() {
        for &v in &node.operands {
            let group = groups.of[graph.producer(v).index()];
            if group.is_none() || group != groups.of[id.index()] {
                used[v.index()] = true;
            }
        }
    }
    graph.outputs().iter().for_each(|(_, v)| used[v.index()] = true);
    graph.updates().iter().for_each(|u| used[u.new.index()] = true);
    used
}

/// What a group reads that is not computed in it, in the order of first use.
fn external_operands(graph: &Graph, members: &[NodeId]) -> Vec<Value> {
    let inside: BTreeSet<Value> = members.iter().flat_map(|&id| graph.node(id).results.iter().copied()).collect();
    let mut operands: Vec<Value> = Vec::new();
    for &id in members {
        for &v in &graph.node(id).operands {
            if !inside.contains(&v) && !operands.contains(&v) {
                operands.push(v);
            }
        }
    }
    operands
}

fn emit_group(
    graph: &Graph,
    members: &[NodeId],
    used_outside: &[bool],
    out: &mut Graph,
    map: &mut [Option<Value>],
) -> Result<()> {
    let operands = external_operands(graph, members);
    let mut register: HashMap<Value, u32> = operands.iter().enumerate().map(|(i, &v)| (v, i as u32)).collect();
    let mut op = Elementwise {
        shape: graph.ty(graph.node(members[0]).results[0]).shape.clone(),
        instrs: Vec::with_capacity(members.len()),
        outputs: Vec::new(),
    };
    let mut results: Vec<Value> = Vec::new();
    for &id in members {
        let node: &Node = graph.node(id);
        let Some(function) = function(&node.op) else { unreachable!("only elementwise nodes are in groups") };
        let args = node.operands.iter().map(|v| register[v]).collect();
        let target = (operands.len() + op.instrs.len()) as u32;
        op.instrs.push(Instr { function, args });
        register.insert(node.results[0], target);
        if used_outside[node.results[0].index()] {
            op.outputs.push(target);
            results.push(node.results[0]);
        }
    }
    if results.is_empty() {
        return Ok(());
    }
    let translated: Vec<Value> = operands.iter().filter_map(|v| map[v.index()]).collect();
    let last = graph.node(members[members.len() - 1]);
    let new = out.push_scoped(op.into(), &translated, last.site.clone(), last.scope.clone())?;
    results.iter().zip(new).for_each(|(old, new)| map[old.index()] = Some(new));
    Ok(())
}
