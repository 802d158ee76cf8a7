//! What the test programs of this crate share: op cases written once ([`cases`]), running a graph on any backend
//! ([`device`]), tolerances ([`tolerance`]), whole layers built by hand ([`layers`]) and reading the source tree ([`source`]), fuzzing ([`fuzz`]).

pub mod cases;
pub mod device;
pub mod fuzz;
pub mod layers;
pub mod sketch;
pub mod source;
pub mod tolerance;

pub use sketch::{Inputs, Sketch};
