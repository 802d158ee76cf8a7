//! `combine`: slot rows back to their tokens, summed over the choices in order.
//!
//! `rows [S,D], slot_choice i32 [S], choice_slot i32 [N,k] (, gate f32 [N,k]) (, side [N,D]) (, coefficient f32 [N,2]) -> y
//! [N,D]` (dtype of `rows`, which the side has too), with the two index tensors as [`super::Assign`] gave them:
//! `y[t] = c[t,0] sum_j gate[t,j] rows[choice_slot[t,j]] + c[t,1] side[t]` (without a gate: 1, without coefficients: 1 and 1,
//! without a side: nothing and no coefficients); a choice without a slot adds nothing. The side is the branch that all tokens
//! take: the dense network of a residual MoE (PR-MoE, its coefficients a softmax of two), shared experts (1 and 1, or 1
//! and a sigmoid). Differentiable in the rows, the gate, the side and the coefficients. The transpose of [`super::Dispatch`].

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::dispatch::Slots;
use super::embedding::index;
use super::{CompareFn, Cotangents, ReduceFn, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Slot rows to tokens; which operands follow the three that are always there, in the order of the fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Combine {
    /// There is a `gate f32 [N,k]`.
    pub gate: bool,
    /// There is a `side [N,D]`.
    pub side: bool,
    /// There is a `coefficient f32 [N,2]`, which needs a side.
    pub coefficient: bool,
}

impl Combine {
    /// Places of the gate, the side and the coefficients among the operands.
    pub fn operands(&self) -> [Option<usize>; 3] {
        let mut count = 3;
        [self.gate, self.side, self.coefficient].map(|there| {
            let at = there.then_some(count);
            count += usize::from(there);
            at
        })
    }
}

impl Rule for Combine {
    const NAME: &'static str = "combine";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::attribute(self.side || !self.coefficient, || "a side, as there are coefficients".into())?;
        let [gate, side, coefficient] = self.operands();
        check::count(operands, 3 + [gate, side, coefficient].into_iter().flatten().count())?;
        let slots = Slots::infer(operands, 1)?;
        let width = Slots::width(operands, 0, slots.slots, "slots")?;
        let y = TensorType::new(operands[0].dtype, [slots.tokens, width]);
        let gate = (gate, TensorType::f32([slots.tokens, slots.choices]));
        for (at, ty) in [gate, (side, y.clone()), (coefficient, TensorType::f32([slots.tokens, 2]))] {
            at.map_or(Ok(()), |at| check::ty(operands, at, &ty))?;
        }
        Ok(smallvec![y])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let d = cx.cotangent();
        let (rows, slot_choice, choice_slot) = (cx.operands[0], cx.operands[1], cx.operands[2]);
        let [gate_at, side_at, coefficient_at] = self.operands();
        let [gate, side, coefficient] = self.operands().map(|at| at.map(|at| cx.operands[at]));
        let parts = match coefficient {
            Some(c) => Some([cx.graph.slice(c, 1, 0, 1)?, cx.graph.slice(c, 1, 1, 1)?]),
            None => None,
        };
        let mut cotangents: Cotangents = smallvec![Cotangent::Zero; cx.operands.len()];
        cotangents[0] = cx.when(0, |cx| {
            let g = &mut *cx.graph;
            let weight = match (parts, gate) {
                (Some([of_rows, _]), Some(gate)) => Some(g.mul(gate, of_rows)?),
                (Some([of_rows, _]), None) => Some(g.broadcast(of_rows, g.ty(choice_slot).shape.clone())?),
                (None, gate) => gate,
            };
            g.dispatch(d, slot_choice, choice_slot, weight)
        })?;
        let asked = |at: Option<usize>| at.filter(|&at| cx.needed[at]);
        let (gate_at, side_at, coefficient_at) = (asked(gate_at), asked(side_at), asked(coefficient_at));
        let g = &mut *cx.graph;
        // d · rows of each choice, before any weight.
        let inner = match gate_at.or(coefficient_at) {
            Some(_) => Some(g.gate_grad(rows, d, slot_choice, choice_slot)?),
            None => None,
        };
        if let (Some(at), Some(inner)) = (gate_at, inner) {
            let d_gate = match parts {
                Some([of_rows, _]) => g.mul(inner, of_rows)?,
                None => inner,
            };
            cotangents[at] = Cotangent::Value(d_gate);
        }
        if let Some(at) = side_at {
            let d_side = match parts {
                Some([_, of_side]) => {
                    let dtype = g.ty(d).dtype;
                    let wide = g.cast(d, DType::F32)?;
                    let d_side = g.mul(wide, of_side)?;
                    g.cast(d_side, dtype)?
                }
                None => d,
            };
            cotangents[at] = Cotangent::Value(d_side);
        }
        if let (Some(at), Some(inner), Some(side)) = (coefficient_at, inner, side) {
            let of_choices = match gate {
                Some(gate) => weighted(g, inner, gate, choice_slot)?,
                None => inner,
            };
            let tokens = g.shape(d)[0];
            let sum = g.reduce(ReduceFn::Sum, of_choices, &[1])?;
            let of_rows = g.reshape(sum, [tokens, 1])?;
            let [slot_choice, choice_slot] = g.own_slots(tokens)?;
            let of_side = g.gate_grad(side, d, slot_choice, choice_slot)?;
            cotangents[at] = Cotangent::Value(g.concat(&[of_rows, of_side], 1)?);
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (rows, choice_slot) = (operands[0], operands[2]);
        let [gate, side, coefficient] = self.operands().map(|at| at.map(|at| &operands[at].data));
        let (slots, d, k) = (rows.ty.shape[0], rows.ty.shape[1], choice_slot.ty.shape[1]);
        let mut y = Tensor::zeros(results[0].clone());
        for (c, &slot) in choice_slot.data.iter().enumerate() {
            let Some(s) = index(slot, slots) else { continue };
            let gate = gate.map_or(1.0, |gate| gate[c]);
            for i in 0..d {
                y.data[c / k * d + i] += gate * rows.data[s * d + i];
            }
        }
        if let Some(side) = side {
            for (i, (y, side)) in y.data.iter_mut().zip(side).enumerate() {
                let [of_rows, of_side] = coefficient.map_or([1.0, 1.0], |c| [c[i / d * 2], c[i / d * 2 + 1]]);
                *y = of_rows * *y + of_side * side;
            }
        }
        vec![y]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

/// `gate * inner`, 0 for a choice without a slot, whose gate may be anything.
fn weighted(g: &mut Graph, inner: Value, gate: Value, choice_slot: Value) -> Result<Value> {
    let none = g.splat(TensorType::i32([]), 0.0)?;
    let has_slot = g.compare(CompareFn::Ge, choice_slot, none)?;
    let (zero, product) = (g.scalar(0.0)?, g.mul(inner, gate)?);
    g.select(has_slot, product, zero)
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
        self.combine_with(rows, slot_choice, choice_slot, gate, None, None)
    }

    /// [`Graph::combine`] with a branch `side [N,D]` that every token takes, and a pair of coefficients f32 `[N,2]` for each
    /// token, of the rows and of the side.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit, or there are coefficients without a side.
    #[track_caller]
    pub fn combine_with(
        &mut self,
        rows: Value,
        slot_choice: Value,
        choice_slot: Value,
        gate: Option<Value>,
        side: Option<Value>,
        coefficient: Option<Value>,
    ) -> Result<Value> {
        let op = Combine { gate: gate.is_some(), side: side.is_some(), coefficient: coefficient.is_some() };
        let optional = [gate, side, coefficient].into_iter().flatten();
        let operands: SmallVec<[Value; 6]> = [rows, slot_choice, choice_slot].into_iter().chain(optional).collect();
        self.push_one(op, &operands)
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
        let plain = Combine::default().reference(&[&rows, &slot_choice, &choice_slot], &types);
        assert_eq!(plain[0].data, [11.0, 100.0, 0.0]);
        let op = Combine { gate: true, ..Combine::default() };
        let gated = op.reference(&[&rows, &slot_choice, &choice_slot, &gate], &types);
        assert_eq!(gated[0].data, [23.0, 400.0, 0.0]);
        let refused = op.infer(&[rows.ty, slot_choice.ty, choice_slot.ty, TensorType::f32([3, 1])]).unwrap_err();
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
