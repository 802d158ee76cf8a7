//! Norms, attention and the dense feed-forward.

use moebius_ir::{Graph, Result, TensorType, Value};

use super::parameters::{Parameters, dtype};
use crate::config::{Activation, Norm};

/// Layer norm or RMS norm over the last axis.
pub(super) fn norm(g: &mut Graph, p: &mut Parameters<'_>, name: &str, x: Value) -> Result<Value> {
    g.scoped(name.rsplit('.').next().unwrap_or(name).to_owned(), |g| {
        let weight = p.master(g, &format!("{name}.weight"))?;
        let eps = p.config().norm_eps as f32;
        match p.config().norm {
            Norm::Layer => {
                let bias = p.master(g, &format!("{name}.bias"))?;
                g.layer_norm(x, weight, bias, eps)
            }
            Norm::Rms => g.rms_norm(x, weight, eps),
        }
    })
}

/// `x · weight + bias` over the last axis.
fn linear(g: &mut Graph, p: &mut Parameters<'_>, name: &str, x: Value) -> Result<Value> {
    let weight = p.get(g, &format!("{name}.weight"))?;
    let bias = p.get(g, &format!("{name}.bias"))?;
    g.matmul_with(x, weight, Some(bias), false, false)
}

fn scale(p: &Parameters<'_>) -> f32 {
    1.0 / (p.config().head_width() as f32).sqrt()
}

/// Causal attention over whole sequences, `[B, S, width]`.
pub(super) fn attention(g: &mut Graph, p: &mut Parameters<'_>, layer: usize, x: Value) -> Result<Value> {
    let c = p.config();
    let qkv = linear(g, p, &format!("layers.{layer}.attention.qkv"), x)?;
    let out = g.attention(qkv, c.heads, c.kv_heads(), true, scale(p))?;
    linear(g, p, &format!("layers.{layer}.attention.out"), out)
}

/// Attention of the newest tokens `[1, T, width]` to themselves and everything in the layer's key/value cache.
pub(super) fn attention_cached(
    g: &mut Graph,
    p: &mut Parameters<'_>,
    layer: usize,
    x: Value,
    start: Value,
) -> Result<Value> {
    let c = p.config();
    let kv = c.kv_heads() * c.head_width();
    let qkv = linear(g, p, &format!("layers.{layer}.attention.qkv"), x)?;
    let cache = TensorType::new(dtype(c), [1, c.sequence, kv]);
    let k = g.state(format!("cache.k/{layer}"), cache.clone())?;
    let v = g.state(format!("cache.v/{layer}"), cache)?;
    let [out, new_k, new_v] = g.attention_cached(qkv, k, v, start, c.heads, c.kv_heads(), scale(p))?;
    g.update(k, new_k)?;
    g.update(v, new_v)?;
    linear(g, p, &format!("layers.{layer}.attention.out"), out)
}

/// The nonlinearity between the two linear layers.
pub(super) fn activation(g: &mut Graph, p: &Parameters<'_>, x: Value) -> Result<Value> {
    match p.config().activation {
        Activation::GeluTanh => g.gelu(x),
    }
}

/// Linear, nonlinearity, linear.
pub(super) fn feed_forward(g: &mut Graph, p: &mut Parameters<'_>, name: &str, x: Value) -> Result<Value> {
    let h = linear(g, p, &format!("{name}.up"), x)?;
    let h = activation(g, p, h)?;
    linear(g, p, &format!("{name}.down"), h)
}
