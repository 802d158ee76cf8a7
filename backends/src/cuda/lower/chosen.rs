//! The route of one token with one choice, and the assign behind it, in the kernel of the product of experts that is behind both and the
//! dispatch: each of its blocks chooses the expert, and one more block leaves what routing leaves.

use moebius_ir::{Graph, NodeId, Op};

use super::route::Routing;
use crate::cuda::launch::Arg;
use crate::cuda::source::{Header, ORDER, ROUTE, ROUTER, ROUTING, Source};
use crate::joined::Beside;

/// Headers that the kernel's file needs beside its own.
pub(super) const HEADERS: [Header; 4] = [ROUTER, ROUTE, ORDER, ROUTING];

/// The route and the assign before a product.
pub(super) struct Chosen<'a> {
    routing: Routing<'a>,
    /// The arguments for `ROUTING_PARAMETERS`.
    args: Vec<Arg>,
}

impl<'a> Chosen<'a> {
    /// Those before the product `id`, if it is to do them.
    ///
    /// # Errors
    /// Of sizes that kernels cannot count.
    pub(super) fn new(graph: &'a Graph, id: NodeId, beside: Beside) -> Result<Option<Chosen<'a>>, String> {
        let (Some(route), Some(assign)) = (beside.route, beside.assigned) else { return Ok(None) };
        let nodes = [route, assign].map(|id| graph.node(id));
        let (Op::Route(op), Op::Assign(slots)) = (&nodes[0].op, &nodes[1].op) else { return Ok(None) };
        let extents = [0, 1].map(|axis| graph.shape(nodes[0].operands[0])[axis]);
        let routing = Routing { nodes, op, slots, extents };
        let args = routing.args(graph, [route, assign].map(|node| beside.first(graph, id, node)))?;
        Ok(Some(Chosen { routing, args }))
    }
}

/// The file of products whose kernel chooses or not. One warp routes one token.
///
/// # Errors
/// Of too many experts.
pub(super) fn source(chosen: Option<&Chosen<'_>>, source: Source) -> Result<Source, String> {
    let source = source.define("CHOOSES", u8::from(chosen.is_some()));
    match chosen {
        None => Ok(source),
        Some(chosen) => chosen.routing.source(source, 1),
    }
}

/// The arguments of `CHOICE_PARAMETERS`.
pub(super) fn args(chosen: Option<&Chosen<'_>>) -> Vec<Arg> {
    chosen.map_or_else(Vec::new, |chosen| chosen.args.clone())
}
