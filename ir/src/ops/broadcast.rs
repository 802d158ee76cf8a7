//! `broadcast`: a tensor repeated along axes it does not have or has with extent 1.
//!
//! `x -> shape`, where the shape of `x`, aligned at the last axis, broadcasts to `shape`. Any dtype. Differentiable in
//! `x`: the sum over what was repeated.

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::binary::unbroadcast;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// A tensor repeated along axes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Broadcast {
    /// The shape of the result.
    pub shape: Shape,
}

/// The index along each axis of element `i` of a tensor of this shape.
pub(super) fn coordinates(i: usize, shape: &Shape) -> SmallVec<[usize; 4]> {
    let mut at = SmallVec::from_elem(0, shape.len());
    let mut rest = i;
    for (index, extent) in at.iter_mut().zip(shape.iter()).rev() {
        *index = rest % extent;
        rest /= extent;
    }
    at
}

/// The position of the element at these indices in a tensor of this shape.
pub(super) fn position(at: &[usize], shape: &Shape) -> usize {
    at.iter().zip(shape.iter()).fold(0, |position, (i, extent)| position * extent + i)
}

/// Which element of a tensor of shape `from` is element `i` of it broadcast to `shape`.
pub(super) fn read_at(i: usize, shape: &Shape, from: &Shape) -> usize {
    if shape == from {
        return i;
    }
    let (mut rest, mut stride, mut position) = (i, 1, 0);
    for (&extent, &own) in shape.iter().rev().zip(from.iter().rev()) {
        if own != 1 {
            position += rest % extent * stride;
            stride *= own;
        }
        rest /= extent;
    }
    position
}

/// The shape all operands broadcast to.
pub(super) fn unify(operands: &[TensorType]) -> Result<Shape, Mismatch> {
    let mut shape = Shape::default();
    for (i, operand) in operands.iter().enumerate() {
        let Some(unified) = shape.broadcast(&operand.shape) else {
            return Err(Mismatch::operand(i, format!("a shape that broadcasts with {shape}")));
        };
        shape = unified;
    }
    Ok(shape)
}

impl Rule for Broadcast {
    const NAME: &'static str = "broadcast";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        if operands[0].shape.broadcast(&self.shape).as_ref() != Some(&self.shape) {
            return Err(Mismatch::operand(0, format!("a shape that broadcasts to {}", self.shape)));
        }
        Ok(smallvec![TensorType::new(operands[0].dtype, self.shape.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let shape = cx.graph.ty(cx.operands[0]).shape.clone();
        let d = cx.cotangent();
        Ok(smallvec![Cotangent::Value(unbroadcast(cx.graph, d, &shape)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let x = operands[0];
        let data = (0..self.shape.elements()).map(|i| x.data[read_at(i, &self.shape, &x.ty.shape)]).collect();
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `x` repeated to `shape`; `x` itself if it has that shape.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the shape of `x` does not broadcast to `shape`.
    #[track_caller]
    pub fn broadcast(&mut self, x: Value, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        if self.ty(x).shape == shape { Ok(x) } else { self.push_one(Broadcast { shape }, &[x]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_repeated_along_rows_and_a_new_axis() {
        let op = Broadcast { shape: [2, 2, 3].into() };
        let x = Tensor::f32([2, 1], vec![1.0, 2.0]);
        let types = op.infer(std::slice::from_ref(&x.ty)).unwrap();
        let once = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0];
        assert_eq!(op.reference(&[&x], &types)[0].data, [once, once].concat());
        for wrong in [vec![3, 1], vec![2], vec![1, 1, 1, 1]] {
            assert!(op.infer(&[TensorType::f32(wrong)]).unwrap_err().wanted.contains("[2,2,3]"));
        }
    }

    #[test]
    fn the_gradient_sums_what_was_repeated() {
        let x = Tensor::f32([2, 1], vec![1.0, 2.0]);
        let dx = check::gradients_of(std::slice::from_ref(&x), |g, v| g.broadcast(v[0], [2, 2, 3]));
        assert_eq!((dx[0].ty.to_string(), &dx[0].data), ("f32[2,1]".into(), &vec![6.0, 6.0]));
        check::assert_gradients(&[x], |g, v| g.broadcast(v[0], [2, 2, 3]));
    }
}
