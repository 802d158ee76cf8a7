//! Ops that only move elements, as copies between strided views: transpose, broadcast, slice, pad, concat.

use moebius_ir::{Graph, Node, Op, Shape};
use smallvec::SmallVec;

/// Extents or strides, in elements.
pub(crate) type Dims = SmallVec<[usize; 4]>;

/// A copy of a strided view of an operand into a strided view of the result; counts in elements.
pub(crate) struct Copy<'a> {
    pub(crate) shape: &'a Shape,
    pub(crate) from_at: usize,
    pub(crate) from: Dims,
    pub(crate) to_at: usize,
    pub(crate) to: Dims,
}

/// The copies that such a node is, one for each operand, and whether they leave parts of the result that must be zero. `None` for
/// any other node.
pub(crate) fn copies<'a>(graph: &'a Graph, node: &Node) -> Option<(Vec<Copy<'a>>, bool)> {
    let to = &graph.ty(*node.results.first()?).shape;
    let from = &graph.ty(*node.operands.first()?).shape;
    let whole = |view: Dims, from_at: usize| Copy { shape: to, from_at, from: view, to_at: 0, to: to.strides() };
    if let Op::Transpose(op) = &node.op {
        let strides = from.strides();
        Some((vec![whole(op.perm.iter().map(|&axis| strides[axis]).collect(), 0)], false))
    } else if let Op::Broadcast(_) = &node.op {
        Some((vec![whole(stretched(from, to), 0)], false))
    } else if let Op::Slice(op) = &node.op {
        Some((vec![whole(from.strides(), op.start * from.strides()[op.axis])], false))
    } else if let Op::Pad(op) = &node.op {
        let to_at = op.before * to.strides()[op.axis];
        Some((vec![Copy { shape: from, from_at: 0, from: from.strides(), to_at, to: to.strides() }], true))
    } else if let Op::Concat(op) = &node.op {
        let mut at = 0;
        let mut copies = Vec::with_capacity(node.operands.len());
        for &operand in &node.operands {
            let from = &graph.ty(operand).shape;
            let to_at = at * to.strides()[op.axis];
            copies.push(Copy { shape: from, from_at: 0, from: from.strides(), to_at, to: to.strides() });
            at += from[op.axis];
        }
        Some((copies, false))
    } else {
        None
    }
}

/// Strides of `from` seen under `to`, 0 where it is stretched.
pub(crate) fn stretched(from: &Shape, to: &Shape) -> Dims {
    let (lead, strides) = (to.len() - from.len(), from.strides());
    (0..to.len()).map(|i| if i < lead || from[i - lead] == 1 { 0 } else { strides[i - lead] }).collect()
}
