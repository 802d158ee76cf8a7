//! Launches that move or make elements: transpose, broadcast, slice, pad, concat, random.

use moebius_ir::ops::{Distribution, Random};
use moebius_ir::{Graph, Node};

use super::Lowered;
use crate::cuda::launch::{Action, Arg, Launch, kernel};
use crate::cuda::source::{PHILOX, Source};
use crate::views::{Copy, copies};

const TEXT: &str = include_str!("../kernels/movement.cu");
const RANDOM: &str = include_str!("../kernels/random.cu");
/// The most axes of a view, as in the kernel.
const MOST_AXES: usize = 8;
const THREADS: usize = 256;

/// The struct `Views` of the kernel.
fn views(copy: &Copy<'_>) -> Result<Arg, String> {
    let axes = copy.shape.len();
    if axes > MOST_AXES {
        return Err(format!("at most {MOST_AXES} axes, not {axes}"));
    }
    let mut bytes = Vec::with_capacity((3 * MOST_AXES + 4) * 8);
    for dims in [&copy.shape[..], &copy.from, &copy.to] {
        (0..MOST_AXES).for_each(|i| bytes.extend((dims.get(i).copied().unwrap_or(0) as i64).to_le_bytes()));
    }
    for n in [copy.from_at, copy.to_at, copy.shape.elements(), axes] {
        bytes.extend((n as i64).to_le_bytes());
    }
    Ok(Arg::Bytes(bytes))
}

/// The copies of a node that only moves elements.
pub(super) fn lower_movement(graph: &Graph, node: &Node) -> Lowered {
    let Some((copies, clear)) = copies(graph, node) else { return Err("an op that only moves elements".into()) };
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
        let args = vec![Arg::Operand(operand), Arg::Result(0), views(copy)?];
        actions.push(kernel(source, "move_views", [blocks, 1, 1], THREADS as u32, args));
    }
    Ok(Launch::of(actions))
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
