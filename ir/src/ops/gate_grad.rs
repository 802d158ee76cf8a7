//! `gate_grad`: the cotangent of the gates of a combine or a dispatch.
//!
//! `rows [S,D], y [N,D] (same dtype), slot_choice i32 [S], choice_slot i32 [N,k] -> f32 [N,k]`, with the two index tensors as
//! [`super::Assign`] gave them: `out[t,j] = rows[choice_slot[t,j]] · y[t]`, 0 for a choice without a slot. Differentiable
//! in the rows and `y`.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::dispatch::Slots;
use super::embedding::index;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Inner products of slot rows with their tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateGrad {}

impl Rule for GateGrad {
    const NAME: &'static str = "gate_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 4)?;
        let slots = Slots::infer(operands, 2)?;
        let width = Slots::width(operands, 0, slots.slots, "slots")?;
        check::ty(operands, 1, &TensorType::new(operands[0].dtype, [slots.tokens, width]))?;
        Ok(smallvec![TensorType::f32([slots.tokens, slots.choices])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let d = cx.cotangent();
        let (rows, y, slot_choice, choice_slot) = (cx.operands[0], cx.operands[1], cx.operands[2], cx.operands[3]);
        Ok(smallvec![
            cx.when(0, |cx| cx.graph.dispatch(y, slot_choice, choice_slot, Some(d)))?,
            cx.when(1, |cx| cx.graph.combine(rows, slot_choice, choice_slot, Some(d)))?,
            Cotangent::Zero,
            Cotangent::Zero,
        ])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (rows, y, choice_slot) = (operands[0], operands[1], operands[3]);
        let (slots, d, k) = (rows.ty.shape[0], rows.ty.shape[1], choice_slot.ty.shape[1]);
        let mut out = Tensor::zeros(results[0].clone());
        for (c, &slot) in choice_slot.data.iter().enumerate() {
            let Some(s) = index(slot, slots) else { continue };
            for i in 0..d {
                out.data[c] += rows.data[s * d + i] * y.data[c / k * d + i];
            }
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The inner product f32 `[N,k]` of each choice's row `[S,D]` with its token's row of `y [N,D]`; see [`GateGrad`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn gate_grad(&mut self, rows: Value, y: Value, slot_choice: Value, choice_slot: Value) -> Result<Value> {
        self.push_one(GateGrad {}, &[rows, y, slot_choice, choice_slot])
    }

    /// `slot_choice` i32 `[n]` and `choice_slot` i32 `[n,1]` by which each of `n` tokens has the slot of its own number: so a gate gradient is
    /// that of rows with rows.
    #[track_caller]
    pub(crate) fn own_slots(&mut self, n: usize) -> Result<[Value; 2]> {
        let own = self.constant(TensorType::i32([n]), (0..n).map(|s| s as f64).collect())?;
        Ok([own, self.reshape(own, [n, 1])?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_choice_has_no_gradient() {
        let rows = Tensor::f32([3, 2], vec![1.0, 2.0, 3.0, 4.0, f64::NAN, f64::NAN]);
        let y = Tensor::f32([2, 2], vec![10.0, 1.0, 100.0, 1000.0]);
        let (slot_choice, choice_slot) = (Tensor::i32([3], &[2, 0, -1]), Tensor::i32([2, 2], &[1, -1, 0, -1]));
        let operands = [&rows, &y, &slot_choice, &choice_slot];
        let types = GateGrad {}.infer(&operands.map(|t| t.ty.clone())).unwrap();
        assert_eq!(GateGrad {}.reference(&operands, &types)[0].data, [34.0, 0.0, 2100.0, 0.0]);
        let refused = GateGrad {}.infer(&[rows.ty, TensorType::f32([2, 3]), slot_choice.ty, choice_slot.ty]);
        let refused = refused.unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(1), "f32[2,2]"));
    }

    #[test]
    fn gradients_agree_with_differences() {
        let rows = Tensor::f32([5, 2], (0..10).map(|i| (f64::from(i) * 1.1).cos()).collect());
        let y = Tensor::f32([3, 2], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        check::assert_gradients(&[rows, y], |g, v| {
            let slot_choice = g.constant(TensorType::i32([5]), vec![1.0, 4.0, 0.0, 2.0, -1.0])?;
            let choice_slot = g.constant(TensorType::i32([3, 2]), vec![2.0, 0.0, 3.0, -1.0, 1.0, -1.0])?;
            g.gate_grad(v[0], v[1], slot_choice, choice_slot)
        });
    }
}
