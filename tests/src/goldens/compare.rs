//! One case: its tensors, and what differs.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use moebius_ir::Tensor;

use super::set::{Problem, Set};

/// A case being compared. Tensors are named without the case; each must be used before [`Case::finish`].
pub struct Case<'a> {
    set: &'a Set,
    prefix: String,
    tensors: Option<&'a HashMap<String, Tensor>>,
    used: RefCell<BTreeSet<String>>,
    wrong: Vec<String>,
}

impl<'a> Case<'a> {
    /// The case `name` in `FILE.safetensors`; an empty name for a file of one case.
    pub fn new(set: &'a Set, file: &str, name: &str) -> Self {
        let prefix = if name.is_empty() { String::new() } else { format!("{name}/") };
        Case { set, prefix, tensors: set.file(file), used: RefCell::default(), wrong: Vec::new() }
    }

    /// The set it belongs to.
    pub fn set(&self) -> &'a Set {
        self.set
    }

    /// A tensor, if the case has it.
    pub fn optional(&self, name: &str) -> Option<&'a Tensor> {
        let full = format!("{}{name}", self.prefix);
        let found = self.tensors?.get(&full)?;
        self.used.borrow_mut().insert(full);
        Some(found)
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`Problem::Tensor`].
    pub fn tensor(&self, name: &str) -> Result<&'a Tensor, Problem> {
        self.optional(name).ok_or_else(|| Problem::Tensor { tensor: format!("{}{name}", self.prefix) })
    }

    /// Marks a tensor as known although nothing is compared with it.
    pub fn ignore(&self, name: &str) {
        self.used.borrow_mut().insert(format!("{}{name}", self.prefix));
    }

    /// Notes a difference.
    pub fn wrong(&mut self, what: impl Into<String>) {
        self.wrong.push(what.into());
    }

    /// Compares numbers that must be equal.
    pub fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, got: &T, wanted: &T) {
        if got != wanted {
            self.wrong(format!("{what}: {got:?} for {wanted:?}"));
        }
    }

    /// Compares with a tensor of the case: no element further away than `tolerance` times the largest magnitude in the
    /// tensor, or 0.01 if all are smaller. A tolerance of 0 wants equal numbers.
    ///
    /// # Errors
    /// [`Problem::Tensor`].
    pub fn close(&mut self, name: &str, got: &[f64], tolerance: f64) -> Result<(), Problem> {
        let wanted = &self.tensor(name)?.data;
        if let Some(wrong) = difference(got, wanted, tolerance) {
            self.wrong(format!("{name}: {wrong}"));
        }
        Ok(())
    }

    /// All differences, and the tensors of the case that nothing asked for.
    pub fn finish(mut self) -> Vec<String> {
        let used = self.used.borrow();
        let mut unused: Vec<String> = self
            .tensors
            .into_iter()
            .flat_map(HashMap::keys)
            .filter(|name| name.starts_with(&self.prefix) && !used.contains(*name))
            .map(|name| format!("{name}: nothing to compare it with"))
            .collect();
        unused.sort_unstable();
        self.wrong.append(&mut unused);
        self.wrong
    }
}

/// The element of `got` that is furthest from `wanted`, if that is too far; see [`Case::close`].
pub fn difference(got: &[f64], wanted: &[f64], tolerance: f64) -> Option<String> {
    if got.len() != wanted.len() {
        return Some(format!("{} elements for {}", got.len(), wanted.len()));
    }
    let size = wanted.iter().fold(0.01f64, |m, w| m.max(w.abs()));
    let error = |i: usize| {
        let e = (got[i] - wanted[i]).abs();
        if e.is_nan() { f64::INFINITY } else { e }
    };
    let worst = (0..got.len()).max_by(|&a, &b| error(a).total_cmp(&error(b)))?;
    (error(worst) > tolerance * size).then(|| {
        format!("element {worst}: {:e} for {:e}, error {:e}, size {size:e}", got[worst], wanted[worst], error(worst))
    })
}
