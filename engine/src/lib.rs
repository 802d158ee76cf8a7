//! Moebius, embedded: open a device, compile a graph, run it, train, keep checkpoints.
//!
//! - [`Engine`] is a device. [`Session`] holds named parameters and state on it. [`Program`] is a compiled graph.
//! - [`Trainer`] turns a graph with a loss into one training step: forward, backward, clipping, AdamW.
//! - [`checkpoint`] writes and reads checkpoints that survive a crash at any moment.
//!
//! This is the only crate with a stable surface; the graph language itself is re-exported as [`ir`].

pub mod checkpoint;
mod copies;
mod element;
mod engine;
mod error;
mod micro;
mod program;
mod session;
mod step;
mod trainer;

pub use moebius_backends::{Error as BackendError, MappedFile, Refusal};
pub use moebius_ir as ir;

pub use element::Element;
pub use engine::{DeviceReport, Engine, Memory};
pub use error::{Error, Result};
pub use micro::{MICRO_BATCH, MicroBatches};
pub use program::Program;
pub use session::{Session, StepTime};
pub use step::{History, Optimizer, Recompute, StepOptions, training_step, training_step_with};
pub use trainer::{MicroStep, StepReport, Trainer};

/// The README's example, compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
