//! The language of Moebius: a small static-shape tensor IR with ops for sparse experts.
//!
//! The way of the data, each arrow one function: [`Graph`] (built by its op methods, each checking shapes at the
//! caller's line) → [`gradients`] → [`passes::optimise`] → [`Plan`], which a backend compiles. A graph prints as
//! text ([`Graph::to_text`]) and parses back ([`Graph::from_text`]); [`reference::run`] gives its meaning in f64.
//!
//! This crate knows no device, does no input or output, starts no thread and contains no `unsafe`.

mod autodiff;
mod dtype;
mod error;
mod graph;
pub mod moments;
pub mod ops;
pub mod passes;
pub mod philox;
mod plan;
pub mod reference;
mod router;
mod tensor;
mod text;
mod types;
mod verify;

pub use autodiff::{Cotangent, Vjp, gradients};
pub use dtype::DType;
pub use error::{Error, Mismatch, Result, Site};
pub use graph::{Graph, Node, NodeId, Update, Value};
pub use moments::Moments;
pub use ops::{Op, Role};
pub use plan::{FENCE_BYTES, Fences, Lifetime, Plan, Reuse, Step, Storage};
pub use tensor::Tensor;
pub use types::{Shape, TensorType};
pub use verify::{Stage, verify};
