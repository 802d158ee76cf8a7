//! `assign`: slots for the chosen experts, grouped by expert.
//!
//! `expert_index i32 [N,k] (, priority f32 [N,k]) -> slot_choice i32 [S], choice_slot i32 [N,k], offsets i32 [E+1],
//! dropped i32 []` with `S = N*k`, or `min(N*k, E*capacity)`. Choice c is `t*k + j` for choice j of token t. Each expert
//! keeps all its choices, with a capacity C the first C of them: by `priority`, larger first (NaN last), then by `order`.
//! The kept choices of expert e own the segment `offsets[e]..offsets[e+1]` of slots, in ascending c; slots from
//! `offsets[E]` on are unused. `slot_choice` is the choice of a slot (-1: unused), `choice_slot` the slot of a choice (-1:
//! none), `dropped` the number of choices that capacity turned away. An index outside `0..E` (such as -1) routes nowhere
//! and is not counted as dropped. Integers only: no gradient, and none for the priority, which only orders.

use std::cmp::Ordering;

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

/// The order in which choices of equal priority fill an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// By token, then by choice.
    TokenMajor,
    /// All first choices before all second ones, then by token (top-2 of GShard and DeepSpeed-MoE).
    ChoiceMajor,
}

/// Slots in expert order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assign {
    /// Number of experts E.
    pub experts: usize,
    /// Most slots of one expert; `None`: dropless.
    pub capacity: Option<usize>,
    /// Which choices are kept first, beside the priority.
    pub order: Order,
}

impl Rule for Assign {
    const NAME: &'static str = "assign";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::between(operands, 1, 2)?;
        check::dtype(operands, 0, DType::I32)?;
        check::rank(operands, 0, 2)?;
        check::attribute(self.experts > 0, || "at least one expert".into())?;
        let shape = &operands[0].shape;
        if shape[1] == 0 {
            return Err(Mismatch::operand(0, "[N,k] with k at least 1"));
        }
        let choices = shape.checked_elements().filter(|&n| i32::try_from(n).is_ok());
        let Some(choices) = choices else {
            return Err(Mismatch::operand(0, "no more choices than an i32 counts"));
        };
        if operands.len() == 2 {
            check::ty(operands, 1, &TensorType::f32(shape.clone()))?;
            check::attribute(self.capacity.is_some(), || "a capacity, as a priority only matters with one".into())?;
        }
        let slots = self.capacity.map_or(choices, |c| choices.min(self.experts.saturating_mul(c)));
        Ok(smallvec![
            TensorType::i32([slots]),
            operands[0].clone(),
            TensorType::i32([self.experts.saturating_add(1)]),
            TensorType::i32([]),
        ])
    }

    /// The results are integers, so that no cotangent ever reaches the operands.
    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        Ok(smallvec![Cotangent::Zero; cx.operands.len()])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let expert_index = operands[0];
        let (n, k) = (expert_index.ty.shape[0], expert_index.ty.shape[1]);
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        out[0].data.fill(-1.0);
        out[1].data.fill(-1.0);
        let priority = |c: usize| match operands.get(1).map(|p| p.data[c]) {
            Some(p) if !p.is_nan() => p,
            Some(_) | None => f64::NEG_INFINITY,
        };
        let rank = |c: usize| match self.order {
            Order::TokenMajor => c,
            Order::ChoiceMajor => c % k * n + c / k,
        };
        let mut slot = 0;
        for e in 0..self.experts {
            let mut kept: Vec<usize> =
                (0..n * k).filter(|&c| index(expert_index.data[c], self.experts) == Some(e)).collect();
            kept.sort_by(|&a, &b| {
                let by_priority = priority(b).partial_cmp(&priority(a)).unwrap_or(Ordering::Equal);
                by_priority.then(rank(a).cmp(&rank(b)))
            });
            let all = kept.len();
            kept.truncate(self.capacity.unwrap_or(all));
            out[3].data[0] += (all - kept.len()) as f64;
            kept.sort_unstable();
            for c in kept {
                out[0].data[slot] = c as f64;
                out[1].data[c] = slot as f64;
                slot += 1;
            }
            out[2].data[e + 1] = slot as f64;
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Gives the choices `expert_index` i32 `[N,k]` slots in expert order; returns `[slot_choice, choice_slot, offsets,
    /// dropped]`. See [`Assign`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit, or a priority comes without a capacity.
    #[track_caller]
    pub fn assign(
        &mut self,
        expert_index: Value,
        priority: Option<Value>,
        experts: usize,
        capacity: Option<usize>,
        order: Order,
    ) -> Result<[Value; 4]> {
        let operands: SmallVec<[Value; 2]> = [expert_index].into_iter().chain(priority).collect();
        self.push_all(Assign { experts, capacity, order }, &operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// slot_choice, choice_slot, offsets and dropped of tokens with two choices each.
    fn run(op: &Assign, expert_index: &[i32], priority: Option<[f64; 6]>) -> [Vec<f64>; 4] {
        let expert_index = Tensor::i32([expert_index.len() / 2, 2], expert_index);
        let priority = priority.map(|p| Tensor::f32([3, 2], p.to_vec()));
        let operands: Vec<&Tensor> = [&expert_index].into_iter().chain(&priority).collect();
        let types = op.infer(&operands.iter().map(|t| t.ty.clone()).collect::<Vec<_>>()).unwrap();
        let out = op.reference(&operands, &types);
        std::array::from_fn(|i| out[i].data.clone())
    }

    #[test]
    fn dropless_segments_are_in_token_order() {
        let op = Assign { experts: 3, capacity: None, order: Order::ChoiceMajor };
        let [slot_choice, choice_slot, offsets, dropped] = run(&op, &[2, 0, 2, -1, 0, 2], None);
        assert_eq!(slot_choice, [1.0, 4.0, 0.0, 2.0, 5.0, -1.0]);
        assert_eq!(choice_slot, [2.0, 0.0, 3.0, -1.0, 1.0, 4.0]);
        assert_eq!((offsets, dropped), (vec![0.0, 2.0, 2.0, 5.0], vec![0.0]));
    }

    #[test]
    fn capacity_keeps_the_first_by_order_or_priority() {
        let index = [0, 1, 1, 0, 1, 0];
        let kept = |order, priority| run(&Assign { experts: 2, capacity: Some(1), order }, &index, priority);
        // Expert 0 is chosen by choices 0, 3, 5; expert 1 by 1, 2, 4, of which 2 is the earliest first choice.
        assert_eq!(kept(Order::TokenMajor, None)[0], [0.0, 1.0]);
        let [slot_choice, choice_slot, offsets, dropped] = kept(Order::ChoiceMajor, None);
        assert_eq!((slot_choice, choice_slot), (vec![0.0, 2.0], vec![0.0, -1.0, 1.0, -1.0, -1.0, -1.0]));
        assert_eq!((offsets, dropped), (vec![0.0, 1.0, 2.0], vec![4.0]));
        let priority = [0.1, f64::NAN, 0.2, 0.3, 0.2, 0.3];
        assert_eq!(kept(Order::TokenMajor, Some(priority))[0], [3.0, 2.0]);
        assert_eq!(run(&Assign { experts: 2, capacity: Some(0), order: Order::TokenMajor }, &index, None)[3], [6.0]);
    }

    #[test]
    fn a_priority_wants_a_capacity() {
        let operands = [TensorType::i32([3, 2]), TensorType::f32([3, 2])];
        let refused = Assign { experts: 2, capacity: None, order: Order::TokenMajor }.infer(&operands).unwrap_err();
        assert!(refused.wanted.contains("a capacity"), "{refused:?}");
        let op = Assign { experts: usize::MAX, capacity: Some(2), order: Order::TokenMajor };
        assert_eq!(op.infer(&operands).unwrap()[0], TensorType::i32([6]));
    }
}
