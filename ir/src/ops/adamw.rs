//! `adamw`: one step of Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).
//!
//! `param f32, grad (a float), m f32, v f32 (one shape), lr f32 [], step f32 [], grad_scale f32 [] -> param', m', v'`, in place
//! on `param`, `m` and `v`. With `g = grad_scale grad` and `step` counted from 1: `m' = beta1 m + (1 - beta1) g`,
//! `v' = beta2 v + (1 - beta2) g²`, `param' = param - lr (mhat / (sqrt(vhat) + eps) + weight_decay param)` with
//! `mhat = m' / (1 - beta1^step)` and `vhat = v' / (1 - beta2^step)`. If `lr` or `grad_scale` is not finite, or `step` is
//! below 1, nothing changes: a step whose gradient overflowed is skipped. With `rounded` there is one operand more at the end, a
//! float of 16 bits of the same shape that holds `param` rounded, and one result more in its place, `param'` rounded to nearest
//! even. Not differentiable.
//!
//! With `moments` = `8bit`, `m` and `v` are u32 `[elements / 4]`, rounded up, and there is an eighth operand, before the rounded
//! copy, `scales f32 [blocks, 2]`, and the result `scales'` in its place: codes and scales of blocks of 256 elements, as
//! [`Moments::ty`] and [`Moments::scales`] say. The step is that of the formula on what the codes mean; `m'` and `v'` are rounded
//! to f32 and from there to codes ([`moments::eight`]).
//!
//! With `moments` = `bf16`, `m` and `v` are bf16; `m'` and `v'` are those of the formula, rounded to f32 and from there
//! stochastically ([`crate::moments`]) by the random numbers of `stream` and `step`; `param'` is that of the formula, with `m'`
//! and `v'` before they are rounded.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::error::{Mismatch, Result, Site};
use crate::graph::{Graph, Value};
use crate::moments::{self, Moments, eight};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// An optimizer step on one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adamw {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f32,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f32,
    /// Added to the root of the second moment; not negative.
    pub eps: f32,
    /// Decoupled weight decay; not negative.
    pub weight_decay: f32,
    /// A copy of the parameter in a float of 16 bits is kept too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rounded: bool,
    /// How the moments are kept.
    #[serde(default, skip_serializing_if = "Moments::is_default")]
    pub moments: Moments,
    /// The stream of the random numbers that moments in fewer bits are rounded by ([`moments::stream`]).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub stream: u32,
}

fn is_zero(stream: &u32) -> bool {
    *stream == 0
}

/// What a step of AdamW moves, or has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdamwState {
    /// The parameter, f32.
    pub param: Value,
    /// The first moment, of the type [`Moments::ty`].
    pub m: Value,
    /// The second moment, as the first.
    pub v: Value,
    /// The scales of both moments, where they have some ([`Moments::scales`]).
    pub scales: Option<Value>,
    /// The parameter rounded to a float of 16 bits, if such a copy is kept.
    pub rounded: Option<Value>,
}

impl Rule for Adamw {
    const NAME: &'static str = "adamw";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        let scaled = self.is_scaled();
        check::count(operands, 7 + usize::from(scaled) + usize::from(self.rounded))?;
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            check::attribute((0.0..1.0).contains(&beta), || format!("{name} in [0, 1), not {beta}"))?;
        }
        check::eps(self.eps)?;
        let decay = self.weight_decay;
        check::attribute(decay.is_finite() && decay >= 0.0, || {
            format!("a weight_decay that is finite and not negative, not {decay}")
        })?;
        let param = TensorType::f32(operands[0].shape.clone());
        let moment = self.moments.ty(&param.shape);
        check::ty(operands, 0, &param)?;
        check::float(operands, 1)?;
        check::shape(operands, 1, param.shape.clone())?;
        check::ty(operands, 2, &moment)?;
        check::ty(operands, 3, &moment)?;
        (4..7).try_for_each(|i| check::ty(operands, i, &TensorType::f32([])))?;
        let mut results: Types = smallvec![param.clone(), moment.clone(), moment];
        if let Some(scales) = self.moments.scales(&param.shape) {
            check::ty(operands, 7, &scales)?;
            results.push(scales);
        }
        if self.rounded {
            let at = self.rounded_at();
            check::float(operands, at)?;
            check::shape(operands, at, param.shape)?;
            let dtype = operands[at].dtype;
            check::attribute(dtype.bytes() == 2, || format!("a rounded parameter of 16 bits, not {dtype}"))?;
            results.push(operands[at].clone());
        }
        Ok(results)
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "an optimizer step is not differentiated")
    }

    fn reference(&self, operands: &[&Tensor], _results: &[TensorType]) -> Vec<Tensor> {
        let (mut param, grad, kept) = (operands[0].clone(), operands[1], [operands[2], operands[3]]);
        let (lr, step, grad_scale) = (operands[4].data[0], operands[5].data[0], operands[6].data[0]);
        if !(lr.is_finite() && grad_scale.is_finite() && step >= 1.0) {
            return [0, 2, 3].into_iter().chain(7..operands.len()).map(|i| operands[i].clone()).collect();
        }
        let scales = self.is_scaled().then(|| operands[7]);
        let mut moments = self.opened(kept, scales, param.data.len());
        let (beta1, beta2) = (f64::from(self.beta1), f64::from(self.beta2));
        let (eps, decay) = (f64::from(self.eps), f64::from(self.weight_decay));
        for ((p, g), [m, v]) in param.data.iter_mut().zip(&grad.data).zip(&mut moments) {
            let g = grad_scale * g;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let m_hat = *m / (1.0 - beta1.powf(step));
            let v_hat = *v / (1.0 - beta2.powf(step));
            *p -= lr * (m_hat / (v_hat.sqrt() + eps) + decay * *p);
        }
        let rounded = self.rounded.then(|| Tensor::new(operands[self.rounded_at()].ty.clone(), param.data.clone()));
        let closed = self.closed(&moments, step as u32, kept, scales);
        std::iter::once(param).chain(closed).chain(rounded).collect()
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        let pairs = &[(0, 0), (1, 2), (2, 3), (3, 7), (4, 8)];
        &pairs[..3 + usize::from(self.is_scaled()) + usize::from(self.rounded)]
    }
}

impl Adamw {
    fn is_scaled(&self) -> bool {
        self.moments == Moments::Eight
    }

    /// The operand that is the rounded copy, if there is one.
    pub fn rounded_at(&self) -> usize {
        7 + usize::from(self.is_scaled())
    }

    /// Both moments of each of `n` elements, from what is kept of them.
    fn opened(&self, [m, v]: [&Tensor; 2], scales: Option<&Tensor>, n: usize) -> Vec<[f64; 2]> {
        let Some(scales) = scales else { return (0..n).map(|i| [m.data[i], v.data[i]]).collect() };
        let opened = |i: usize| {
            let code = |t: &Tensor| (t.data[i / 4] as u32 >> (8 * (i % 4))) as u8;
            let scale = |which: usize| scales.data[2 * (i / eight::BLOCK) + which] as f32;
            [eight::m_of(code(m), scale(0)), eight::v_of(code(v), scale(1))].map(f64::from)
        };
        (0..n).map(opened).collect()
    }

    /// What is kept of the moments: both tensors, and the scales if there are any.
    fn closed(&self, moments: &[[f64; 2]], step: u32, kept: [&Tensor; 2], scales: Option<&Tensor>) -> Vec<Tensor> {
        let random = |i: usize| moments::words(self.stream, step, i as u64 / 4)[i % 4];
        let column = |which: usize| moments.iter().map(move |of_one| of_one[which]);
        let Some(scales) = scales else {
            let stored = |which: usize, (i, x): (usize, f64)| match self.moments {
                Moments::F32 | Moments::Eight => x,
                Moments::Bf16 => f64::from(moments::bf16(moments::bf16_bits(x as f32, random(i) >> (16 * which)))),
            };
            let tensor = |which: usize| {
                let data = column(which).enumerate().map(|x| stored(which, x)).collect();
                Tensor::new(kept[which].ty.clone(), data)
            };
            return vec![tensor(0), tensor(1)];
        };
        let mut tensors = [kept[0], kept[1], scales].map(|t| Tensor::zeros(t.ty.clone()));
        for (block, of_block) in moments.chunks(eight::BLOCK).enumerate() {
            let largest = |which: usize| of_block.iter().map(|x| (x[which] as f32).abs().to_bits()).max().unwrap_or(0);
            let scales = [eight::scale_of_m(largest(0)), eight::scale_of_v(largest(1))];
            for (which, scale) in scales.into_iter().enumerate() {
                tensors[2].data[2 * block + which] = f64::from(scale);
            }
            let inverse = scales.map(eight::inverse);
            for (i, [m, v]) in (eight::BLOCK * block..).zip(of_block) {
                let codes = [
                    eight::code_of_m(*m as f32, inverse[0], random(i)),
                    eight::code_of_v(*v as f32, inverse[1], moments::for_second(random(i))),
                ];
                for (tensor, code) in tensors.iter_mut().zip(codes) {
                    tensor.data[i / 4] += f64::from(u32::from(code) << (8 * (i % 4)));
                }
            }
        }
        tensors.into()
    }
}

impl Graph {
    /// One step of `rule` on `param` with the moments `m` and `v`; returns `[param', m', v']`. See [`Adamw`].
    ///
    /// # Errors
    /// As [`Graph::adamw_of`].
    #[track_caller]
    pub fn adamw(
        &mut self,
        rule: Adamw,
        param: Value,
        grad: Value,
        m: Value,
        v: Value,
        lr: Value,
        step: Value,
        grad_scale: Value,
    ) -> Result<[Value; 3]> {
        let state = AdamwState { param, m, v, scales: None, rounded: None };
        let AdamwState { param, m, v, .. } = self.adamw_of(rule, state, grad, [lr, step, grad_scale])?;
        Ok([param, m, v])
    }

    /// One step of `rule` on all that it moves, `scalars` being `[lr, step, grad_scale]`; returns what it has moved, in the same
    /// storage. Whether there is a rounded copy is read from `state`. See [`Adamw`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit or an attribute is out of its range.
    #[track_caller]
    pub fn adamw_of(&mut self, rule: Adamw, state: AdamwState, grad: Value, scalars: [Value; 3]) -> Result<AdamwState> {
        let AdamwState { param, m, v, scales, rounded } = state;
        let [lr, step, grad_scale] = scalars;
        let mut operands = vec![param, grad, m, v, lr, step, grad_scale];
        operands.extend(scales);
        operands.extend(rounded);
        let rule = Adamw { rounded: rounded.is_some(), ..rule };
        let results = self.push(rule.into(), &operands, Site::caller())?;
        let mut more = results[3..].iter().copied();
        let (scales, rounded) = (scales.and_then(|_| more.next()), rounded.and_then(|_| more.next()));
        Ok(AdamwState { param: results[0], m: results[1], v: results[2], scales, rounded })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Adamw = Adamw {
        beta1: 0.5,
        beta2: 0.75,
        eps: 0.0,
        weight_decay: 0.5,
        rounded: false,
        moments: Moments::F32,
        stream: 0,
    };

    fn run(moments: [f64; 2], lr: f64, step: f64, grad_scale: f64) -> [f64; 3] {
        let one = |v: f64| Tensor::f32([1], vec![v]);
        let scalar = |v: f64| Tensor::f32([], vec![v]);
        let tensors =
            [one(1.0), one(4.0), one(moments[0]), one(moments[1]), scalar(lr), scalar(step), scalar(grad_scale)];
        let operands = tensors.each_ref();
        let types = RULE.infer(&operands.map(|t| t.ty.clone())).unwrap();
        let out = RULE.reference(&operands, &types);
        std::array::from_fn(|i| out[i].data[0])
    }

    #[test]
    fn two_steps_by_hand() {
        // g = 2: m = 1, v = 1, both hats give 2 and 4, so that the step is lr (1 + decay).
        assert_eq!(run([0.0, 0.0], 0.25, 1.0, 0.5), [1.0 - 0.25 * 1.5, 1.0, 1.0]);
        // Step 2: m = 0.5 + 1 over 1 - 1/4; v = 0.75 + 1 over 1 - 9/16, the squares of 2 and 2.
        assert_eq!(run([1.0, 1.0], 0.25, 2.0, 0.5), [1.0 - 0.25 * 1.5, 1.5, 1.75]);
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing() {
        for (lr, step, scale) in
            [(f64::NAN, 1.0, 1.0), (0.1, 1.0, f64::INFINITY), (0.1, 1.0, f64::NAN), (0.1, 0.0, 1.0)]
        {
            assert_eq!(run([3.0, 5.0], lr, step, scale), [1.0, 3.0, 5.0]);
        }
    }

    #[test]
    fn out_of_range_attributes_and_wrong_moments_are_named() {
        let (x, s) = (TensorType::f32([2]), TensorType::f32([]));
        let grad = TensorType::new(crate::DType::Bf16, [2]);
        let types = |m: TensorType| [x.clone(), grad.clone(), m, x.clone(), s.clone(), s.clone(), s.clone()];
        assert!(RULE.infer(&types(x.clone())).is_ok());
        assert_eq!(RULE.infer(&types(grad.clone())).unwrap_err().operand, Some(2));
        let refused = Adamw { beta2: 1.0, ..RULE }.infer(&types(x.clone())).unwrap_err();
        assert!(refused.wanted.contains("beta2 in [0, 1)"), "{refused:?}");
    }

    #[test]
    fn a_rounded_copy_has_16_bits_and_follows() {
        let (x, s) = (TensorType::f32([2]), TensorType::f32([]));
        let rule = Adamw { rounded: true, ..RULE };
        let types = |r: TensorType| [x.clone(), x.clone(), x.clone(), x.clone(), s.clone(), s.clone(), s.clone(), r];
        let narrow = TensorType::new(crate::DType::Bf16, [2]);
        assert_eq!(rule.infer(&types(narrow.clone())).unwrap()[3], narrow);
        assert!(rule.infer(&types(x.clone())).unwrap_err().wanted.contains("16 bits"));
        let tensor = |ty: &TensorType, v: f64| Tensor { ty: ty.clone(), data: vec![v; ty.elements()] };
        let values = [1.0, 4.0, 0.0, 0.0, 0.25, 1.0, 0.5, 1.0];
        let operands: Vec<Tensor> = types(narrow).iter().zip(values).map(|(ty, v)| tensor(ty, v)).collect();
        let run = |operands: &[Tensor]| {
            let operands: Vec<&Tensor> = operands.iter().collect();
            rule.reference(&operands, &[]).iter().map(|t| t.data[0]).collect::<Vec<_>>()
        };
        let moved = 1.0 - 0.25 * 1.5;
        assert_eq!(run(&operands), [moved, 1.0, 1.0, moved]);
        let mut skipped = operands;
        skipped[6].data[0] = f64::NAN;
        assert_eq!(run(&skipped), [1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn moments_in_fewer_bits_have_their_own_types_and_follow() {
        let (x, s) = (TensorType::f32([300]), TensorType::f32([]));
        let narrow = TensorType::new(crate::DType::Bf16, [300]);
        for moments in [Moments::Bf16, Moments::Eight] {
            let rule = Adamw { rounded: true, moments, stream: 4, ..RULE };
            let moment = moments.ty(&x.shape);
            let mut types = vec![x.clone(), x.clone(), moment.clone(), moment.clone(), s.clone(), s.clone(), s.clone()];
            types.extend(moments.scales(&x.shape));
            types.push(narrow.clone());
            let results = rule.infer(&types).unwrap();
            assert_eq!(rule.in_place().len(), results.len());
            for &(result, operand) in rule.in_place() {
                assert_eq!(results[result], types[operand], "{moments}");
            }
            // Moments of another type, and a graph that forgot the scales.
            let mut wrong = types.clone();
            wrong[3] = x.clone();
            assert_eq!(rule.infer(&wrong).unwrap_err().operand, Some(3));
            assert!(Adamw { moments: Moments::F32, ..rule.clone() }.infer(&types).is_err());

            let mut state: Vec<Tensor> = types.iter().map(|ty| Tensor::zeros(ty.clone())).collect();
            for (i, value) in [(1, 4.0), (4, 0.25), (5, 1.0), (6, 0.5)] {
                state[i].data.fill(value);
            }
            let step = |state: &[Tensor]| rule.reference(&state.iter().collect::<Vec<_>>(), &[]);
            // As by hand: all moments are 1, which both have a code for.
            let out = step(&state);
            let opened = rule.opened([&out[1], &out[2]], out.get(3).filter(|_| rule.is_scaled()), 300);
            assert!(opened.iter().flatten().all(|moment| (moment - 1.0).abs() < 1e-6), "{moments}: {opened:?}");
            assert!(out[0].data.iter().chain(&out[out.len() - 1].data).all(|&p| (p + 0.25).abs() < 1e-12));
            // A step that is skipped leaves what was kept.
            let mut skipped = state.clone();
            for &(result, operand) in rule.in_place() {
                skipped[operand] = out[result].clone();
            }
            skipped[6].data.fill(f64::NAN);
            assert!(step(&skipped).iter().zip(&out).all(|(a, b)| a.data == b.data), "{moments}");
        }
    }
}
