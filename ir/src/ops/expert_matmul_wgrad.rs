//! `expert_matmul_wgrad`: the gradient of every expert's weights (K-grouped).
//!
//! `a [S,K], b [S,N] (same dtype), offsets i32 [E+1] -> [E,K,N]`: `out[e] = sum of a[s]ᵀ b[s]` over
//! `offsets[e] <= s < offsets[e+1]`, zeros for an empty expert. Differentiable in both factors.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::segment_sum::{experts, segment};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// K-grouped matmul over ragged segments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertMatmulWgrad {}

impl Rule for ExpertMatmulWgrad {
    const NAME: &'static str = "expert_matmul_wgrad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 3)?;
        check::float(operands, 0)?;
        check::rank(operands, 0, 2)?;
        check::dtype(operands, 1, operands[0].dtype)?;
        check::rank(operands, 1, 2)?;
        let (a, b) = (&operands[0].shape, &operands[1].shape);
        if b[0] != a[0] {
            return Err(Mismatch::operand(1, format!("[{},N], as operand 0 has {0} slots", a[0])));
        }
        let e = experts(operands, 2)?;
        Ok(smallvec![TensorType::new(operands[0].dtype, [e, a[1], b[1]])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (a, b, offsets, d) = (cx.operands[0], cx.operands[1], cx.operands[2], cx.cotangent());
        Ok(smallvec![
            cx.when(0, |cx| cx.graph.expert_matmul(b, d, offsets, None, true))?,
            cx.when(1, |cx| cx.graph.expert_matmul(a, d, offsets, None, false))?,
            Cotangent::Zero,
        ])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (a, b, offsets) = (operands[0], operands[1], operands[2]);
        let (k, n) = (a.ty.shape[1], b.ty.shape[1]);
        let mut out = Tensor::zeros(results[0].clone());
        for e in 0..results[0].shape[0] {
            for s in segment(offsets, e) {
                for i in 0..k {
                    for j in 0..n {
                        out.data[(e * k + i) * n + j] += a.data[s * k + i] * b.data[s * n + j];
                    }
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
    /// `aᵀ b` over every expert's segment, `a [S,K]` and `b [S,N]` to `[E,K,N]`; see [`ExpertMatmulWgrad`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn expert_matmul_wgrad(&mut self, a: Value, b: Value, offsets: Value) -> Result<Value> {
        self.push_one(ExpertMatmulWgrad {}, &[a, b, offsets])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_expert_gets_zeros_and_unused_slots_do_not_count() {
        let a = Tensor::f32([3, 2], vec![1.0, 2.0, 3.0, 4.0, f64::NAN, f64::NAN]);
        let b = Tensor::f32([3, 1], vec![10.0, 100.0, f64::NAN]);
        let offsets = Tensor::i32([3], &[0, 0, 2]);
        let operands = [&a, &b, &offsets];
        let types = ExpertMatmulWgrad {}.infer(&operands.map(|t| t.ty.clone())).unwrap();
        assert_eq!(types[0], TensorType::f32([2, 2, 1]));
        assert_eq!(ExpertMatmulWgrad {}.reference(&operands, &types)[0].data, [0.0, 0.0, 310.0, 420.0]);
        let refused = ExpertMatmulWgrad {}.infer(&[a.ty, TensorType::f32([4, 1]), offsets.ty]).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(1), "[3,N], as operand 0 has 3 slots"));
    }

    #[test]
    fn gradients_agree_with_differences() {
        let a = Tensor::f32([5, 2], (0..10).map(|i| (f64::from(i) * 0.9).sin()).collect());
        let b = Tensor::f32([5, 3], (0..15).map(|i| (f64::from(i) * 0.4).cos()).collect());
        check::assert_gradients(&[a, b], |g, v| {
            let offsets = g.constant(TensorType::i32([4]), vec![0.0, 3.0, 3.0, 4.0])?;
            g.expert_matmul_wgrad(v[0], v[1], offsets)
        });
    }
}
