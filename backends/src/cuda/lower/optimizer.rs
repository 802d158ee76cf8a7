//! Launches of the optimizer's ops.

use moebius_ir::ops::Adamw;
use moebius_ir::{DType, Graph, Moments, Node};

use super::{Lowered, dtype, float, typed};
use crate::cuda::launch::{Arg, Launch, Scratch, kernel};
use crate::cuda::source::{ADAMW, PHILOX, Source, VECTORS};

const TEXT: &str = include_str!("../kernels/optimizer.cu");
const NARROW: &str = include_str!("../kernels/adamw_narrow.cu");
const THREADS: usize = 256;
/// Elements of one block of the norm, as in the kernel.
const BLOCK_ELEMENTS: usize = 8192;
/// Sums of blocks that a block of the second stage adds up, as in the kernel.
const BLOCK_PARTS: usize = 2048;
/// Elements of one block of AdamW, as in the kernels.
const STEP_ELEMENTS: usize = 4096;

/// The kernels for gradients of a float type and rounded parameters of another.
fn source(gradient: DType, rounded: Option<DType>) -> Result<Source, String> {
    with_rounded(typed("optimizer.cu", &[VECTORS, ADAMW], TEXT, gradient)?, rounded)
}

/// The kernels for moments in fewer bits.
fn narrow(gradient: DType, rounded: Option<DType>) -> Result<Source, String> {
    let source = typed("adamw_narrow.cu", &[VECTORS, ADAMW, PHILOX], NARROW, gradient)?;
    with_rounded(source.exact(), rounded)
}

fn with_rounded(source: Source, rounded: Option<DType>) -> Result<Source, String> {
    Ok(source.define("ROUNDED", float(rounded.unwrap_or(DType::Bf16))?))
}

pub(super) fn lower_global_norm(graph: &Graph, node: &Node) -> Lowered {
    let blocks: Vec<usize> = node.operands.iter().map(|&v| graph.ty(v).elements().div_ceil(BLOCK_ELEMENTS)).collect();
    let parts: usize = blocks.iter().sum();
    let mut scratch = Scratch::default();
    let all = scratch.take(8 * parts);
    let mut at = 0;
    let mut actions = Vec::with_capacity(blocks.len() + 1);
    for (i, &blocks) in blocks.iter().enumerate() {
        let source = source(dtype(graph, node, i), None)?;
        let args = vec![Arg::Operand(i), Arg::size(graph.ty(node.operands[i]).elements()), Arg::Scratch(8 * at)];
        actions.push(kernel(source, "sum_of_squares", [blocks, 1, 1], THREADS as u32, args));
        at += blocks;
    }
    let source = source(dtype(graph, node, 0), None)?;
    let (mut last, mut left) = (all, parts);
    if parts > BLOCK_PARTS {
        left = parts.div_ceil(BLOCK_PARTS);
        let sums = scratch.take(8 * left);
        let args = vec![last, Arg::size(parts), sums.clone()];
        actions.push(kernel(source.clone(), "sum_of_parts", [left, 1, 1], THREADS as u32, args));
        last = sums;
    }
    let args = vec![last, Arg::size(left), Arg::Result(0)];
    actions.push(kernel(source, "norm_of_parts", [1, 1, 1], THREADS as u32, args));
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

pub(super) fn lower_adamw(graph: &Graph, node: &Node, op: &Adamw) -> Lowered {
    let n = graph.ty(node.operands[0]).elements();
    let rounded = op.rounded.then(|| dtype(graph, node, op.rounded_at()));
    let gradient = dtype(graph, node, 1);
    // Parameter, moments, their scales and the rounded copy are results in the storage of the operands that they replace.
    let tensors = [Arg::Result(0), Arg::Operand(1), Arg::Result(1), Arg::Result(2)];
    let scalars = [Arg::Operand(4), Arg::Operand(5), Arg::Operand(6)];
    let copy = if op.rounded { Arg::Result(op.rounded_at() - 4) } else { Arg::Null };
    let rule = [op.beta1, op.beta2, op.eps, op.weight_decay].map(Arg::F32);
    let args = |more: &[Arg]| [&tensors[..], &scalars, &rule, &[Arg::size(n)], more].concat();
    let (source, name, args) = match op.moments {
        Moments::F32 => (source(gradient, rounded)?, "adamw", args(&[copy])),
        Moments::Bf16 => (narrow(gradient, rounded)?, "adamw_bf16", args(&[Arg::U32(op.stream), copy])),
        Moments::Eight => {
            (narrow(gradient, rounded)?, "adamw_8bit", args(&[Arg::U32(op.stream), Arg::Result(3), copy]))
        }
    };
    Ok(Launch::one(source, name, [n.div_ceil(STEP_ELEMENTS), 1, 1], THREADS as u32, args))
}
