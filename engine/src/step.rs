//! The graph of a training step: forward, backward, clipping and AdamW, with what is chosen beside them.

use moebius_ir::moments::stream;
use moebius_ir::ops::{Adamw, AdamwState, CompareFn};
use moebius_ir::{DType, Graph, Moments, Op, Role, TensorType, Value, gradients, passes};

use crate::copies;
use crate::error::Result;
use crate::micro::MicroBatches;

/// AdamW with decoupled weight decay and clipping by the global norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay per step, times the learning rate; biases and norms ([`Optimizer::decays`]) are left out.
    pub weight_decay: f32,
    /// Gradients are scaled down to this norm if theirs is larger; 0 means never.
    pub clip: f32,
    /// How the moments are kept between steps; small tensors may keep them in f32 ([`Moments::of_tensor`]).
    pub moments: Moments,
}

impl Default for Optimizer {
    /// The values of the DeepSpeed-MoE scripts: betas 0.9 and 0.95, eps 1e-8, decay 0.1, clip 1; moments in f32.
    fn default() -> Self {
        Optimizer { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0, moments: Moments::F32 }
    }
}

impl Optimizer {
    /// Whether weight decay applies: to matrices, not to vectors, and not to biases, which experts have in rows.
    pub fn decays(name: &str, ty: &TensorType) -> bool {
        ty.shape.len() >= 2 && !name.ends_with("bias")
    }
}

/// What a training step is made of beside its loss.
#[derive(Debug, Default)]
pub struct StepOptions {
    /// How parameters are moved.
    pub optimizer: Optimizer,
    /// The micro-batches of the step, made in this very graph; `None` for one.
    pub micro_batches: Option<MicroBatches>,
    /// What the backward pass computes again instead of keeping it.
    pub recompute: Recompute,
    /// What is remembered of each step on the device, so that the host need not read it in every step.
    pub history: Option<History>,
}

/// What the backward pass computes again instead of keeping it from the forward pass on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    #[default]
    Nothing,
    /// Everything between these values of the graph, with the same bits ([`passes::recompute`]).
    Between(Vec<Value>),
    /// What is cheap ([`passes::recompute_light`]), without the outputs of experts where they can be spared
    /// ([`passes::inner_gates`]): gradients of gates are summed in another order.
    Light,
}

impl Recompute {
    /// The graph with gradients in which it is so.
    ///
    /// # Errors
    /// None on a verified graph.
    pub fn apply(&self, graph: Graph) -> Result<Graph> {
        Ok(match self {
            Recompute::Nothing => graph,
            Recompute::Between(borders) => passes::recompute(&graph, borders)?,
            Recompute::Light => passes::recompute_light(&passes::inner_gates(&graph)?)?,
        })
    }
}

/// What is remembered on the device of the latest steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// How many steps, from 1.
    pub steps: usize,
    /// Outputs of the graph, f32 scalars, that are remembered beside the loss and the norm of the gradient.
    pub outputs: Vec<String>,
}

/// Name of the first moment of a parameter.
pub(crate) fn first_moment(parameter: &str) -> String {
    format!("adam.m/{parameter}")
}

/// Name of the second moment of a parameter.
pub(crate) fn second_moment(parameter: &str) -> String {
    format!("adam.v/{parameter}")
}

/// Name of the scales of both moments of a parameter, where they have some.
pub(crate) fn moment_scales(parameter: &str) -> String {
    format!("adam.scales/{parameter}")
}

/// Name of the state that is true once a step was not finite: from then on nothing is updated.
pub(crate) const HALTED: &str = "trainer.halted";
/// Name of the output with the remembered values, f32 `[steps, 2 + outputs]`: loss, norm, outputs.
pub(crate) const HISTORY: &str = "history";
/// Name of the feed with the row of [`HISTORY`] that a step is remembered in, i32 scalar.
pub(crate) const HISTORY_ROW: &str = "history_row";

/// Turns a graph with a scalar `loss` into a training step over all its parameters.
///
/// Adds the feeds `learning_rate` and `step` (f32 scalars, steps from 1), states `adam.m/NAME` and `adam.v/NAME` for each
/// parameter, in the types of its [`Moments`] (with `adam.scales/NAME` in 8 bits), and the outputs `loss` (unless there) and `grad_norm` (before clipping). If the loss or the gradient norm is
/// not finite, no parameter and no moment changes, nor any state that the graph updates.
///
/// A parameter that is read by one cast to a float of 16 bits alone gets a state `rounded/NAME` that holds it rounded, is read
/// instead, and is kept up to date by the optimizer; [`crate::Trainer`] makes it after parameters were written.
///
/// # Errors
/// [`crate::Error::Graph`] if an op on the way from a parameter to the loss has no gradient.
pub fn training_step(graph: &mut Graph, loss: Value, optimizer: &Optimizer) -> Result<()> {
    add_step(graph, loss, optimizer, None, None)
}

/// [`training_step`] with options; takes the graph and returns that of the step.
///
/// With micro-batches each run of the graph is one of them. Their gradients are added up in f32 in the states
/// `accumulated/NAME`; the last one clips the mean and updates. Loss and norm are those of the means, and updates that the graph
/// has so far are carried out in the last one only.
///
/// With a history there is the output `history`, and once a step is not finite no later one changes anything either, until
/// [`crate::Trainer::collect`] has seen it.
///
/// # Errors
/// As [`training_step`]; [`crate::Error::Graph`] also for a name that is taken: with micro-batches the graph may have no output
/// `loss` of its own.
pub fn training_step_with(mut graph: Graph, loss: Value, options: StepOptions) -> Result<Graph> {
    let StepOptions { optimizer, micro_batches, recompute, history } = options;
    add_step(&mut graph, loss, &optimizer, micro_batches, history.as_ref())?;
    recompute.apply(graph)
}

fn add_step(
    graph: &mut Graph,
    loss: Value,
    optimizer: &Optimizer,
    mut micro: Option<MicroBatches>,
    history: Option<&History>,
) -> Result<()> {
    let parameter = |v: Value| graph.input_of(v).is_some_and(|i| i.role == Role::Parameter);
    let parameters: Vec<(String, Value)> = graph.inputs().iter().filter(|(_, v)| parameter(*v)).cloned().collect();
    let mut copies = Vec::with_capacity(parameters.len());
    for (name, value) in &parameters {
        copies.push(copies::keep(graph, name, *value)?);
    }
    // The gradient of a copy is that of its parameter, in fewer bits and without a cast.
    let read: Vec<Value> = parameters.iter().zip(&copies).map(|(&(_, v), copy)| copy.unwrap_or(v)).collect();
    let mut grads = gradients(graph, loss, &read)?;
    graph.scoped("optimizer", |g| {
        let learning_rate = g.feed("learning_rate", TensorType::f32([]))?;
        let step = g.feed("step", TensorType::f32([]))?;
        let mut loss = loss;
        if let Some(micro) = &mut micro {
            loss = micro.mean(g, "loss", loss)?;
            for ((name, _), grad) in parameters.iter().zip(&mut grads) {
                let wide = g.cast(*grad, DType::F32)?;
                *grad = micro.sum(g, &format!("gradient/{name}"), wide)?;
            }
        }
        let share = micro.as_ref().map_or(1.0, |micro| 1.0 / micro.count() as f64);
        let parts = parts_of_norm(g, &grads)?;
        let norm = g.global_norm(&parts)?;
        let norm = g.mul_scalar(norm, share)?;
        let one = g.scalar(1.0)?;
        let scale = if optimizer.clip > 0.0 {
            let limit = g.scalar(f64::from(optimizer.clip))?;
            // As torch's clip_grad_norm_: the small term keeps the quotient finite at norm 0.
            let shifted = g.add_scalar(norm, 1e-6)?;
            let quotient = g.div(limit, shifted)?;
            g.minimum(one, quotient)?
        } else {
            one
        };
        let scale = g.mul_scalar(scale, share)?;
        let (loss_is_finite, norm_is_finite) = (g.is_finite(loss)?, g.is_finite(norm)?);
        let finite = all_of(g, &[loss_is_finite, norm_is_finite])?;
        let halted = history.map(|_| g.state(HALTED, TensorType::new(DType::Bool, []))).transpose()?;
        let mut goes = finite;
        if let Some(micro) = &micro {
            goes = all_of(g, &[goes, micro.last()])?;
        }
        if let Some(halted) = halted {
            let no = g.splat(TensorType::new(DType::Bool, []), 0.0)?;
            goes = g.select(halted, no, goes)?;
        }
        // What the graph itself keeps from step to step, such as the selection bias of a router.
        g.update_only_if(goes)?;
        // In step 0 AdamW changes nothing.
        let zero = g.scalar(0.0)?;
        let step = g.select(goes, step, zero)?;
        for (((name, value), grad), copy) in parameters.iter().zip(grads).zip(copies) {
            let ty = g.ty(*value).clone();
            let moments = optimizer.moments.of_tensor(ty.elements() as u64);
            let m = g.state(first_moment(name), moments.ty(&ty.shape))?;
            let v = g.state(second_moment(name), moments.ty(&ty.shape))?;
            let scales = moments.scales(&ty.shape).map(|ty| g.state(moment_scales(name), ty)).transpose()?;
            let decay = if Optimizer::decays(name, &ty) { optimizer.weight_decay } else { 0.0 };
            let rule = Adamw {
                beta1: optimizer.beta1,
                beta2: optimizer.beta2,
                eps: optimizer.eps,
                weight_decay: decay,
                rounded: copy.is_some(),
                moments,
                stream: if moments == Moments::F32 { 0 } else { stream(name) },
            };
            let old = AdamwState { param: *value, m, v, scales, rounded: copy };
            let new = g.adamw_of(rule, old, grad, [learning_rate, step, scale])?;
            let (scales, copies) = (scales.zip(new.scales), copy.zip(new.rounded));
            let all = [Some((*value, new.param)), Some((m, new.m)), Some((v, new.v)), scales, copies];
            for (old, new) in all.into_iter().flatten() {
                g.update(old, new)?;
            }
        }
        if micro.is_some() || g.output_named("loss").is_none() {
            g.output("loss", loss)?;
        }
        g.output("grad_norm", norm)?;
        if let (Some(history), Some(halted)) = (history, halted) {
            halt(g, halted, finite, micro.as_ref())?;
            remember(g, history, loss, norm)?;
        }
        micro.map_or(Ok(()), |micro| micro.keep(g))
    })
}

/// What the norm of all gradients is taken of: of experts' weights, which are most of a sparse model, the norm of each, which a backend
/// may take where it makes the gradient; the others as they are.
fn parts_of_norm(g: &mut Graph, grads: &[Value]) -> Result<Vec<Value>> {
    let part = |&grad: &Value| {
        let made = g.producer(g.alias_base(grad));
        if let Op::ExpertMatmulWgrad(_) = g.node(made).op { Ok(g.global_norm(&[grad])?) } else { Ok(grad) }
    };
    grads.iter().map(part).collect()
}

/// Whether all of some bool scalars hold.
fn all_of(g: &mut Graph, conditions: &[Value]) -> Result<Value> {
    let no = g.splat(TensorType::new(DType::Bool, []), 0.0)?;
    let mut all = g.splat(TensorType::new(DType::Bool, []), 1.0)?;
    for &condition in conditions {
        all = g.select(condition, all, no)?;
    }
    Ok(all)
}

/// A step that is not finite sets `halted`, which then stays.
fn halt(g: &mut Graph, halted: Value, finite: Value, micro: Option<&MicroBatches>) -> Result<()> {
    let yes = g.splat(TensorType::new(DType::Bool, []), 1.0)?;
    let mut now = g.select(finite, halted, yes)?;
    if let Some(micro) = micro {
        now = g.select(micro.last(), now, halted)?;
    }
    Ok(g.update(halted, now)?)
}

/// Writes loss, norm and the chosen outputs into the row that the host names.
fn remember(g: &mut Graph, history: &History, loss: Value, norm: Value) -> Result<()> {
    let rows = history.steps.max(1);
    let mut row = vec![loss, norm];
    for name in &history.outputs {
        row.push(g.output_named(name).ok_or_else(|| crate::Error::NoSuch {
            what: "output",
            name: name.clone(),
            there: g.outputs().iter().map(|(n, _)| n.clone()).collect(),
        })?);
    }
    for value in &mut row {
        *value = g.reshape(*value, [1, 1])?;
    }
    let row = g.concat(&row, 1)?;
    let columns = 2 + history.outputs.len();
    let state = g.state("trainer.history", TensorType::f32([rows, columns]))?;
    let here = g.feed(HISTORY_ROW, TensorType::i32([]))?;
    let numbers = g.constant(TensorType::i32([rows, 1]), (0..rows).map(|i| i as f64).collect())?;
    let here = g.compare(CompareFn::Eq, numbers, here)?;
    let new = g.select(here, row, state)?;
    g.update(state, new)?;
    Ok(g.output(HISTORY, new)?)
}
