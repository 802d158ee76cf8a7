//! Launches of the sparse-expert ops that are neither matrix products nor the router's.

use moebius_ir::ops::Combine;
use moebius_ir::{DType, Graph, Node};

use super::joined::{Joined, leaving};
use super::{Lowered, dtype, dtype_of_result};
use crate::lowering::shapes;
use crate::vulkan::launch::{At, Launch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 256;
/// Threads that share a row.
const ROW_THREADS: usize = 64;

/// The kernel of rows of `d` elements, which are moved eight at a time where a row has a multiple of eight; and how many at a time.
fn of_rows(limits: Limits, [one, eight]: [&'static str; 2], d: usize) -> (Shader, usize) {
    if d.is_multiple_of(8) {
        (Shader::file(limits, eight, THREADS).with("eight"), 8)
    } else {
        (Shader::file(limits, one, THREADS), 1)
    }
}

/// A buffer of such a kernel.
fn moved(shader: Shader, wide: usize, name: &str, dtype: DType, at: At) -> Shader {
    if wide == 8 { shader.by_eight(name, dtype, at) } else { shader.buffer(name, dtype, at) }
}

/// A kernel with a thread for each of `elements`.
fn each(shader: Shader, elements: usize) -> Lowered {
    Ok(Launch::of(vec![shader.line(elements.div_ceil(THREADS))?]))
}

pub(super) fn lower_dispatch(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (d, slots, ty) = (x[1], slot_choice[0], dtype(graph, node, 0));
    let gate = if node.operands.len() > 3 { At::Operand(3) } else { At::Null };
    let (shader, wide) = of_rows(limits, ["dispatch", "dispatch_eight"], d);
    let shader = shader
        .number("slots", slots)
        .number("choices", choice_slot.elements())
        .number("k", choice_slot[1])
        .number("d", d)
        .buffer("slot_choice", DType::I32, At::Operand(1))
        .buffer("gate", DType::F32, gate);
    let shader = moved(shader, wide, "x", ty, At::Operand(0));
    each(moved(shader, wide, "rows", ty, At::Result(0)), slots * d / wide)
}

pub(super) fn lower_combine(
    graph: &Graph,
    node: &Node,
    op: Combine,
    joined: Option<&Joined<'_>>,
    limits: Limits,
) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (d, tokens, ty) = (x[1], choice_slot[0], dtype(graph, node, 0));
    let [gate, side, coefficient] = op.operands().map(|i| i.map_or(At::Null, At::Operand));
    let (shader, wide) = match joined {
        Some(_) => (Shader::file(limits, "combine", THREADS), 1),
        None => of_rows(limits, ["combine", "combine_eight"], d),
    };
    let shader = shader
        .number("slots", slot_choice[0])
        .number("tokens", tokens)
        .number("k", choice_slot[1])
        .number("d", d)
        .buffer("choice_slot", DType::I32, At::Operand(2))
        .buffer("gate", DType::F32, gate)
        .buffer("coefficient", DType::F32, coefficient);
    let shader = moved(shader, wide, "rows", ty, At::Operand(0));
    let (shader, to) = (moved(shader, wide, "side", ty, side), (dtype_of_result(graph, node, 0), At::Result(0)));
    let shader = if wide == 8 { shader.by_eight("y", to.0, to.1) } else { leaving(shader, to, false, joined) };
    each(shader, tokens * d / wide)
}

pub(super) fn lower_gate_grad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [x, _, slot_choice, choice_slot] = shapes(graph, node);
    let shader = Shader::file(limits, "gate_grad", ROW_THREADS)
        .sums()
        .number("slots", slot_choice[0])
        .number("k", choice_slot[1])
        .number("d", x[1])
        .buffer("rows", dtype(graph, node, 0), At::Operand(0))
        .buffer("y", dtype(graph, node, 1), At::Operand(1))
        .buffer("choice_slot", DType::I32, At::Operand(3))
        .buffer("gates", DType::F32, At::Result(0));
    Ok(Launch::of(vec![shader.line(choice_slot.elements())?]))
}

pub(super) fn lower_segment_sum(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [x, offsets] = shapes(graph, node);
    let (width, experts) = (x[1], offsets[0] - 1);
    let shader = Shader::file(limits, "segment_sum", THREADS)
        .number("width", width)
        .number("experts", experts)
        .buffer("rows", dtype(graph, node, 0), At::Operand(0))
        .buffer("offsets", DType::I32, At::Operand(1))
        .buffer("y", dtype_of_result(graph, node, 0), At::Result(0));
    each(shader, experts * width)
}
