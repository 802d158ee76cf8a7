//! GPT with sparse experts (PR-MoE), written in the IR: one builder for the training step, the evaluation and the decoding
//! step, so that the three cannot differ.
//!
//! After section 2.5 of the DeepSpeed-MoE specification: pre-norm blocks, learned positions, tied output embedding,
//! tanh-GELU. `layers` holds attention and the dense feed-forward, `moe` the sparse one with its `router`, `outputs` what is told
//! of routers and routes, `init` the start values, `greedy` the decoding step that chooses the next token itself.

mod distillation;
mod greedy;
mod init;
mod layers;
mod moe;
mod outputs;
mod parameters;
pub mod router;

pub use distillation::{
    Distillation, Distilling, KEPT_IDS, KEPT_LOG_P, KEPT_LOG_TAIL, Lesson, TEACHER_HIDDEN, distillation,
    teacher_hidden, teacher_logits,
};
pub use greedy::{CHOSEN, NEXT_POSITION, NEXT_TOKEN, greedy};
pub use init::{Start, initialise};
pub use moe::{MoeStatistics, Pass, moe_layer};
pub use outputs::{
    Routes, choices_feed, coefficient_output, dropped_output, entropy_output, expert_index_output, idle_state,
    load_output, score_output, z_output,
};
pub use parameters::{Parameter, Parameters, of_teacher};

use moebius::MicroBatches;
use moebius_ir::{DType, Graph, Result, TensorType, Value};

use crate::config::ModelConfig;
use outputs::StepStatistics;

/// What a pass through the blocks knows beside the rows.
#[derive(Clone, Copy)]
struct Mode {
    /// Whether capacity and noise are those of training.
    training: bool,
    /// Key of the router's noise.
    noise: Option<Value>,
    /// Token ids, i32 `[B, S]`.
    ids: Value,
    /// What is done with routes.
    routes: Routes,
}

/// A graph with the value that training minimises.
pub struct Training {
    /// Feeds `tokens` and `targets`, both i32 `[batch, sequence]`, and [`NOISE_KEY`] if the router is noisy; outputs as
    /// [`training`] says.
    pub graph: Graph,
    /// The total loss, f32 scalar.
    pub loss: Value,
    /// The residual stream before each block, `[batch, sequence, width]`: between which the backward pass may recompute.
    pub borders: Vec<Value>,
    /// What the graph knows of the other micro-batches of its step, if there are any.
    pub micro_batches: Option<MicroBatches>,
}

/// Name of the feed with the key of a step's random numbers, u32 `[2]`, in training graphs of a model whose router is noisy
/// ([`is_noisy`]).
pub const NOISE_KEY: &str = "noise_key";

/// Whether a training step of this model draws random numbers.
pub fn is_noisy(config: &ModelConfig) -> bool {
    config.routing().is_noisy() && config.experts_per_layer().iter().any(|&e| e > 0)
}

/// Why there is no decoding graph.
#[derive(Debug, thiserror::Error)]
pub enum DecodingError {
    /// Experts chose among all tokens of a batch in training.
    #[error(
        "cannot generate: in training the experts chose their tokens, so whether a token met an expert depended on tokens \
         after it, which are not known now (model.router.allow_expert_choice_decoding=true generates nevertheless)"
    )]
    FutureTokens,
    /// An op was refused.
    #[error(transparent)]
    Graph(#[from] moebius_ir::Error),
}

/// The forward graph of training on `batch` sequences.
///
/// Outputs: `lm_loss` (mean cross entropy in nats), `aux_loss` (coefficients times the sum over layers of the balance and z
/// losses), and for each MoE layer its health: [`load_output`], [`dropped_output`], [`entropy_output`], [`z_output`],
/// [`coefficient_output`]. The total loss is their sum; [`moebius::training_step`] names it `loss`. A selection bias moves by the
/// counts of the step, and [`idle_state`] counts the steps that an expert was without a token.
///
/// Where experts choose their tokens, they look at whole sequences: the loss of such a model is not that of a causal one.
///
/// # Errors
/// Those of the ops, for a configuration that was not validated.
pub fn training(config: &ModelConfig, batch: usize) -> moebius::Result<Training> {
    training_with(config, batch, Routes::default())
}

/// [`training`] in steps of `count` micro-batches of `batch` sequences each. The outputs after the last one are those of the step:
/// loads and drops are sums, all others means, and a selection bias moves by the counts of them all.
///
/// # Errors
/// As [`training`].
pub fn training_accumulated(config: &ModelConfig, batch: usize, count: usize) -> moebius::Result<Training> {
    let mut graph = Graph::new();
    let micro_batches = MicroBatches::new(&mut graph, count)?;
    build_training(graph, micro_batches, config, batch, Routes::default(), None)
}

/// [`training_accumulated`] of a student: the loss is `lm_weight` times the cross entropy, the auxiliary losses, and the distillation
/// term, which is the output `kd_loss`, as weighted in the loss. A whole teacher reads the same tokens in evaluation mode, its
/// tensors are states named by [`of_teacher`]; of a cached one there are the feeds [`KEPT_IDS`], [`KEPT_LOG_P`] and
/// [`KEPT_LOG_TAIL`].
///
/// # Errors
/// As [`training`], for a teacher of another vocabulary or with a shorter sequence too.
pub fn distilling(
    config: &ModelConfig,
    batch: usize,
    count: usize,
    lesson: &Distilling<'_>,
) -> moebius::Result<Training> {
    let mut graph = Graph::new();
    let micro_batches = MicroBatches::new(&mut graph, count)?;
    build_training(graph, micro_batches, config, batch, Routes::default(), Some(lesson))
}

/// [`training`] whose routes are recorded or given. The routes of all tokens are in the order of the tokens.
///
/// # Errors
/// As [`training`]; there are no given routes for a router in which experts choose.
pub fn training_with(config: &ModelConfig, batch: usize, routes: Routes) -> moebius::Result<Training> {
    build_training(Graph::new(), None, config, batch, routes, None)
}

fn build_training(
    mut graph: Graph,
    mut micro_batches: Option<MicroBatches>,
    config: &ModelConfig,
    batch: usize,
    routes: Routes,
    lesson: Option<&Distilling<'_>>,
) -> moebius::Result<Training> {
    let g = &mut graph;
    let ids = TensorType::i32([batch, config.sequence]);
    let tokens = g.feed("tokens", ids.clone())?;
    let targets = g.feed("targets", ids)?;
    let mut p = Parameters::new(config);
    let x = embed_sequence(g, &mut p, tokens)?;
    let noise = if is_noisy(config) { Some(g.feed(NOISE_KEY, TensorType::new(DType::U32, [2]))?) } else { None };
    let mode = Mode { training: true, noise, ids: tokens, routes };
    let Blocks { x, statistics, borders } =
        blocks(g, &mut p, x, mode, &mut |g, p, layer, x| layers::attention(g, p, layer, x))?;
    let (loss, kd_loss) = match lesson {
        None => (token_losses(g, &mut p, x, targets)?, None),
        Some(lesson) => {
            let [loss, kd] = distillation::student_losses(g, &mut p, x, tokens, targets, lesson)?;
            let kd = g.mean_all(kd)?;
            (loss, Some(g.mul_scalar(kd, lesson.options.beta)?))
        }
    };
    let lm_loss = g.mean_all(loss)?;
    let mut aux_loss = g.scalar(0.0)?;
    for (layer, s) in &statistics {
        let balance = g.mul_scalar(s.load_balancing_loss, config.aux_coef)?;
        let z = g.mul_scalar(s.z_loss, config.z_coef)?;
        let both = g.add(balance, z)?;
        aux_loss = g.add(aux_loss, both)?;
        let of_step = StepStatistics::of(g, *layer, s, &mut micro_batches)?;
        outputs::health(g, *layer, &of_step)?;
        if let Some(bias) = s.selection_bias {
            let moved = router::moved_bias(g, bias, of_step.counts, config.routing().bias_rate)?;
            g.update(bias, moved)?;
        }
    }
    routes.outputs(g, &statistics)?;
    let weighted = match lesson {
        Some(lesson) if lesson.lm_weight != 1.0 => g.mul_scalar(lm_loss, lesson.lm_weight)?,
        Some(_) | None => lm_loss,
    };
    let mut loss = g.add(weighted, aux_loss)?;
    if let Some(kd_loss) = kd_loss {
        loss = g.add(loss, kd_loss)?;
    }
    let losses = [("lm_loss", Some(lm_loss)), ("aux_loss", Some(aux_loss)), ("kd_loss", kd_loss)];
    for (name, value) in losses.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        let of_step = outputs::mean(g, &mut micro_batches, name, value)?;
        g.output(name, of_step)?;
    }
    Ok(Training { graph, loss, borders, micro_batches })
}

/// The graph of an evaluation of `batch` sequences: feeds `tokens` and `targets`, output `loss`, the cross entropy of every
/// token in nats, f32 `[batch * sequence]` (0 where the target is negative).
///
/// # Errors
/// As [`training`].
pub fn evaluation(config: &ModelConfig, batch: usize) -> Result<Graph> {
    evaluation_with(config, batch, Routes::default())
}

/// [`evaluation`] whose routes are recorded or given. The routes of all tokens are in the order of the tokens.
///
/// # Errors
/// As [`training_with`].
pub fn evaluation_with(config: &ModelConfig, batch: usize, routes: Routes) -> Result<Graph> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let ids = TensorType::i32([batch, config.sequence]);
    let tokens = g.feed("tokens", ids.clone())?;
    let targets = g.feed("targets", ids)?;
    let mut p = Parameters::new(config);
    let x = embed_sequence(g, &mut p, tokens)?;
    let mode = Mode { training: false, noise: None, ids: tokens, routes };
    let Blocks { x, statistics, .. } =
        blocks(g, &mut p, x, mode, &mut |g, p, layer, x| layers::attention(g, p, layer, x))?;
    let loss = token_losses(g, &mut p, x, targets)?;
    g.output("loss", loss)?;
    routes.outputs(g, &statistics)?;
    Ok(graph)
}

/// The graph that takes `tokens` further tokens of one text: feeds `tokens` (i32 `[1, tokens]`), `positions` (i32
/// `[tokens]`) and `start` (i32 scalar, how many tokens the cache holds); output `logits`, f32 `[vocab]`, after the last.
/// Keys and values live in the states `cache.k/N` and `cache.v/N`, `[1, sequence, kv_heads * head]`.
///
/// # Errors
/// [`DecodingError::FutureTokens`] for a router in which experts choose tokens, unless the configuration allows it;
/// otherwise as [`training`].
pub fn decoding(config: &ModelConfig, tokens: usize) -> Result<Graph, DecodingError> {
    decoding_with(config, tokens, Routes::default())
}

/// [`decoding`] whose routes are recorded or given.
///
/// # Errors
/// As [`decoding`] and [`training_with`].
pub fn decoding_with(config: &ModelConfig, tokens: usize, routes: Routes) -> Result<Graph, DecodingError> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let ids = g.feed("tokens", TensorType::i32([1, tokens]))?;
    let positions = g.feed("positions", TensorType::i32([tokens]))?;
    let start = g.feed("start", TensorType::i32([]))?;
    let (logits, statistics) = decoded(g, config, Step { ids, positions, start }, routes)?;
    g.output("logits", logits)?;
    routes.outputs(g, &statistics)?;
    Ok(graph)
}

/// What a decoding step takes.
struct Step {
    /// Further tokens, i32 `[1, tokens]`.
    ids: Value,
    /// Their positions, i32 `[tokens]`.
    positions: Value,
    /// How many tokens the cache holds, i32 scalar.
    start: Value,
}

/// The logits after the last token of a step, f32 `[vocab]`, and the statistics of its MoE layers.
fn decoded(
    g: &mut Graph,
    config: &ModelConfig,
    step: Step,
    routes: Routes,
) -> Result<(Value, Vec<(usize, MoeStatistics)>), DecodingError> {
    let routing = config.routing();
    if routing.expert_choice && !routing.allow_expert_choice_decoding {
        return Err(DecodingError::FutureTokens);
    }
    let Step { ids, positions, start } = step;
    let tokens = g.ty(ids).elements();
    let mut p = Parameters::new(config);
    let x = g.scoped("embedding", |g| {
        let (token, position) = (p.get(g, "embedding.weight")?, p.get(g, "position.weight")?);
        let (token, position) = (g.embedding(token, ids)?, g.embedding(position, positions)?);
        g.add(token, position)
    })?;
    let mode = Mode { training: false, noise: None, ids, routes };
    let Blocks { x, statistics, .. } =
        blocks(g, &mut p, x, mode, &mut |g, p, layer, x| layers::attention_cached(g, p, layer, x, start))?;
    let width = config.width;
    let x = g.reshape(x, [tokens, width])?;
    let last = g.slice(x, 0, tokens - 1, 1)?;
    let w = p.output(g)?;
    let logits = g.matmul_with(last, w, None, false, true)?;
    let logits = g.cast(logits, DType::F32)?;
    Ok((g.reshape(logits, [config.vocab])?, statistics))
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

impl Mode {
    fn pass(&self, g: &mut Graph, config: &ModelConfig, layer: usize) -> Result<Pass> {
        let noise = self.noise.map(|key| router::RouterNoise::drawn(key, layer)).unwrap_or_default();
        let tokens = g.ty(self.ids).elements();
        let choices = self.routes.feed(g, config, layer, tokens)?;
        Ok(Pass { training: self.training, noise, used: None, ids: Some(self.ids), choices })
    }
}

type Attention<'f> = dyn FnMut(&mut Graph, &mut Parameters<'_>, usize, Value) -> Result<Value> + 'f;

/// What comes out of the blocks.
struct Blocks {
    /// After the final norm.
    x: Value,
    /// Of the MoE layers.
    statistics: Vec<(usize, MoeStatistics)>,
    /// The residual stream before each block.
    borders: Vec<Value>,
}

/// All blocks and the final norm; `attention` is given the layer and the normalised input.
fn blocks(
    g: &mut Graph,
    p: &mut Parameters<'_>,
    mut x: Value,
    mode: Mode,
    attention: &mut Attention<'_>,
) -> Result<Blocks> {
    let (mut statistics, mut borders) = (Vec::new(), Vec::new());
    for (layer, experts) in p.config().experts_per_layer().into_iter().enumerate() {
        borders.push(x);
        x = g.scoped(format!("layers.{layer}"), |g| {
            let h = layers::norm(g, p, &format!("layers.{layer}.attention_norm"), x)?;
            let h = g.scoped("attention", |g| attention(g, p, layer, h))?;
            let x = g.add(x, h)?;
            let h = layers::norm(g, p, &format!("layers.{layer}.ffn_norm"), x)?;
            let h = if experts == 0 {
                g.scoped("ffn", |g| layers::feed_forward(g, p, &format!("layers.{layer}.ffn"), h))?
            } else {
                let pass = mode.pass(g, p.config(), layer)?;
                let (h, s) = g.scoped("moe", |g| moe_layer(g, p, layer, experts, h, &pass))?;
                statistics.push((layer, s));
                h
            };
            g.add(x, h)
        })?;
    }
    let x = layers::norm(g, p, "norm", x)?;
    Ok(Blocks { x, statistics, borders })
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
