//! Launches of softmax and norms, a workgroup for each row.

use moebius_ir::{DType, Graph, Node};

use super::{Lowered, dtype, dtype_of_result};
use crate::vulkan::launch::{At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 128;
/// Rows whose parts of dgamma one thread adds up.
const CHUNK: usize = 64;

/// A kernel on the rows of the node's first operand, and how many there are.
fn by_row(graph: &Graph, node: &Node, name: &'static str, limits: Limits) -> (Shader, usize) {
    let shape = &graph.ty(node.operands[0]).shape;
    (Shader::file(limits, name, THREADS).with("sums").number("d", shape.last()), shape.rows())
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
    let (shader, rows) = by_row(graph, node, "layer_norm", limits);
    let of = |i| dtype(graph, node, i);
    let shader = shader.float("eps", eps).buffer("x", of(0), At::Operand(0)).buffer("gamma", of(1), At::Operand(1));
    let shader = shader.buffer("beta", of(2), At::Operand(2)).buffer("y", of(0), At::Result(0));
    let shader = shader.buffer("mean", DType::F32, At::Result(1)).buffer("rstd", DType::F32, At::Result(2));
    Ok(Launch::of(vec![shader.line(rows)?]))
}

pub(super) fn lower_rms_norm(graph: &Graph, node: &Node, eps: f32, limits: Limits) -> Lowered {
    let (shader, rows) = by_row(graph, node, "rms_norm", limits);
    let of = |i| dtype(graph, node, i);
    let shader = shader.float("eps", eps).buffer("x", of(0), At::Operand(0)).buffer("gamma", of(1), At::Operand(1));
    let shader = shader.buffer("y", of(0), At::Result(0)).buffer("rstd", DType::F32, At::Result(1));
    Ok(Launch::of(vec![shader.line(rows)?]))
}

/// The gradient of either norm; `mean`, `rstd` and `dy` are operands, the mean only of layer_norm.
fn lower_grad(graph: &Graph, node: &Node, mean: Option<usize>, rstd: usize, dy: usize, limits: Limits) -> Lowered {
    let (of_x, rows) = by_row(graph, node, "norm_grad", limits);
    let d = graph.ty(node.operands[0]).shape.last();
    let (of, result) = (|i| dtype(graph, node, i), |i| dtype_of_result(graph, node, i));
    let chunks = rows.div_ceil(CHUNK);
    let mut scratch = Scratch::default();
    let gammas = scratch.take(4 * chunks * d);
    let betas = if mean.is_some() { scratch.take(4 * chunks * d) } else { At::Null };
    let dbeta = if mean.is_some() { At::Result(2) } else { At::Null };
    let operands = |shader: Shader| {
        shader
            .buffer("x", of(0), At::Operand(0))
            .buffer("mean", DType::F32, mean.map_or(At::Null, At::Operand))
            .buffer("rstd", DType::F32, At::Operand(rstd))
            .buffer("dy", of(dy), At::Operand(dy))
    };
    let of_x = operands(of_x).buffer("gamma", of(1), At::Operand(1)).buffer("dx", result(0), At::Result(0));
    let of_weights = Shader::file(limits, "norm_weights", THREADS).number("rows", rows).number("d", d);
    let of_weights = operands(of_weights.number("chunk", CHUNK).number("chunks", chunks))
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
