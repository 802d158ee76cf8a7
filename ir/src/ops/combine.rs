//! `combine`: slot rows back to their tokens, summed over the choices in order.
//!
//! `rows [S,D], slot_choice i32 [S], choice_slot i32 [N,k] (, gate f32 [N,k]) -> y [N,D]` (dtype of `rows`), with the two index
//! tensors as [`super::Assign`] gave them: `y[t] = sum_j gate[t,j] rows[choice_slot[t,j]]` (without a gate: 1); a choice
//! without a slot adds nothing. Differentiable in the rows and the gate. The transpose of [`super::Dispatch`].

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::dispatch::Slots;
use super::embedding::index;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Slot rows to tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Combine {}

impl Rule for Combine {
    const NAME: &'static str = "combine";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::between(operands, 3, 4)?;
        let slots = Slots::infer(operands, 1)?;
        let width = Slots::width(operands, 0, slots.slots, "slots")?;
        slots.gate(operands)?;
        Ok(smallvec![TensorType::new(operands[0].dtype, [slots.tokens, width])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let d = cx.cotangent();
        let (rows, slot_choice, choice_slot) = (cx.operands[0], cx.operands[1], cx.operands[2]);
        let gate = cx.operands.get(3).copied();
        let mut cotangents: Cotangents = smallvec![
            cx.when(0, |cx| cx.graph.dispatch(d, slot_choice, choice_slot, gate))?,
            Cotangent::Zero,
            Cotangent::Zero,
        ];
        if gate.is_some() {
            cotangents.push(cx.when(3, |cx| cx.graph.gate_grad(rows, d, slot_choice, choice_slot))?);
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (rows, choice_slot) = (operands[0], operands[2]);
        let (slots, d, k) = (rows.ty.shape[0], rows.ty.shape[1], choice_slot.ty.shape[1]);
        let mut y = Tensor::zeros(results[0].clone());
        for (c, &slot) in choice_slot.data.iter().enumerate() {
            let Some(s) = index(slot, slots) else { continue };
            let gate = operands.get(3).map_or(1.0, |gate| gate.data[c]);
            for i in 0..d {
                y.data[c / k * d + i] += gate * rows.data[s * d + i];
            }
        }
        vec![y]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The tokens `[N,D]` from the rows `[S,D]` of their slots, weighted by `gate` f32 `[N,k]` if given; see [`Combine`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn combine(
        &mut self,
        rows: Value,
        slot_choice: Value,
        choice_slot: Value,
        gate: Option<Value>,
    ) -> Result<Value> {
        let operands: SmallVec<[Value; 4]> = [rows, slot_choice, choice_slot].into_iter().chain(gate).collect();
        self.push_one(Combine {}, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_token_is_zero_and_unused_slots_are_not_read() {
        let rows = Tensor::f32([4, 1], vec![1.0, 10.0, 100.0, f64::NAN]);
        let slot_choice = Tensor::i32([4], &[1, 0, 2, -1]);
        let choice_slot = Tensor::i32([3, 2], &[1, 0, 2, -1, -1, -1]);
        let gate = Tensor::f32([3, 2], vec![2.0, 3.0, 4.0, f64::NAN, 1.0, 1.0]);
        let types = [TensorType::f32([3, 1])];
        let plain = Combine {}.reference(&[&rows, &slot_choice, &choice_slot], &types);
        assert_eq!(plain[0].data, [11.0, 100.0, 0.0]);
        let gated = Combine {}.reference(&[&rows, &slot_choice, &choice_slot, &gate], &types);
        assert_eq!(gated[0].data, [23.0, 400.0, 0.0]);
        let refused =
            Combine {}.infer(&[rows.ty, slot_choice.ty, choice_slot.ty, TensorType::f32([3, 1])]).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(3), "f32[3,2]"));
    }

    #[test]
    fn gradients_agree_with_differences() {
        let rows = Tensor::f32([5, 2], (0..10).map(|i| (f64::from(i) * 1.1).cos()).collect());
        let gate = Tensor::f32([3, 2], vec![0.5, 0.2, 0.9, 0.4, 0.3, 0.8]);
        for gated in [true, false] {
            check::assert_gradients(&[rows.clone(), gate.clone()], |g, v| {
                let slot_choice = g.constant(TensorType::i32([5]), vec![1.0, 4.0, 0.0, 2.0, -1.0])?;
                let choice_slot = g.constant(TensorType::i32([3, 2]), vec![2.0, 0.0, 3.0, -1.0, 1.0, -1.0])?;
                g.combine(v[0], slot_choice, choice_slot, gated.then_some(v[1]))
            });
        }
    }
}
