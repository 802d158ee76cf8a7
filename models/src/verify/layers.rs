//! Whole layers, built from ops by hand: a second way beside [`crate::gpt`], which they do not use.

use moebius_ir::ops::{Balance, Order, ReduceFn};
use moebius_ir::{DType, Result, Role, Shape, TensorType, Value};

use crate::verify::sketch::Sketch;

/// A layer of sparse experts.
#[derive(Clone, Copy, Debug)]
pub struct Moe {
    /// Columns of a token.
    pub width: usize,
    /// Columns between the two products of an expert.
    pub hidden: usize,
    /// Experts.
    pub experts: usize,
    /// Choices of a token.
    pub k: usize,
    /// Most slots of one expert.
    pub capacity: Option<usize>,
    /// The gates of a token are divided by their sum.
    pub renormalise: bool,
}

/// What a layer of sparse experts gives.
#[derive(Clone, Copy, Debug)]
pub struct MoeResult {
    /// `[N,D]`.
    pub y: Value,
    /// Scalar.
    pub load_balancing_loss: Value,
    /// Scalar.
    pub z_loss: Value,
    /// f32 `[N,E]`.
    pub logits: Value,
}

/// A differentiated parameter of the open dtype: normal numbers times `size`.
///
/// # Errors
/// If the name is taken.
pub fn parameter(s: &mut Sketch, name: &str, shape: impl Into<Shape>, size: f64) -> Result<Value> {
    parameter_as(s, name, TensorType::new(s.dtype, shape), size)
}

/// [`parameter`] of any type.
///
/// # Errors
/// If the name is taken.
pub fn parameter_as(s: &mut Sketch, name: &str, ty: TensorType, size: f64) -> Result<Value> {
    let data = s.normals(ty.elements()).into_iter().map(|x| size * x).collect();
    s.named(name, Role::Parameter, ty, data, true)
}

/// A norm, packed attention and the way back to the residual stream: `x [B,T,D] -> [B,T,D]`.
///
/// # Errors
/// If a name under `prefix` is taken.
pub fn attention_block(s: &mut Sketch, prefix: &str, x: Value, heads: usize, kv_heads: usize) -> Result<Value> {
    let d = s.graph.ty(x).shape.last();
    let columns = (heads + 2 * kv_heads) * d / heads;
    let size = 1.0 / (d as f64).sqrt();
    let f32 = |n: usize| TensorType::f32([n]);
    let gamma = parameter_as(s, &format!("{prefix}.norm.weight"), f32(d), 1.0)?;
    let beta = parameter_as(s, &format!("{prefix}.norm.bias"), f32(d), 0.1)?;
    let w = parameter(s, &format!("{prefix}.qkv"), [d, columns], size)?;
    let b = parameter_as(s, &format!("{prefix}.qkv.bias"), f32(columns), 0.1)?;
    let out = parameter(s, &format!("{prefix}.out"), [d, d], size)?;
    let g = &mut s.graph;
    let h = g.layer_norm(x, gamma, beta, 1e-5)?;
    let qkv = g.matmul_with(h, w, Some(b), false, false)?;
    let h = g.attention(qkv, heads, kv_heads, true, 1.0 / ((d / heads) as f32).sqrt())?;
    let h = g.matmul(h, out)?;
    g.add(x, h)
}

/// A dense feed-forward layer with GELU: `x [N,D] -> [N,D]`.
///
/// # Errors
/// If a name under `prefix` is taken.
pub fn dense_ffn(s: &mut Sketch, prefix: &str, x: Value, hidden: usize) -> Result<Value> {
    let d = s.graph.ty(x).shape.last();
    let w1 = parameter(s, &format!("{prefix}.w1"), [d, hidden], 1.0 / (d as f64).sqrt())?;
    let b1 = parameter(s, &format!("{prefix}.b1.bias"), [hidden], 0.1)?;
    let w2 = parameter(s, &format!("{prefix}.w2"), [hidden, d], 1.0 / (hidden as f64).sqrt())?;
    let b2 = parameter(s, &format!("{prefix}.b2.bias"), [d], 0.1)?;
    let g = &mut s.graph;
    let h = g.matmul_with(x, w1, Some(b1), false, false)?;
    let h = g.gelu(h)?;
    g.matmul_with(h, w2, Some(b2), false, false)
}

/// The sparse layer: route, assign, dispatch, two expert products, combine: `x [N,D]`.
///
/// # Errors
/// If a name under `prefix` is taken.
pub fn moe(s: &mut Sketch, prefix: &str, x: Value, layer: Moe) -> Result<MoeResult> {
    let Moe { width: d, hidden, experts: e, k, .. } = layer;
    let router = parameter_as(s, &format!("{prefix}.router"), TensorType::f32([d, e]), 2.0 / (d as f64).sqrt())?;
    let w1 = parameter(s, &format!("{prefix}.w1"), [e, d, hidden], 1.0 / (d as f64).sqrt())?;
    let b1 = parameter(s, &format!("{prefix}.b1.bias"), [e, hidden], 0.1)?;
    let w2 = parameter(s, &format!("{prefix}.w2"), [e, hidden, d], 1.0 / (hidden as f64).sqrt())?;
    let b2 = parameter(s, &format!("{prefix}.b2.bias"), [e, d], 0.1)?;
    let g = &mut s.graph;
    let wide = g.cast(x, DType::F32)?;
    let logits = g.matmul(wide, router)?;
    let [gate, index, load_balancing_loss, z_loss, ..] = g.route(logits, k, Balance::AllChoices)?;
    let gate = if layer.renormalise {
        let n = g.shape(gate)[0];
        let sum = g.reduce(ReduceFn::Sum, gate, &[1])?;
        let sum = g.reshape(sum, [n, 1])?;
        g.div(gate, sum)?
    } else {
        gate
    };
    let [slot_choice, choice_slot, offsets, _] = g.assign(index, None, e, layer.capacity, Order::ChoiceMajor)?;
    let rows = g.dispatch(x, slot_choice, choice_slot, None)?;
    let h = g.expert_matmul(rows, w1, offsets, Some(b1), false)?;
    let h = g.gelu(h)?;
    let rows = g.expert_matmul(h, w2, offsets, Some(b2), false)?;
    let y = g.combine(rows, slot_choice, choice_slot, Some(gate))?;
    Ok(MoeResult { y, load_balancing_loss, z_loss, logits })
}

/// The residual layer of PR-MoE: a dense MLP and one expert, weighted by a softmax of two learned scores. `coefficient`
/// replaces that softmax `[N,2]` where it is given.
///
/// # Errors
/// If a name under `prefix` is taken.
pub fn residual_moe(
    s: &mut Sketch,
    prefix: &str,
    x: Value,
    layer: Moe,
    coefficient: Option<Value>,
) -> Result<MoeResult> {
    let result = moe(s, &format!("{prefix}.moe"), x, layer)?;
    let dense = dense_ffn(s, &format!("{prefix}.dense"), x, layer.hidden)?;
    let scores = parameter(s, &format!("{prefix}.coefficient"), [layer.width, 2], 0.3)?;
    let g = &mut s.graph;
    let coefficient = match coefficient {
        Some(given) => given,
        None => {
            let scores = g.matmul(x, scores)?;
            g.softmax(scores)?
        }
    };
    let (of_moe, of_dense) = (g.slice(coefficient, 1, 0, 1)?, g.slice(coefficient, 1, 1, 1)?);
    let (sparse, dense) = (g.mul(result.y, of_moe)?, g.mul(dense, of_dense)?);
    Ok(MoeResult { y: g.add(sparse, dense)?, ..result })
}

/// A decoder of two blocks, the second sparse, with tied embedding and a cross-entropy loss. Feeds `tokens` and `targets`
/// i32 `[B,T]`. Returns the loss: the mean cross entropy plus small balance and z losses.
///
/// # Errors
/// None.
pub fn transformer(s: &mut Sketch, batch: usize, tokens: usize, vocabulary: usize, layer: Moe) -> Result<Value> {
    let d = layer.width;
    let n = batch * tokens;
    let ids = |offset: usize| (0..n).map(|i| ((i * 7 + offset * 3) % vocabulary) as f64).collect::<Vec<_>>();
    let text = s.named("tokens", Role::Feed, TensorType::i32([batch, tokens]), ids(0), false)?;
    let targets = s.named("targets", Role::Feed, TensorType::i32([n]), ids(1), false)?;
    let table = parameter(s, "embedding", [vocabulary, d], 0.5)?;
    let x = s.graph.scoped("embedding", |g| g.embedding(table, text))?;
    let x = attention_block(s, "0.attention", x, 2, 1)?;
    let flat = s.graph.reshape(x, [n, d])?;
    let h = dense_ffn(s, "0.ffn", flat, layer.hidden)?;
    let flat = s.graph.add(flat, h)?;
    let x = s.graph.reshape(flat, [batch, tokens, d])?;
    let x = attention_block(s, "1.attention", x, 2, 2)?;
    let flat = s.graph.reshape(x, [n, d])?;
    let result = residual_moe(s, "1.ffn", flat, layer, None)?;
    let gamma = parameter_as(s, "norm.weight", TensorType::f32([d]), 1.0)?;
    let g = &mut s.graph;
    let x = g.add(flat, result.y)?;
    let x = g.rms_norm(x, gamma, 1e-5)?;
    let losses = g.linear_cross_entropy(x, table, targets)?;
    let loss = g.mean_all(losses)?;
    let balance = g.mul_scalar(result.load_balancing_loss, 1e-2)?;
    let z = g.mul_scalar(result.z_loss, 1e-3)?;
    let loss = g.add(loss, balance)?;
    g.add(loss, z)
}
