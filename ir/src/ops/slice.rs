//! `slice`: a range of one axis.
//!
//! `x -> x[.., start..start+len, ..]` on axis `axis`. Any dtype. Differentiable: zeros around the cotangent.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// A range of one axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// The axis.
    pub axis: usize,
    /// The first index that is kept.
    pub start: usize,
    /// How many are kept.
    pub len: usize,
}

/// `shape` with another extent on one axis.
pub(super) fn with_extent(shape: &Shape, axis: usize, extent: usize) -> Shape {
    Shape::new(shape.iter().enumerate().map(|(i, &n)| if i == axis { extent } else { n }))
}

/// Number of elements before (outer) and after (inner) one axis.
pub(super) fn around(shape: &Shape, axis: usize) -> (usize, usize) {
    (shape[..axis].iter().product(), shape[axis + 1..].iter().product())
}

impl Rule for Slice {
    const NAME: &'static str = "slice";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        check::axis(operands, 0, self.axis)?;
        let x = &operands[0];
        if self.start.checked_add(self.len).is_none_or(|end| end > x.shape[self.axis]) {
            let (axis, start, len) = (self.axis, self.start, self.len);
            return Err(Mismatch::operand(0, format!("indices {start}..{start}+{len} on axis {axis}")));
        }
        Ok(smallvec![TensorType::new(x.dtype, with_extent(&x.shape, self.axis, self.len))])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let extent = cx.graph.shape(cx.operands[0])[self.axis];
        let d = cx.cotangent();
        Ok(smallvec![Cotangent::Value(cx.graph.pad(d, self.axis, self.start, extent - self.start - self.len)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let x = operands[0];
        let (outer, inner) = around(&x.ty.shape, self.axis);
        let extent = x.ty.shape[self.axis];
        let mut out = Tensor::zeros(results[0].clone());
        for o in 0..outer {
            for j in 0..self.len {
                for i in 0..inner {
                    out.data[(o * self.len + j) * inner + i] = x.data[(o * extent + self.start + j) * inner + i];
                }
            }
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The indices `start..start+len` of one axis of `x`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `x` does not have them.
    #[track_caller]
    pub fn slice(&mut self, x: Value, axis: usize, start: usize, len: usize) -> Result<Value> {
        self.push_one(Slice { axis, start, len }, &[x])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_a_middle_axis() {
        let x = Tensor::i32([2, 3, 2], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        let op = Slice { axis: 1, start: 1, len: 2 };
        let types = op.infer(std::slice::from_ref(&x.ty)).unwrap();
        assert_eq!(op.reference(&[&x], &types)[0].data, [2.0, 3.0, 4.0, 5.0, 8.0, 9.0, 10.0, 11.0]);
        let x = Tensor::f32([2, 3, 2], x.data);
        check::assert_gradients(&[x], |g, v| g.slice(v[0], 1, 1, 1));
    }

    #[test]
    fn a_range_beyond_the_end_is_refused() {
        for (axis, start, len) in [(0, 2, 2), (1, 0, 1), (0, usize::MAX, 2)] {
            let error = Slice { axis, start, len }.infer(&[TensorType::f32([3])]).unwrap_err();
            assert_eq!(error.operand, Some(0));
        }
        assert_eq!(Slice { axis: 0, start: 3, len: 0 }.infer(&[TensorType::f32([3])]).unwrap()[0].shape[..], [0]);
    }
}
