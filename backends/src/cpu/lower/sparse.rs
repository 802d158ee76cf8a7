//! Launches of the sparse-expert ops that are not matrix products.

use moebius_ir::ops::{Balance, Combine, Order, Route, RouteGrad, Score};
use moebius_ir::{Graph, Node};

use super::args::Launch;
use super::{Lowered, by_float, shapes};
use crate::cpu::kernels::assign::{AssignOrder, assign, assign_workspace};
use crate::cpu::kernels::combine::{Side, combine};
use crate::cpu::kernels::dispatch::dispatch;
use crate::cpu::kernels::gate_grad::gate_grad;
use crate::cpu::kernels::route::{BalanceMask, route, route_grad, route_grad_workspace, route_workspace};
use crate::cpu::kernels::route_any::{
    Inputs, route_any, route_any_grad, route_any_grad_workspace, route_any_workspace,
};
use crate::cpu::kernels::segment_sum::segment_sum;

fn mask(balance: Balance) -> BalanceMask {
    match balance {
        Balance::FirstChoice => BalanceMask::FirstChoice,
        Balance::AllChoices => BalanceMask::TopK,
    }
}

pub(super) fn lower_route(graph: &Graph, node: &Node, op: &Route) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let (router, at, noise_use) = (op.router, op.operands(), op.noise);
    let (k, mask) = (router.k, mask(router.balance));
    let plain = router.score == Score::Softmax && router.groups.is_none() && at.count == 1;
    let scratch = if plain { route_workspace(n, e) } else { route_any_workspace(n, e) };
    Ok(Launch::new(4 * scratch, move |a| {
        let logits = a.operand(0, n * e);
        let (gate, index, counts) = (a.result(0, n * k), a.result(1, n * k), a.result(4, e));
        let losses = if plain {
            route(logits, n, e, k, mask, index, gate, counts, a.scratch())
        } else {
            let inputs = Inputs {
                logits,
                selection_bias: at.selection_bias.map(|i| a.operand(i, e)),
                noise: at.noise.map(|i| a.operand(i, n * e)).zip(noise_use),
                used: at.used.map(|i| a.operand(i, n)),
                choices: at.choices.map(|i| a.operand(i, n * k)),
            };
            route_any(&router, mask, inputs, n, e, index, gate, counts, a.scratch())
        };
        a.result::<f32>(2, 1)[0] = losses.load_balancing_loss;
        a.result::<f32>(3, 1)[0] = losses.z_loss;
        a.result::<f32>(5, 1)[0] = losses.entropy;
    }))
}

pub(super) fn lower_route_grad(graph: &Graph, node: &Node, op: &RouteGrad) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let (k, score, mask) = (op.k, op.score, mask(op.balance));
    let plain = score == Score::Softmax;
    let scratch = if plain { route_grad_workspace(e) } else { route_any_grad_workspace(n, e) };
    Ok(Launch::new(4 * scratch, move |a| {
        let (logits, index, d_gate) = (a.operand(0, n * e), a.operand(1, n * k), a.operand(2, n * k));
        let (d_balance, d_z) = (a.operand::<f32>(3, 1)[0], a.operand::<f32>(4, 1)[0]);
        let (d_logits, scratch) = (a.result(0, n * e), a.scratch());
        if plain {
            let (d_gate, d_balance, d_z) = (Some(d_gate), Some(d_balance), Some(d_z));
            route_grad(logits, index, n, e, k, mask, d_gate, d_balance, d_z, d_logits, scratch);
        } else {
            route_any_grad(score, mask, logits, index, n, e, k, d_gate, d_balance, d_z, d_logits, scratch);
        }
    }))
}

pub(super) fn lower_assign(
    graph: &Graph,
    node: &Node,
    experts: usize,
    capacity: Option<usize>,
    order: Order,
) -> Lowered {
    let (n, k) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let slots = graph.ty(node.results[0]).elements();
    let prioritised = node.operands.len() > 1;
    let order = match order {
        Order::TokenMajor => AssignOrder::TokenMajor,
        Order::ChoiceMajor => AssignOrder::ChoiceMajor,
    };
    Ok(Launch::new(4 * assign_workspace(n, k, experts, prioritised), move |a| {
        let (index, priority) = (a.operand(0, n * k), a.optional(1, n * k));
        let (slot_choice, choice_slot, offsets) = (a.result(0, slots), a.result(1, n * k), a.result(2, experts + 1));
        let dropped =
            assign(index, n, k, experts, order, priority, capacity, slot_choice, choice_slot, offsets, a.scratch());
        a.result::<i32>(3, 1)[0] = dropped;
    }))
}

pub(super) fn lower_dispatch(graph: &Graph, node: &Node) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (n, d, s, k) = (x[0], x[1], slot_choice[0], choice_slot[1]);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        dispatch::<T>(a.operand(0, n * d), a.operand(1, s), k, d, a.optional(3, n * k), a.result(0, s * d));
    }))
}

pub(super) fn lower_combine(graph: &Graph, node: &Node, op: Combine) -> Lowered {
    let [rows, slot_choice, choice_slot] = shapes(graph, node);
    let (d, s, n, k) = (rows[1], slot_choice[0], choice_slot[0], choice_slot[1]);
    let [gate, side, coefficient] = op.operands();
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        let gate = gate.map(|i| a.operand(i, n * k));
        let coefficient = coefficient.map(|i| a.operand(i, n * 2));
        let side = side.map(|i| Side { rows: a.operand(i, n * d), coefficient });
        combine::<T>(a.operand(0, s * d), a.operand(2, n * k), k, d, gate, side, a.result(0, n * d));
    }))
}

pub(super) fn lower_gate_grad(graph: &Graph, node: &Node) -> Lowered {
    let [rows, y, slot_choice, choice_slot] = shapes(graph, node);
    let (d, n, s, k) = (rows[1], y[0], slot_choice[0], choice_slot[1]);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        gate_grad::<T>(a.operand(0, s * d), a.operand(1, n * d), a.operand(3, n * k), k, d, a.result(0, n * k));
    }))
}

pub(super) fn lower_segment_sum(graph: &Graph, node: &Node) -> Lowered {
    let [rows, offsets] = shapes(graph, node);
    let (s, width, experts) = (rows[0], rows[1], offsets[0] - 1);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(0, move |a| {
        segment_sum::<T, T>(a.operand(0, s * width), a.operand(1, experts + 1), width, a.result(0, experts * width));
    }))
}
