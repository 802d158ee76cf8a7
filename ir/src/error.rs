//! What can go wrong in the IR. Every error says what was wanted, what was found and where.

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;

use crate::TensorType;

/// Result of an IR function.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where in the caller's code a node was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Source file.
    pub file: Cow<'static, str>,
    /// Line, from 1.
    pub line: u32,
}

impl Site {
    /// The place that called the `#[track_caller]` function which calls this.
    #[track_caller]
    pub fn caller() -> Self {
        let at = Location::caller();
        Site { file: Cow::Borrowed(at.file()), line: at.line() }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// What an op's shape rule objects to; the graph adds the op's name, all operand types and the caller's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The operand at fault, if it is one.
    pub operand: Option<usize>,
    /// What the rule wants.
    pub wanted: String,
}

impl Mismatch {
    /// Operand `operand` is not what the rule wants.
    pub fn operand(operand: usize, wanted: impl Into<String>) -> Self {
        Mismatch { operand: Some(operand), wanted: wanted.into() }
    }

    /// An attribute, or the operands together, are not what the rule wants.
    pub fn op(wanted: impl Into<String>) -> Self {
        Mismatch { operand: None, wanted: wanted.into() }
    }
}

fn types(found: &[TensorType]) -> String {
    found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn which(operand: &Option<usize>) -> String {
    operand.map_or_else(String::new, |i| format!("operand {i}: "))
}

/// An error of the IR.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// An op refuses its operands.
    #[error("{op} at {site}: {}wanted {wanted}; found operands ({})", which(operand), types(found))]
    Operands {
        /// Name of the op.
        op: &'static str,
        /// The operand at fault, if it is one.
        operand: Option<usize>,
        /// What the op wants.
        wanted: String,
        /// The types of all operands.
        found: Vec<TensorType>,
        /// The caller's line.
        site: Site,
    },
    /// A gradient was asked for through an op that has none.
    #[error("{op} at {site} has no gradient with respect to operand {operand}: {why}")]
    NotDifferentiable {
        /// Name of the op.
        op: &'static str,
        /// The operand whose gradient was wanted.
        operand: usize,
        /// Why there is none.
        why: &'static str,
        /// Where the node was made.
        site: Site,
    },
    /// `gradients` was called with something it cannot differentiate.
    #[error("gradients at {site}: wanted {wanted}, found {found}")]
    Gradients {
        /// What is needed.
        wanted: &'static str,
        /// What was given.
        found: String,
        /// The caller's line.
        site: Site,
    },
    /// Two inputs, outputs or updates claim one name or value.
    #[error("{what} {name:?} at {site} is already there")]
    Duplicate {
        /// Input, output or update.
        what: &'static str,
        /// Its name.
        name: String,
        /// The caller's line.
        site: Site,
    },
    /// A state update whose new value has another type, or whose target is not a parameter or state.
    #[error("update of {name:?} at {site}: wanted {wanted}, found {found}")]
    Update {
        /// Name of the state.
        name: String,
        /// What is needed.
        wanted: String,
        /// What was given.
        found: String,
        /// The caller's line.
        site: Site,
    },
    /// A graph that breaks a rule of its stage.
    #[error("verify ({stage}): node {node} ({op}) at {site}: wanted {wanted}, found {found}")]
    Invalid {
        /// The stage whose rule is broken.
        stage: &'static str,
        /// Index of the node.
        node: usize,
        /// Its op.
        op: &'static str,
        /// What the stage allows.
        wanted: String,
        /// What is there.
        found: String,
        /// Where the node was made.
        site: Site,
    },
    /// Text that is no graph.
    #[error("graph text, line {line}: wanted {wanted}, found {found:?}")]
    Parse {
        /// Line, from 1.
        line: usize,
        /// What the grammar allows here.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// The state updates cannot be ordered after all readers of the old values.
    #[error("plan: {op} at {site} overwrites operand {operand} in place, but a later step still needs the old value")]
    Overwrite {
        /// The op that works in place.
        op: &'static str,
        /// The operand it overwrites.
        operand: usize,
        /// Where the node was made.
        site: Site,
    },
    /// The buffers of a plan need more bytes than can be addressed.
    #[error("plan: wanted buffers that can be addressed, found {buffers} of {bytes} bytes together")]
    TooLarge {
        /// Number of buffers.
        buffers: usize,
        /// Their sizes together.
        bytes: u128,
    },
    /// The reference interpreter was not given what it needs.
    #[error("reference: input {name:?}: wanted {wanted}, found {found}")]
    Feed {
        /// Name of the input.
        name: String,
        /// Type that is needed.
        wanted: String,
        /// What was given.
        found: String,
    },
}
