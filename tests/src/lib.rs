//! What the test programs of this crate share: running a graph on any backend ([`device`]), comparison with tensors of the real
//! DeepSpeed ([`goldens`]), fuzzing of the parsers ([`fuzz`]), a backend with a fault ([`faulty`]), known bugs ([`planted`]), layers of every router family
//! ([`families`]), one case on devices
//! ([`conformance`]), the graphs of all cases ([`graphs`]) and reading the source tree ([`source`]). The cases of ops and layers and how close a result must be are those of `moebius verify`.

pub mod conformance;
pub mod device;
pub mod families;
pub mod faulty;
pub mod fuzz;
pub mod goldens;
pub mod graphs;
pub mod planted;
pub mod source;

pub use moebius_models::verify::{Inputs, Sketch, cases, layers, slope, tolerance};

use proptest::test_runner::{Config, FileFailurePersistence, RngSeed};

/// 256 cases of a property, the same at every run, so that a failure is that of a change; `PROPTEST_RNG_SEED` and `PROPTEST_CASES`
/// give others. Seeds of cases that fail are kept in `file`, and run before all others.
pub fn cases_of(file: &'static str) -> Config {
    let persistence = Some(Box::new(FileFailurePersistence::Direct(file)) as _);
    let mut config = Config { max_shrink_iters: 200, failure_persistence: persistence, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 256;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(2_206_053);
    }
    config
}
