//! Copies of parameters in the dtype that a training graph computes in, kept up to date by the optimizer.
//!
//! A model in 16-bit floats trains parameters in f32 and reads them rounded. Rounding all of them in every step reads each once
//! more; the optimizer, which has the new value in its registers, writes the rounded one beside it instead. The copies belong to
//! no checkpoint: they are made from the parameters whenever those were written by anyone but the optimizer.

use moebius_ir::{Graph, Op, Role, TensorType, Value};

use crate::error::Result;
use crate::program::Program;
use crate::session::Session;

/// What the name of a copy begins with; the parameter's name follows.
const PREFIX: &str = "rounded/";

/// Lets the graph read `parameter` from a copy, and returns that, if all that reads the parameter is one cast to a float of 16
/// bits.
///
/// # Errors
/// [`crate::Error::Graph`] if the name is taken.
pub(crate) fn keep(graph: &mut Graph, name: &str, parameter: Value) -> Result<Option<Value>> {
    let mut readers = graph.nodes().iter().filter(|node| node.operands.contains(&parameter));
    let (Some(reader), None) = (readers.next(), readers.next()) else { return Ok(None) };
    let Op::Cast(cast) = &reader.op else { return Ok(None) };
    if !(cast.dtype.is_float() && cast.dtype.bytes() == 2) {
        return Ok(None);
    }
    let copy = reader.results[0];
    let read = |v: Value| v == parameter;
    if graph.outputs().iter().any(|(_, v)| read(*v)) || graph.updates().iter().any(|u| read(u.state) || read(u.new)) {
        return Ok(None);
    }
    graph.store_cast(copy, format!("{PREFIX}{name}"))?;
    Ok(Some(copy))
}

/// The program that makes all copies of a training step, and when it ran last.
pub(crate) struct Copies {
    program: Program,
    /// The session's count of writes at that time.
    made_at: Option<u64>,
}

/// The graph that makes all copies of a training step's graph, if it has any.
///
/// # Errors
/// [`crate::Error::Graph`] for a step that was not made by [`keep`].
pub(crate) fn refresh_of(step: &Graph) -> Result<Option<Graph>> {
    let mut graph = Graph::new();
    for (name, copy) in step.inputs() {
        let is_state = step.input_of(*copy).is_some_and(|i| i.role == Role::State);
        let Some(parameter) = name.strip_prefix(PREFIX).filter(|_| is_state) else { continue };
        let ty = step.ty(*copy).clone();
        let parameter = graph.parameter(parameter, TensorType::f32(ty.shape.clone()))?;
        let rounded = graph.cast(parameter, ty.dtype)?;
        let copy = graph.state(name, ty)?;
        graph.update(copy, rounded)?;
    }
    Ok((!graph.updates().is_empty()).then_some(graph))
}

impl Copies {
    /// Those of a training step's graph, if it has any.
    ///
    /// # Errors
    /// As [`Session::compile`].
    pub(crate) fn of(session: &mut Session, step: &Graph) -> Result<Option<Copies>> {
        let Some(graph) = refresh_of(step)? else { return Ok(None) };
        Ok(Some(Copies { program: session.compile(&graph)?, made_at: None }))
    }

    /// Makes the copies anew if a tensor of the session was written since.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub(crate) fn refresh(&mut self, session: &mut Session) -> Result<()> {
        if self.made_at != Some(session.writes()) {
            session.run(&mut self.program)?;
            self.made_at = Some(session.writes());
        }
        Ok(())
    }
}
