//! The graphs of all cases of ops and layers, for what is made of graphs without a device.

use std::collections::BTreeSet;

use moebius_ir::{DType, Graph, passes};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::cases::{self, Case};

/// What `of` makes of each case in each of its dtypes, forward and backward and after the passes, each once. The second argument is the
/// case's title. On all cores.
///
/// # Panics
/// If a case is no legal graph.
pub fn of_all_cases<T: Ord + Send>(of: impl Fn(&Graph, &str) -> Vec<T> + Sync) -> BTreeSet<T> {
    let cases: Vec<Case> = cases::groups().into_iter().flat_map(|(_, cases)| cases).collect();
    let all: Vec<(&Case, DType)> =
        cases.iter().flat_map(|case| case.dtypes.iter().map(move |&dtype| (case, dtype))).collect();
    let one = |&(case, dtype): &(&Case, DType)| {
        let title = case.title(dtype);
        let mut sketch = case.sketch(dtype).unwrap_or_else(|e| panic!("{title}: {e}"));
        if sketch.differentiable() {
            sketch.differentiate().unwrap_or_else(|e| panic!("{title}: {e}"));
        }
        of(&passes::optimise(&sketch.graph).unwrap_or_else(|e| panic!("{title}: {e}")), &title)
    };
    all.par_iter().flat_map_iter(one).collect()
}
