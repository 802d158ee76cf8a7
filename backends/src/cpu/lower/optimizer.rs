//! Launches of the optimizer's ops.

use moebius_ir::moments::eight;
use moebius_ir::ops::Adamw;
use moebius_ir::{DType, Graph, Moments, Node};

use super::args::{Args, Launch};
use super::{Lowered, by_float};
use crate::cpu::element::Element;
use crate::cpu::kernels::adamw::{AdamW, adamw};
use crate::cpu::kernels::adamw_narrow::{adamw_8bit, adamw_bf16};
use crate::cpu::kernels::global_norm::{global_norm_workspace, sum_of_squares};

pub(super) fn lower_adamw(graph: &Graph, node: &Node, op: &Adamw) -> Lowered {
    let n = graph.ty(node.operands[0]).elements();
    let op = op.clone();
    // Results come in the order of the operands that they replace.
    let copy = op.rounded_at() - 4;
    let rounded = node.operands.get(op.rounded_at()).map(|&v| graph.ty(v).dtype);
    by_float!(graph.ty(node.operands[1]).dtype, G => Launch::new(0, move |a| {
        let step = AdamW {
            lr: a.operand(4, 1)[0],
            beta1: op.beta1,
            beta2: op.beta2,
            eps: op.eps,
            weight_decay: op.weight_decay,
            step: a.operand::<f32>(5, 1)[0] as u32,
            grad_scale: a.operand(6, 1)[0],
        };
        match rounded {
            Some(DType::F16) => run::<G, half::f16>(a, &op, n, a.result(copy, n), &step),
            Some(_sixteen_bits) => run::<G, half::bf16>(a, &op, n, a.result(copy, n), &step),
            None => run::<G, f32>(a, &op, n, &mut [], &step),
        }
    }))
}

fn run<G: Element, R: Element>(a: &Args<'_>, op: &Adamw, n: usize, rounded: &mut [R], step: &AdamW) {
    let (param, grad) = (a.result(0, n), a.operand::<G>(1, n));
    match op.moments {
        Moments::F32 => adamw::<f32, G, R>(param, grad, [a.result(1, n), a.result(2, n)], rounded, step),
        Moments::Eight => {
            let (words, blocks) = (n.div_ceil(4), n.div_ceil(eight::BLOCK));
            let moments = ([a.result(1, words), a.result(2, words)], a.result(3, 2 * blocks));
            adamw_8bit(param, grad, moments, rounded, step, op.stream);
        }
        Moments::Bf16 => adamw_bf16(param, grad, [a.result(1, n), a.result(2, n)], rounded, step, op.stream),
    }
}

pub(super) fn lower_global_norm(graph: &Graph, node: &Node) -> Lowered {
    let tensors: Vec<(DType, usize)> =
        node.operands.iter().map(|&v| (graph.ty(v).dtype, graph.ty(v).elements())).collect();
    let scratch = tensors.iter().map(|&(_, n)| 8 * global_norm_workspace(n)).max().unwrap_or(0);
    Ok(Launch::new(scratch, move |a| {
        let squares = |i: usize, dtype: DType, n: usize| match dtype {
            DType::F32 => sum_of_squares::<f32>(a.operand(i, n), a.scratch()),
            DType::Bf16 => sum_of_squares::<half::bf16>(a.operand(i, n), a.scratch()),
            DType::F16 => sum_of_squares::<half::f16>(a.operand(i, n), a.scratch()),
            DType::I32 | DType::U32 | DType::Bool => unreachable!("global_norm takes floats"),
        };
        let sum: f64 = tensors.iter().enumerate().map(|(i, &(dtype, n))| squares(i, dtype, n)).sum();
        a.result::<f32>(0, 1)[0] = sum.sqrt() as f32;
    }))
}
