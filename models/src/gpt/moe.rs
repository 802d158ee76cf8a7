//! The sparse feed-forward: routed experts and, beside them, the residual network of PR-MoE (spec 2.1) or a shared expert.

use moebius_ir::ops::ReduceFn;
use moebius_ir::{DType, Graph, Result, TensorType, Value};

use super::layers;
use super::parameters::{Parameters, selection_bias};
use super::router::{self, GateInputs, RouterNoise};
use crate::config::{ApplyTo, Side};

/// What one pass through an MoE layer knows beside the tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Whether the capacity is that of training.
    pub training: bool,
    /// Random numbers of the router.
    pub noise: RouterNoise,
    /// bool `[N]`, false for tokens that route nowhere.
    pub used: Option<Value>,
    /// i32 `[B, S]`, the token ids, which a layer that routes by id needs.
    pub ids: Option<Value>,
    /// i32 `[N,k]`: the experts of each token, instead of any choice; -1 for none.
    pub choices: Option<Value>,
}

/// What is known of one MoE layer after its forward pass.
#[derive(Clone, Copy, Debug)]
pub struct MoeStatistics {
    /// Load-balancing loss, f32 scalar.
    pub load_balancing_loss: Value,
    /// Router z-loss, f32 scalar.
    pub z_loss: Value,
    /// Choices per expert before dropping, i32 `[E]`.
    pub counts: Value,
    /// Choices that found no slot, i32 scalar.
    pub dropped: Value,
    /// The experts of each token before dropping, i32 `[N,k]`, -1 for none.
    pub expert_index: Value,
    /// Their score values, f32 `[N,k]`: the gates before they are normalised and scaled.
    pub score: Value,
    /// Mean entropy of the router's probabilities, nats per token, f32 scalar.
    pub entropy: Value,
    /// Mean over the tokens of the two coefficients, of experts and side branch, f32 `[2]`, where the router learns them.
    pub coefficient: Option<Value>,
    /// The layer's selection bias, f32 `[E]`, if it has one.
    pub selection_bias: Option<Value>,
}

/// `y = c0 * sum_j w_j E_j(a_j x) + c1 * S(x)` with the router's `w` and `a` and the coefficients of the side branch `S`; for
/// PR-MoE `c = softmax(x Wc + bc)`.
///
/// `x` is `[B, S, width]`; so is the result. `layer` is its index over all layers, from 0.
///
/// # Errors
/// Those of the ops, for a configuration that was not validated.
pub fn moe_layer(
    g: &mut Graph,
    p: &mut Parameters<'_>,
    layer: usize,
    experts: usize,
    x: Value,
    pass: &Pass,
) -> Result<(Value, MoeStatistics)> {
    let c = p.config();
    let routing = c.routing();
    let at = |name: &str| format!("layers.{layer}.moe.{name}");
    let shape = g.ty(x).shape.clone();
    let tokens = shape.rows();
    let x = g.reshape(x, [tokens, c.width])?;

    let weight = p.master(g, &at("router.weight"))?;
    let bias = if routing.bias { Some(p.master(g, &at("router.bias"))?) } else { None };
    let x32 = g.cast(x, DType::F32)?;
    let x32 = router::jittered(g, &routing, x32, pass.noise.jitter)?;
    let logits = g.matmul_with(x32, weight, bias, false, true)?;
    let choices = match (pass.choices, pass.ids) {
        (Some(given), _) => Some(given),
        (None, Some(ids)) if c.routes_by_id(layer) => {
            let table = router::experts_by_id(c.vocab, experts, c.top_k(), layer);
            let table = g.constant(TensorType::f32([c.vocab, c.top_k()]), table)?;
            let chosen = g.embedding(table, ids)?;
            let chosen = g.reshape(chosen, [tokens, c.top_k()])?;
            Some(g.cast(chosen, DType::I32)?)
        }
        (None, Some(_) | None) => None,
    };
    let has_bias = routing.selection_bias && !c.routes_by_id(layer);
    let stored = p.stored(&selection_bias(layer));
    let bias = if has_bias { Some(g.state(stored, TensorType::f32([experts]))?) } else { None };
    let inputs = GateInputs { noise: pass.noise, used: pass.used, selection_bias: bias, choices };
    let capacity = router::capacity(c, pass.training, tokens, experts);
    let gating = router::gate(g, &routing, c.top_k(), capacity, logits, &inputs)?;
    let (slot_choice, choice_slot, offsets) = (gating.slot_choice, gating.choice_slot, gating.offsets);
    let (of_input, of_output) = match routing.apply_to {
        ApplyTo::Output => (None, Some(gating.gate)),
        ApplyTo::Input => (Some(gating.gate), None),
    };

    // Before the experts: the rows of these and of the side then lack nothing that they are combined with.
    let coefficient = coefficient(g, p, layer, x, routing.side)?;
    let mean_coefficient = coefficient.map(|c| g.reduce(ReduceFn::Mean, c, &[0])).transpose()?;
    let rows = g.dispatch(x, slot_choice, choice_slot, of_input)?;
    let (up, up_bias) = (p.get(g, &at("experts.up.weight"))?, p.get(g, &at("experts.up.bias"))?);
    let (down, down_bias) = (p.get(g, &at("experts.down.weight"))?, p.get(g, &at("experts.down.bias"))?);
    let h = g.expert_matmul(rows, up, offsets, Some(up_bias), false)?;
    let h = layers::activation(g, p, h)?;
    let rows = g.expert_matmul(h, down, offsets, Some(down_bias), false)?;

    let side = match routing.side {
        Side::None => None,
        Side::Constant | Side::Sigmoid | Side::Softmax => {
            Some(g.scoped("mlp", |g| layers::feed_forward(g, p, &at("mlp"), x))?)
        }
    };
    let y = g.combine_with(rows, slot_choice, choice_slot, of_output, side, coefficient)?;
    let y = g.reshape(y, shape)?;
    let statistics = MoeStatistics {
        load_balancing_loss: gating.load_balancing_loss,
        z_loss: gating.z_loss,
        counts: gating.counts,
        dropped: gating.dropped,
        expert_index: gating.expert_index,
        score: gating.score,
        entropy: gating.entropy,
        coefficient: mean_coefficient,
        selection_bias: bias,
    };
    Ok((y, statistics))
}

/// The coefficients of experts and side branch, f32 `[N,2]`; `None` where both are 1.
fn coefficient(g: &mut Graph, p: &mut Parameters<'_>, layer: usize, x: Value, side: Side) -> Result<Option<Value>> {
    let at = |name: &str| format!("layers.{layer}.moe.coefficient.{name}");
    match side {
        Side::None | Side::Constant => Ok(None),
        Side::Sigmoid => {
            let weight = p.get(g, &at("weight"))?;
            let of_side = g.matmul_with(x, weight, None, false, true)?;
            let of_side = g.cast(of_side, DType::F32)?;
            let of_side = g.sigmoid(of_side)?;
            let tokens = g.shape(of_side)[0];
            let one = g.splat(TensorType::f32([tokens, 1]), 1.0)?;
            g.concat(&[one, of_side], 1).map(Some)
        }
        Side::Softmax => {
            let (weight, bias) = (p.get(g, &at("weight"))?, p.master(g, &at("bias"))?);
            let scores = g.matmul_with(x, weight, None, false, true)?;
            // From here on in f32: the bias' gradient is a sum over all tokens of which little is left, as experts and side
            // branch pull it to both sides, and the roundings of its terms would be most of it.
            let scores = g.cast(scores, DType::F32)?;
            let scores = g.add(scores, bias)?;
            g.softmax(scores).map(Some)
        }
    }
}
