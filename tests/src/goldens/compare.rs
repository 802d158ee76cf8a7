//! One case: its tensors, and what differs.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use moebius_ir::Tensor;

use super::set::{Problem, Set};

/// How far roundings move a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Roundings<'a> {
    /// Of the inputs to a narrower dtype: each element, where the tensor wanted was made of others.
    pub inputs: Option<&'a [f64]>,
    /// Of what is computed: the element moved furthest.
    pub values: f64,
}

/// A case being compared. Tensors are named without the case; each must be used before [`Case::finish`].
pub struct Case<'a> {
    set: &'a Set,
    prefix: String,
    tensors: Option<&'a HashMap<String, Tensor>>,
    used: RefCell<BTreeSet<String>>,
    wrong: Vec<String>,
    notes: Vec<String>,
    worst: f64,
}

impl<'a> Case<'a> {
    /// The case `name` in `FILE.safetensors`; an empty name for a file of one case.
    pub fn new(set: &'a Set, file: &str, name: &str) -> Self {
        let prefix = if name.is_empty() { String::new() } else { format!("{name}/") };
        Case {
            set,
            prefix,
            tensors: set.file(file),
            used: RefCell::default(),
            wrong: Vec::new(),
            notes: Vec::new(),
            worst: 0.0,
        }
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

    /// Notes what a reader of the report should know although nothing is wrong.
    pub fn note(&mut self, what: impl Into<String>) {
        self.notes.push(what.into());
    }

    /// What [`Case::note`] was told.
    pub fn notes(&self) -> &[String] {
        &self.notes
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
        let size = size(wanted);
        self.worst = self.worst.max(worst(got, wanted, size).map_or(0.0, |(_, error)| error));
        if let Some(wrong) = too_far(got, wanted, size, tolerance) {
            self.wrong(format!("{name}: {wrong}"));
        }
        Ok(())
    }

    /// As [`Case::close`], of a result that roundings move, if they are known: `beside` says how far. An element may be as much
    /// further away as other inputs move it. And where roundings alone move the tensor by more than half the tolerance, it may be
    /// as far away as they move two computations. A note says where either was needed.
    ///
    /// # Errors
    /// [`Problem::Tensor`].
    pub fn close_but_for(
        &mut self,
        name: &str,
        got: &[f64],
        beside: Roundings<'_>,
        tolerance: f64,
    ) -> Result<(), Problem> {
        let wanted = &self.tensor(name)?.data;
        let size = size(wanted);
        if got.len() != wanted.len() || too_far(got, wanted, size, tolerance).is_none() {
            return self.close(name, got, tolerance);
        }
        let mut left = got.to_vec();
        if let Some(moved) = beside.inputs.filter(|moved| moved.len() == got.len()) {
            left = got.iter().zip(wanted).zip(moved).map(|((g, w), m)| nearer(*g, *w, m.abs())).collect();
            let most = moved.iter().fold(0.0f64, |most, m| most.max(m.abs()));
            self.note(format!("{name} moved by up to {:.1e} of {size:.1e} by rounded inputs alone", most / size));
        }
        let moved = beside.values / size;
        if too_far(&left, wanted, size, tolerance).is_none() || too_far(&left, wanted, size, 2.0 * moved).is_some() {
            return self.close(name, &left, tolerance);
        }
        let error = worst(&left, wanted, size).map_or(0.0, |(_, error)| error);
        self.note(format!(
            "{name} off by {error:.1e} of {size:.1e}, where roundings alone move it by up to {moved:.1e}"
        ));
        Ok(())
    }

    /// The largest error of [`Case::close`] so far, relative to the size of its tensor.
    pub fn worst(&self) -> f64 {
        self.worst
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

/// `got`, moved towards `wanted` by `by`, at most all the way.
fn nearer(got: f64, wanted: f64, by: f64) -> f64 {
    let error = got - wanted;
    // Written so that what is no number stays none.
    if error.abs() <= by { wanted } else { got - by.copysign(error) }
}

/// What errors of a tensor are relative to: its largest magnitude, or 0.01 if all are smaller.
fn size(wanted: &[f64]) -> f64 {
    wanted.iter().fold(0.01f64, |m, w| m.max(w.abs()))
}

/// The element that is furthest from `wanted`, and its error in parts of `size`.
fn worst(got: &[f64], wanted: &[f64], size: f64) -> Option<(usize, f64)> {
    let error = |(g, w): (&f64, &f64)| {
        let error = (g - w).abs() / size;
        if error.is_nan() { f64::INFINITY } else { error }
    };
    got.iter().zip(wanted).map(error).enumerate().max_by(|a, b| a.1.total_cmp(&b.1))
}

/// The element of `got` that is furthest from `wanted`, if that is too far; see [`Case::close`].
pub(super) fn difference(got: &[f64], wanted: &[f64], tolerance: f64) -> Option<String> {
    too_far(got, wanted, size(wanted), tolerance)
}

fn too_far(got: &[f64], wanted: &[f64], size: f64, tolerance: f64) -> Option<String> {
    if got.len() != wanted.len() {
        return Some(format!("{} elements for {}", got.len(), wanted.len()));
    }
    let (at, error) = worst(got, wanted, size)?;
    (error > tolerance)
        .then(|| format!("element {at}: {:e} for {:e}, error {error:e} of size {size:e}", got[at], wanted[at]))
}
