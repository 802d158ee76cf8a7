//! `expert_matmul`: every expert's rows times its weights (M-grouped).
//!
//! `rows [S,K], w [E,K,N], offsets i32 [E+1] (, bias [E,N]) -> [S,N]`; with `transpose` the weights are `[E,N,K]`.
//! For a slot `s` in the segment of expert `e`, that is `offsets[e] <= s < offsets[e+1]`:
//! `out[s] = rows[s] · w[e] + bias[e]`. Slots at or after `offsets[E]` are unused and give 0.
//! Differentiable in rows, weights and bias.

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// M-grouped matmul over ragged segments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertMatmul {
    /// The weights are `[E,N,K]` instead of `[E,K,N]`.
    pub transpose: bool,
}

impl Rule for ExpertMatmul {
    const NAME: &'static str = "expert_matmul";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::between(operands, 3, 4)?;
        check::rank(operands, 0, 2)?;
        check::rank(operands, 1, 3)?;
        check::float(operands, 0)?;
        check::dtype(operands, 1, operands[0].dtype)?;
        let (rows, w) = (&operands[0].shape, &operands[1].shape);
        let (k, n) = if self.transpose { (w[2], w[1]) } else { (w[1], w[2]) };
        if rows[1] != k {
            return Err(Mismatch::operand(0, format!("[S,{k}], as the weights take {k} columns")));
        }
        check::ty(operands, 2, &TensorType::i32([w[0] + 1]))?;
        if operands.len() == 4 {
            check::float(operands, 3)?;
            check::shape(operands, 3, [w[0], n])?;
        }
        Ok(smallvec![TensorType::new(operands[0].dtype, [rows[0], n])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let d = cx.cotangent();
        let (rows, w, offsets) = (cx.operands[0], cx.operands[1], cx.operands[2]);
        let mut cotangents: Cotangents = smallvec![
            cx.when(0, |cx| cx.graph.expert_matmul(d, w, offsets, None, !self.transpose))?,
            cx.when(1, |cx| {
                let (a, b) = if self.transpose { (d, rows) } else { (rows, d) };
                cx.graph.expert_matmul_wgrad(a, b, offsets)
            })?,
            Cotangent::Zero,
        ];
        if let Some(&bias) = cx.operands.get(3) {
            cotangents.push(cx.when(3, |cx| {
                let sum = cx.graph.segment_sum(d, offsets)?;
                let dtype = cx.graph.ty(bias).dtype;
                cx.graph.cast(sum, dtype)
            })?);
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (rows, w, offsets) = (operands[0], operands[1], operands[2]);
        let (k, n) = (rows.ty.shape[1], results[0].shape[1]);
        let mut out = Tensor::zeros(results[0].clone());
        for e in 0..w.ty.shape[0] {
            for s in offsets.data[e] as usize..offsets.data[e + 1] as usize {
                for j in 0..n {
                    let mut sum = operands.get(3).map_or(0.0, |bias| bias.data[e * n + j]);
                    for i in 0..k {
                        let at = if self.transpose { j * k + i } else { i * n + j };
                        sum += rows.data[s * k + i] * w.data[e * k * n + at];
                    }
                    out.data[s * n + j] = sum;
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
    /// Every expert's rows times its weights; see [`ExpertMatmul`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn expert_matmul(
        &mut self,
        rows: Value,
        w: Value,
        offsets: Value,
        bias: Option<Value>,
        transpose: bool,
    ) -> Result<Value> {
        let operands: SmallVec<[Value; 4]> = [rows, w, offsets].into_iter().chain(bias).collect();
        self.push_one(ExpertMatmul { transpose }, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn an_idle_expert_and_unused_slots_give_zero() {
        let rows = Tensor::f32([3, 2], vec![1.0, 2.0, 3.0, 4.0, f64::NAN, f64::NAN]);
        let w = Tensor::f32([2, 2, 1], vec![9.0, 9.0, 10.0, 1.0]);
        let offsets = Tensor::i32([3], &[0, 0, 2]);
        let op = ExpertMatmul { transpose: false };
        let out = op.reference(&[&rows, &w, &offsets], &[TensorType::f32([3, 1])]);
        assert_eq!(out[0].data, [12.0, 34.0, 0.0]);
    }

    #[test]
    fn a_width_that_does_not_fit_is_named() {
        let operands = [TensorType::f32([3, 5]), TensorType::f32([2, 4, 1]), TensorType::new(DType::I32, [3])];
        let mismatch = ExpertMatmul { transpose: false }.infer(&operands).unwrap_err();
        assert_eq!((mismatch.operand, mismatch.wanted.contains("[S,4]")), (Some(0), true));
    }
}
