//! Negative controls: known bugs of sparse layers, planted one at a time, and the checks that must notice them. A suite that lets
//! one of them pass checks nothing there.
//!
//! A [`Bug`] computes the nodes of one op wrongly on a backend that is otherwise the reference ([`Planted`]); a [`Cut`] is a wrong
//! gradient, as a wrong `vjp` would emit it, in the graph itself. [`bugs`] and [`CUTS`] list them with the [`Check`]s of the suites.

mod backend;
mod cuts;
mod layers;
mod products;
mod routing;
mod slots;

use std::path::Path;
use std::sync::Arc;

use moebius_ir::{DType, Tensor};
use moebius_models::verify::Sketch;
use moebius_models::verify::cases::{self, Case};
use moebius_models::verify::slope::slope;

pub use backend::{Launch, Planted};
pub use cuts::{CUTS, Cut};

use crate::conformance;
use crate::device::Device;
use crate::families::check::{Found, one_hot_form, some_draws};
use crate::goldens::{self, Machine, Set};

/// A wrong meaning of one op.
pub struct Bug {
    /// Its name.
    pub name: &'static str,
    /// What is wrong.
    pub what: &'static str,
    /// Where it happened.
    pub seen: &'static str,
    /// The op whose results are wrong.
    pub op: &'static str,
    /// The wrong results; `None` for a node that the bug does not touch.
    pub wrong: fn(&Launch<'_>) -> Option<Vec<Tensor>>,
    /// Each of these fails with it.
    pub noticed_by: &'static [Check],
}

/// A check of the suites.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// The values of one case of an op or a layer ([`conformance::forward`]).
    Values(&'static str, &'static str),
    /// Its gradients ([`conformance::backward`]).
    Gradients(&'static str, &'static str),
    /// The one-hot form of some layers of every router family ([`one_hot_form`]).
    OneHotForm,
    /// A case of a kind that the real DeepSpeed computed ([`goldens::run`]).
    Golden(&'static str, &'static str),
}

impl Check {
    /// Runs the check with `bug`, or with none.
    ///
    /// # Errors
    /// In words, what the check finds wrong.
    ///
    /// # Panics
    /// If there is no such check.
    pub fn run(self, bug: Option<&'static Bug>) -> Result<(), String> {
        let planted = |checked| Arc::new(Planted::new(bug, checked));
        // The two have one name: their results have to be the same bits.
        let devices =
            || [(true, "planted, checked"), (false, "planted")].map(|(c, name)| Device { name, backend: planted(c) });
        match self {
            Check::Values(op, case) => conformance::forward(&named(op, case), DType::F32, &devices()),
            Check::Gradients(op, case) => conformance::backward(&named(op, case), DType::F32, &devices()),
            Check::OneHotForm => {
                let backend = planted(true);
                let found: Result<Vec<Found>, String> =
                    some_draws().iter().map(|draw| one_hot_form(backend.as_ref(), draw)).collect();
                let told = found?.into_iter().filter(|f| *f == Found::Agrees).count();
                assert!(told > 80, "{told} draws tell something");
                Ok(())
            }
            Check::Golden(kind, case) => {
                let mut set =
                    Set::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")).unwrap_or_else(|e| panic!("{e}"));
                set.keep(kind, case);
                let report = goldens::run(&set, &Machine::new("planted", planted(true)));
                // A layer of f32 is run in bf16 too.
                assert!(matches!(report.agreed.len() + report.failed.len(), 1 | 2), "{kind}/{case}: one case");
                match report.failed.first() {
                    None => Ok(()),
                    Some((_, wrong)) => Err(wrong.join("; ")),
                }
            }
        }
    }
}

/// The case of this name, of an op or a layer.
fn named(op: &str, name: &str) -> Case {
    let mut cases: Vec<Case> = cases::groups().into_iter().flat_map(|(_, cases)| cases).collect();
    cases.extend(cases::layers().unwrap_or_else(|e| panic!("{e}")));
    let case = cases.into_iter().find(|c| c.op == op && c.name == name);
    case.unwrap_or_else(|| panic!("{op} has no case {name:?}"))
}

/// Compares the gradient of a case with a difference of its loss, in f64, after `cut` has changed its graph.
///
/// # Errors
/// In words, what differs.
///
/// # Panics
/// If the case has no gradient.
pub fn gradient_check(op: &str, case: &str, cut: Option<&Cut>) -> Result<(), String> {
    let mut sketch: Sketch = named(op, case).sketch(DType::F32).unwrap_or_else(|e| panic!("{e}"));
    sketch.differentiate().unwrap_or_else(|e| panic!("{e}"));
    if let Some(cut) = cut {
        sketch.graph = cut.apply(&sketch.graph).map_err(|e| e.to_string())?;
    }
    let loss = sketch.graph.output_named("loss").unwrap_or_else(|| panic!("a loss"));
    let found = slope(&mut sketch, loss).map_err(|e| e.to_string())?;
    if found.agrees() { Ok(()) } else { Err(format!("{found:?}")) }
}

/// The bugs.
pub fn bugs() -> impl Iterator<Item = &'static Bug> {
    [routing::BUGS, slots::BUGS, products::BUGS, layers::BUGS].into_iter().flatten()
}
