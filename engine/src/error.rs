//! What can go wrong in the engine.

use moebius_backends::{NonFinite, Refusal};
use moebius_ir::{DType, TensorType};

/// Result of an engine function.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn tensor(found: &Option<NonFinite>) -> String {
    match found {
        Some(t) => format!(
            "the first tensor that is not finite is {} of type {} in {} (made at {}): element {} is {}",
            t.op,
            t.ty,
            if t.scope.is_empty() { "the top of the model" } else { &t.scope },
            t.site,
            t.index,
            t.value
        ),
        None => "every tensor of a second run of the step was finite".into(),
    }
}

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A graph is at fault.
    #[error(transparent)]
    Graph(#[from] moebius_ir::Error),
    /// The device or its backend is at fault.
    #[error(transparent)]
    Backend(#[from] moebius_backends::Error),
    /// A checkpoint is at fault.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::CheckpointError),
    /// A device that is not there.
    #[error("device {wanted:?} is not available; there are: {}", there.join(", "))]
    NoSuchDevice {
        /// The name asked for.
        wanted: String,
        /// The names that exist.
        there: Vec<String>,
    },
    /// A device without memory checks.
    #[error("device {device:?} cannot check memory: wanted a backend with a checked mode, found none")]
    NoChecks {
        /// Name of its backend.
        device: &'static str,
    },
    /// An element type that is not the tensor's.
    #[error("{name:?} is {ty}: wanted elements of {}, found {found}", ty.dtype)]
    ElementType {
        /// Name of the tensor.
        name: String,
        /// Its type.
        ty: TensorType,
        /// The dtype of the elements given or asked for.
        found: DType,
    },
    /// A feed or output the program does not have.
    #[error("the program has no {what} named {name:?}; there are: {}", there.join(", "))]
    NoSuch {
        /// Feed or output.
        what: &'static str,
        /// The name asked for.
        name: String,
        /// The names that exist.
        there: Vec<String>,
    },
    /// A tensor in a file that is not of the type that the session holds.
    #[error("tensor {name:?}: wanted {wanted} or an f32 tensor of its shape, found {found} in the file")]
    LoadedType {
        /// Its name.
        name: String,
        /// What the session holds.
        wanted: TensorType,
        /// Dtype and shape in the file.
        found: String,
    },
    /// A step that cannot be launched before those launched so far are collected.
    #[error("{launched} steps were launched and the device remembers {most}: wanted them collected first")]
    Uncollected {
        /// Steps that were launched.
        launched: u64,
        /// How many the history has room for.
        most: usize,
    },
    /// A loss or gradient that is not finite. Parameters and moments are as they were before the step.
    #[error("step {step}: loss {loss}, gradient norm {grad_norm}; {}", tensor(found))]
    NonFinite {
        /// The training step, from 1.
        step: u64,
        /// Its loss.
        loss: f32,
        /// Its gradient norm.
        grad_norm: f32,
        /// The first tensor that is not finite.
        found: Option<NonFinite>,
    },
    /// A training step that began and did not end. What the device had updated by then stays.
    #[error(
        "step {step} did not end: {source}. Parameters and optimizer in memory may be partly of that step: wanted those of a \
         checkpoint before going on"
    )]
    Torn {
        /// The step, from 1; of steps that were launched together, the first.
        step: u64,
        /// Why not.
        source: Box<Error>,
    },
    /// A trainer that is asked to go on after [`Error::Torn`].
    #[error(
        "step {step} did not end, so that parameters and optimizer in memory may be partly of it: wanted a checkpoint loaded \
         and `Trainer::resume_at`"
    )]
    StillTorn {
        /// The step, from 1.
        step: u64,
    },
}

impl Error {
    /// The nodes that the device cannot run, if that is what went wrong; otherwise none.
    pub fn refusals(&self) -> &[Refusal] {
        if let Error::Backend(moebius_backends::Error::Unsupported { refusals, .. }) = self { refusals } else { &[] }
    }
}
