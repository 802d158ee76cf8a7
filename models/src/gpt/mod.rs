//! GPT with sparse experts (PR-MoE), written in the IR: one builder for the training step, the evaluation and the decoding
//! step, so that the three cannot differ.
//!
//! After section 2.5 of the DeepSpeed-MoE specification: pre-norm blocks, learned positions, tied output embedding,
//! tanh-GELU. `layers` holds attention and the dense feed-forward, `moe` the sparse one, `init` the start values.

mod distillation;
mod init;
mod layers;
mod moe;
mod parameters;

pub use distillation::{Distillation, distillation};
pub use init::{Start, initialise};
pub use parameters::{Parameter, Parameters};

use moebius_ir::{DType, Graph, Result, TensorType, Value};

use crate::config::ModelConfig;

/// What is known of one MoE layer after its forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MoeStatistics {
    /// Load-balancing loss, f32 scalar.
    load_balancing_loss: Value,
    /// Router z-loss, f32 scalar.
    z_loss: Value,
    /// Choices per expert before dropping, i32 `[E]`.
    counts: Value,
    /// Choices that found no slot, i32 scalar.
    dropped: Value,
}

/// Which capacity factor applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Train,
    Evaluate,
}

/// A graph with the value that training minimises.
pub struct Training {
    /// Feeds `tokens` and `targets`, both i32 `[batch, sequence]`; outputs as [`training`] says.
    pub graph: Graph,
    /// The total loss, f32 scalar.
    pub loss: Value,
}

/// Name of the output with the load of the MoE layer at this index (0-based, over all layers).
pub fn load_output(layer: usize) -> String {
    format!("load/{layer}")
}

/// Name of the output with the number of dropped choices of the MoE layer at this index.
pub fn dropped_output(layer: usize) -> String {
    format!("dropped/{layer}")
}

/// The forward graph of training on `batch` sequences.
///
/// Outputs: `lm_loss` (mean cross entropy in nats), `aux_loss` (coefficients times the sum over layers of the balance and z
/// losses), and for each MoE layer `load/N` (i32 `[E]`, choices per expert before dropping) and `dropped/N` (i32 scalar).
/// The total loss is their sum; [`moebius::training_step`] names it `loss`.
///
/// # Errors
/// Those of the ops, for a configuration that was not validated.
pub fn training(config: &ModelConfig, batch: usize) -> Result<Training> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let ids = TensorType::i32([batch, config.sequence]);
    let tokens = g.feed("tokens", ids.clone())?;
    let targets = g.feed("targets", ids)?;
    let mut p = Parameters::new(config);
    let x = embed_sequence(g, &mut p, tokens)?;
    let (x, statistics) = blocks(g, &mut p, x, Mode::Train, &mut |g, p, layer, x| layers::attention(g, p, layer, x))?;
    let loss = token_losses(g, &mut p, x, targets)?;
    let lm_loss = g.mean_all(loss)?;
    g.output("lm_loss", lm_loss)?;
    let mut aux_loss = g.scalar(0.0)?;
    for (layer, s) in &statistics {
        let balance = g.mul_scalar(s.load_balancing_loss, config.aux_coef)?;
        let z = g.mul_scalar(s.z_loss, config.z_coef)?;
        let both = g.add(balance, z)?;
        aux_loss = g.add(aux_loss, both)?;
        g.output(load_output(*layer), s.counts)?;
        g.output(dropped_output(*layer), s.dropped)?;
    }
    g.output("aux_loss", aux_loss)?;
    let loss = g.add(lm_loss, aux_loss)?;
    Ok(Training { graph, loss })
}

/// The graph of an evaluation of `batch` sequences: feeds `tokens` and `targets`, output `loss`, the cross entropy of every
/// token in nats, f32 `[batch * sequence]` (0 where the target is negative).
///
/// # Errors
/// As [`training`].
pub fn evaluation(config: &ModelConfig, batch: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let ids = TensorType::i32([batch, config.sequence]);
    let tokens = g.feed("tokens", ids.clone())?;
    let targets = g.feed("targets", ids)?;
    let mut p = Parameters::new(config);
    let x = embed_sequence(g, &mut p, tokens)?;
    let (x, _) = blocks(g, &mut p, x, Mode::Evaluate, &mut |g, p, layer, x| layers::attention(g, p, layer, x))?;
    let loss = token_losses(g, &mut p, x, targets)?;
    g.output("loss", loss)?;
    Ok(graph)
}

/// The graph that takes `tokens` further tokens of one text: feeds `tokens` (i32 `[1, tokens]`), `positions` (i32
/// `[tokens]`) and `start` (i32 scalar, how many tokens the cache holds); output `logits`, f32 `[vocab]`, after the last.
/// Keys and values live in the states `cache.k/N` and `cache.v/N`, `[1, sequence, kv_heads * head]`.
///
/// # Errors
/// As [`training`].
pub fn decoding(config: &ModelConfig, tokens: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let ids = g.feed("tokens", TensorType::i32([1, tokens]))?;
    let positions = g.feed("positions", TensorType::i32([tokens]))?;
    let start = g.feed("start", TensorType::i32([]))?;
    let mut p = Parameters::new(config);
    let x = g.scoped("embedding", |g| {
        let (token, position) = (p.get(g, "embedding.weight")?, p.get(g, "position.weight")?);
        let (token, position) = (g.embedding(token, ids)?, g.embedding(position, positions)?);
        g.add(token, position)
    })?;
    let (x, _) =
        blocks(g, &mut p, x, Mode::Evaluate, &mut |g, p, layer, x| layers::attention_cached(g, p, layer, x, start))?;
    let width = config.width;
    let x = g.reshape(x, [tokens, width])?;
    let last = g.slice(x, 0, tokens - 1, 1)?;
    let w = p.output(g)?;
    let logits = g.matmul_with(last, w, None, false, true)?;
    let logits = g.cast(logits, DType::F32)?;
    let logits = g.reshape(logits, [config.vocab])?;
    g.output("logits", logits)?;
    Ok(graph)
}

/// Token and position embeddings of whole sequences, `[B, S, width]`.
fn embed_sequence(g: &mut Graph, p: &mut Parameters<'_>, tokens: Value) -> Result<Value> {
    g.scoped("embedding", |g| {
        let table = p.get(g, "embedding.weight")?;
        let position = p.get(g, "position.weight")?;
        let x = g.embedding(table, tokens)?;
        g.add(x, position)
    })
}

type Attention<'f> = dyn FnMut(&mut Graph, &mut Parameters<'_>, usize, Value) -> Result<Value> + 'f;

/// All blocks and the final norm; `attention` is given the layer and the normalised input.
fn blocks(
    g: &mut Graph,
    p: &mut Parameters<'_>,
    mut x: Value,
    mode: Mode,
    attention: &mut Attention<'_>,
) -> Result<(Value, Vec<(usize, MoeStatistics)>)> {
    let mut statistics = Vec::new();
    for (layer, experts) in p.config().experts_per_layer().into_iter().enumerate() {
        x = g.scoped(format!("layers.{layer}"), |g| {
            let h = layers::norm(g, p, &format!("layers.{layer}.attention_norm"), x)?;
            let h = g.scoped("attention", |g| attention(g, p, layer, h))?;
            let x = g.add(x, h)?;
            let h = layers::norm(g, p, &format!("layers.{layer}.ffn_norm"), x)?;
            let h = if experts == 0 {
                g.scoped("ffn", |g| layers::feed_forward(g, p, &format!("layers.{layer}.ffn"), h))?
            } else {
                let (h, s) = g.scoped("moe", |g| moe::moe(g, p, layer, experts, h, mode))?;
                statistics.push((layer, s));
                h
            };
            g.add(x, h)
        })?;
    }
    let x = layers::norm(g, p, "norm", x)?;
    Ok((x, statistics))
}

/// Cross entropy of every token against the tied embedding, f32 `[B * S]`.
fn token_losses(g: &mut Graph, p: &mut Parameters<'_>, x: Value, targets: Value) -> Result<Value> {
    g.scoped("loss", |g| {
        let tokens = g.ty(targets).elements();
        let width = p.config().width;
        let x = g.reshape(x, [tokens, width])?;
        let targets = g.reshape(targets, [tokens])?;
        let w = p.output(g)?;
        g.linear_cross_entropy(x, w, targets)
    })
}
