//! From a graph to a plan: the order of the steps, the lifetime of every buffer, and its offset in one arena. Plain data;
//! nothing here allocates device memory.
//!
//! Storage is shared where it can be: a reshape is its operand, an op that works in place is the operand it overwrites, and
//! a fused chain writes over an operand that dies with it, also over the stored tensor whose update it computes if nothing reads
//! the old value later. Parameters and state lie outside the arena.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::fmt::Write;

use crate::error::{Error, Result};
use crate::graph::{Graph, NodeId, Value};
use crate::ops::{Op, Role};

/// Every buffer starts at a multiple of this many bytes.
const ALIGN: usize = 128;

/// Unused bytes after every buffer of a fenced plan.
pub const FENCE_BYTES: usize = ALIGN;

/// Whether buffers are kept apart so that a write past the end of one can be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fences {
    /// Buffers may touch.
    Off,
    /// [`FENCE_BYTES`] unused bytes after every buffer.
    On,
}

/// When memory of the arena is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// As soon as nothing needs what it holds.
    AtOnce,
    /// Buffers of at most `bytes` keep theirs for `steps` steps more: for backends that run steps beside each other where they
    /// share no memory.
    Later {
        /// Bytes of the largest of these buffers.
        bytes: usize,
        /// How many steps more.
        steps: usize,
    },
}

/// Where a value lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In the persistent storage of this parameter or state input.
    State(Value),
    /// In the arena, at this offset in bytes.
    Arena(usize),
}

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Run a node, with this many bytes of scratch at this offset of the arena.
    Run {
        /// The node.
        node: NodeId,
        /// Offset of its scratch memory.
        scratch: usize,
        /// Bytes of scratch memory.
        scratch_bytes: usize,
    },
    /// Copy `new` over the storage of `state`: an update no op carried out in place.
    Copy {
        /// The state's input value.
        state: Value,
        /// What it holds afterwards.
        new: Value,
    },
}

/// A stretch of the arena and the steps during which it must keep its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// The value whose buffer it is; `None` for scratch.
    pub value: Option<Value>,
    /// Offset in the arena.
    pub offset: usize,
    /// Length in bytes, fence included.
    pub bytes: usize,
    /// First step that writes it; 0 if it is filled before the run.
    pub first: usize,
    /// Last step that reads it, or before whose end its memory is not used again.
    pub last: usize,
}

/// A graph with everything decided that can be decided without a device.
#[derive(Clone, Debug)]
pub struct Plan {
    graph: Graph,
    steps: Vec<Step>,
    /// For each node, the one joined onto it.
    joined: Vec<Option<NodeId>>,
    /// For each node, the one it is joined onto.
    onto: Vec<Option<NodeId>>,
    storage: Vec<Storage>,
    lifetimes: Vec<Lifetime>,
    arena_bytes: usize,
    fences: Fences,
}

impl Plan {
    /// Plans `graph`. `scratch` gives the bytes of scratch memory that a backend's kernels need in a node's step; it is given the plan as far
    /// as order and what is joined.
    ///
    /// # Errors
    /// [`Error::Overwrite`] if an op works in place on something that must be read later; [`Error::Update`] if the old value
    /// of an updated state is also an output or the new value of another state; [`Error::TooLarge`] if no memory has the size.
    pub fn new(graph: Graph, scratch: &dyn Fn(&Plan, NodeId) -> usize, fences: Fences) -> Result<Plan> {
        Plan::with_joined(graph, scratch, &|_, _| None, fences)
    }

    /// Like [`Plan::new`] for a backend that can run some nodes together, as a fused chain with the product it follows. `join`
    /// names the node that is to follow a node; where the order allows it, [`Plan::joined`] then holds: its step comes right
    /// after the node's. What is joined makes a group, as a norm, a product and a chain. During each step of a group all operands
    /// and results of the group have their memory, and none lies over another's, but for a result of a chain, which may, as ever,
    /// lie over an operand of that chain, though never over one of the nodes before it.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn with_joined(
        graph: Graph,
        scratch: &dyn Fn(&Plan, NodeId) -> usize,
        join: &dyn Fn(&Graph, NodeId) -> Option<NodeId>,
        fences: Fences,
    ) -> Result<Plan> {
        Plan::with_reuse(graph, scratch, join, fences, Reuse::AtOnce)
    }

    /// Like [`Plan::with_joined`], with memory used again when `reuse` says.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn with_reuse(
        graph: Graph,
        scratch: &dyn Fn(&Plan, NodeId) -> usize,
        join: &dyn Fn(&Graph, NodeId) -> Option<NodeId>,
        fences: Fences,
        reuse: Reuse,
    ) -> Result<Plan> {
        let wanted = (0..graph.nodes().len()).map(|i| join(&graph, NodeId(i as u32))).collect();
        let (order, joined) = order(&graph, wanted)?;
        let mut step_of = vec![0usize; graph.nodes().len()];
        let mut steps: Vec<Step> = Vec::with_capacity(order.len());
        for node in order {
            step_of[node.index()] = steps.len();
            let op = &graph.node(node).op;
            let runs = !matches!(op, Op::Input(_) | Op::Constant(_)) && !op.is_alias();
            if runs {
                steps.push(Step::Run { node, scratch: 0, scratch_bytes: 0 });
            }
        }
        let mut onto = vec![None; joined.len()];
        for (id, next) in joined.iter().enumerate() {
            next.iter().for_each(|next| onto[next.index()] = Some(NodeId(id as u32)));
        }
        let roots = roots(&graph, &steps, &step_of, &onto);
        for update in graph.updates() {
            if roots[update.new.index()] != update.state {
                let stale = |v: Value| roots[v.index()] == update.state;
                if graph.outputs().iter().any(|(_, v)| stale(*v)) || graph.updates().iter().any(|u| stale(u.new)) {
                    return Err(Error::Update {
                        name: graph.input_of(update.state).map_or_else(String::new, |i| i.name.clone()),
                        wanted: "an old value that nothing needs after the run".into(),
                        found: "an output or another update that is the old value".into(),
                        site: graph.node(graph.producer(update.new)).site.clone(),
                    });
                }
                steps.push(Step::Copy { state: update.state, new: update.new });
            }
        }
        let (storage, lifetimes) = (Vec::new(), Vec::new());
        let mut plan = Plan { graph, steps, joined, onto, storage, lifetimes, arena_bytes: 0, fences };
        let needs: Vec<usize> = plan
            .steps
            .iter()
            .map(|step| if let Step::Run { node, .. } = *step { scratch(&plan, node) } else { 0 })
            .collect();
        for (step, needed) in plan.steps.iter_mut().zip(needs) {
            if let Step::Run { scratch_bytes, .. } = step {
                *scratch_bytes = needed;
            }
        }
        plan.place(&roots, &step_of, reuse)?;
        Ok(plan)
    }

    /// The graph it carries out.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// What to do, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The node that is joined onto this one, whose step is the next: the work of both can be done in either step.
    pub fn joined(&self, node: NodeId) -> Option<NodeId> {
        self.joined[node.index()]
    }

    /// The node that this one is joined onto, whose step is the one before.
    pub fn joined_onto(&self, node: NodeId) -> Option<NodeId> {
        self.onto[node.index()]
    }

    /// Where a value lies.
    pub fn storage(&self, value: Value) -> Storage {
        self.storage[value.index()]
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Every buffer of the arena.
    pub fn lifetimes(&self) -> &[Lifetime] {
        &self.lifetimes
    }

    /// Whether buffers are fenced.
    pub fn fences(&self) -> Fences {
        self.fences
    }

    /// Bytes of parameters and other state, which lie outside the arena.
    pub fn state_bytes(&self) -> usize {
        let state = |v: Value| self.graph.input_of(v).is_some_and(|i| i.role != Role::Feed);
        self.graph.inputs().iter().filter(|(_, v)| state(*v)).map(|(_, v)| self.graph.ty(*v).bytes()).sum()
    }

    /// Two buffers that overlap in memory while both are alive, if there are any: a bug of the planner.
    pub fn overlap(&self) -> Option<(Lifetime, Lifetime)> {
        for (i, a) in self.lifetimes.iter().enumerate() {
            for b in &self.lifetimes[..i] {
                let in_time = a.first <= b.last && b.first <= a.last;
                let in_space = a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
                if in_time && in_space {
                    return Some((*a, *b));
                }
            }
        }
        None
    }

    /// The plan as text: one line a step, with where its results go.
    pub fn to_text(&self) -> String {
        let mut text = format!("plan: {} steps, arena {} bytes\n", self.steps.len(), self.arena_bytes);
        for (i, step) in self.steps.iter().enumerate() {
            match *step {
                Step::Run { node, scratch, scratch_bytes } => {
                    let node = self.graph.node(node);
                    let place = |v: &Value| match self.storage(*v) {
                        Storage::State(s) => {
                            format!("%{}=state({})", v.index(), self.graph.input_of(s).map_or("", |i| &i.name))
                        }
                        Storage::Arena(at) => format!("%{}@{at}", v.index()),
                    };
                    let results = node.results.iter().map(place).collect::<Vec<_>>().join(", ");
                    let operands =
                        node.operands.iter().map(|v| format!("%{}", v.index())).collect::<Vec<_>>().join(", ");
                    let _ = write!(text, "{i}: {results} = {}({operands})", node.op.name());
                    if scratch_bytes > 0 {
                        let _ = write!(text, " scratch {scratch_bytes}@{scratch}");
                    }
                    text.push('\n');
                }
                Step::Copy { state, new } => {
                    let _ = writeln!(text, "{i}: copy %{} over %{}", new.index(), state.index());
                }
            }
        }
        text
    }

    /// Gives every root its lifetime and offset; fills `storage`.
    fn place(&mut self, roots: &[Value], step_of: &[usize], reuse: Reuse) -> Result<()> {
        let graph = &self.graph;
        let end = self.steps.len();
        let mut span: Vec<Option<(usize, usize)>> = vec![None; graph.value_count()];
        let mut live = |root: Value, first: usize, last: usize| {
            let s = span[root.index()].get_or_insert((first, last));
            *s = (s.0.min(first), s.1.max(last));
        };
        for (id, node) in graph.nodes_with_ids() {
            let at = step_of[id.index()];
            for &r in &node.results {
                let root = roots[r.index()];
                if let Op::Input(input) = &node.op {
                    // A feed keeps its value from run to run until the host gives another.
                    if input.role == Role::Feed {
                        live(root, 0, end);
                    }
                } else if let Op::Constant(_) = node.op {
                    // Constants are written once, when the arena is made, and must outlast every run.
                    live(root, 0, end);
                } else {
                    live(root, at, at);
                }
            }
            if !node.op.is_alias() {
                node.operands.iter().for_each(|v| live(roots[v.index()], at, at));
            }
            // Of a group everything is there from its first step to its last.
            let before = before(&self.onto, id).count();
            let behind = std::iter::successors(self.joined[id.index()], |n| self.joined[n.index()]).count();
            if before + behind > 0 {
                let values = node.operands.iter().chain(&node.results);
                values.for_each(|v| live(roots[v.index()], at - before, at + behind));
            }
        }
        graph.outputs().iter().for_each(|(_, v)| live(roots[v.index()], end, end));
        graph.updates().iter().for_each(|u| live(roots[u.new.index()], end, end));

        let is_state = |v: Value| graph.input_of(v).is_some_and(|i| i.role != Role::Feed);
        let fence = if self.fences == Fences::On { FENCE_BYTES } else { 0 };
        let padded = |bytes: usize| bytes.max(1).next_multiple_of(ALIGN) + fence;
        let mut buffers: Vec<Lifetime> = Vec::new();
        for value in graph.values() {
            if roots[value.index()] == value
                && !is_state(value)
                && let Some((first, last)) = span[value.index()]
            {
                let bytes = padded(graph.ty(value).bytes());
                buffers.push(Lifetime { value: Some(value), offset: 0, bytes, first, last });
            }
        }
        let mut scratch_of: Vec<(usize, usize)> = Vec::new();
        for (i, step) in self.steps.iter().enumerate() {
            if let Step::Run { scratch_bytes, .. } = *step
                && scratch_bytes > 0
            {
                scratch_of.push((i, buffers.len()));
                buffers.push(Lifetime { value: None, offset: 0, bytes: padded(scratch_bytes), first: i, last: i });
            }
        }
        if let Reuse::Later { bytes, steps } = reuse {
            let small = buffers.iter_mut().filter(|b| b.bytes <= bytes);
            small.for_each(|b| b.last = b.last.saturating_add(steps).min(end));
        }
        // Offsets are at most the sum of all buffers, so this keeps every sum of them countable.
        let all: u128 = buffers.iter().map(|b| b.bytes as u128).sum();
        if all > isize::MAX as u128 {
            return Err(Error::TooLarge { buffers: buffers.len(), bytes: all });
        }
        self.arena_bytes = place_by_size(&mut buffers);
        for (step, buffer) in scratch_of {
            if let Step::Run { scratch, .. } = &mut self.steps[step] {
                *scratch = buffers[buffer].offset;
            }
        }
        let mut offset_of: Vec<usize> = vec![0; graph.value_count()];
        buffers.iter().for_each(|b| b.value.into_iter().for_each(|v| offset_of[v.index()] = b.offset));
        self.storage = graph
            .values()
            .map(|v| {
                let root = roots[v.index()];
                if is_state(root) { Storage::State(root) } else { Storage::Arena(offset_of[root.index()]) }
            })
            .collect();
        self.lifetimes = buffers;
        Ok(())
    }
}

/// Node order with every op that works in place after all other readers of what it overwrites, and the nodes that are
/// joined right behind those they are joined onto, for which they are held back: those of `joined` that are ready then. A node that computes
/// the update of a stored tensor comes as soon as its operands are there, which need not be kept then. Otherwise nodes keep the order in which
/// they were made.
fn order(graph: &Graph, mut joined: Vec<Option<NodeId>>) -> Result<(Vec<NodeId>, Vec<Option<NodeId>>)> {
    let nodes = graph.nodes();
    let mut readers: Vec<Vec<NodeId>> = vec![Vec::new(); graph.value_count()];
    for (id, node) in graph.nodes_with_ids() {
        node.operands.iter().for_each(|v| readers[v.index()].push(id));
    }
    let mut next: Vec<Vec<NodeId>> = vec![Vec::new(); nodes.len()];
    let mut waits: Vec<usize> = vec![0; nodes.len()];
    let mut edge = |from: NodeId, to: NodeId| {
        next[from.index()].push(to);
        waits[to.index()] += 1;
    };
    for (id, node) in graph.nodes_with_ids() {
        node.operands.iter().for_each(|&v| edge(graph.producer(v), id));
        for &(result, operand) in node.op.in_place() {
            let overwritten = node.operands[operand];
            let refuse = || Error::Overwrite { op: node.op.name(), operand, site: node.site.clone() };
            let base = graph.alias_base(overwritten);
            let feed = graph.input_of(base).is_some_and(|i| i.role == Role::Feed);
            if feed || matches!(graph.node(graph.producer(base)).op, Op::Constant(_)) {
                return Err(refuse());
            }
            // All values that share the overwritten storage: the base and every alias of it.
            let mut shared = vec![base];
            while let Some(value) = shared.pop() {
                for &reader in &readers[value.index()] {
                    if reader == id {
                        continue;
                    }
                    let node = graph.node(reader);
                    if node.op.is_alias() {
                        // What an alias only waits for it does not read.
                        if node.operands[0] == value {
                            shared.push(node.results[0]);
                        }
                    } else {
                        edge(reader, id);
                    }
                }
                let kept = |v: Value| v == value && v != node.results[result];
                if graph.outputs().iter().any(|(_, v)| kept(*v)) || graph.updates().iter().any(|u| kept(u.new)) {
                    return Err(refuse());
                }
            }
        }
    }
    // Places in memory are no steps: they come as early as they can, so that nothing that is joined waits for one.
    let free = |i: usize| matches!(nodes[i].op, Op::Input(_) | Op::Constant(_)) || nodes[i].op.is_alias();
    // What is there before the first step is waited for by nobody.
    let is_there = |node: NodeId| matches!(graph.node(node).op, Op::Input(_) | Op::Constant(_));
    let own_rank = |i: usize| if is_there(NodeId(i as u32)) { 0 } else { i };
    let mut rank: Vec<usize> = (0..nodes.len()).map(own_rank).collect();
    for update in graph.updates() {
        let node = graph.producer(update.new);
        let operands = graph.node(node).operands.iter().map(|&v| rank[graph.producer(v).index()]);
        if graph.node(node).op.in_place().is_empty() && !is_there(node) {
            rank[node.index()] = operands.max().unwrap_or(node.index());
        }
    }
    let key = |i: usize| Reverse((!free(i), rank[i], i));
    let mut ready: BinaryHeap<_> = (0..nodes.len()).filter(|&i| waits[i] == 0).map(key).collect();
    let mut taken = vec![false; nodes.len()];
    let mut order = Vec::with_capacity(nodes.len());
    // The node that was taken last, if another is to follow it.
    let mut followed: Option<NodeId> = None;
    // For each node, the one that it is to follow; and those that are ready before that one is taken.
    let mut onto: Vec<Option<usize>> = vec![None; nodes.len()];
    for (i, next) in joined.iter().enumerate() {
        next.iter().for_each(|next| onto[next.index()] = Some(i));
    }
    let mut held = Vec::new();
    loop {
        let Some(Reverse((busy, _, i))) = ready.pop() else {
            if held.is_empty() {
                break;
            }
            // Nothing else is left: whatever they would have followed waits for them.
            for i in held.drain(..) {
                onto[i] = None;
                ready.push(key(i));
            }
            continue;
        };
        if taken[i] {
            continue;
        }
        if onto[i].is_some_and(|before| !taken[before]) {
            held.push(i);
            continue;
        }
        let mut now = i;
        if busy && let Some(node) = followed.take() {
            match joined[node.index()].map(NodeId::index) {
                Some(next) if waits[next] == 0 && !taken[next] => {
                    ready.push(key(i));
                    now = next;
                }
                Some(next) => {
                    joined[node.index()] = None;
                    onto[next] = None;
                    if let Some(at) = held.iter().position(|&held| held == next) {
                        ready.push(key(held.swap_remove(at)));
                    }
                }
                None => {}
            }
        }
        held.retain(|&held| held != now);
        taken[now] = true;
        order.push(NodeId(now as u32));
        if joined[now].is_some() {
            followed = Some(NodeId(now as u32));
        }
        for to in &next[now] {
            waits[to.index()] -= 1;
            if waits[to.index()] == 0 {
                ready.push(key(to.index()));
            }
        }
    }
    if let Some(node) = followed {
        joined[node.index()] = None;
    }
    if order.len() < nodes.len() {
        // Only an in-place op can close a cycle: data flow alone has none.
        let stuck = nodes.iter().enumerate().find(|(i, n)| waits[*i] > 0 && !n.op.in_place().is_empty());
        let node = stuck.map_or(&nodes[0], |(_, n)| n);
        let operand = node.op.in_place().first().map_or(0, |p| p.1);
        return Err(Error::Overwrite { op: node.op.name(), operand, site: node.site.clone() });
    }
    Ok((order, joined))
}

/// The nodes of a node's group that come before it, the nearest first, where `onto` says which node each is joined onto.
fn before(onto: &[Option<NodeId>], node: NodeId) -> impl Iterator<Item = NodeId> {
    std::iter::successors(onto[node.index()], |n| onto[n.index()])
}

/// For each value, the value whose storage it shares (itself if it has its own).
fn roots(graph: &Graph, steps: &[Step], step_of: &[usize], onto: &[Option<NodeId>]) -> Vec<Value> {
    let mut roots: Vec<Value> = graph.values().collect();
    // In step order, so that an operand's root is final before it is passed on.
    let mut by_step: Vec<NodeId> = graph.nodes_with_ids().map(|(id, _)| id).collect();
    by_step.sort_by_key(|id| (step_of[id.index()], id.index()));
    for &id in &by_step {
        let node = graph.node(id);
        if node.op.is_alias() {
            roots[node.results[0].index()] = roots[node.operands[0].index()];
        }
        for &(result, operand) in node.op.in_place() {
            roots[node.results[result].index()] = roots[node.operands[operand].index()];
        }
    }
    // The last step that needs each root; outputs and updates are needed at the end.
    let end = steps.len();
    let mut last: Vec<usize> = vec![0; graph.value_count()];
    for (id, node) in graph.nodes_with_ids() {
        if node.op.is_alias() {
            continue;
        }
        for v in node.operands.iter().chain(&node.results) {
            let l = &mut last[roots[v.index()].index()];
            *l = (*l).max(step_of[id.index()]);
        }
    }
    // What the nodes of a group read is read while a chain behind them writes.
    let read_before = |chain: NodeId| before(onto, chain).flat_map(|id| &graph.node(id).operands);
    let kept = graph.outputs().iter().map(|(_, v)| *v).chain(graph.updates().iter().map(|u| u.new));
    kept.for_each(|v| last[roots[v.index()].index()] = end);

    // A fused chain may write a result over an operand of the same type that nobody needs afterwards.
    // A stored tensor may be written over by its own update.
    let updated: HashMap<Value, Value> = graph.updates().iter().map(|u| (u.state, u.new)).collect();
    let reusable = |root: Value, result: Value| {
        if graph.input_of(root).is_some() {
            return updated.get(&root) == Some(&result);
        }
        !matches!(graph.node(graph.producer(root)).op, Op::Constant(_))
    };
    // One that nothing reads is written there from the start, whatever it is computed from.
    let operands = graph.nodes().iter().flat_map(|node| &node.operands).copied();
    let kept = graph.outputs().iter().map(|(_, v)| *v).chain(graph.updates().iter().map(|u| u.new));
    let read: HashSet<Value> = operands.chain(kept).map(|v| roots[v.index()]).collect();
    let unread = graph.updates().iter().filter(|u| !read.contains(&u.state));
    let written: HashMap<Value, Value> = unread.map(|u| (u.new, u.state)).collect();
    for &id in &by_step {
        let node = graph.node(id);
        let Op::Elementwise(_) = node.op else { continue };
        let mut taken: Vec<Value> = Vec::new();
        for &result in &node.results {
            if roots[result.index()] != result {
                continue;
            }
            let fits = |&&v: &&Value| {
                let root = roots[v.index()];
                let shares = |o: &&Value| roots[o.index()] == root;
                node.operands.iter().filter(shares).all(|&o| graph.ty(o) == graph.ty(result))
                    && reusable(root, result)
                    && last[root.index()] == step_of[id.index()]
                    && !taken.contains(&root)
                    && !read_before(id).any(|v| roots[v.index()] == root)
            };
            // The stored tensor first: another operand would have to be copied over it.
            let is_stored = |v: &&Value| graph.input_of(roots[v.index()]).is_some();
            let mut candidates = node.operands.iter().filter(is_stored).chain(&node.operands);
            let over = || candidates.find(fits).map(|operand| roots[operand.index()]);
            let Some(root) = written.get(&result).copied().or_else(over) else { continue };
            taken.push(root);
            last[root.index()] = last[result.index()];
            // Everything that shared the result's storage now shares the operand's.
            roots.iter_mut().filter(|r| **r == result).for_each(|r| *r = root);
        }
    }
    roots
}

/// Offsets by the greedy rule: largest buffer first, each at the lowest place free during its whole lifetime. Returns the
/// size of the arena.
fn place_by_size(buffers: &mut [Lifetime]) -> usize {
    let mut by_size: Vec<usize> = (0..buffers.len()).collect();
    by_size.sort_by_key(|&i| (Reverse(buffers[i].bytes), buffers[i].first, i));
    let mut placed: Vec<usize> = Vec::with_capacity(buffers.len());
    let mut arena = 0;
    for i in by_size {
        let me = buffers[i];
        let mut busy: Vec<(usize, usize)> = placed
            .iter()
            .map(|&j| &buffers[j])
            .filter(|b| b.first <= me.last && me.first <= b.last)
            .map(|b| (b.offset, b.offset + b.bytes))
            .collect();
        busy.sort_unstable();
        let mut offset = 0;
        for (from, to) in busy {
            if offset + me.bytes <= from {
                break;
            }
            offset = offset.max(to);
        }
        buffers[i].offset = offset;
        arena = arena.max(offset + me.bytes);
        placed.push(i);
    }
    arena
}
