//! Launches that move or make elements: transpose, broadcast, slice, pad, concat, random.

use moebius_ir::ops::{Concat, Distribution, Pad, Random, Slice, Transpose};
use moebius_ir::{Graph, Node, Shape};
use smallvec::SmallVec;

use super::Lowered;
use crate::cuda::launch::{Action, Arg, Launch, kernel};
use crate::cuda::source::{PHILOX, Source};

type Dims = SmallVec<[usize; 4]>;

const TEXT: &str = include_str!("../kernels/movement.cu");
const RANDOM: &str = include_str!("../kernels/random.cu");
/// The most axes of a view, as in the kernel.
const MOST_AXES: usize = 8;
const THREADS: usize = 256;

/// A copy of a strided view of an operand into a strided view of the result; counts in elements.
struct Copy<'a> {
    shape: &'a Shape,
    from_at: usize,
    from: Dims,
    to_at: usize,
    to: Dims,
}

impl Copy<'_> {
    /// The struct `Views` of the kernel.
    fn views(&self) -> Result<Arg, String> {
        let axes = self.shape.len();
        if axes > MOST_AXES {
            return Err(format!("at most {MOST_AXES} axes, not {axes}"));
        }
        let mut bytes = Vec::with_capacity((3 * MOST_AXES + 4) * 8);
        for dims in [&self.shape[..], &self.from, &self.to] {
            (0..MOST_AXES).for_each(|i| bytes.extend((dims.get(i).copied().unwrap_or(0) as i64).to_le_bytes()));
        }
        for n in [self.from_at, self.to_at, self.shape.elements(), axes] {
            bytes.extend((n as i64).to_le_bytes());
        }
        Ok(Arg::Bytes(bytes))
    }
}

/// Copies into one result, one operand each; `clear` if they do not cover it.
fn launch(graph: &Graph, node: &Node, copies: &[Copy<'_>], clear: bool) -> Lowered {
    let ty = graph.ty(node.results[0]);
    let mut actions = Vec::with_capacity(copies.len() + 1);
    if clear {
        // Zero has the same bits in every dtype.
        actions.push(Action::Clear { at: Arg::Result(0), bytes: ty.bytes() });
    }
    let element = match ty.dtype.bytes() {
        4 => "u32",
        2 => "u16",
        _one => "u8",
    };
    for (operand, copy) in copies.iter().enumerate() {
        let source = Source::new("movement.cu", &[], TEXT).define("U", element);
        let blocks = copy.shape.elements().div_ceil(THREADS);
        let args = vec![Arg::Operand(operand), Arg::Result(0), copy.views()?];
        actions.push(kernel(source, "move_views", [blocks, 1, 1], THREADS as u32, args));
    }
    Ok(Launch::of(actions))
}

pub(super) fn lower_transpose(graph: &Graph, node: &Node, op: &Transpose) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let strides = from.strides();
    let view = op.perm.iter().map(|&axis| strides[axis]).collect();
    launch(graph, node, &[Copy { shape: to, from_at: 0, from: view, to_at: 0, to: to.strides() }], false)
}

pub(super) fn lower_broadcast(graph: &Graph, node: &Node) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let view = stretched(from, to);
    launch(graph, node, &[Copy { shape: to, from_at: 0, from: view, to_at: 0, to: to.strides() }], false)
}

/// Strides of `from` seen under `to`, 0 where it is stretched.
pub(super) fn stretched(from: &Shape, to: &Shape) -> Dims {
    let (lead, strides) = (to.len() - from.len(), from.strides());
    (0..to.len()).map(|i| if i < lead || from[i - lead] == 1 { 0 } else { strides[i - lead] }).collect()
}

pub(super) fn lower_slice(graph: &Graph, node: &Node, op: &Slice) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let from_at = op.start * from.strides()[op.axis];
    launch(graph, node, &[Copy { shape: to, from_at, from: from.strides(), to_at: 0, to: to.strides() }], false)
}

pub(super) fn lower_pad(graph: &Graph, node: &Node, op: &Pad) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let to_at = op.before * to.strides()[op.axis];
    launch(graph, node, &[Copy { shape: from, from_at: 0, from: from.strides(), to_at, to: to.strides() }], true)
}

pub(super) fn lower_concat(graph: &Graph, node: &Node, op: &Concat) -> Lowered {
    let to = &graph.ty(node.results[0]).shape;
    let mut at = 0;
    let mut copies = Vec::with_capacity(node.operands.len());
    for &operand in &node.operands {
        let from = &graph.ty(operand).shape;
        let to_at = at * to.strides()[op.axis];
        copies.push(Copy { shape: from, from_at: 0, from: from.strides(), to_at, to: to.strides() });
        at += from[op.axis];
    }
    launch(graph, node, &copies, false)
}

pub(super) fn lower_random(graph: &Graph, node: &Node, op: &Random) -> Lowered {
    let elements = graph.ty(node.results[0]).elements();
    let (which, element) = match op.distribution {
        Distribution::Uniform => (0, "float"),
        Distribution::Normal => (1, "float"),
        Distribution::Gumbel => (2, "float"),
        Distribution::Bits => (3, "u32"),
    };
    let source = Source::new("random.cu", &[PHILOX], RANDOM).define("DISTRIBUTION", which).define("U", element).exact();
    let blocks = elements.div_ceil(4 * THREADS);
    let args = vec![Arg::Operand(0), Arg::U32(op.stream), Arg::size(elements), Arg::Result(0)];
    Ok(Launch::one(source, "random_numbers", [blocks, 1, 1], THREADS as u32, args))
}
