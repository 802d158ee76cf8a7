//! `dispatch`: token rows to their slots.
//!
//! `x [N,D], slot_choice i32 [S], choice_slot i32 [N,k] (, gate f32 [N,k]) -> rows [S,D]` (dtype of `x`), with the two index
//! tensors as [`super::Assign`] gave them: `rows[s] = gate[c] x[c/k]` for `c = slot_choice[s]` (without a gate: 1), 0 for
//! an unused slot. Differentiable in `x` and the gate. The transpose of [`super::Combine`].

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::embedding::index;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Token rows to slots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dispatch {}

/// The extents of an assignment.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    /// S.
    pub(super) slots: usize,
    /// N.
    pub(super) tokens: usize,
    /// k.
    pub(super) choices: usize,
}

impl Slots {
    /// Operands `at` and `at + 1` are `slot_choice i32 [S]` and `choice_slot i32 [N,k]`.
    pub(super) fn infer(operands: &[TensorType], at: usize) -> Result<Slots, Mismatch> {
        check::dtype(operands, at, DType::I32)?;
        check::rank(operands, at, 1)?;
        check::dtype(operands, at + 1, DType::I32)?;
        check::rank(operands, at + 1, 2)?;
        let (slots, choice_slot) = (operands[at].shape[0], &operands[at + 1].shape);
        if choice_slot[1] == 0 {
            return Err(Mismatch::operand(at + 1, "[N,k] with k at least 1"));
        }
        Ok(Slots { slots, tokens: choice_slot[0], choices: choice_slot[1] })
    }

    /// Operand `i` is a float matrix of `rows` rows, as many as there are `what`; gives its width.
    pub(super) fn width(operands: &[TensorType], i: usize, rows: usize, what: &str) -> Result<usize, Mismatch> {
        check::float(operands, i)?;
        check::rank(operands, i, 2)?;
        if operands[i].shape[0] != rows {
            return Err(Mismatch::operand(i, format!("[{rows},D], as there are {rows} {what}")));
        }
        Ok(operands[i].shape[1])
    }

    /// Operand 3, if it is there, is `gate f32 [N,k]`.
    pub(super) fn gate(&self, operands: &[TensorType]) -> Result<(), Mismatch> {
        if operands.len() == 4 {
            check::ty(operands, 3, &TensorType::f32([self.tokens, self.choices]))?;
        }
        Ok(())
    }
}

impl Rule for Dispatch {
    const NAME: &'static str = "dispatch";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::between(operands, 3, 4)?;
        let slots = Slots::infer(operands, 1)?;
        let width = Slots::width(operands, 0, slots.tokens, "tokens")?;
        slots.gate(operands)?;
        Ok(smallvec![TensorType::new(operands[0].dtype, [slots.slots, width])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let d = cx.cotangent();
        let (x, slot_choice, choice_slot) = (cx.operands[0], cx.operands[1], cx.operands[2]);
        let gate = cx.operands.get(3).copied();
        let mut cotangents: Cotangents = smallvec![
            cx.when(0, |cx| cx.graph.combine(d, slot_choice, choice_slot, gate))?,
            Cotangent::Zero,
            Cotangent::Zero,
        ];
        if gate.is_some() {
            cotangents.push(cx.when(3, |cx| cx.graph.gate_grad(d, x, slot_choice, choice_slot))?);
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, slot_choice, choice_slot) = (operands[0], operands[1], operands[2]);
        let (d, k) = (x.ty.shape[1], choice_slot.ty.shape[1]);
        let mut rows = Tensor::zeros(results[0].clone());
        for (s, &choice) in slot_choice.data.iter().enumerate() {
            let Some(c) = index(choice, choice_slot.data.len()) else { continue };
            let gate = operands.get(3).map_or(1.0, |gate| gate.data[c]);
            for i in 0..d {
                rows.data[s * d + i] = gate * x.data[c / k * d + i];
            }
        }
        vec![rows]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The rows `[S,D]` of the slots from the tokens `x [N,D]`, weighted by `gate` f32 `[N,k]` if given; see [`Dispatch`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn dispatch(&mut self, x: Value, slot_choice: Value, choice_slot: Value, gate: Option<Value>) -> Result<Value> {
        let operands: SmallVec<[Value; 4]> = [x, slot_choice, choice_slot].into_iter().chain(gate).collect();
        self.push_one(Dispatch {}, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_slots_are_zero() {
        let x = Tensor::f32([2, 1], vec![10.0, 20.0]);
        let (slot_choice, choice_slot) = (Tensor::i32([3], &[3, 0, -1]), Tensor::i32([2, 2], &[1, -1, -1, 0]));
        let gate = Tensor::f32([2, 2], vec![0.5, f64::NAN, f64::NAN, 2.0]);
        let types = [TensorType::f32([3, 1])];
        let plain = Dispatch {}.reference(&[&x, &slot_choice, &choice_slot], &types);
        assert_eq!(plain[0].data, [20.0, 10.0, 0.0]);
        let gated = Dispatch {}.reference(&[&x, &slot_choice, &choice_slot, &gate], &types);
        assert_eq!(gated[0].data, [40.0, 5.0, 0.0]);
        let short = [TensorType::f32([3, 1]), slot_choice.ty, choice_slot.ty];
        let refused = Dispatch {}.infer(&short).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(0), "[2,D], as there are 2 tokens"));
    }

    #[test]
    fn gradients_agree_with_differences() {
        let x = Tensor::f32([3, 2], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        let gate = Tensor::f32([3, 2], vec![0.5, 0.2, 0.9, 0.4, 0.3, 0.8]);
        for gated in [true, false] {
            check::assert_gradients(&[x.clone(), gate.clone()], |g, v| {
                let slot_choice = g.constant(TensorType::i32([5]), vec![1.0, 4.0, 0.0, 2.0, -1.0])?;
                let choice_slot = g.constant(TensorType::i32([3, 2]), vec![2.0, 0.0, 3.0, -1.0, 1.0, -1.0])?;
                g.dispatch(v[0], slot_choice, choice_slot, gated.then_some(v[1]))
            });
        }
    }
}
