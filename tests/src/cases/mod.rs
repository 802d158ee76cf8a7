//! The op cases: each is written once and run on every backend, by the reference, and by the gradient check.

mod dense;
mod elementwise;
mod movement;
mod norms;
mod optimizer;
mod router;
mod sparse;

use moebius_ir::{DType, Result};

use crate::sketch::Sketch;
use crate::tolerance::Class;

pub use sparse::{Routing, routings};

/// Floats of all widths.
pub const FLOATS: &[DType] = &[DType::F32, DType::Bf16, DType::F16];
/// One float of each width.
pub const WIDE_AND_NARROW: &[DType] = &[DType::F32, DType::Bf16];
/// The floats that are narrower than f32.
pub const HALVES: &[DType] = &[DType::Bf16, DType::F16];
/// For cases that fix all their dtypes.
pub const ONE: &[DType] = &[DType::F32];

type Build = Box<dyn Fn(&mut Sketch) -> Result<()> + Send + Sync>;

/// One way to use one op.
pub struct Case {
    /// The op, as in [`moebius_ir::Op::NAMES`].
    pub op: &'static str,
    /// What is special about it.
    pub name: String,
    /// How exact a backend must be.
    pub class: Class,
    /// What the open floats are run as.
    pub dtypes: &'static [DType],
    /// The gradient is smooth around the inputs, so that differences tell it.
    pub smooth: bool,
    build: Build,
}

impl Case {
    /// The case in words.
    pub fn title(&self, dtype: DType) -> String {
        format!("{} / {} / {dtype}", self.op, self.name)
    }

    /// The graph and its inputs.
    ///
    /// # Panics
    /// If the case is not a legal graph.
    pub fn sketch(&self, dtype: DType) -> Sketch {
        let mut sketch = Sketch::new(dtype);
        (self.build)(&mut sketch).unwrap_or_else(|e| panic!("{}: {e}", self.title(dtype)));
        sketch
    }

    /// The same case, not to be compared with differences.
    #[must_use]
    pub fn rough(mut self) -> Self {
        self.smooth = false;
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
    Case { op, name: name.into(), class, dtypes, smooth: true, build: Box::new(build) }
}

/// Cases by group, so that groups can be tested side by side.
pub fn groups() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        ("elementwise", elementwise::cases()),
        ("movement", movement::cases()),
        ("norms", norms::cases()),
        ("dense", dense::cases()),
        ("router", router::cases()),
        ("sparse", sparse::cases()),
        ("optimizer", optimizer::cases()),
    ]
}

/// The cases of one group.
///
/// # Panics
/// If there is no such group.
pub fn group(name: &str) -> Vec<Case> {
    let found = groups().into_iter().find(|(n, _)| *n == name);
    found.unwrap_or_else(|| panic!("no group {name}")).1
}
