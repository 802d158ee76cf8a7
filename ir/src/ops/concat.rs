//! `concat`: tensors joined along one axis.
//!
//! `one or more xs (same dtype, same extents on the other axes) -> joined` on axis `axis`, in order. Differentiable in
//! each: its range of the cotangent.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::slice::{around, with_extent};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Tensors joined along one axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concat {
    /// The axis.
    pub axis: usize,
}

impl Rule for Concat {
    const NAME: &'static str = "concat";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        let Some(first) = operands.first() else {
            return Err(Mismatch::op("at least one operand"));
        };
        check::axis(operands, 0, self.axis)?;
        let mut extent = 0usize;
        for (i, x) in operands.iter().enumerate() {
            check::dtype(operands, i, first.dtype)?;
            check::rank(operands, i, first.shape.len())?;
            check::shape(operands, i, with_extent(&first.shape, self.axis, x.shape[self.axis]))?;
            extent = extent.checked_add(x.shape[self.axis]).ok_or_else(|| {
                Mismatch::operand(i, format!("extents on axis {} whose sum can be counted", self.axis))
            })?;
        }
        Ok(smallvec![TensorType::new(first.dtype, with_extent(&first.shape, self.axis, extent))])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let d = cx.cotangent();
        let mut cotangents = Cotangents::new();
        let mut start = 0;
        for i in 0..cx.operands.len() {
            let len = cx.graph.shape(cx.operands[i])[self.axis];
            cotangents.push(cx.when(i, |cx| cx.graph.slice(d, self.axis, start, len))?);
            start += len;
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (outer, inner) = around(&results[0].shape, self.axis);
        let mut data = Vec::with_capacity(results[0].elements());
        for o in 0..outer {
            for x in operands {
                let block = x.ty.shape[self.axis] * inner;
                data.extend_from_slice(&x.data[o * block..(o + 1) * block]);
            }
        }
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `xs` joined along one axis.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if there is none, or they differ in more than the extent of that axis.
    #[track_caller]
    pub fn concat(&mut self, xs: &[Value], axis: usize) -> Result<Value> {
        self.push_one(Concat { axis }, xs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_joined_in_order() {
        let (a, b) = (Tensor::f32([2, 1], vec![1.0, 2.0]), Tensor::f32([2, 2], vec![3.0, 4.0, 5.0, 6.0]));
        let op = Concat { axis: 1 };
        let types = op.infer(&[a.ty.clone(), b.ty.clone()]).unwrap();
        assert_eq!(op.reference(&[&a, &b], &types)[0].data, [1.0, 3.0, 4.0, 2.0, 5.0, 6.0]);
        check::assert_gradients(&[a, b], |g, v| g.concat(&[v[0], v[1], v[0]], 1));
    }

    #[test]
    fn what_differs_elsewhere_is_refused() {
        let op = Concat { axis: 0 };
        assert!(op.infer(&[]).unwrap_err().wanted.contains("at least one"));
        let infer = |other: TensorType| op.infer(&[TensorType::f32([2, 3]), other]);
        assert!(infer(TensorType::f32([5, 4])).unwrap_err().wanted.contains("[5,3]"));
        assert_eq!(infer(TensorType::i32([5, 3])).unwrap_err().operand, Some(1));
        assert_eq!(infer(TensorType::f32([5])).unwrap_err().operand, Some(1));
        assert_eq!(infer(TensorType::f32([0, 3])).unwrap()[0], TensorType::f32([2, 3]));
    }
}
