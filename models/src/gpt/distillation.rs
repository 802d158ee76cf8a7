//! The distillation term of MoS: a student is drawn to the output distribution of a frozen teacher.
//!
//! Section 2.6 of the DeepSpeed-MoE specification (`calculate_mos_loss` of Megatron-DeepSpeed): with `p = softmax(logits / T)`
//! the term is `beta T^2 mean_n sum_v p_teacher (ln p_teacher - ln p_student)`, the forward KL divergence as a mean over all
//! tokens, no loss mask applied. [`distillation`] has it in plain ops, for logits; a training step takes it from the hidden states
//! and head weights of both, whose logits are never all there ([`super::distilling`]).

use moebius_ir::ops::ReduceFn;
use moebius_ir::{DType, Graph, Result, TensorType, Value};

use super::parameters::{Parameters, dtype};
use super::{Blocks, Mode, Routes, blocks, layers};
use crate::config::ModelConfig;

/// Feed with the tokens that are kept of the teacher for each token of the batch, i32 `[batch * sequence, K]`.
pub const KEPT_IDS: &str = "teacher.ids";
/// Feed with their log-probabilities, f16 `[batch * sequence, K]`.
pub const KEPT_LOG_P: &str = "teacher.log_p";
/// Feed with the logarithm of the probability of all others, f32 `[batch * sequence]`.
pub const KEPT_LOG_TAIL: &str = "teacher.log_tail";
/// State in which [`teacher_hidden`] leaves what [`teacher_logits`] reads: `[batch * sequence, width]` in the teacher's dtype.
pub const TEACHER_HIDDEN: &str = "teacher.hidden";

/// Where a student's lesson comes from.
#[derive(Debug, Clone, Copy)]
pub enum Lesson<'c> {
    /// From a whole teacher in the same graph.
    Live(&'c ModelConfig),
    /// From what is kept of one: so many tokens.
    Cached(usize),
}

/// How a student is taught.
#[derive(Debug, Clone, Copy)]
pub struct Distilling<'c> {
    /// By whom.
    pub lesson: Lesson<'c>,
    /// How strongly.
    pub options: Distillation,
    /// Weight of the cross entropy in the loss.
    pub lm_weight: f64,
}

/// How strongly and how softly a student follows its teacher.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distillation {
    /// T: both logits are divided by it.
    pub temperature: f64,
    /// Weight of the term in the loss.
    pub beta: f64,
}

impl Default for Distillation {
    /// Those of the released scripts: temperature 1 and weight 1.
    fn default() -> Self {
        Distillation { temperature: 1.0, beta: 1.0 }
    }
}

/// The distillation term, f32 scalar, of `student` and `teacher` logits of one shape `[.., V]`; computed in f32 whatever their
/// dtype. Its gradient of the student's logits is `beta T (p_student - p_teacher) / tokens`.
///
/// # Errors
/// [`moebius_ir::Error::Operands`] if the shapes differ or have no axis.
pub fn distillation(g: &mut Graph, student: Value, teacher: Value, options: Distillation) -> Result<Value> {
    let Distillation { temperature, beta } = options;
    let tokens = g.ty(student).shape.rows().max(1);
    let student = log_softmax(g, student, temperature)?;
    let teacher = log_softmax(g, teacher, temperature)?;
    let p = g.exp(teacher)?;
    // Logits are finite and below 2^31, so no probability is 0 times an infinite logarithm.
    let ratio = g.sub(teacher, student)?;
    let terms = g.mul(p, ratio)?;
    let sum = g.sum_all(terms)?;
    g.mul_scalar(sum, beta * temperature * temperature / tokens as f64)
}

/// `ln softmax(logits / T)` over the last axis in f32.
fn log_softmax(g: &mut Graph, logits: Value, temperature: f64) -> Result<Value> {
    let wide = g.cast(logits, DType::F32)?;
    let wide = g.mul_scalar(wide, 1.0 / temperature)?;
    let shape = g.ty(wide).shape.clone();
    let mut row = shape.to_vec();
    let last = row.len().saturating_sub(1);
    if let Some(extent) = row.last_mut() {
        *extent = 1;
    }
    // Any number near the largest will do. A whole one has no gradient, which would be the rounding errors of the whole row.
    let max = g.reduce(ReduceFn::Max, wide, &[last])?;
    let whole = g.cast(max, DType::I32)?;
    let near = g.cast(whole, DType::F32)?;
    let near = g.reshape(near, row.clone())?;
    let centred = g.sub(wide, near)?;
    let power = g.exp(centred)?;
    let sum = g.reduce(ReduceFn::Sum, power, &[last])?;
    let sum = g.reshape(sum, row)?;
    let log = g.ln(sum)?;
    g.sub(centred, log)
}

/// What the teacher makes of the tokens, in evaluation mode: its last hidden states `[batch * sequence, width]`. No noise is drawn and
/// capacities are those of evaluation; auxiliary losses are not even computed.
fn hidden(g: &mut Graph, p: &mut Parameters<'_>, tokens: Value) -> Result<Value> {
    g.scoped("teacher", |g| {
        let shape = g.ty(tokens).shape.clone();
        let (sequence, width) = (shape.last(), p.config().width);
        let x = g.scoped("embedding", |g| {
            let table = p.get(g, "embedding.weight")?;
            let position = p.get(g, "position.weight")?;
            // A teacher may know longer sequences than its student.
            let position = if g.shape(position)[0] == sequence { position } else { g.slice(position, 0, 0, sequence)? };
            let x = g.embedding(table, tokens)?;
            g.add(x, position)
        })?;
        let mode = Mode { training: false, noise: None, ids: tokens, routes: Routes::default() };
        let Blocks { x, .. } = blocks(g, p, x, mode, &mut |g, p, layer, x| layers::attention(g, p, layer, x))?;
        g.reshape(x, [shape.elements(), width])
    })
}

/// What a graph has of the teacher.
enum Taught {
    /// Its last hidden states and its head's weights.
    Whole([Value; 2]),
    /// Kept tokens, their log-probabilities, and that of all others.
    Kept([Value; 3]),
}

/// Cross entropy and distillation term of every token, f32 `[B * S]` each, for the student's last hidden states `x`.
pub(super) fn student_losses(
    g: &mut Graph,
    p: &mut Parameters<'_>,
    x: Value,
    tokens: Value,
    targets: Value,
    lesson: &Distilling<'_>,
) -> Result<[Value; 2]> {
    let (n, width) = (g.ty(targets).elements(), p.config().width);
    let temperature = lesson.options.temperature as f32;
    // Made before the student's loss, so that both are in one place.
    let teacher = match lesson.lesson {
        Lesson::Live(config) => {
            let mut of = Parameters::teacher(config);
            let x = hidden(g, &mut of, tokens)?;
            let w = of.output(g)?;
            // The classifiers of both are computed in the student's dtype.
            let [x, w] = [g.cast(x, dtype(p.config()))?, g.cast(w, dtype(p.config()))?];
            Taught::Whole([x, w])
        }
        Lesson::Cached(kept) => {
            let ids = g.feed(KEPT_IDS, TensorType::i32([n, kept]))?;
            let log_p = g.feed(KEPT_LOG_P, TensorType::new(DType::F16, [n, kept]))?;
            let log_p = g.cast(log_p, DType::F32)?;
            Taught::Kept([ids, log_p, g.feed(KEPT_LOG_TAIL, TensorType::f32([n]))?])
        }
    };
    g.scoped("loss", |g| {
        let x = g.reshape(x, [n, width])?;
        let targets = g.reshape(targets, [n])?;
        let w = p.output(g)?;
        match teacher {
            Taught::Whole(teacher) => g.linear_distillation([x, w], targets, teacher, temperature),
            Taught::Kept(kept) => g.linear_distillation_cached([x, w], targets, kept, temperature),
        }
    })
}

/// The graph of a teacher alone, in evaluation mode: feed `tokens`, i32 `[batch, sequence]`; it leaves its last hidden states in
/// the state [`TEACHER_HIDDEN`]. Its tensors are states named by [`super::of_teacher`].
///
/// # Errors
/// Those of the ops, for a configuration that was not validated or a sequence longer than it knows.
pub fn teacher_hidden(config: &ModelConfig, batch: usize, sequence: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let tokens = g.feed("tokens", TensorType::i32([batch, sequence]))?;
    let x = hidden(g, &mut Parameters::teacher(config), tokens)?;
    let kept = g.state(TEACHER_HIDDEN, g.ty(x).clone())?;
    g.update(kept, x)?;
    Ok(graph)
}

/// The graph of a teacher's logits for some of the tokens of [`teacher_hidden`], which ran before it in the same session: feed `rows`,
/// i32 `[count]`, of the `tokens` there are; output `logits`, f32 `[count, vocab]`, which are not rounded to a narrower dtype.
///
/// # Errors
/// Those of the ops, for a configuration that was not validated.
pub fn teacher_logits(config: &ModelConfig, tokens: usize, count: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let mut p = Parameters::teacher(config);
    let rows = g.feed("rows", TensorType::i32([count]))?;
    let hidden = g.state(TEACHER_HIDDEN, TensorType::new(dtype(config), [tokens, config.width]))?;
    let x = g.embedding(hidden, rows)?;
    let w = p.output(g)?;
    let [x, w] = [g.cast(x, DType::F32)?, g.cast(w, DType::F32)?];
    let logits = g.matmul_with(x, w, None, false, true)?;
    g.output("logits", logits)?;
    Ok(graph)
}
