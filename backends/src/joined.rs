//! Which nodes run together with the matrix product beside them: fused chains behind it, part by part, while the part is in a near
//! cache; and on GPUs, where rows are few and a kernel more costs more than its work, norms and dispatches before it, and of experts
//! the combine behind it. There a chain is also joined onto a combine, an assign onto a route, and the norm of a gradient onto the product
//! that makes it.

#[cfg(feature = "cuda")]
use std::collections::HashSet;

#[cfg(feature = "cuda")]
use moebius_ir::DType;
use moebius_ir::{Graph, NodeId, Op, Value};
#[cfg(any(feature = "cuda", feature = "vulkan"))]
use moebius_ir::{Node, Plan};

/// The most rows of a norm that is done by the product behind it: every block of that normalises them all.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
const MOST_LED: usize = 8;
/// The most choices that one block routes and assigns, or combines.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
const MOST_CHOICES: usize = 64;

/// The nodes whose work is done by the kernels of another. That one's operands and results are followed by those of the node behind it,
/// these by those of the one before, of the route before that and of the assign, of the twin and of the node behind that, of the softmax, of
/// the combine and of the node behind that.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Beside {
    /// The norm or dispatch right before it, as [`led`] says.
    pub(crate) before: Option<NodeId>,
    /// The route right before that dispatch, with an assign between them, as [`chosen`] says.
    pub(crate) route: Option<NodeId>,
    /// The chain, assign or norm right behind it, as [`follower`] says, or the route, as [`routed`] says.
    pub(crate) behind: Option<NodeId>,
    /// The assign behind either route.
    pub(crate) assigned: Option<NodeId>,
    /// The product of another branch, as [`twin`] says, and the chain behind that.
    pub(crate) twin: Option<NodeId>,
    pub(crate) behind_twin: Option<NodeId>,
    /// The softmax of the coefficients of that combine, as [`weighed`] says.
    pub(crate) weighed: Option<NodeId>,
    /// The combine behind a product of experts, as [`combined`] says, and the chain behind that.
    pub(crate) combined: Option<NodeId>,
    pub(crate) behind_combined: Option<NodeId>,
}

#[cfg(any(feature = "cuda", feature = "vulkan"))]
impl Beside {
    /// What a plan joins to a node; `None` for one whose own work is done by the node before it or behind it.
    pub(crate) fn of(plan: &Plan, id: NodeId) -> Option<Beside> {
        let op = |id: NodeId| &plan.graph().node(id).op;
        let leads = |id: &NodeId| is_lead(op(*id)) && plan.joined(*id).is_some();
        let is_of_experts = |id: NodeId| matches!(op(id), Op::ExpertMatmul(_));
        // A dispatch that no product does leaves the route and the assign before it alone too.
        let chooses = |id: NodeId| {
            let [assign, dispatch] = [plan.joined(id)?, plan.joined(plan.joined(id)?)?];
            let all = matches!(op(id), Op::Route(_)) && matches!(op(dispatch), Op::Dispatch(_)) && leads(&dispatch);
            all.then_some(assign)
        };
        // A twin that the plan has apart from its product of experts is a product as others are, which no combine is done with.
        let mut ahead = std::iter::successors(plan.joined_onto(id), |id| plan.joined_onto(*id));
        let weighs = |id| is_softmax(op(id)) && plan.joined(id).is_some_and(|next| is_combine(op(next)));
        let alone = (is_combine(op(id)) || is_softmax(op(id))) && !ahead.any(is_of_experts);
        let alone = alone || is_softmax(op(id)) && !weighs(id) || matches!(op(id), Op::Dispatch(_)) && !leads(&id);
        let onto = plan.joined_onto(id).filter(|_| !alone);
        let before = onto.filter(leads);
        if leads(&id) || onto != before || chooses(id).is_some() {
            return None;
        }
        let route = before.and_then(|dispatch| plan.joined_onto(plan.joined_onto(dispatch)?));
        let route = route.filter(|&route| chooses(route).is_some());
        let is_product = |op: &Op| matches!(op, Op::Matmul(_));
        let is_behind = |op: &Op| !is_product(op) && !is_combine(op) && !is_softmax(op);
        let mut next = plan.joined(id);
        let mut take = |is: &dyn Fn(&Op) -> bool| {
            let taken = next.filter(|id| is(op(*id)))?;
            next = plan.joined(taken);
            Some(taken)
        };
        let (behind, assigned) = (take(&is_behind), take(&|op| matches!(op, Op::Assign(_))));
        let assigned = assigned.or_else(|| route.and_then(chooses));
        let twin = take(&is_product);
        let behind_twin = twin.and_then(|_| take(&is_behind));
        let weighed = next.filter(|&softmax| is_of_experts(id) && weighs(softmax));
        next = weighed.map_or(next, |softmax| plan.joined(softmax));
        let combined = next.filter(|&combine| is_of_experts(id) && is_combine(op(combine)));
        next = combined.map_or(next, |combine| plan.joined(combine));
        let behind_combined = next.filter(|&chain| combined.is_some() && is_behind(op(chain)));
        Some(Beside { before, route, behind, assigned, twin, behind_twin, weighed, combined, behind_combined })
    }

    /// Bytes of scratch memory in a node's step: what it needs `by_itself`, or as it is `lowered` with others beside it, or none if it is
    /// done with another.
    pub(crate) fn scratch(
        plan: &Plan,
        id: NodeId,
        by_itself: &[usize],
        lowered: &dyn Fn(&Graph, NodeId, Beside) -> usize,
    ) -> usize {
        match Beside::of(plan, id) {
            None => 0,
            Some(beside) if beside == Beside::default() => by_itself[id.index()],
            Some(beside) => lowered(plan.graph(), id, beside),
        }
    }

    /// The nodes, in the order of their operands and results behind those of the node itself.
    pub(crate) fn nodes(self) -> impl Iterator<Item = NodeId> {
        let Beside { before, route, behind, assigned, twin, behind_twin, weighed, combined, behind_combined } = self;
        [behind, before, route, assigned, twin, behind_twin, weighed, combined, behind_combined].into_iter().flatten()
    }

    /// Which of all operands, and of all results, is the first of `node` beside node `id`.
    pub(crate) fn first(self, graph: &Graph, id: NodeId, node: NodeId) -> [usize; 2] {
        let ahead = || [id].into_iter().chain(self.nodes().take_while(|n| *n != node)).map(|id| graph.node(id));
        [ahead().map(|n| n.operands.len()).sum(), ahead().map(|n| n.results.len()).sum()]
    }
}

#[cfg(any(feature = "cuda", feature = "vulkan"))]
fn is_combine(op: &Op) -> bool {
    matches!(op, Op::Combine(_))
}

#[cfg(any(feature = "cuda", feature = "vulkan"))]
fn is_softmax(op: &Op) -> bool {
    matches!(op, Op::Softmax(_))
}

/// Whether a node that another is joined onto is done by that one.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
fn is_lead(op: &Op) -> bool {
    matches!(op, Op::LayerNorm(_) | Op::RmsNorm(_) | Op::Dispatch(_))
}

/// The product whose kernel is to do a norm's or a dispatch's work too: the first one that has its rows, few ones, as its own. If others
/// read those of a norm too, that kernel also stores them; of a dispatch nothing else does.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn led(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let node = graph.node(id);
    let y = *node.results.first().filter(|_| is_lead(&node.op))?;
    let shape = &graph.ty(y).shape;
    if shape.rows() > MOST_LED {
        return None;
    }
    let dispatches = matches!(node.op, Op::Dispatch(_));
    graph.nodes_with_ids().skip(id.index() + 1).find_map(|(product, node)| {
        let reads = |v: &Value| base(graph, *v) == y;
        let rows = *node.operands.first()?;
        let as_rows =
            reads(&rows) && graph.ty(rows).shape.last() == shape.last() && !node.operands[1..].iter().any(reads);
        let one = if let Op::Matmul(op) = &node.op {
            !dispatches && !op.transpose_a && graph.shape(node.operands[1]).len() == 2
        } else {
            dispatches && matches!(node.op, Op::ExpertMatmul(_)) && !is_kept(graph, y, product)
        };
        (as_rows && one).then_some(product)
    })
}

/// The product that runs beside a product of experts: one of few rows that needs nothing of it and has as many columns over as long a k,
/// as that of the network beside the experts, which reads the same tokens. Each by itself mostly waits.
#[cfg(feature = "cuda")]
pub(crate) fn twin(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let product = graph.node(id);
    let Op::ExpertMatmul(of_experts) = &product.op else { return None };
    let w = graph.ty(product.operands[1]);
    let like = |node: &Node| {
        let Op::Matmul(op) = &node.op else { return false };
        let of_twin = graph.ty(node.operands[1]);
        let rows = &graph.ty(node.results[0]).shape;
        of_twin.dtype == w.dtype
            && of_twin.shape[..] == w.shape[1..]
            && graph.ty(node.operands[0]).dtype == w.dtype
            && (op.transpose_a, op.transpose_b) == (false, of_experts.transpose)
            && rows.rows() <= MOST_LED
            && node.operands.len() + 1 == product.operands.len()
    };
    let (twin, node) = graph.nodes_with_ids().skip(id.index() + 1).find(|(_, node)| like(node))?;
    let chain = joined(graph, twin);
    // All that is made of the product, so far as it may come before the twin or the twin's chain.
    let mut made: HashSet<Value> = product.results.iter().copied().collect();
    for (_, node) in graph.nodes_with_ids().take(chain.unwrap_or(twin).index()).skip(id.index() + 1) {
        if node.operands.iter().any(|v| made.contains(v)) {
            made.extend(&node.results);
        }
    }
    let mut read = [node].into_iter().chain(chain.map(|chain| graph.node(chain))).flat_map(|node| &node.operands);
    (!read.any(|v| made.contains(v))).then_some(twin)
}

/// The product of experts whose twin a product is.
#[cfg(feature = "cuda")]
pub(crate) fn twinned(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let node = graph.node(id);
    if !matches!(node.op, Op::Matmul(_)) || graph.ty(node.results[0]).shape.rows() > MOST_LED {
        return None;
    }
    let before = graph.nodes_with_ids().take(id.index()).filter(|(_, node)| matches!(node.op, Op::ExpertMatmul(_)));
    before.map(|(product, _)| product).find(|&product| twin(graph, product) == Some(id))
}

/// The combine that is to run in the kernel of a product of experts with few rows that nothing else reads, with the chain behind it: one
/// whose other operands, and those of the chain, that kernel does not make, but for the side, which may be the twin's result.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn combined(graph: &Graph, id: NodeId, beside: Beside) -> Option<NodeId> {
    let product = graph.node(id);
    let rows = *product.results.first().filter(|_| matches!(product.op, Op::ExpertMatmul(_)))?;
    let slots = graph.ty(rows).shape.rows();
    if slots == 0 || slots > MOST_LED || beside.behind.is_some() || beside.behind_twin.is_some() {
        return None;
    }
    let reads = |node: &Node| {
        let taken = node.operands.first().filter(|_| is_combine(&node.op));
        taken.is_some_and(|&v| base(graph, v) == rows && graph.shape(v) == graph.shape(rows))
    };
    let (combine, node) = graph.nodes_with_ids().skip(id.index() + 1).find(|(_, node)| reads(node))?;
    let Op::Combine(op) = &node.op else { return None };
    let choices = graph.ty(node.operands[2]);
    let few = (1..=MOST_LED).contains(&choices.shape[0]) && (1..=MOST_CHOICES).contains(&choices.elements());
    let of_twin = beside.twin.map(|twin| graph.node(twin).results[0]);
    let is_side = |at: usize| op.operands()[1] == Some(at);
    let chain = chain_behind(graph, combine).map(|chain| graph.node(chain));
    let made = |v: Value| [Some(rows), of_twin].contains(&Some(base(graph, v)));
    let is_late = |(at, &v): (usize, &Value)| made(v) && !(is_side(at) && Some(base(graph, v)) == of_twin);
    let mut of_chain = chain.into_iter().flat_map(|chain| &chain.operands);
    let apart = !node.operands.iter().enumerate().skip(1).any(is_late) && !of_chain.any(|&v| made(v));
    (few && apart && !is_kept(graph, rows, combine)).then_some(combine)
}

/// The softmax of a combine's coefficients that nothing else reads: its two numbers for a token are as soon made as read.
#[cfg(feature = "cuda")]
pub(crate) fn weighed(graph: &Graph, combine: NodeId) -> Option<NodeId> {
    let node = graph.node(combine);
    let Op::Combine(op) = &node.op else { return None };
    let coefficient = node.operands[op.operands()[2]?];
    let softmax = graph.producer(coefficient);
    let wide = is_softmax(&graph.node(softmax).op) && graph.ty(coefficient).dtype == DType::F32;
    (wide && !is_kept(graph, coefficient, combine)).then_some(softmax)
}

/// The product of experts that a node ends, which is itself or the chain behind it.
#[cfg(feature = "cuda")]
pub(crate) fn ended(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let is_experts = |id: &NodeId| matches!(graph.node(*id).op, Op::ExpertMatmul(_));
    if is_experts(&id) {
        return joined(graph, id).is_none().then_some(id);
    }
    let made = graph.node(id).operands.iter().map(|&v| graph.producer(base(graph, v)));
    made.filter(is_experts).find(|&product| joined(graph, product) == Some(id))
}

/// The route of few tokens to run with the product that makes its logits.
#[cfg(feature = "vulkan")]
pub(crate) fn routed(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let product = graph.node(id);
    let logits = *product.results.first().filter(|_| matches!(product.op, Op::Matmul(_)))?;
    let of_these = |node: &Node| {
        let reads = |v: &Value| base(graph, *v) == logits;
        let few = |v: Value| graph.ty(v).shape.rows() <= MOST_LED && graph.ty(v).elements() <= MOST_CHOICES;
        let routes = matches!(node.op, Op::Route(_)) && reads(&node.operands[0]);
        routes && !node.operands[1..].iter().any(reads) && few(node.results[1])
    };
    graph.nodes_with_ids().skip(id.index() + 1).find(|(_, node)| of_these(node)).map(|(id, _)| id)
}

/// The assign, the dispatch and the product behind a route of one token that has one choice: the kernel of the product can choose the
/// expert itself, so that nothing waits for the rest of the routing.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn chosen(graph: &Graph, route: NodeId) -> Option<[NodeId; 3]> {
    let node = graph.node(route);
    if !matches!(node.op, Op::Route(_)) || graph.ty(node.results[1]).elements() != 1 {
        return None;
    }
    let assign = follower(graph, route)?;
    let slot_choice = graph.node(assign).results[0];
    let dispatches = |node: &Node| {
        let reads = |v: &&Value| base(graph, **v) == slot_choice;
        matches!(node.op, Op::Dispatch(_)) && node.operands.len() == 3 && node.operands.get(1).filter(reads).is_some()
    };
    let (dispatch, _) = graph.nodes_with_ids().skip(assign.index() + 1).find(|(_, node)| dispatches(node))?;
    Some([assign, dispatch, led(graph, dispatch)?])
}

/// Whether a chain reads nothing that a lead makes: blocks that are done would read what others have yet to store.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn apart(graph: &Graph, lead: NodeId, chain: NodeId) -> bool {
    let made = &graph.node(lead).results;
    !graph.node(chain).operands.iter().any(|&v| made.contains(&base(graph, v)))
}

/// The node to run with the one before it: the chain behind a product or a combine, of a route of few tokens the assign, or the norm of the
/// gradient of experts' weights.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn follower(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let node = graph.node(id);
    if matches!(node.op, Op::Combine(_)) {
        return chain_behind(graph, id);
    }
    if matches!(node.op, Op::ExpertMatmulWgrad(_)) {
        let gradient = node.results[0];
        let norm = |node: &Node| matches!(node.op, Op::GlobalNorm(_)) && node.operands.len() == 1;
        let of_this = |node: &Node| base(graph, node.operands[0]) == gradient;
        return graph.nodes_with_ids().find(|(_, node)| norm(node) && of_this(node)).map(|(id, _)| id);
    }
    if !matches!(node.op, Op::Route(_)) {
        return joined(graph, id);
    }
    let index = node.results[1];
    let assigns = |node: &Node| matches!(node.op, Op::Assign(_)) && base(graph, node.operands[0]) == index;
    let few = graph.ty(index).elements() <= MOST_CHOICES;
    graph.nodes_with_ids().find(|(_, node)| few && assigns(node)).map(|(id, _)| id)
}

/// The chain to run with a product, as [`chain_behind`] says.
pub(crate) fn joined(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let node = graph.node(id);
    let product = *node.results.first()?;
    // A node that is several products, each of which would have to find its place in the chain, gets none.
    let one = if let Op::Matmul(op) = &node.op {
        graph.shape(product).len() == 2 || (graph.shape(node.operands[1]).len() == 2 && !op.transpose_a)
    } else {
        matches!(node.op, Op::ExpertMatmul(_))
    };
    if one { chain_behind(graph, id) } else { None }
}

/// The chain that can run with a node: a fused chain over as many elements as the node's result, which it takes unstretched, and
/// whose other operands are made before the node.
fn chain_behind(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let product = *graph.node(id).results.first()?;
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

/// What a value is a reshape of.
pub(crate) fn base(graph: &Graph, mut value: Value) -> Value {
    while let Op::Reshape(_) = graph.node(graph.producer(value)).op {
        value = graph.node(graph.producer(value)).operands[0];
    }
    value
}

/// Whether anything but `reader` needs a value: a node, an output or an update.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn is_kept(graph: &Graph, value: Value, reader: NodeId) -> bool {
    let is = |v: Value| base(graph, v) == value;
    let reads = |(id, node): (NodeId, &Node)| {
        id != reader && !matches!(node.op, Op::Reshape(_)) && node.operands.iter().any(|&v| is(v))
    };
    graph.outputs().iter().any(|(_, v)| is(*v))
        || graph.updates().iter().any(|u| is(u.new))
        || graph.nodes_with_ids().any(reads)
}
