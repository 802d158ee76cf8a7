//! Launches of the optimizer's ops.

use moebius_ir::moments::eight;
use moebius_ir::ops::Adamw;
use moebius_ir::{DType, Graph, Moments, Node};

use super::{Lowered, dtype};
use crate::vulkan::launch::{At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 256;
/// Elements whose squares a workgroup adds up.
const EACH: usize = 8192;

pub(super) fn lower_global_norm(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let groups: Vec<usize> = node.operands.iter().map(|&v| graph.ty(v).elements().div_ceil(EACH)).collect();
    let count: usize = groups.iter().sum();
    let mut scratch = Scratch::default();
    let parts = scratch.take(8 * count);
    let mut first = 0;
    let mut actions = Vec::with_capacity(groups.len() + 1);
    for (i, &groups) in groups.iter().enumerate() {
        let shader = Shader::file(limits, "sum_of_squares", THREADS)
            .sums()
            .with("powers")
            .constant("EACH", EACH)
            .number("n", graph.ty(node.operands[i]).elements())
            .number("first", first)
            .buffer("x", dtype(graph, node, i), At::Operand(i))
            .buffer("parts", DType::F32, parts);
        actions.push(shader.line(groups)?);
        first += groups;
    }
    let shader = Shader::file(limits, "norm_of_parts", THREADS)
        .sums()
        .with("powers")
        .number("parts_count", count)
        .buffer("parts", DType::F32, parts)
        .buffer("norm", DType::F32, At::Result(0));
    actions.push(shader.line(1)?);
    Ok(Launch::of(actions).with_scratch(&scratch))
}

pub(super) fn lower_adamw(graph: &Graph, node: &Node, op: &Adamw, limits: Limits) -> Lowered {
    let n = graph.ty(node.operands[0]).elements();
    let (rounded, of_rounded) = if op.rounded {
        (At::Result(op.rounded_at() - 4), dtype(graph, node, op.rounded_at()))
    } else {
        (At::Null, DType::F32)
    };
    // The device has no f64 to take powers in; logarithms of numbers close to 1 lose nothing in f32.
    let ln = |x: f32| f64::from(x).ln() as f32;
    let (name, each) = match op.moments {
        Moments::F32 => ("adamw", THREADS),
        Moments::Bf16 => ("adamw_bf16", 4 * THREADS),
        Moments::Eight => ("adamw_8bit", eight::BLOCK),
    };
    // Parameter, moments, their scales and the rounded copy are results in the storage of the operands that they replace.
    let shader = Shader::file(limits, name, THREADS)
        .with("adamw_rule")
        .number("n", n)
        .float("beta1", op.beta1)
        .float("beta2", op.beta2)
        .float("ln_beta1", ln(op.beta1))
        .float("ln_beta2", ln(op.beta2))
        .float("eps", op.eps)
        .float("weight_decay", op.weight_decay)
        .buffer("param", DType::F32, At::Result(0))
        .buffer("grad", dtype(graph, node, 1), At::Operand(1))
        .buffer("lr", DType::F32, At::Operand(4))
        .buffer("steps", DType::F32, At::Operand(5))
        .buffer("scale", DType::F32, At::Operand(6))
        .buffer("rounded", of_rounded, rounded);
    let [m, v] = [At::Result(1), At::Result(2)];
    let shader = match op.moments {
        Moments::F32 => shader.buffer("m", DType::F32, m).buffer("v", DType::F32, v),
        Moments::Bf16 => {
            let shader = shader.with("philox").number("stream", op.stream as usize);
            shader.moved("m", 2, m).moved("v", 2, v)
        }
        Moments::Eight => {
            let shader = shader.with("philox").number("stream", op.stream as usize);
            let shader = shader.buffer("m", DType::U32, m).buffer("v", DType::U32, v);
            shader.buffer("scales", DType::F32, At::Result(3))
        }
    };
    Ok(Launch::of(vec![shader.line(n.div_ceil(each))?]))
}

// A workgroup has a block of codes.
const _: () = assert!(THREADS == eight::BLOCK);
