//! What routes and assigns few tokens behind what makes their logits, as the work of one workgroup: on its own, or of the one that is the
//! last to end of a product.

use moebius_ir::ops::{Assign, Route, Score};
use moebius_ir::{DType, Graph, Node, NodeId, Op};

use super::router::{self, Shares};
use crate::joined::Beside;
use crate::vulkan::launch::{Action, At};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// Threads of a workgroup that does nothing else: 32 for each token, as far as these go.
const LEAST_THREADS: usize = 64;
const MOST_THREADS: usize = 256;

/// A node, its op, and the first of its operands and of its results among those of the kernel.
type Of<'a, T> = (&'a Node, &'a T, [usize; 2]);

/// A route and the assign behind it, if there is one.
pub(super) struct Routed<'a> {
    graph: &'a Graph,
    route: Of<'a, Route>,
    assign: Option<Of<'a, Assign>>,
}

impl<'a> Routed<'a> {
    /// Those of node `id` and the nodes beside it, if a route is among them: the node, one behind it, or one before it.
    pub(super) fn new(graph: &'a Graph, id: NodeId, beside: Beside) -> Option<Routed<'a>> {
        let is_route = |id: &NodeId| matches!(graph.node(*id).op, Op::Route(_));
        let (route, first, assigned) = if is_route(&id) {
            (id, [0, 0], beside.behind)
        } else {
            let route = beside.behind.filter(is_route).or(beside.route)?;
            (route, beside.first(graph, id, route), beside.assigned)
        };
        let Op::Route(op) = &graph.node(route).op else { return None };
        let assign = assigned.and_then(|assign| {
            let Op::Assign(op) = &graph.node(assign).op else { return None };
            Some((graph.node(assign), op, beside.first(graph, id, assign)))
        });
        Some(Routed { graph, route: (graph.node(route), op, first), assign })
    }

    /// How a workgroup of so many threads shares out all tokens.
    fn shares(&self, limits: Limits, threads: usize) -> Result<Shares, String> {
        let (node, op, _) = self.route;
        let [n, experts] = [0, 1].map(|axis| self.graph.shape(node.operands[0])[axis]);
        Shares::of_one(limits, [n, experts, op.router.groups.map_or(0, |g| g.count)], threads)
    }

    /// The logits.
    pub(super) fn logits(&self) -> At {
        let (_, _, [operand, _]) = self.route;
        At::Operand(operand)
    }

    /// The kernel that does nothing else, as one workgroup.
    ///
    /// # Errors
    /// What is wanted instead.
    pub(super) fn alone(&self, limits: Limits) -> Result<Action, String> {
        let (node, _, _) = self.route;
        let threads =
            (32 * self.graph.shape(node.operands[0])[0].next_power_of_two()).clamp(LEAST_THREADS, MOST_THREADS);
        let body = "fn kernel(group: u32, thread: u32) { tail(thread); }";
        let shader = Shader::new(limits, "route", body, threads).buffer("logits", DType::F32, self.logits());
        self.add(shader, limits, threads)?.line(1)
    }

    /// A kernel of so many threads with `choice_of_first(thread)`, the only choice of the only token, as the routing makes it. It has the
    /// buffer `logits`.
    ///
    /// # Errors
    /// What is wanted instead.
    pub(super) fn choosing(&self, shader: Shader, limits: Limits, threads: usize) -> Result<Shader, String> {
        let (node, op, [operand, _]) = self.route;
        let experts = self.graph.shape(node.operands[0])[1];
        let (r, of) = (op.router, op.operands());
        let shares = self.shares(limits, threads)?;
        let beside = [of.selection_bias, of.noise, of.used, of.choices];
        if r.score == Score::Softmax && r.groups.is_none() && beside.iter().all(Option::is_none) {
            let shader = shares.add(shader, limits, [1, experts, 1], r.score, r.balance);
            return Ok(shader.with("choice_by_softmax"));
        }
        let shader = shares.route(shader, limits, self.graph, (node, op), (operand, None), [At::Null; 2]);
        Ok(shader.with("route").with("choice_by_route"))
    }

    /// A kernel of so many threads with `tail(thread)`, which routes and assigns all tokens, with the bits of the kernels of their own. It
    /// has the buffer `logits`, or `get_logits(nth)`.
    ///
    /// # Errors
    /// What is wanted instead.
    pub(super) fn add(&self, shader: Shader, limits: Limits, threads: usize) -> Result<Shader, String> {
        let (node, op, [operand, result]) = self.route;
        let shares = self.shares(limits, threads)?;
        let shader = shares.route(shader, limits, self.graph, (node, op), (operand, Some(result)), [At::Null; 2]);
        let shader = shader.with("route");
        let Some((assign, op, first)) = self.assign else {
            return Ok(shader.declare("fn tail(thread: u32) { route_tokens(0u, thread); }"));
        };
        // The index is in the route's own buffer.
        let shader = router::assign_in_order(shader, self.graph, (assign, op), first, None)?.with("assign_in_order");
        let tail = "fn tail(thread: u32) {\n    route_tokens(0u, thread);\n    storageBarrier();\n    assign_chunk(0u, thread);\n}";
        Ok(shader.declare(tail))
    }
}
