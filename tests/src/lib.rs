//! What the test programs of this crate share: running a graph on any backend ([`device`]), comparison with tensors of the real
//! DeepSpeed ([`goldens`]), fuzzing of the parsers ([`fuzz`]), a backend with a fault ([`faulty`]), known bugs ([`planted`]), one case on devices
//! ([`conformance`]) and reading the source tree ([`source`]). The cases of ops and layers and how close a result must be are those of `moebius verify`.

pub mod conformance;
pub mod device;
pub mod faulty;
pub mod fuzz;
pub mod goldens;
pub mod planted;
pub mod source;

pub use moebius_models::verify::{Inputs, Sketch, cases, layers, slope, tolerance};
