//! What the lowerings of all backends have in common.

use moebius_ir::{Graph, Node, NodeId, Shape};

#[cfg(any(feature = "cuda", feature = "vulkan"))]
use crate::joined::Beside;
use crate::{Error, Refusal, Result};

/// The launch of every node, or a refusal for each node that `lower` gives none for but says what it wants instead.
///
/// # Errors
/// [`Error::Unsupported`].
pub(crate) fn launches<L>(
    backend: &'static str,
    graph: &Graph,
    lower: impl Fn(NodeId) -> Result<L, String>,
) -> Result<Vec<L>> {
    let mut launches = Vec::with_capacity(graph.nodes().len());
    let mut refusals = Vec::new();
    for (id, node) in graph.nodes_with_ids() {
        match lower(id) {
            Ok(launch) => launches.push(launch),
            Err(wanted) => refusals.push(Refusal {
                op: node.op.name(),
                operands: node.operands.iter().map(|&v| graph.ty(v).clone()).collect(),
                wanted,
                site: node.site.clone(),
            }),
        }
    }
    if refusals.is_empty() { Ok(launches) } else { Err(Error::Unsupported { backend, refusals }) }
}

/// [`launches`] of nodes together with what `beside` says is beside them, which `lower` is given too; what that gives nothing for is done
/// with another node and has nothing to do itself.
///
/// # Errors
/// As [`launches`].
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) fn launches_with<L: Default>(
    backend: &'static str,
    graph: &Graph,
    beside: impl Fn(NodeId) -> Option<Beside>,
    lower: impl Fn(NodeId, Beside) -> Result<L, String>,
) -> Result<Vec<L>> {
    launches(backend, graph, |id| beside(id).map_or_else(|| Ok(L::default()), |beside| lower(id, beside)))
}

/// The shapes of a node's first `N` operands.
pub(crate) fn shapes<const N: usize>(graph: &Graph, node: &Node) -> [Shape; N] {
    std::array::from_fn(|i| graph.ty(node.operands[i]).shape.clone())
}

/// A reduction over axes that lie side by side, as one over the middle of three axes: their extents.
///
/// # Errors
/// What is wanted instead of axes that do not lie side by side.
pub(crate) fn reduced(x: &Shape, axes: &[usize]) -> Result<[usize; 3], String> {
    let (first, last) = (axes[0], axes[axes.len() - 1]);
    // An axis of one element may lie anywhere without changing the order of the elements.
    let between = (first..=last).filter(|axis| !axes.contains(axis) && x[*axis] != 1).count();
    if between > 0 {
        return Err("reduced axes that lie side by side".into());
    }
    Ok([&x[..first], &x[first..=last], &x[last + 1..]].map(|extents| extents.iter().product()))
}

/// How a node that may reject a value words that.
#[cfg(any(feature = "cuda", feature = "vulkan"))]
pub(crate) struct Rejects {
    /// What it wants.
    pub(crate) wanted: String,
    /// What the noted number was.
    pub(crate) found: &'static str,
}

#[cfg(any(feature = "cuda", feature = "vulkan"))]
impl Rejects {
    /// The error of a rejected value.
    pub(crate) fn error(&self, node: &Node, found: i32) -> Error {
        Error::Kernel {
            op: node.op.name(),
            site: node.site.clone(),
            wanted: self.wanted.clone(),
            found: format!("{} {found}", self.found),
        }
    }
}
