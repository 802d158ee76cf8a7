//! Micro-batches: a training step whose gradient is the mean over several runs of one graph.

use moebius_ir::ops::CompareFn;
use moebius_ir::{Graph, TensorType, Value};

use crate::error::Result;

/// Name of the feed with the number of the micro-batch in its step, i32 scalar from 0; [`crate::Trainer`] gives it.
pub const MICRO_BATCH: &str = "micro_batch";

/// What a graph knows of the micro-batches of a step: each run of the graph is one of them. What the step as a whole is told of,
/// such as the load of an expert, is summed up over them in state on the device, which the first one begins anew. So nothing of
/// it has to be kept between steps, and a step that was given up leaves nothing behind.
#[derive(Debug)]
pub struct MicroBatches {
    count: usize,
    first: Value,
    last: Value,
    /// States and what they hold after this micro-batch.
    sums: Vec<(Value, Value)>,
}

impl MicroBatches {
    /// Steps of `count` micro-batches; `None` for one alone (or 0), which needs nothing. Adds the feed [`MICRO_BATCH`].
    ///
    /// # Errors
    /// [`crate::Error::Graph`] if the graph has an input of that name.
    pub fn new(g: &mut Graph, count: usize) -> Result<Option<MicroBatches>> {
        if count <= 1 {
            return Ok(None);
        }
        let scalar = TensorType::i32([]);
        let index = g.feed(MICRO_BATCH, scalar.clone())?;
        let (zero, end) = (g.splat(scalar.clone(), 0.0)?, g.splat(scalar, (count - 1) as f64)?);
        let first = g.compare(CompareFn::Eq, index, zero)?;
        let last = g.compare(CompareFn::Eq, index, end)?;
        Ok(Some(MicroBatches { count, first, last, sums: Vec::new() }))
    }

    /// How many there are in a step, at least 2.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bool scalar: whether this is the last one of its step.
    pub fn last(&self) -> Value {
        self.last
    }

    /// The sum of `value` (f32 or i32, any shape) over the micro-batches of the step so far, this one included. It is kept in the
    /// state `accumulated/NAME`.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] if the name is taken.
    pub fn sum(&mut self, g: &mut Graph, name: &str, value: Value) -> Result<Value> {
        let before = g.state(format!("accumulated/{name}"), g.ty(value).clone())?;
        let both = g.add(before, value)?;
        let sum = g.select(self.first, value, both)?;
        self.sums.push((before, sum));
        Ok(sum)
    }

    /// The sum of `value`, f32, over the micro-batches so far, divided by the number of all: after the last one the mean.
    ///
    /// # Errors
    /// As [`MicroBatches::sum`].
    pub fn mean(&mut self, g: &mut Graph, name: &str, value: Value) -> Result<Value> {
        let sum = self.sum(g, name, value)?;
        Ok(g.mul_scalar(sum, 1.0 / self.count as f64)?)
    }

    /// The sums are kept for the next micro-batch, whatever the conditions of the updates so far.
    pub(crate) fn keep(self, g: &mut Graph) -> Result<()> {
        self.sums.into_iter().try_for_each(|(state, sum)| Ok(g.update(state, sum)?))
    }
}
