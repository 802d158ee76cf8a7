//! `input`: a value that comes from outside the graph.
//!
//! `() -> ty`. A feed is given anew for each run; parameters and state live on the device between runs and may be
//! updated by the graph ([`Graph::update`]). Gradients end here.

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Where an input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Given by the host for every run.
    Feed,
    /// A trained tensor, kept on the device between runs.
    Parameter,
    /// Any other tensor kept on the device between runs: optimizer moments, key/value caches.
    State,
}

/// An input of the graph; its name is unique in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// The name it is fed, stored and checkpointed under.
    pub name: String,
    /// Where it comes from.
    pub role: Role,
    /// Its type.
    pub ty: TensorType,
}

impl Rule for Input {
    const NAME: &'static str = "input";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 0)?;
        check::attribute(!self.name.is_empty(), || "a name that is not empty".into())?;
        Ok(smallvec![self.ty.clone()])
    }

    fn vjp(&self, _cx: &mut Vjp<'_>) -> Result<Cotangents> {
        Ok(SmallVec::new())
    }

    /// An input has no meaning of its own: [`crate::reference::run`] takes its value from the feeds instead.
    fn reference(&self, _operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        vec![Tensor::zeros(results[0].clone())]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// A value the host gives for every run.
    ///
    /// # Errors
    /// [`crate::Error::Duplicate`] if the name is taken.
    #[track_caller]
    pub fn feed(&mut self, name: impl Into<String>, ty: TensorType) -> Result<Value> {
        self.push_one(Input { name: name.into(), role: Role::Feed, ty }, &[])
    }

    /// A trained tensor.
    ///
    /// # Errors
    /// [`crate::Error::Duplicate`] if the name is taken.
    #[track_caller]
    pub fn parameter(&mut self, name: impl Into<String>, ty: TensorType) -> Result<Value> {
        self.push_one(Input { name: name.into(), role: Role::Parameter, ty }, &[])
    }

    /// A tensor kept on the device between runs that is not trained.
    ///
    /// # Errors
    /// [`crate::Error::Duplicate`] if the name is taken.
    #[track_caller]
    pub fn state(&mut self, name: impl Into<String>, ty: TensorType) -> Result<Value> {
        self.push_one(Input { name: name.into(), role: Role::State, ty }, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_second_input_of_one_name_is_refused_with_its_line() {
        let mut g = Graph::new();
        g.feed("x", TensorType::f32([2])).unwrap();
        let error = g.parameter("x", TensorType::f32([2])).unwrap_err();
        assert!(matches!(&error, Error::Duplicate { name, .. } if name == "x"), "{error}");
        assert!(error.to_string().contains("input.rs"), "{error}");
    }
}
