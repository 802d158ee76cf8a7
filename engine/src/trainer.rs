//! Training: one graph per step, with forward, backward, clipping and AdamW in it.

use moebius_ir::{DType, Graph, Role, TensorType, Value, gradients};

use crate::error::{Error, Result};
use crate::program::Program;
use crate::session::Session;

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
}

impl Default for Optimizer {
    /// The values of the DeepSpeed-MoE scripts: betas 0.9 and 0.95, eps 1e-8, decay 0.1, clip 1.
    fn default() -> Self {
        Optimizer { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

impl Optimizer {
    /// Whether weight decay applies: to matrices, not to vectors, and not to biases, which experts have in rows.
    pub fn decays(name: &str, ty: &TensorType) -> bool {
        ty.shape.len() >= 2 && !name.ends_with("bias")
    }
}

/// Name of the first moment of a parameter.
pub(crate) fn first_moment(parameter: &str) -> String {
    format!("adam.m/{parameter}")
}

/// Name of the second moment of a parameter.
pub(crate) fn second_moment(parameter: &str) -> String {
    format!("adam.v/{parameter}")
}

/// Turns a graph with a scalar `loss` into a training step over all its parameters.
///
/// Adds the feeds `learning_rate` and `step` (f32 scalars, steps from 1), states `adam.m/NAME` and `adam.v/NAME` for each
/// parameter, and the outputs `loss` (unless there) and `grad_norm` (before clipping). If the loss or the gradient norm is
/// not finite, no parameter and no moment changes, nor any state that the graph updates.
///
/// # Errors
/// [`Error::Graph`] if an op on the way from a parameter to the loss has no gradient.
pub fn training_step(graph: &mut Graph, loss: Value, optimizer: &Optimizer) -> Result<()> {
    let parameter = |v: Value| graph.input_of(v).is_some_and(|i| i.role == Role::Parameter);
    let parameters: Vec<(String, Value)> = graph.inputs().iter().filter(|(_, v)| parameter(*v)).cloned().collect();
    let values: Vec<Value> = parameters.iter().map(|&(_, v)| v).collect();
    let grads = gradients(graph, loss, &values)?;
    graph.scoped("optimizer", |g| {
        let learning_rate = g.feed("learning_rate", TensorType::f32([]))?;
        let step = g.feed("step", TensorType::f32([]))?;
        let norm = g.global_norm(&grads)?;
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
        let nan = g.scalar(f64::NAN)?;
        let loss_is_finite = g.is_finite(loss)?;
        let norm_is_finite = g.is_finite(norm)?;
        let scale = g.select(loss_is_finite, scale, nan)?;
        let scale = g.select(norm_is_finite, scale, nan)?;
        // What the graph itself keeps from step to step, such as the selection bias of a router.
        let no = g.splat(TensorType::new(DType::Bool, []), 0.0)?;
        let finite = g.select(loss_is_finite, norm_is_finite, no)?;
        g.update_only_if(finite)?;
        for ((name, value), grad) in parameters.iter().zip(grads) {
            let ty = g.ty(*value).clone();
            let m = g.state(first_moment(name), TensorType::f32(ty.shape.clone()))?;
            let v = g.state(second_moment(name), TensorType::f32(ty.shape.clone()))?;
            let decay = if Optimizer::decays(name, &ty) { optimizer.weight_decay } else { 0.0 };
            let rule = moebius_ir::ops::Adamw {
                beta1: optimizer.beta1,
                beta2: optimizer.beta2,
                eps: optimizer.eps,
                weight_decay: decay,
            };
            let [new, new_m, new_v] = g.adamw(rule, *value, grad, m, v, learning_rate, step, scale)?;
            g.update(*value, new)?;
            g.update(m, new_m)?;
            g.update(v, new_v)?;
        }
        if g.output_named("loss").is_none() {
            g.output("loss", loss)?;
        }
        g.output("grad_norm", norm)
    })?;
    Ok(())
}

/// What one training step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The step, from 1.
    pub step: u64,
    /// The loss the gradient was taken of.
    pub loss: f32,
    /// Norm of the gradient before clipping.
    pub grad_norm: f32,
}

/// A compiled training step and how many were done.
pub struct Trainer {
    program: Program,
    step: u64,
    parameters: Vec<String>,
}

impl Trainer {
    /// Compiles the training step of a graph with a scalar `loss`; see [`training_step`]. Parameters that the session does
    /// not hold yet are zero.
    ///
    /// # Errors
    /// As [`training_step`] and [`Session::compile`].
    pub fn new(session: &mut Session, mut graph: Graph, loss: Value, optimizer: &Optimizer) -> Result<Trainer> {
        training_step(&mut graph, loss, optimizer)?;
        let program = session.compile(&graph)?;
        let graph = program.plan().graph();
        let parameter = |v: Value| graph.input_of(v).is_some_and(|i| i.role == Role::Parameter);
        let parameters = graph.inputs().iter().filter(|(_, v)| parameter(*v)).map(|(n, _)| n.clone()).collect();
        Ok(Trainer { program, step: 0, parameters })
    }

    /// The step's program: give it its feeds before [`Trainer::step`], read outputs after.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Goes on as if `step` steps were done: after loading a checkpoint.
    pub fn resume_at(&mut self, step: u64) {
        self.step = step;
    }

    /// Names of the trained tensors.
    pub fn parameters(&self) -> &[String] {
        &self.parameters
    }

    /// Names of the optimizer's tensors.
    pub fn moments(&self) -> Vec<String> {
        self.parameters.iter().flat_map(|p| [first_moment(p), second_moment(p)]).collect()
    }

    /// One step with this learning rate.
    ///
    /// # Errors
    /// [`Error::NonFinite`], with every stored tensor unchanged, if the loss or the gradient is not finite; otherwise
    /// as [`Session::run`].
    pub fn step(&mut self, session: &mut Session, learning_rate: f32) -> Result<StepReport> {
        let step = self.step + 1;
        self.program.feed("learning_rate", &[learning_rate])?;
        self.program.feed("step", &[step as f32])?;
        session.run(&mut self.program)?;
        let (loss, grad_norm) = (self.program.scalar("loss")?, self.program.scalar("grad_norm")?);
        if !loss.is_finite() || !grad_norm.is_finite() {
            let found = session.first_non_finite(&mut self.program)?;
            return Err(Error::NonFinite { step, loss, grad_norm, found });
        }
        self.step = step;
        Ok(StepReport { step, loss, grad_norm })
    }

    /// `steps` steps. `before` gives the feeds and the learning rate of each step; `after` sees what it did and may end
    /// the training by returning `false`.
    ///
    /// # Errors
    /// As [`Trainer::step`], and whatever `before` returns.
    pub fn train(
        &mut self,
        session: &mut Session,
        steps: u64,
        mut before: impl FnMut(u64, &mut Program) -> Result<f32>,
        mut after: impl FnMut(&StepReport, &Program, &Session) -> bool,
    ) -> Result<()> {
        for _ in 0..steps {
            let learning_rate = before(self.step + 1, &mut self.program)?;
            let report = self.step(session, learning_rate)?;
            if !after(&report, &self.program, session) {
                break;
            }
        }
        Ok(())
    }
}
