//! The sparse feed-forward: standard MoE, and the residual MoE of PR-MoE (spec 2.1).

use moebius_ir::ops::{Balance, CompareFn, Order, ReduceFn};
use moebius_ir::{DType, Graph, Result, Value};

use super::layers;
use super::parameters::Parameters;
use super::{Mode, MoeStatistics};
use crate::config::{Mlp, ModelConfig, Renormalise, Router};

/// Slots per expert for `tokens` tokens, or `None` if nothing is dropped:
/// `max(ceil(f32(tokens / experts) * f32(k * factor)), min_capacity)`, the product in f32 as DeepSpeed has it (spec 1.1).
pub(super) fn capacity(config: &ModelConfig, mode: Mode, tokens: usize, experts: usize) -> Option<usize> {
    let factor = config.capacity_factor(mode == Mode::Train)?;
    let share = tokens as f64 / experts as f64;
    let slots = (share as f32) * ((config.top_k as f64 * factor) as f32);
    Some((slots.ceil() as usize).max(config.min_capacity))
}

/// `y = sum_j gate_j * expert_j(x)`, for the residual form `c0 * that + c1 * mlp(x)` with `c = softmax(x Wc + bc)`.
///
/// `x` is `[B, S, width]`; so is the result.
pub(super) fn moe(
    g: &mut Graph,
    p: &mut Parameters<'_>,
    layer: usize,
    experts: usize,
    x: Value,
    mode: Mode,
) -> Result<(Value, MoeStatistics)> {
    let c = p.config();
    let at = |name: &str| format!("layers.{layer}.moe.{name}");
    let shape = g.ty(x).shape.clone();
    let tokens = shape.rows();
    let x = g.reshape(x, [tokens, c.width])?;

    let (balance, order) = match c.router() {
        Router::Top1 | Router::TopK => (Balance::AllChoices, Order::TokenMajor),
        Router::Top2 => (Balance::FirstChoice, Order::ChoiceMajor),
    };
    let router = p.master(g, &at("router.weight"))?;
    let x32 = g.cast(x, DType::F32)?;
    let logits = g.matmul_with(x32, router, None, false, true)?;
    let [probability, expert_index, load_balancing_loss, z_loss, counts, _] = g.route(logits, c.top_k, balance)?;
    let capacity = capacity(c, mode, tokens, experts);
    // With a limit, top-k evicts the least probable members of an expert (DeepSpeed's 'probs'), the others the latest.
    let priority = (c.router() == Router::TopK && capacity.is_some()).then_some(probability);
    let [slot_choice, choice_slot, offsets, dropped] = g.assign(expert_index, priority, experts, capacity, order)?;
    let mut gate = if c.renormalise() == Renormalise::AfterDropping {
        renormalised(g, probability, choice_slot)?
    } else {
        probability
    };

    let rows = g.dispatch(x, slot_choice, choice_slot, None)?;
    let (up, up_bias) = (p.get(g, &at("experts.up.weight"))?, p.get(g, &at("experts.up.bias"))?);
    let (down, down_bias) = (p.get(g, &at("experts.down.weight"))?, p.get(g, &at("experts.down.bias"))?);
    let h = g.expert_matmul(rows, up, offsets, Some(up_bias), false)?;
    let h = layers::activation(g, p, h)?;
    let rows = g.expert_matmul(h, down, offsets, Some(down_bias), false)?;

    let y = match c.mlp {
        Mlp::Standard => g.combine(rows, slot_choice, choice_slot, Some(gate))?,
        Mlp::Residual => {
            let weight = p.get(g, &at("coefficient.weight"))?;
            let bias = p.get(g, &at("coefficient.bias"))?;
            let coefficient = g.matmul_with(x, weight, Some(bias), false, true)?;
            let coefficient = g.softmax(coefficient)?;
            // The first coefficient scales the gates, so that the sparse branch needs no pass of its own for it.
            let of_experts = g.slice(coefficient, 1, 0, 1)?;
            let of_experts = g.cast(of_experts, DType::F32)?;
            gate = g.mul(gate, of_experts)?;
            let sparse = g.combine(rows, slot_choice, choice_slot, Some(gate))?;
            let dense = g.scoped("mlp", |g| layers::feed_forward(g, p, &at("mlp"), x))?;
            let of_mlp = g.slice(coefficient, 1, 1, 1)?;
            let dense = g.mul(dense, of_mlp)?;
            g.add(sparse, dense)?
        }
    };
    let y = g.reshape(y, shape)?;
    Ok((y, MoeStatistics { load_balancing_loss, z_loss, counts, dropped }))
}

/// Gates of the choices that found a slot, divided by their sum over the token, at least the f32 epsilon (spec 1.4, 1.5).
fn renormalised(g: &mut Graph, probability: Value, choice_slot: Value) -> Result<Value> {
    let zero = g.splat(moebius_ir::TensorType::i32([]), 0.0)?;
    let kept = g.compare(CompareFn::Ge, choice_slot, zero)?;
    let kept = g.cast(kept, DType::F32)?;
    let gate = g.mul(probability, kept)?;
    let sum = g.reduce(ReduceFn::Sum, gate, &[1])?;
    let tokens = g.shape(sum)[0];
    let sum = g.reshape(sum, [tokens, 1])?;
    let least = g.scalar(f64::from(f32::EPSILON))?;
    let sum = g.maximum(sum, least)?;
    g.div(gate, sum)
}
