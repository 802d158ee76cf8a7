//! Launches that move or make elements: transpose, broadcast, slice, pad, concat, random.

use std::fmt::Write;

use moebius_ir::ops::{Distribution, Random};
use moebius_ir::{DType, Graph, Node};

use super::Lowered;
use crate::views::{Copy, copies};
use crate::vulkan::launch::{Action, At, Launch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// The most axes of a view: its numbers fit what a kernel is given.
const MOST_AXES: usize = 8;
const THREADS: usize = 256;

/// One copy as a kernel.
fn copy(limits: Limits, copy: &Copy<'_>, bytes: usize, from: At, to: At) -> Result<Action, String> {
    let axes = copy.shape.len();
    if axes > MOST_AXES {
        return Err(format!("at most {MOST_AXES} axes, not {axes}"));
    }
    let mut steps = String::new();
    for axis in (0..axes).rev() {
        let _ = writeln!(
            steps,
            "    let at{axis} = i % p.shape{axis}; i = i / p.shape{axis}; \
             read += at{axis} * p.from{axis}; write += at{axis} * p.to{axis};"
        );
    }
    let mut shader = Shader::file(limits, "move_views", THREADS)
        .replace("AXES", &steps)
        .moved("source", bytes, from)
        .moved("sink", bytes, to)
        .number("elements", copy.shape.elements())
        .number("from_at", copy.from_at)
        .number("to_at", copy.to_at);
    for axis in 0..axes {
        shader = shader
            .number(&format!("shape{axis}"), copy.shape[axis])
            .number(&format!("from{axis}"), copy.from[axis])
            .number(&format!("to{axis}"), copy.to[axis]);
    }
    shader.line(copy.shape.elements().div_ceil(THREADS))
}

/// The copies of a node that only moves elements.
pub(super) fn lower_movement(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let Some((copies, clear)) = copies(graph, node) else { return Err("an op that only moves elements".into()) };
    let ty = graph.ty(node.results[0]);
    let mut actions = Vec::with_capacity(copies.len() + 1);
    // Zero has the same bits in every dtype, and bytes are put into words that begin as 0.
    if clear || ty.dtype.bytes() == 1 {
        actions.push(Action::Clear { at: At::Result(0), bytes: ty.bytes() });
    }
    for (operand, one) in copies.iter().enumerate() {
        actions.push(copy(limits, one, ty.dtype.bytes(), At::Operand(operand), At::Result(0))?);
    }
    Ok(Launch::of(actions))
}

pub(super) fn lower_random(graph: &Graph, node: &Node, op: &Random, limits: Limits) -> Lowered {
    let ty = graph.ty(node.results[0]);
    let numbers = match op.distribution {
        Distribution::Uniform => "let even = unit(a); let odd = unit(b);",
        Distribution::Normal => {
            "let r = root(-2.0f * ln_of(unit(a) + UNIT)); let angle = turns(unit(b)); let even = r * angle.x; let odd = r * angle.y;"
        }
        Distribution::Gumbel => "let even = gumbel(a); let odd = gumbel(b);",
        Distribution::Bits => "let even = a; let odd = b;",
    };
    let shader = Shader::file(limits, "random", THREADS)
        .with("philox")
        .replace("NUMBERS", numbers)
        .buffer("key", DType::U32, At::Operand(0))
        .buffer("out", ty.dtype, At::Result(0))
        .number("stream", op.stream as usize)
        .number("elements", ty.elements());
    Ok(Launch::of(vec![shader.line(ty.elements().div_ceil(4 * THREADS))?]))
}
