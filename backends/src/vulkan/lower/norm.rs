//! Launches of softmax and norms, a workgroup for each row. Norms of rows of a multiple of eight elements read 16 bytes at a time.

use moebius_ir::{DType, Graph, Node};

use super::{Lowered, dtype, dtype_of_result};
use crate::vulkan::launch::{At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 128;
/// Rows whose parts of dgamma one thread adds up.
const CHUNK: usize = 64;
/// The most elements of a row of which a thread keeps what it has.
const MOST_KEPT: usize = 8192;

/// A kernel on the rows of the node's first operand, and how many there are.
fn by_row(graph: &Graph, node: &Node, name: &'static str, limits: Limits) -> (Shader, usize) {
    let shape = &graph.ty(node.operands[0]).shape;
    (Shader::file(limits, name, THREADS).sums().number("d", shape.last()), shape.rows())
}

/// A kernel of a norm's gradient: that for rows of multiples of eight elements, of which a thread keeps its own, where the rows are such. And whether
/// it is that one.
fn norm(graph: &Graph, node: &Node, [one, eight]: [&'static str; 2], limits: Limits) -> (Shader, usize, bool) {
    let shape = &graph.ty(node.operands[0]).shape;
    let d = shape.last();
    if !by_eight(d) {
        let (shader, rows) = by_row(graph, node, one, limits);
        return (shader, rows, false);
    }
    let threads = threads(d);
    let shader = Shader::file(limits, eight, threads).with("eight").number("d", d);
    (shader.sums().constant("OWN", (d / 8).div_ceil(threads)), shape.rows(), true)
}

/// Whether rows of `d` elements are taken eight elements at a time.
pub(super) fn by_eight(d: usize) -> bool {
    d.is_multiple_of(8) && (1..=MOST_KEPT).contains(&d)
}

/// Threads that share such a row.
fn threads(d: usize) -> usize {
    (d / 8).next_power_of_two().clamp(32, 256)
}

/// A kernel with `normalise(nth, thread)` for such rows: a layer norm or a root-mean-square norm.
pub(super) fn row(shader: Shader, layer: bool, d: usize) -> Shader {
    let threads = threads(d);
    let shader = shader.sums_of(threads).with("norm_row").with(if layer { "layer_norm_row" } else { "rms_norm_row" });
    shader.constant("WIDTH", d).constant("NORMED", threads).constant("OWN", (d / 8).div_ceil(threads))
}

/// The kernel of the norm of this name, how many rows there are, and whether it takes them eight elements at a time.
fn rows(graph: &Graph, node: &Node, name: &'static str, limits: Limits) -> (Shader, usize, bool) {
    let shape = &graph.ty(node.operands[0]).shape;
    let d = shape.last();
    if !by_eight(d) {
        let (shader, rows) = by_row(graph, node, name, limits);
        return (shader, rows, false);
    }
    let shader = Shader::file(limits, "norm_rows", threads(d)).with("eight");
    (row(shader, name == "layer_norm", d), shape.rows(), true)
}

/// A buffer of such a kernel.
fn buffer(shader: Shader, eight: bool, name: &str, dtype: DType, at: At) -> Shader {
    if eight { shader.by_eight(name, dtype, at) } else { shader.buffer(name, dtype, at) }
}

pub(super) fn lower_softmax(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let (shader, rows) = by_row(graph, node, "softmax", limits);
    let ty = dtype(graph, node, 0);
    Ok(Launch::of(vec![shader.buffer("x", ty, At::Operand(0)).buffer("y", ty, At::Result(0)).line(rows)?]))
}

pub(super) fn lower_softmax_grad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let (shader, rows) = by_row(graph, node, "softmax_grad", limits);
    let ty = dtype(graph, node, 0);
    let shader = shader.buffer("y", ty, At::Operand(0)).buffer("dy", ty, At::Operand(1));
    Ok(Launch::of(vec![shader.buffer("dx", ty, At::Result(0)).line(rows)?]))
}

pub(super) fn lower_layer_norm(graph: &Graph, node: &Node, eps: f32, limits: Limits) -> Lowered {
    let of = |i| dtype(graph, node, i);
    let (shader, rows, eight) = rows(graph, node, "layer_norm", limits);
    let shader = buffer(shader.float("eps", eps), eight, "x", of(0), At::Operand(0));
    let shader = buffer(shader, eight, "gamma", of(1), At::Operand(1));
    let shader = buffer(buffer(shader, eight, "beta", of(2), At::Operand(2)), eight, "y", of(0), At::Result(0));
    let shader = shader.buffer("mean", DType::F32, At::Result(1)).buffer("rstd", DType::F32, At::Result(2));
    Ok(Launch::of(vec![shader.line(rows)?]))
}

pub(super) fn lower_rms_norm(graph: &Graph, node: &Node, eps: f32, limits: Limits) -> Lowered {
    let of = |i| dtype(graph, node, i);
    let (shader, rows, eight) = rows(graph, node, "rms_norm", limits);
    let shader = buffer(shader.float("eps", eps), eight, "x", of(0), At::Operand(0));
    let shader = buffer(shader, eight, "gamma", of(1), At::Operand(1));
    let shader = buffer(shader, eight, "y", of(0), At::Result(0)).buffer("mean", DType::F32, At::Null);
    Ok(Launch::of(vec![shader.buffer("rstd", DType::F32, At::Result(1)).line(rows)?]))
}

/// The gradient of either norm; `mean`, `rstd` and `dy` are operands, the mean only of layer_norm.
fn lower_grad(graph: &Graph, node: &Node, mean: Option<usize>, rstd: usize, dy: usize, limits: Limits) -> Lowered {
    let (of_x, rows, eight) = norm(graph, node, ["norm_grad", "norm_grad_eight"], limits);
    let d = graph.ty(node.operands[0]).shape.last();
    let (of, result) = (|i| dtype(graph, node, i), |i| dtype_of_result(graph, node, i));
    let chunks = rows.div_ceil(CHUNK);
    let mut scratch = Scratch::default();
    let gammas = scratch.take(4 * chunks * d);
    let betas = if mean.is_some() { scratch.take(4 * chunks * d) } else { At::Null };
    let dbeta = if mean.is_some() { At::Result(2) } else { At::Null };
    let operands = |shader: Shader, eight: bool| {
        let shader = buffer(shader, eight, "x", of(0), At::Operand(0));
        let shader = shader.buffer("mean", DType::F32, mean.map_or(At::Null, At::Operand));
        buffer(shader.buffer("rstd", DType::F32, At::Operand(rstd)), eight, "dy", of(dy), At::Operand(dy))
    };
    let of_x = buffer(operands(of_x, eight), eight, "gamma", of(1), At::Operand(1));
    let of_x = buffer(of_x, eight, "dx", result(0), At::Result(0));
    let of_weights = Shader::file(limits, "norm_weights", THREADS).number("rows", rows).number("d", d);
    let of_weights = operands(of_weights.number("chunk", CHUNK).number("chunks", chunks), false)
        .buffer("gammas", DType::F32, gammas)
        .buffer("betas", DType::F32, betas);
    let finish = Shader::file(limits, "norm_weights_finish", THREADS)
        .number("d", d)
        .number("chunks", chunks)
        .buffer("gammas", DType::F32, gammas)
        .buffer("betas", DType::F32, betas)
        .buffer("dgamma", result(1), At::Result(1))
        .buffer("dbeta", DType::F32, dbeta);
    let actions =
        vec![of_x.line(rows)?, of_weights.line((chunks * d).div_ceil(THREADS))?, finish.line(d.div_ceil(THREADS))?];
    Ok(Launch::of(actions).with_scratch(&scratch))
}

pub(super) fn lower_layer_norm_grad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    lower_grad(graph, node, Some(2), 3, 4, limits)
}

pub(super) fn lower_rms_norm_grad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    lower_grad(graph, node, None, 2, 3, limits)
}
