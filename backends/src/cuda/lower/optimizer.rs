//! Launches of the optimizer's ops.

use std::collections::BTreeMap;

use moebius_ir::ops::Adamw;
use moebius_ir::{DType, Graph, Moments, Node};

use super::{Lowered, dtype, float, typed};
use crate::cuda::launch::{Action, Arg, Launch, Scratch, Task, Tasks, kernel};
use crate::cuda::source::{ADAMW, HALVES, PHILOX, Source, TASKS, VECTORS};

const TEXT: &str = include_str!("../kernels/optimizer.cu");
const NARROW: &str = include_str!("../kernels/adamw_narrow.cu");
const THREADS: usize = 256;
/// Elements of one block of the norm, as in the kernel.
const BLOCK_ELEMENTS: usize = 32_768;
/// Sums of blocks that a block of the second stage adds up, as in the kernel.
const BLOCK_PARTS: usize = 2048;
/// Elements of one block of AdamW, as in the kernels.
const STEP_ELEMENTS: usize = 32_768;

/// The kernels for gradients of a float type and rounded parameters of another.
fn source(gradient: DType, rounded: Option<DType>) -> Result<Source, String> {
    with_rounded(typed("optimizer.cu", &[VECTORS, TASKS, ADAMW], TEXT, gradient)?, rounded)
}

/// The kernels for moments in fewer bits.
fn narrow(gradient: DType, rounded: Option<DType>) -> Result<Source, String> {
    let source = typed("adamw_narrow.cu", &[VECTORS, TASKS, ADAMW, PHILOX, HALVES], NARROW, gradient)?;
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
    // One launch for all gradients of a type.
    let mut by_type: BTreeMap<DType, Vec<Task>> = BTreeMap::new();
    let mut at = 0;
    for (i, &blocks) in blocks.iter().enumerate() {
        let args = vec![Arg::Operand(i), Arg::Scratch(8 * at), Arg::size(graph.ty(node.operands[i]).elements())];
        by_type.entry(dtype(graph, node, i)).or_default().push(Task { blocks, args });
        at += blocks;
    }
    let mut actions = Vec::with_capacity(4);
    for (dtype, tasks) in by_type {
        let source = source(dtype, None)?;
        actions.push(Action::Tasks(Tasks { source, name: "sum_of_squares", threads: THREADS as u32, tasks }));
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
    actions.push(norm_of_parts(dtype(graph, node, 0), last, left, Arg::Result(0))?);
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

/// The norm of which `partial` has so many sums of squares, in f64.
pub(super) fn norm_of_parts(dtype: DType, partial: Arg, parts: usize, norm: Arg) -> Result<Action, String> {
    let args = vec![partial, Arg::size(parts), norm];
    Ok(kernel(source(dtype, None)?, "norm_of_parts", [1, 1, 1], THREADS as u32, args))
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
    let (source, name, scales) = match op.moments {
        Moments::F32 => (source(gradient, rounded)?, "adamw", Arg::Null),
        Moments::Bf16 => (narrow(gradient, rounded)?, "adamw_bf16", Arg::Null),
        Moments::Eight => (narrow(gradient, rounded)?, "adamw_8bit", Arg::Result(3)),
    };
    // The fields of the kernels' `Step`.
    let args = [&tensors[..], &scalars, &[copy, scales, Arg::size(n)], &rule, &[Arg::U32(op.stream)]].concat();
    let tasks = vec![Task { blocks: n.div_ceil(STEP_ELEMENTS), args }];
    Ok(Launch::of(vec![Action::Tasks(Tasks { source, name, threads: THREADS as u32, tasks })]))
}
