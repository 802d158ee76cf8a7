//! Training: one graph per step, run as often as the step has micro-batches, and what the host reads of it.

use moebius_ir::{Graph, Role, Value};

use crate::copies::Copies;
use crate::error::{Error, Result};
use crate::micro::MICRO_BATCH;
use crate::program::Program;
use crate::session::Session;
use crate::step::{
    HALTED, HISTORY, HISTORY_ROW, Optimizer, StepOptions, first_moment, moment_scales, second_moment,
    training_step_with,
};

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

/// A micro-batch that the trainer wants the feeds of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroStep {
    /// The step it belongs to, from 1.
    pub step: u64,
    /// Its number in the step, from 0; 0 where steps have one alone.
    pub micro_batch: usize,
}

/// A compiled training step and how many were done.
///
/// A step is [launched](Trainer::launch), and looked at when it is [collected](Trainer::collect). A trainer with a
/// [`crate::History`] can launch as many steps as that remembers before it collects them all at once, so that a device beside the
/// host need not be waited for in each; results have the same bits.
pub struct Trainer {
    program: Program,
    /// Steps that were collected, and those that were launched beyond.
    step: u64,
    pending: u64,
    /// The step that began and did not end.
    torn: Option<u64>,
    shape: Shape,
    parameters: Vec<String>,
    copies: Option<Copies>,
}

/// What a trainer has to know of its program.
struct Shape {
    micro_batches: usize,
    /// Steps that are remembered on the device, and values of each; without a history one step, and loss and norm.
    rows: usize,
    columns: usize,
    remembers: bool,
}

impl Shape {
    /// The graph of the step, and its shape.
    fn of(graph: Graph, loss: Value, options: StepOptions) -> Result<(Graph, Shape)> {
        let micro_batches = options.micro_batches.as_ref().map_or(1, crate::MicroBatches::count);
        let remembers = options.history.is_some();
        let (rows, columns) = options.history.as_ref().map_or((1, 2), |h| (h.steps.max(1), 2 + h.outputs.len()));
        let graph = training_step_with(graph, loss, options)?;
        Ok((graph, Shape { micro_batches, rows, columns, remembers }))
    }
}

impl Trainer {
    /// Compiles the training step of a graph with a scalar `loss`; see [`crate::training_step`]. Parameters that the session does
    /// not hold yet are zero.
    ///
    /// # Errors
    /// As [`crate::training_step`] and [`Session::compile`].
    pub fn new(session: &mut Session, graph: Graph, loss: Value, optimizer: &Optimizer) -> Result<Trainer> {
        Trainer::with(session, graph, loss, StepOptions { optimizer: *optimizer, ..StepOptions::default() })
    }

    /// [`Trainer::new`] with micro-batches, recomputation or a history; see [`training_step_with`].
    ///
    /// # Errors
    /// As [`training_step_with`] and [`Session::compile`].
    pub fn with(session: &mut Session, graph: Graph, loss: Value, options: StepOptions) -> Result<Trainer> {
        let (graph, shape) = Shape::of(graph, loss, options)?;
        Trainer::of(session, &graph, shape)
    }

    fn of(session: &mut Session, step: &Graph, shape: Shape) -> Result<Trainer> {
        let program = session.compile(step)?;
        let copies = Copies::of(session, step)?;
        let graph = program.plan().graph();
        let parameter = |v: Value| graph.input_of(v).is_some_and(|i| i.role == Role::Parameter);
        let parameters = graph.inputs().iter().filter(|(_, v)| parameter(*v)).map(|(n, _)| n.clone()).collect();
        Ok(Trainer { program, step: 0, pending: 0, torn: None, shape, parameters, copies })
    }

    /// Goes on with another graph for the same parameters, as [`Trainer::with`] compiles it. The old program and what only it kept
    /// in the session, or kept in another type, are given back before the new one takes any memory. All launched steps must have
    /// been collected.
    ///
    /// # Errors
    /// [`Error::Uncollected`] if steps were launched and not collected; as [`Trainer::with`]: only the first of these leaves a
    /// trainer that can go on.
    pub fn replace(&mut self, session: &mut Session, graph: Graph, loss: Value, options: StepOptions) -> Result<()> {
        if self.pending > 0 {
            return Err(Error::Uncollected { launched: self.pending, most: 0 });
        }
        let (graph, shape) = Shape::of(graph, loss, options)?;
        let old = self.program.plan().graph();
        let gone = |(name, value): &&(String, Value)| {
            let kept = old.input_of(*value).is_some_and(|i| i.role != Role::Feed);
            kept && graph.input_named(name).is_none_or(|v| graph.ty(v) != old.ty(*value))
        };
        let gone: Vec<String> = old.inputs().iter().filter(gone).map(|(name, _)| name.clone()).collect();
        // A program that does nothing takes the place of the old one, whose memory is free then.
        self.program = session.compile(&Graph::new())?;
        self.copies = None;
        for name in gone {
            session.remove(&name);
        }
        let step = self.step;
        *self = Trainer { step, ..Trainer::of(session, &graph, shape)? };
        Ok(())
    }

    /// The step's program: give it its feeds before [`Trainer::step`], read outputs after.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// Steps done, without those that were launched and not collected.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Steps done and launched.
    pub fn steps_launched(&self) -> u64 {
        self.step + self.pending
    }

    /// How many more steps can be launched before they must be collected.
    pub fn room(&self) -> u64 {
        (self.shape.rows as u64).saturating_sub(self.pending)
    }

    /// Goes on as if `step` steps were done: after loading a checkpoint. Steps that were launched are forgotten, and one that did
    /// not end.
    pub fn resume_at(&mut self, step: u64) {
        (self.step, self.pending, self.torn) = (step, 0, None);
    }

    /// Refuses to go on with what a step left that did not end.
    fn whole(&self) -> Result<()> {
        self.torn.map_or(Ok(()), |step| Err(Error::StillTorn { step }))
    }

    /// The error of a device in the middle of `step`, after which nobody knows which tensors it has updated.
    fn tear(&mut self, step: u64, source: Error) -> Error {
        self.torn = Some(step);
        Error::Torn { step, source: Box::new(source) }
    }

    /// Names of the trained tensors.
    pub fn parameters(&self) -> &[String] {
        &self.parameters
    }

    /// Names of the optimizer's tensors.
    pub fn moments(&self) -> Vec<String> {
        let graph = self.program.plan().graph();
        let names = self.parameters.iter().flat_map(|p| [first_moment(p), second_moment(p), moment_scales(p)]);
        names.filter(|name| graph.input_named(name).is_some()).collect()
    }

    /// Gives the program everything it wants for one micro-batch.
    fn prepare<E: From<Error>>(
        &mut self,
        at: MicroStep,
        feed: &mut impl FnMut(MicroStep, &mut Program) -> Result<f32, E>,
    ) -> Result<(), E> {
        let learning_rate = feed(at, &mut self.program)?;
        let program = &mut self.program;
        program.feed("learning_rate", &[learning_rate])?;
        program.feed("step", &[at.step as f32])?;
        if self.shape.micro_batches > 1 {
            program.feed(MICRO_BATCH, &[at.micro_batch as i32])?;
        }
        if self.shape.remembers {
            program.feed(HISTORY_ROW, &[((at.step - 1) % self.shape.rows as u64) as i32])?;
        }
        Ok(())
    }

    /// Runs the next step without looking at what it did. `feed` gives the feeds of each of its micro-batches and returns the
    /// learning rate.
    ///
    /// # Errors
    /// [`Error::Uncollected`] if there is no [room](Trainer::room); whatever `feed` returns; [`Error::Torn`] if the device fails, and
    /// [`Error::StillTorn`] from then on until [`Trainer::resume_at`].
    pub fn launch<E: From<Error>>(
        &mut self,
        session: &mut Session,
        mut feed: impl FnMut(MicroStep, &mut Program) -> Result<f32, E>,
    ) -> Result<(), E> {
        self.whole()?;
        if self.room() == 0 {
            return Err(Error::Uncollected { launched: self.pending, most: self.shape.rows }.into());
        }
        if let Some(copies) = &mut self.copies {
            copies.refresh(session)?;
        }
        let step = self.step + self.pending + 1;
        for micro_batch in 0..self.shape.micro_batches {
            self.prepare(MicroStep { step, micro_batch }, &mut feed)?;
            let ran = session.run(&mut self.program);
            ran.map_err(|e| if micro_batch == 0 && is_refusal(&e) { e } else { self.tear(step, e) })?;
        }
        self.pending += 1;
        Ok(())
    }

    /// Waits for the launched steps and gives each to `seen`, with the values that the history remembers beside loss and norm.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the loss or the gradient of a step is not finite, after `seen` was given those before it. Every
    /// stored tensor that outlasts a step is as it was before that step, which is forgotten with those after it. `feed` is called
    /// for its micro-batches once more, to find the first tensor that is not finite. Otherwise as [`Trainer::launch`].
    pub fn collect<E: From<Error>>(
        &mut self,
        session: &mut Session,
        mut feed: impl FnMut(MicroStep, &mut Program) -> Result<f32, E>,
        mut seen: impl FnMut(StepReport, &[f32]),
    ) -> Result<(), E> {
        self.whole()?;
        if self.pending == 0 {
            return Ok(());
        }
        // A device beside the host tells here what went wrong in the steps that were launched.
        let values = self.remembered().map_err(|source| self.tear(self.step + 1, source))?;
        for _ in 0..std::mem::take(&mut self.pending) {
            let step = self.step + 1;
            let row = ((step - 1) % self.shape.rows as u64) as usize * self.shape.columns;
            let row = &values[row..row + self.shape.columns];
            let (loss, grad_norm) = (row[0], row[1]);
            if !loss.is_finite() || !grad_norm.is_finite() {
                let found = self.first_non_finite(session, step, &mut feed)?;
                return Err(Error::NonFinite { step, loss, grad_norm, found }.into());
            }
            self.step = step;
            seen(StepReport { step, loss, grad_norm }, &row[2..]);
        }
        Ok(())
    }

    /// Loss, gradient norm and what else the program remembers, row by row.
    fn remembered(&self) -> Result<Vec<f32>> {
        if self.shape.remembers {
            return self.program.output(HISTORY);
        }
        Ok(vec![self.program.scalar("loss")?, self.program.scalar("grad_norm")?])
    }

    /// Runs a step again, tensor by tensor, and lets later steps update what they train.
    fn first_non_finite<E: From<Error>>(
        &mut self,
        session: &mut Session,
        step: u64,
        feed: &mut impl FnMut(MicroStep, &mut Program) -> Result<f32, E>,
    ) -> Result<Option<moebius_backends::NonFinite>, E> {
        let mut found = None;
        for micro_batch in 0..self.shape.micro_batches {
            if found.is_none() {
                self.prepare(MicroStep { step, micro_batch }, feed)?;
                found = session.first_non_finite(&mut self.program)?;
            }
        }
        if self.shape.remembers {
            session.write(HALTED, &[0u8])?;
        }
        Ok(found)
    }

    /// One step with this learning rate and the feeds that the program has, which serve every micro-batch.
    ///
    /// # Errors
    /// [`Error::NonFinite`], with every stored tensor unchanged, if the loss or the gradient is not finite; otherwise
    /// as [`Trainer::launch`].
    pub fn step(&mut self, session: &mut Session, learning_rate: f32) -> Result<StepReport> {
        self.step_with(session, |_, _| Ok(learning_rate))
    }

    /// One step; `feed` is that of [`Trainer::launch`].
    ///
    /// # Errors
    /// As [`Trainer::launch`] and [`Trainer::collect`].
    pub fn step_with<E: From<Error>>(
        &mut self,
        session: &mut Session,
        mut feed: impl FnMut(MicroStep, &mut Program) -> Result<f32, E>,
    ) -> Result<StepReport, E> {
        self.launch(session, &mut feed)?;
        let mut last = StepReport { step: self.step, loss: f32::NAN, grad_norm: f32::NAN };
        self.collect(session, feed, |report, _| last = report)?;
        Ok(last)
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

/// Whether a program was refused before any of it ran: the session does not hold what it wants.
fn is_refusal(error: &Error) -> bool {
    use moebius_backends::Error::{ForeignStore, NoSuch, StoredType};
    matches!(error, Error::Backend(NoSuch { .. } | StoredType { .. } | ForeignStore { .. }))
}
