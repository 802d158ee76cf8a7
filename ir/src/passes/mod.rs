//! Graph to graph: each pass keeps the meaning, and the result of each is verified.

mod constant_folding;
mod cse;
mod dce;
mod fusion;
mod inner_gates;
mod kept;
mod least;
mod narrow;
mod read_through;
mod recompute;

pub use constant_folding::fold_constants;
pub use cse::eliminate_common_subexpressions;
pub use dce::eliminate_dead_code;
pub use fusion::fuse_elementwise;
pub use inner_gates::inner_gates;
pub use kept::{Kept, kept_for_backward};
pub use narrow::narrow_parameters;
pub use read_through::read_through;
pub use recompute::{recompute, recompute_light};

use crate::error::Result;
use crate::graph::Graph;
use crate::verify::{Stage, verify};

/// All passes in their order: reading through, constants, common subexpressions, dead code, fusion of elementwise chains.
///
/// # Errors
/// [`crate::Error::Invalid`] if the graph, or what a pass made of it, breaks a rule.
pub fn optimise(graph: &Graph) -> Result<Graph> {
    verify(graph, Stage::Built)?;
    let mut graph = read_through(graph)?;
    verify(&graph, Stage::Built)?;
    graph = fold_constants(&graph)?;
    verify(&graph, Stage::Built)?;
    graph = eliminate_common_subexpressions(&graph)?;
    verify(&graph, Stage::Built)?;
    graph = eliminate_dead_code(&graph)?;
    verify(&graph, Stage::Built)?;
    graph = fuse_elementwise(&graph)?;
    graph = eliminate_dead_code(&graph)?;
    verify(&graph, Stage::Optimised)?;
    Ok(graph)
}
