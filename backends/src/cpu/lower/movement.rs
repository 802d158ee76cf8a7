//! Launches that move or make elements: transpose, broadcast, slice, pad, concat, random.

use bytemuck::Pod;
use moebius_ir::ops::{Concat, Distribution, Pad, Random, Slice, Transpose};
use moebius_ir::{Graph, Node};
use smallvec::SmallVec;

use super::Lowered;
use super::args::{Args, Launch};
use crate::cpu::kernels::movement::{MAX_DIMS, copy_strided, fill};
use crate::cpu::kernels::random_fill::{self, random, random_bits};

type Dims = SmallVec<[usize; 4]>;

/// A copy of a strided view of an operand into a strided view of the result. All counts are in elements.
struct Copy {
    shape: Dims,
    from: (usize, usize, Dims),
    /// Elements of the whole result, offset and strides of the view in it.
    to: (usize, usize, Dims),
}

impl Copy {
    fn run<U: Pod + Send + Sync>(&self, a: &Args<'_>, operand: usize, result: &mut [U]) {
        let (elements, from, from_strides) = &self.from;
        let (_, to, to_strides) = &self.to;
        copy_strided(&self.shape, result, *to, to_strides, a.operand::<U>(operand, *elements), *from, from_strides);
    }
}

/// Copies into one result; `clear` if they do not cover it.
fn launch(graph: &Graph, node: &Node, copies: Vec<Copy>, clear: bool) -> Lowered {
    if let Some(copy) = copies.iter().find(|c| c.shape.len() > MAX_DIMS) {
        return Err(format!("at most {MAX_DIMS} axes, not {}", copy.shape.len()));
    }
    fn run<U: Pod + Send + Sync>(a: &Args<'_>, copies: &[Copy], elements: usize, clear: bool) {
        let result = a.result::<U>(0, elements);
        if clear {
            fill(result, U::zeroed());
        }
        copies.iter().enumerate().for_each(|(operand, copy)| copy.run(a, operand, result));
    }
    let elements = graph.ty(node.results[0]).elements();
    // Zero has the same bits in every dtype, so only the size of an element matters.
    Ok(match graph.ty(node.results[0]).dtype.bytes() {
        4 => Launch::new(0, move |a| run::<u32>(a, &copies, elements, clear)),
        2 => Launch::new(0, move |a| run::<u16>(a, &copies, elements, clear)),
        _one => Launch::new(0, move |a| run::<u8>(a, &copies, elements, clear)),
    })
}

pub(super) fn lower_transpose(graph: &Graph, node: &Node, op: &Transpose) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let strides = from.strides();
    let view = op.perm.iter().map(|&axis| strides[axis]).collect();
    let copy = Copy {
        shape: to.iter().copied().collect(),
        from: (from.elements(), 0, view),
        to: (to.elements(), 0, to.strides()),
    };
    launch(graph, node, vec![copy], false)
}

pub(super) fn lower_broadcast(graph: &Graph, node: &Node) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let lead = to.len() - from.len();
    let strides = from.strides();
    let view = (0..to.len()).map(|i| if i < lead || from[i - lead] == 1 { 0 } else { strides[i - lead] }).collect();
    let copy = Copy {
        shape: to.iter().copied().collect(),
        from: (from.elements(), 0, view),
        to: (to.elements(), 0, to.strides()),
    };
    launch(graph, node, vec![copy], false)
}

pub(super) fn lower_slice(graph: &Graph, node: &Node, op: &Slice) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let copy = Copy {
        shape: to.iter().copied().collect(),
        from: (from.elements(), op.start * from.strides()[op.axis], from.strides()),
        to: (to.elements(), 0, to.strides()),
    };
    launch(graph, node, vec![copy], false)
}

pub(super) fn lower_pad(graph: &Graph, node: &Node, op: &Pad) -> Lowered {
    let (from, to) = (&graph.ty(node.operands[0]).shape, &graph.ty(node.results[0]).shape);
    let copy = Copy {
        shape: from.iter().copied().collect(),
        from: (from.elements(), 0, from.strides()),
        to: (to.elements(), op.before * to.strides()[op.axis], to.strides()),
    };
    launch(graph, node, vec![copy], true)
}

pub(super) fn lower_concat(graph: &Graph, node: &Node, op: &Concat) -> Lowered {
    let to = &graph.ty(node.results[0]).shape;
    let mut at = 0;
    let mut copies = Vec::with_capacity(node.operands.len());
    for &operand in &node.operands {
        let from = &graph.ty(operand).shape;
        copies.push(Copy {
            shape: from.iter().copied().collect(),
            from: (from.elements(), 0, from.strides()),
            to: (to.elements(), at * to.strides()[op.axis], to.strides()),
        });
        at += from[op.axis];
    }
    launch(graph, node, copies, false)
}

pub(super) fn lower_random(graph: &Graph, node: &Node, op: &Random) -> Lowered {
    let elements = graph.ty(node.results[0]).elements();
    let stream = op.stream;
    let key = |a: &Args<'_>| {
        let key = a.operand::<u32>(0, 2);
        [key[0], key[1]]
    };
    let floats =
        |distribution| Launch::new(0, move |a| random::<f32>(distribution, key(a), stream, a.result(0, elements)));
    Ok(match op.distribution {
        Distribution::Uniform => floats(random_fill::Distribution::Uniform),
        Distribution::Normal => floats(random_fill::Distribution::Normal),
        Distribution::Gumbel => floats(random_fill::Distribution::Gumbel),
        Distribution::Bits => Launch::new(0, move |a| random_bits(key(a), stream, a.result(0, elements))),
    })
}
