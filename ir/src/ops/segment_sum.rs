//! `segment_sum`: the sum of the rows of every expert's segment, as the gradient of a per-expert bias needs it.
//!
//! `rows [S,N], offsets i32 [E+1] -> [E,N]` (dtype of `rows`): `out[e] = sum of rows[s]` over
//! `offsets[e] <= s < offsets[e+1]`, zeros for an empty expert. Not differentiable: no op of the set needs it.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Sums over ragged segments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentSum {}

/// Operand `i` is `offsets i32 [E+1]`; gives E.
pub(super) fn experts(operands: &[TensorType], i: usize) -> Result<usize, Mismatch> {
    check::dtype(operands, i, DType::I32)?;
    check::rank(operands, i, 1)?;
    operands[i].shape[0].checked_sub(1).ok_or_else(|| Mismatch::operand(i, "[E+1], at least one offset"))
}

/// The slots of expert `e`.
pub(super) fn segment(offsets: &Tensor, e: usize) -> Range<usize> {
    offsets.data[e] as usize..offsets.data[e + 1] as usize
}

impl Rule for SegmentSum {
    const NAME: &'static str = "segment_sum";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        check::float(operands, 0)?;
        check::rank(operands, 0, 2)?;
        let e = experts(operands, 1)?;
        Ok(smallvec![TensorType::new(operands[0].dtype, [e, operands[0].shape[1]])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(
            Self::NAME,
            "it stands only in the gradient of expert_matmul, whose second derivative is not in the set",
        )
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (rows, offsets) = (operands[0], operands[1]);
        let n = rows.ty.shape[1];
        let mut out = Tensor::zeros(results[0].clone());
        for e in 0..results[0].shape[0] {
            for s in segment(offsets, e) {
                for i in 0..n {
                    out.data[e * n + i] += rows.data[s * n + i];
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
    /// The sum `[E,N]` of the rows `[S,N]` of every expert's segment; see [`SegmentSum`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn segment_sum(&mut self, rows: Value, offsets: Value) -> Result<Value> {
        self.push_one(SegmentSum {}, &[rows, offsets])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_slots_do_not_count() {
        let rows = Tensor::f32([4, 1], vec![1.0, 20.0, 300.0, f64::NAN]);
        let offsets = Tensor::i32([4], &[0, 2, 2, 3]);
        let types = SegmentSum {}.infer(&[rows.ty.clone(), offsets.ty.clone()]).unwrap();
        assert_eq!(types[0], TensorType::f32([3, 1]));
        assert_eq!(SegmentSum {}.reference(&[&rows, &offsets], &types)[0].data, [21.0, 0.0, 300.0]);
        assert_eq!(SegmentSum {}.infer(&[rows.ty, TensorType::i32([0])]).unwrap_err().operand, Some(1));
    }

    #[test]
    fn it_is_the_gradient_of_an_expert_bias() {
        let ramp = |shape: &[usize]| {
            let n: usize = shape.iter().product();
            Tensor::f32(shape, (0..n).map(|i| (i as f64 * 0.9).sin()).collect())
        };
        for (transpose, w) in [(false, ramp(&[3, 2, 4])), (true, ramp(&[3, 4, 2]))] {
            check::assert_gradients(&[ramp(&[5, 2]), w, ramp(&[3, 4])], |g, v| {
                let offsets = g.constant(TensorType::i32([4]), vec![0.0, 3.0, 3.0, 4.0])?;
                g.expert_matmul(v[0], v[1], offsets, Some(v[2]), transpose)
            });
        }
    }
}
