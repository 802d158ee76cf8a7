//! Launches of reductions, softmax and norms.

use moebius_ir::ops::{Reduce, ReduceFn};
use moebius_ir::{Graph, Node};

use super::args::Launch;
use super::{Lowered, by_float};
use crate::cpu::kernels::layer_norm::{layer_norm, layer_norm_grad, layer_norm_grad_workspace};
use crate::cpu::kernels::reduce::{Reduction, reduce, reduce_workspace};
use crate::cpu::kernels::rms_norm::{rms_norm, rms_norm_grad, rms_norm_grad_workspace};
use crate::cpu::kernels::softmax::{softmax, softmax_grad};
use crate::lowering::reduced;

/// Reduced axes that lie side by side are one loop between an outer and an inner one.
pub(super) fn lower_reduce(graph: &Graph, node: &Node, op: &Reduce) -> Lowered {
    let [outer, n, inner] = reduced(&graph.ty(node.operands[0]).shape, &op.axes)?;
    let reduction = match op.function {
        ReduceFn::Sum => Reduction::Sum,
        ReduceFn::Mean => Reduction::Mean,
        ReduceFn::Max => Reduction::Max,
    };
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(4 * reduce_workspace(outer, n, inner), move |a| {
        let x = a.operand::<T>(0, outer * n * inner);
        reduce::<T, T>(x, outer, n, inner, reduction, a.result(0, outer * inner), a.scratch());
    }))
}

/// Rows and columns of an operand, the last axis being the columns.
fn matrix(graph: &Graph, node: &Node, i: usize) -> (usize, usize) {
    let shape = &graph.ty(node.operands[i]).shape;
    (shape.rows(), shape.last())
}

pub(super) fn lower_softmax(graph: &Graph, node: &Node) -> Lowered {
    let (r, d) = matrix(graph, node, 0);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        softmax::<T>(a.operand(0, r * d), d, a.result(0, r * d));
    }))
}

pub(super) fn lower_softmax_grad(graph: &Graph, node: &Node) -> Lowered {
    let (r, d) = matrix(graph, node, 0);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        softmax_grad::<T>(a.operand(0, r * d), a.operand(1, r * d), d, a.result(0, r * d));
    }))
}

pub(super) fn lower_layer_norm(graph: &Graph, node: &Node, eps: f32) -> Lowered {
    let (r, d) = matrix(graph, node, 0);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        let (gamma, beta) = (a.operand::<f32>(1, d), a.operand::<f32>(2, d));
        layer_norm::<T, f32>(a.operand(0, r * d), gamma, beta, eps, a.result(0, r * d), a.result(1, r), a.result(2, r));
    }))
}

pub(super) fn lower_layer_norm_grad(graph: &Graph, node: &Node) -> Lowered {
    let (r, d) = matrix(graph, node, 0);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(4 * layer_norm_grad_workspace(r, d), move |a| {
        let (x, gamma, dy) = (a.operand::<T>(0, r * d), a.operand::<f32>(1, d), a.operand::<T>(4, r * d));
        let (mean, rstd) = (a.operand(2, r), a.operand(3, r));
        let (dx, dgamma, dbeta) = (a.result(0, r * d), a.result::<f32>(1, d), a.result::<f32>(2, d));
        layer_norm_grad(x, gamma, mean, rstd, dy, dx, dgamma, dbeta, a.scratch());
    }))
}

pub(super) fn lower_rms_norm(graph: &Graph, node: &Node, eps: f32) -> Lowered {
    let (r, d) = matrix(graph, node, 0);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        rms_norm::<T, f32>(a.operand(0, r * d), a.operand(1, d), eps, a.result(0, r * d), a.result(1, r));
    }))
}

pub(super) fn lower_rms_norm_grad(graph: &Graph, node: &Node) -> Lowered {
    let (r, d) = matrix(graph, node, 0);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(4 * rms_norm_grad_workspace(r, d), move |a| {
        let (x, gamma, rstd, dy) = (a.operand::<T>(0, r * d), a.operand::<f32>(1, d), a.operand(2, r), a.operand(3, r * d));
        rms_norm_grad(x, gamma, rstd, dy, a.result(0, r * d), a.result::<f32>(1, d), a.scratch());
    }))
}
