//! What routes and assigns few tokens behind what makes their logits, as the work of one workgroup: on its own, or of the one that is the
//! last to end of a product.

use moebius_ir::ops::{Assign, Route};
use moebius_ir::{Graph, Node, NodeId, Op};

use super::router::{self, Shares};
use crate::joined::Beside;
use crate::vulkan::launch::At;
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

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

    /// The logits.
    pub(super) fn logits(&self) -> At {
        let (_, _, [operand, _]) = self.route;
        At::Operand(operand)
    }

    /// A kernel of so many threads with `tail(thread)`, which routes and assigns all tokens, with the bits of the kernels of their own. It
    /// has the buffer `logits`, or `get_logits(nth)`.
    ///
    /// # Errors
    /// What is wanted instead.
    pub(super) fn add(&self, shader: Shader, limits: Limits, threads: usize) -> Result<Shader, String> {
        let (node, op, first) = self.route;
        let [n, experts] = [0, 1].map(|axis| self.graph.shape(node.operands[0])[axis]);
        let shares = Shares::of_one(limits, [n, experts, op.router.groups.map_or(0, |g| g.count)], threads)?;
        let shader = shares.route(shader, limits, self.graph, (node, op), first, [At::Null; 2]).with("route");
        let Some((assign, op, first)) = self.assign else {
            return Ok(shader.declare("fn tail(thread: u32) { route_tokens(0u, thread); }"));
        };
        // The index is in the route's own buffer.
        let shader = router::assign_in_order(shader, self.graph, (assign, op), first, None)?.with("assign_in_order");
        let tail = "fn tail(thread: u32) {\n    route_tokens(0u, thread);\n    storageBarrier();\n    assign_chunk(0u, thread);\n}";
        Ok(shader.declare(tail))
    }
}
