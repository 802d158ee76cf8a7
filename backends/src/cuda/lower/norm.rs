//! Launches of softmax and norms, a block for each row.

use moebius_ir::{Graph, Node};

use super::{Lowered, dtype, int, per_lane, typed};
use crate::cuda::launch::{Action, Arg, Launch, Scratch, kernel};
use crate::cuda::source::{NORM, Source, VECTORS};

const TEXT: &str = include_str!("../kernels/norm.cu");
const SOFTMAX: &str = include_str!("../kernels/softmax.cu");
const THREADS: usize = 128;
/// Rows that a block of the gradient goes through.
const CHUNK: usize = 16;
/// Threads of a block that joins their sums, as in the kernel.
const FINISH_THREADS: u32 = 1024;

/// The rows of the node's first operand, and its columns.
fn sizes(graph: &Graph, node: &Node) -> Result<(usize, usize), String> {
    let shape = &graph.ty(node.operands[0]).shape;
    int(shape.last(), "a last axis")?;
    int(shape.rows(), "rows")?;
    Ok((shape.rows(), shape.last()))
}

/// The norms' kernels for the node's first operand, its rows, and its columns.
fn parts(graph: &Graph, node: &Node) -> Result<(Source, usize, usize), String> {
    let (rows, d) = sizes(graph, node)?;
    let dtype = dtype(graph, node, 0);
    let source = typed("norm.cu", &[VECTORS, NORM], TEXT, dtype)?
        .define("PER_LANE", per_lane(dtype, d))
        .define("PIECES", d.div_ceil(THREADS * per_lane(dtype, d)).max(1));
    Ok((source, rows, d))
}

fn by_row(source: Source, name: &'static str, rows: usize, args: Vec<Arg>) -> Action {
    kernel(source, name, [rows, 1, 1], THREADS as u32, args)
}

pub(super) fn lower_softmax(graph: &Graph, node: &Node) -> Lowered {
    let (rows, d) = sizes(graph, node)?;
    let source = typed("softmax.cu", &[], SOFTMAX, dtype(graph, node, 0))?;
    let args = vec![Arg::Operand(0), Arg::I32(d as i32), Arg::Result(0)];
    Ok(Launch::of(vec![by_row(source, "softmax", rows, args)]))
}

pub(super) fn lower_softmax_grad(graph: &Graph, node: &Node) -> Lowered {
    let (rows, d) = sizes(graph, node)?;
    let source = typed("softmax.cu", &[], SOFTMAX, dtype(graph, node, 0))?;
    let args = vec![Arg::Operand(0), Arg::Operand(1), Arg::I32(d as i32), Arg::Result(0)];
    Ok(Launch::of(vec![by_row(source, "softmax_grad", rows, args)]))
}

pub(super) fn lower_layer_norm(graph: &Graph, node: &Node, eps: f32) -> Lowered {
    let (source, rows, d) = parts(graph, node)?;
    let operands = [Arg::Operand(0), Arg::Operand(1), Arg::Operand(2), Arg::I32(d as i32), Arg::F32(eps)];
    let args = [&operands[..], &[Arg::Result(0), Arg::Result(1), Arg::Result(2)]].concat();
    Ok(Launch::of(vec![by_row(source, "layer_norm", rows, args)]))
}

pub(super) fn lower_rms_norm(graph: &Graph, node: &Node, eps: f32) -> Lowered {
    let (source, rows, d) = parts(graph, node)?;
    let operands = [Arg::Operand(0), Arg::Operand(1), Arg::I32(d as i32), Arg::F32(eps)];
    let args = [&operands[..], &[Arg::Result(0), Arg::Result(1)]].concat();
    Ok(Launch::of(vec![by_row(source, "rms_norm", rows, args)]))
}

/// The gradient of either norm; `mean`, `rstd` and `dy` are operands, the mean only of layer_norm.
fn lower_grad(graph: &Graph, node: &Node, mean: Option<usize>, rstd: usize, dy: usize) -> Lowered {
    let (source, rows, d) = parts(graph, node)?;
    let mean = mean.map_or(Arg::Null, Arg::Operand);
    let has_mean = mean != Arg::Null;
    let (rstd, dy, width) = (Arg::Operand(rstd), Arg::Operand(dy), Arg::I32(d as i32));
    let chunks = rows.div_ceil(CHUNK);
    let mut scratch = Scratch::default();
    let gamma = scratch.take(4 * chunks * d);
    let beta = if has_mean { scratch.take(4 * chunks * d) } else { Arg::Null };
    let dbeta = if has_mean { Arg::Result(2) } else { Arg::Null };
    let operands = [Arg::Operand(0), Arg::Operand(1), mean, rstd, dy];
    let sizes = [Arg::I32(rows as i32), width.clone(), Arg::I32(CHUNK as i32)];
    let of_rows = [&operands[..], &sizes, &[Arg::Result(0), gamma.clone(), beta.clone()]].concat();
    let of_chunks = vec![gamma, beta, Arg::I32(int(chunks, "chunks")?), width, Arg::Result(1), dbeta];
    let actions = vec![
        by_row(source.clone(), "norm_grad", chunks, of_rows),
        kernel(source, "norm_weights", [d.div_ceil(32), 1, 1], FINISH_THREADS, of_chunks),
    ];
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

pub(super) fn lower_layer_norm_grad(graph: &Graph, node: &Node) -> Lowered {
    lower_grad(graph, node, Some(2), 3, 4)
}

pub(super) fn lower_rms_norm_grad(graph: &Graph, node: &Node) -> Lowered {
    lower_grad(graph, node, None, 2, 3)
}
