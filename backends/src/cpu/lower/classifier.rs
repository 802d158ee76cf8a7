//! Launches of the losses of a linear classifier: cross entropy and distillation.

use moebius_ir::{Graph, Node};

use super::args::{Args, Launch, Rejected};
use super::{Lowered, by_float, shapes};
use crate::cpu::element::Element;
use crate::cpu::kernels::classifier::ClassifierShape;
use crate::cpu::kernels::linear_cross_entropy::{
    linear_cross_entropy, linear_cross_entropy_grad, linear_cross_entropy_grad_workspace,
    linear_cross_entropy_workspace,
};
use crate::cpu::kernels::linear_distillation::{
    OfRows, Results, Teacher, linear_distillation, linear_distillation_grad, linear_distillation_grad_workspace,
    linear_distillation_workspace,
};
use crate::cpu::kernels::linear_distillation_cached::{
    Kept, linear_distillation_cached, linear_distillation_cached_grad, linear_distillation_cached_grad_workspace,
    linear_distillation_cached_workspace,
};

fn rejected(e: impl std::fmt::Display) -> Rejected {
    Rejected { wanted: "targets and kept tokens within the vocabulary".into(), found: e.to_string() }
}

fn classifier(graph: &Graph, node: &Node) -> ClassifierShape {
    let [x, w] = shapes(graph, node);
    ClassifierShape { rows: x[0], width: x[1], vocabulary: w[0] }
}

/// Operands 0 to 2: x, w and the targets.
fn student<'a, T: Element>(shape: &ClassifierShape, a: &Args<'a>) -> ((&'a [T], &'a [T]), &'a [i32]) {
    let (x, w) = (a.operand(0, shape.rows * shape.width), a.operand(1, shape.vocabulary * shape.width));
    ((x, w), a.operand(2, shape.rows))
}

/// Results 0 and 1 of a gradient.
fn gradients<'a, T: Element>(shape: &ClassifierShape, a: &Args<'a>) -> (&'a mut [T], &'a mut [T]) {
    (a.result(0, shape.rows * shape.width), a.result(1, shape.vocabulary * shape.width))
}

pub(super) fn lower_linear_cross_entropy(graph: &Graph, node: &Node, threads: usize) -> Lowered {
    let shape = classifier(graph, node);
    let n = shape.rows;
    let scratch = 4 * linear_cross_entropy_workspace(&shape, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(scratch, move |a| {
        let ((x, w), targets) = student::<T>(&shape, a);
        linear_cross_entropy(&shape, x, w, targets, a.result(0, n), a.result(1, n), a.scratch()).map_err(rejected)
    }))
}

pub(super) fn lower_linear_cross_entropy_grad(graph: &Graph, node: &Node, threads: usize) -> Lowered {
    let shape = classifier(graph, node);
    let n = shape.rows;
    let scratch = 4 * linear_cross_entropy_grad_workspace(&shape, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(scratch, move |a| {
        let ((x, w), targets) = student::<T>(&shape, a);
        let (lse, dloss) = (a.operand(3, n), a.operand(4, n));
        let (dx, dw) = gradients::<T>(&shape, a);
        linear_cross_entropy_grad(&shape, x, w, targets, lse, dloss, dx, dw, a.scratch()).map_err(rejected)
    }))
}

fn results<'a>(n: usize, a: &Args<'a>) -> Results<'a> {
    let [loss, kd, lse, soft, other] = [0, 1, 2, 3, 4].map(|i| a.result(i, n));
    Results { loss, kd, lse, soft, other }
}

/// The numbers of each row, from operand `first` on.
fn of_rows<'a>(first: usize, n: usize, a: &Args<'a>) -> OfRows<'a> {
    let [lse, soft, other, dloss, dkd] = [0, 1, 2, 3, 4].map(|i| a.operand(first + i, n));
    OfRows { lse, soft, other, dloss, dkd }
}

/// Operands 3 and 4.
fn teacher<'a, T: Element>(
    shape: &ClassifierShape,
    (width, temperature): (usize, f32),
    a: &Args<'a>,
) -> Teacher<'a, T> {
    let (x, w) = (a.operand(3, shape.rows * width), a.operand(4, shape.vocabulary * width));
    Teacher { x, w, width, temperature }
}

pub(super) fn lower_linear_distillation(graph: &Graph, node: &Node, temperature: f32, threads: usize) -> Lowered {
    let shape = classifier(graph, node);
    let width = graph.shape(node.operands[3])[1];
    let scratch = 4 * linear_distillation_workspace(&shape, width, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(scratch, move |a| {
        let (own, targets) = student::<T>(&shape, a);
        let of = teacher(&shape, (width, temperature), a);
        linear_distillation(&shape, own, targets, of, results(shape.rows, a), a.scratch()).map_err(rejected)
    }))
}

pub(super) fn lower_linear_distillation_grad(graph: &Graph, node: &Node, temperature: f32, threads: usize) -> Lowered {
    let shape = classifier(graph, node);
    let width = graph.shape(node.operands[3])[1];
    let scratch = 4 * linear_distillation_grad_workspace(&shape, width, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(scratch, move |a| {
        let (own, targets) = student::<T>(&shape, a);
        let (of, rows) = (teacher(&shape, (width, temperature), a), of_rows(5, shape.rows, a));
        linear_distillation_grad(&shape, own, targets, of, rows, gradients::<T>(&shape, a), a.scratch())
            .map_err(rejected)
    }))
}

/// Operands 3 to 5.
fn kept<'a>(n: usize, (count, temperature): (usize, f32), a: &Args<'a>) -> Kept<'a> {
    let (ids, log_p, log_tail) = (a.operand(3, n * count), a.operand(4, n * count), a.operand(5, n));
    Kept { ids, log_p, log_tail, count, temperature }
}

pub(super) fn lower_linear_distillation_cached(
    graph: &Graph,
    node: &Node,
    temperature: f32,
    threads: usize,
) -> Lowered {
    let shape = classifier(graph, node);
    let count = graph.shape(node.operands[3])[1];
    let scratch = 4 * linear_distillation_cached_workspace(&shape, count, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(scratch, move |a| {
        let (own, targets) = student::<T>(&shape, a);
        let of = kept(shape.rows, (count, temperature), a);
        linear_distillation_cached(&shape, own, targets, of, results(shape.rows, a), a.scratch()).map_err(rejected)
    }))
}

pub(super) fn lower_linear_distillation_cached_grad(
    graph: &Graph,
    node: &Node,
    temperature: f32,
    threads: usize,
) -> Lowered {
    let shape = classifier(graph, node);
    let count = graph.shape(node.operands[3])[1];
    let scratch = 4 * linear_distillation_cached_grad_workspace(&shape, count, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(scratch, move |a| {
        let (own, targets) = student::<T>(&shape, a);
        let (of, rows) = (kept(shape.rows, (count, temperature), a), of_rows(6, shape.rows, a));
        linear_distillation_cached_grad(&shape, own, targets, of, rows, gradients::<T>(&shape, a), a.scratch())
            .map_err(rejected)
    }))
}
