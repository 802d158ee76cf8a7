//! What the test programs of this crate share: op cases written once ([`cases`]), running a graph on any backend
//! ([`device`]), tolerances ([`tolerance`]), whole layers built by hand ([`layers`]), comparison with tensors of the real
//! DeepSpeed ([`goldens`]), fuzzing of the parsers ([`fuzz`]) and reading the source tree ([`source`]).

pub mod cases;
pub mod device;
pub mod fuzz;
pub mod goldens;
pub mod layers;
pub mod sketch;
pub mod source;
pub mod tolerance;

pub use sketch::{Inputs, Sketch};
