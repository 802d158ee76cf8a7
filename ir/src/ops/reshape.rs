//! `reshape`: the same elements in the same row-major order under another shape.
//!
//! `x -> shape` of as many elements. Any dtype. Costs nothing: a plan lets both share their storage. Differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// The same elements under another shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reshape {
    /// The shape of the result.
    pub shape: Shape,
}

impl Rule for Reshape {
    const NAME: &'static str = "reshape";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        if self.shape.checked_elements() != Some(operands[0].elements()) {
            return Err(Mismatch::operand(0, format!("as many elements as {} has", self.shape)));
        }
        Ok(smallvec![TensorType::new(operands[0].dtype, self.shape.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let shape = cx.graph.ty(cx.operands[0]).shape.clone();
        let d = cx.cotangent();
        Ok(smallvec![Cotangent::Value(cx.graph.reshape(d, shape)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        vec![Tensor::new(results[0].clone(), operands[0].data.clone())]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The elements of `x` under another shape; `x` itself if it has that shape.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the number of elements differs.
    #[track_caller]
    pub fn reshape(&mut self, x: Value, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        if self.ty(x).shape == shape { Ok(x) } else { self.push_one(Reshape { shape }, &[x]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_stays_and_the_gradient_comes_back_in_shape() {
        let x = Tensor::f32([2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        check::assert_gradients(&[x], |g, v| g.reshape(v[0], [3, 1, 2]));
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::f32([2, 3])).unwrap();
        assert_eq!(g.reshape(x, [2, 3]).unwrap(), x);
        let flat = g.reshape(x, [6]).unwrap();
        assert_eq!((g.nodes().len(), g.shape(flat)), (2, [6].as_slice()));
    }

    #[test]
    fn another_number_of_elements_is_refused() {
        let huge = Reshape { shape: [usize::MAX, 2].into() };
        for op in [huge, Reshape { shape: [5].into() }] {
            assert_eq!(op.infer(&[TensorType::f32([2, 3])]).unwrap_err().operand, Some(0));
        }
    }
}
