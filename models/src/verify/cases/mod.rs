//! The cases: each is written once and run on every backend, by the reference, and by the gradient check. [`groups`] are those
//! of the ops, [`layers`] those of whole layers.

mod beside;
mod chains;
mod dense;
mod distillation;
mod elementwise;
mod movement;
mod norms;
mod optimizer;
mod router;
mod sparse;
mod whole;

use moebius_ir::{DType, Result};

use crate::verify::sketch::Sketch;
use crate::verify::tolerance::{Class, Tolerance, tolerance};

pub use sparse::{Routing, routings};
pub use whole::{LAYERS, layers};

/// Floats of all widths.
pub const FLOATS: &[DType] = &[DType::F32, DType::Bf16, DType::F16];
/// One float of each width.
pub const WIDE_AND_NARROW: &[DType] = &[DType::F32, DType::Bf16];
/// The floats that are narrower than f32.
pub const HALVES: &[DType] = &[DType::Bf16, DType::F16];
/// For cases that fix all their dtypes.
pub const ONE: &[DType] = &[DType::F32];

/// How a case keeps its choices (of experts, of the larger of two numbers) from depending on a rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edges {
    /// By the way it makes its inputs.
    Kept,
    /// Its inputs are drawn until no small step changes a choice. Only roundings in f32 come before the choices.
    Drawn,
    /// The same with a step as large as roundings to the open dtype, which come before the choices too.
    DrawnFarOff,
}

type Build = Box<dyn Fn(&mut Sketch) -> Result<()> + Send + Sync>;

/// One way to use one op, or one whole layer.
pub struct Case {
    /// The op, as in [`moebius_ir::Op::NAMES`], or the kind of layer, as in [`LAYERS`].
    pub op: &'static str,
    /// What is special about it.
    pub name: String,
    /// How exact a backend must be.
    pub class: Class,
    /// What the open floats are run as.
    pub dtypes: &'static [DType],
    /// The gradient is smooth around the inputs, so that differences tell it.
    pub smooth: bool,
    /// How choices are kept clear of edges.
    pub edges: Edges,
    /// The size of the terms whose difference the values are, and the gradients: see [`Tolerance::of_terms`].
    pub terms: [f64; 2],
    build: Build,
}

impl Case {
    /// The case in words.
    pub fn title(&self, dtype: DType) -> String {
        format!("{} / {} / {dtype}", self.op, self.name)
    }

    /// The graph and its inputs.
    ///
    /// # Errors
    /// Those of the ops, if the case is not a legal graph.
    pub fn sketch(&self, dtype: DType) -> Result<Sketch> {
        self.keyed(dtype, 0)
    }

    /// [`Case::sketch`] with other numbers for every key, where the case draws them.
    ///
    /// # Errors
    /// As [`Case::sketch`].
    pub fn keyed(&self, dtype: DType, key: u32) -> Result<Sketch> {
        let mut sketch = Sketch::new(dtype).keyed(key);
        (self.build)(&mut sketch)?;
        Ok(sketch)
    }

    /// The same case, not to be compared with differences.
    #[must_use]
    pub fn rough(mut self) -> Self {
        self.smooth = false;
        self
    }

    /// The same case, whose values or gradients are differences of terms of about these sizes, 0 where they are not.
    #[must_use]
    pub fn of_terms(mut self, values: f64, gradients: f64) -> Self {
        self.terms = [values, gradients];
        self
    }

    /// The tolerance of its values, of this dtype.
    pub fn tolerance(&self, dtype: DType) -> Tolerance {
        let class = if dtype.is_float() { self.class } else { Class::Exact };
        tolerance(class, dtype).of_terms(self.terms[0])
    }

    /// The tolerance of its gradients, of this dtype.
    pub fn gradient_tolerance(&self, dtype: DType) -> Tolerance {
        let class = if self.class == Class::Layer { Class::Layer } else { Class::Gradient };
        tolerance(class, dtype).of_terms(self.terms[1])
    }

    /// The same case, its inputs drawn until they are clear of edges.
    #[must_use]
    pub fn drawn(mut self, edges: Edges) -> Self {
        self.edges = edges;
        self
    }
}

/// A case; see its fields.
fn case(
    op: &'static str,
    name: impl Into<String>,
    class: Class,
    dtypes: &'static [DType],
    build: impl Fn(&mut Sketch) -> Result<()> + Send + Sync + 'static,
) -> Case {
    Case {
        op,
        name: name.into(),
        class,
        dtypes,
        smooth: true,
        edges: Edges::Kept,
        terms: [0.0; 2],
        build: Box::new(build),
    }
}

/// Op cases by group, so that groups can be tested side by side.
pub fn groups() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        ("elementwise", elementwise::cases()),
        ("movement", movement::cases()),
        ("norms", norms::cases()),
        ("dense", dense::cases()),
        ("chains", [chains::cases(), beside::cases()].into_iter().flatten().collect()),
        ("distillation", distillation::cases()),
        ("router", router::cases()),
        ("sparse", sparse::cases()),
        ("optimizer", optimizer::cases()),
    ]
}

/// The cases of one group; `None` if there is no such group.
pub fn group(name: &str) -> Option<Vec<Case>> {
    groups().into_iter().find(|(n, _)| *n == name).map(|(_, cases)| cases)
}
