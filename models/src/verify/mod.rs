//! Whether a device computes what the ops mean: every op with its edges, forward and backward, in every dtype, and whole layers
//! with their gradients, each compared with the reference of the language in f64.
//!
//! - [`cases`] are the cases, written as a [`Sketch`]: a graph and its inputs. [`layers`] builds whole layers by hand.
//! - [`device`] runs a graph on a [`moebius::Engine`] and by the reference; [`tolerance`] says how close the two must be.
//! - [`slope`] compares a gradient with a difference of the loss.
//! - [`verify`] does all of it and makes a [`Report`]; the program's command `verify` prints it.

pub mod cases;
mod check;
pub mod device;
pub mod layers;
mod report;
pub mod sketch;
pub mod slope;
#[cfg(test)]
mod tests;
pub mod tolerance;

use std::time::Instant;

use moebius::Engine;
use moebius_ir::{DType, Op};

pub use check::{Fault, Finding, Outcome, Pass, Sort};
pub use report::{Counts, Failure, RefusedCases, Report, Row, Verdict};
pub use sketch::{Inputs, Sketch};

use crate::config::{ConfigError, nearest};
use cases::{Case, LAYERS};
use check::Machine;

/// What to verify.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The ops and layers by name, as [`names`] lists them; empty for all.
    pub only: Vec<String>,
    /// Seed of the inputs that are drawn.
    pub seed: u32,
}

/// Where a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Cases done, each dtype counted.
    pub done: usize,
    /// Cases there are.
    pub total: usize,
    /// The op or layer that comes next, or came last.
    pub op: &'static str,
}

/// Why nothing was verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A name that no op and no layer has.
    #[error("no op or layer is named `{name}`{}; there are {}", did_you_mean(nearest), known.join(", "))]
    Unknown {
        /// The name.
        name: String,
        /// The nearest names, best first.
        nearest: Vec<String>,
        /// All names.
        known: Vec<&'static str>,
    },
    /// A configuration of the layers' cases is refused: a bug of the cases.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

fn did_you_mean(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!(" (nearest: {})", nearest.join(", ")) }
}

/// What can be verified: every op, then the layers.
pub fn names() -> impl Iterator<Item = &'static str> {
    Op::NAMES.iter().copied().chain(LAYERS)
}

/// Every case that `only` names, all if it names none; ops in the order of the language.
fn selected(only: &[String]) -> Result<Vec<Case>, VerifyError> {
    if let Some(name) = only.iter().find(|name| names().all(|known| known != **name)) {
        let (nearest, known) = (nearest(name, names()), names().collect());
        return Err(VerifyError::Unknown { name: name.clone(), nearest, known });
    }
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    let mut cases: Vec<Case> = cases::groups().into_iter().flat_map(|(_, cases)| cases).collect();
    if LAYERS.iter().any(|name| wanted(name)) {
        cases.extend(cases::layers()?);
    }
    cases.retain(|case| wanted(case.op));
    cases.sort_by_key(|case| names().position(|name| name == case.op));
    Ok(cases)
}

/// Runs the cases on the device, as it is and with memory checks where it has them, and compares each with the reference.
/// `progress` is told of each case before it runs, and of the end.
///
/// What the device cannot run is no error: it is in the report.
///
/// # Errors
/// [`VerifyError::Unknown`] for a name that is not there.
pub fn verify(engine: &Engine, options: &Options, progress: &mut dyn FnMut(Progress)) -> Result<Report, VerifyError> {
    let cases = selected(&options.only)?;
    let jobs: Vec<(&Case, DType)> = cases.iter().flat_map(|c| c.dtypes.iter().map(move |&d| (c, d))).collect();
    let begun = Instant::now();
    let machine = Machine::new(engine);
    // If a kernel cannot be made, the case that needs it says so.
    let _ = engine.prepare(jobs.iter().flat_map(|(case, dtype)| check::graphs(case, *dtype, options.seed)));
    let mut report = Report::new(engine.name(), engine.describe(), machine.checked.is_some(), options.seed);
    for (done, (case, dtype)) in jobs.iter().enumerate() {
        progress(Progress { done, total: jobs.len(), op: case.op });
        report.add(check::check(case, *dtype, options.seed, &machine));
    }
    if let Some((case, _)) = jobs.last() {
        progress(Progress { done: jobs.len(), total: jobs.len(), op: case.op });
    }
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}
