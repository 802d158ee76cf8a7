//! `linear_distillation`: a linear classifier, its cross entropy, and how far it is from a teacher's, without ever holding all
//! logits of either.
//!
//! `x [N,D], w [V,D], targets i32 [N], teacher_x [N,E], teacher_w [V,E]` (all floats of one dtype) `-> loss, kd, lse, soft_lse,
//! teacher_lse` (f32 `[N]`), with `logits = x wᵀ`, `loss` and `lse` as of [`super::LinearCrossEntropy`], and at temperature T
//! with `q = softmax(logits / T)`, `p = softmax(teacher_x teacher_wᵀ / T)`:
//! `kd[n] = T² sum_v p[n,v] (ln p[n,v] - ln q[n,v])`, the forward KL divergence of section 2.6 of the DeepSpeed-MoE
//! specification, in nats. `soft_lse` and `teacher_lse` are the `ln sum_v exp` of what the two softmaxes are taken of. A row with
//! a negative target is ignored: `loss` and `kd` are 0. A target of V or more makes both NaN. Differentiable in `x` and `w`
//! through `loss` and `kd`; the teacher carries no gradient, the `lse`s are kept for [`super::LinearDistillationGrad`].

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::attention::dot;
use super::embedding::index;
use super::linear_cross_entropy::per_row;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Cross entropy of a linear classifier and its divergence from a teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearDistillation {
    /// T: both logits are divided by it before `kd` is taken. Finite and above 0.
    pub temperature: f32,
}

/// What the forms of the op share: a finite temperature above 0.
pub(super) fn temperature(t: f32) -> Result<(), Mismatch> {
    check::attribute(t.is_finite() && t > 0.0, || format!("a temperature that is finite and above 0, not {t}"))
}

/// Operands 0 to 4 are those of [`LinearDistillation`]; gives the type of one f32 per row.
pub(super) fn with_teacher(operands: &[TensorType]) -> Result<TensorType, Mismatch> {
    let row = per_row(operands)?;
    let (n, v) = (operands[0].shape[0], operands[1].shape[0]);
    for i in [3, 4] {
        check::rank(operands, i, 2)?;
        check::dtype(operands, i, operands[0].dtype)?;
    }
    let width = operands[3].shape[1];
    check::shape(operands, 3, [n, width])?;
    check::shape(operands, 4, [v, width])?;
    Ok(row)
}

/// The cotangents of `loss` and `kd`, zeros for one that nothing depends on; an error if there is one of an `lse` or if more than
/// `x` and `w` is asked for.
pub(super) fn row_cotangents(cx: &mut Vjp<'_>, op: &'static str) -> Result<[Value; 2]> {
    if cx.cotangents[2..].iter().any(Option::is_some) {
        cx.refuse(op, "its lse values carry no gradient")?;
    }
    if cx.needed[2..].contains(&true) {
        cx.refuse(op, "the teacher is not differentiated")?;
    }
    let row = cx.graph.ty(cx.results[0]).clone();
    let mut of = |i: usize| cx.cotangents[i].map_or_else(|| cx.graph.splat(row.clone(), 0.0), Ok);
    Ok([of(0)?, of(1)?])
}

/// All logits of row `i` of `x` against `w`.
pub(super) fn logits(x: &Tensor, w: &Tensor, i: usize) -> Vec<f64> {
    let (v, d) = (w.ty.shape[0], w.ty.shape[1]);
    let row = &x.data[i * d..(i + 1) * d];
    (0..v).map(|j| dot(row, &w.data[j * d..(j + 1) * d])).collect()
}

/// `ln sum exp`; -inf of nothing.
pub(super) fn lse(logits: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = logits.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + logits.map(|l| (l - max).exp()).sum::<f64>().ln() }
}

/// `[loss, kd]` of a row with these logits, whose lse is `hard` and whose divergence `kd`: 0 where the target is ignored, NaN where it
/// is none.
pub(super) fn losses(target: f64, student: &[f64], hard: f64, kd: f64) -> [f64; 2] {
    match index(target, student.len()) {
        Some(target) => [hard - student[target], kd],
        None if target < 0.0 => [0.0, 0.0],
        None => [f64::NAN, f64::NAN],
    }
}

impl Rule for LinearDistillation {
    const NAME: &'static str = "linear_distillation";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        temperature(self.temperature)?;
        check::count(operands, 5)?;
        let row = with_teacher(operands)?;
        Ok(smallvec![row; 5])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let [dloss, dkd] = row_cotangents(cx, Self::NAME)?;
        let &[x, w, targets, teacher_x, teacher_w] = cx.operands else { unreachable!("infer checked the count") };
        let lse = [cx.results[2], cx.results[3], cx.results[4]];
        let grad = super::LinearDistillationGrad { temperature: self.temperature };
        let operands = [x, w, targets, teacher_x, teacher_w, lse[0], lse[1], lse[2], dloss, dkd];
        let [dx, dw] = cx.graph.push_all(grad, &operands)?;
        let zero = Cotangent::Zero;
        Ok(smallvec![Cotangent::Value(dx), Cotangent::Value(dw), zero, zero, zero])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (x, w, targets) = (operands[0], operands[1], operands[2]);
        let (n, t) = (x.ty.shape[0], f64::from(self.temperature));
        let mut out: Vec<Tensor> = results.iter().cloned().map(Tensor::zeros).collect();
        for i in 0..n {
            let (student, teacher) = (logits(x, w, i), logits(operands[3], operands[4], i));
            let hard = lse(student.iter().copied());
            let (soft, of_teacher) = (lse(student.iter().map(|l| l / t)), lse(teacher.iter().map(|l| l / t)));
            let terms = teacher.iter().zip(&student).map(|(a, b)| {
                let (p, q) = (a / t - of_teacher, b / t - soft);
                p.exp() * (p - q)
            });
            let [loss, kd] = losses(targets.data[i], &student, hard, t * t * terms.sum::<f64>());
            for (out, value) in out.iter_mut().zip([loss, kd, hard, soft, of_teacher]) {
                out.data[i] = value;
            }
        }
        out
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The loss and the distillation term `[loss, kd]`, f32 `[N]`, of `x [N,D]` classified by `w [V,D]` against `targets` i32 `[N]`
    /// and the teacher's `teacher_x [N,E]`, `teacher_w [V,E]`; see [`LinearDistillation`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn linear_distillation(
        &mut self,
        [x, w]: [Value; 2],
        targets: Value,
        [teacher_x, teacher_w]: [Value; 2],
        temperature: f32,
    ) -> Result<[Value; 2]> {
        let operands = [x, w, targets, teacher_x, teacher_w];
        self.push_all::<5>(LinearDistillation { temperature }, &operands).map(|[loss, kd, ..]| [loss, kd])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, gradients};

    const OP: LinearDistillation = LinearDistillation { temperature: 2.0 };

    #[test]
    fn equal_logits_are_no_distance_and_ignored_rows_cost_nothing() {
        let x = Tensor::f32([4, 1], vec![0.5, 1.0, 5.0, 0.0]);
        let w = Tensor::f32([2, 1], vec![1.0, -1.0]);
        // The same logits from another width, but for the second row.
        let teacher_x = Tensor::f32([4, 2], vec![0.25, 0.25, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
        let teacher_w = Tensor::f32([2, 2], vec![1.0, 1.0, -1.0, -1.0]);
        let targets = Tensor::i32([4], &[0, 1, -1, 2]);
        let operands = [&x, &w, &targets, &teacher_x, &teacher_w];
        let types = OP.infer(&operands.map(|t| t.ty.clone())).unwrap();
        let out = OP.reference(&operands, &types);
        assert!(out[1].data[0].abs() < 1e-15, "{:?}", out[1]);
        // The teacher is even, the student has logits 1/2 and -1/2 at T = 2: 4 (ln 1/2 - (0 - lse)) = 4 ln cosh 1/2.
        assert!((out[1].data[1] - 4.0 * 0.5f64.cosh().ln()).abs() < 1e-14, "{:?}", out[1]);
        assert_eq!((out[0].data[2], out[1].data[2]), (0.0, 0.0));
        assert!(out[0].data[3].is_nan() && out[1].data[3].is_nan());
        let mut types = operands.map(|t| t.ty.clone());
        types[4] = TensorType::f32([2, 3]);
        let refused = OP.infer(&types).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(4), "shape [2,2]"));
        let cold = LinearDistillation { temperature: 0.0 };
        assert!(cold.infer(&operands.map(|t| t.ty.clone())).is_err());
    }

    #[test]
    fn gradients_agree_with_differences_and_the_teacher_has_none() {
        let x = Tensor::f32([3, 2], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        let w = Tensor::f32([4, 2], vec![0.3, 0.2, -0.9, 1.1, 0.4, -0.6, 0.8, 0.5]);
        let (x_ty, w_ty) = (x.ty.clone(), w.ty.clone());
        check::assert_gradients(&[x, w], |g, v| {
            let targets = g.constant(TensorType::i32([3]), vec![3.0, -1.0, 0.0])?;
            let teacher_x = g.constant(TensorType::f32([3, 1]), vec![0.5, 1.0, -2.0])?;
            let teacher_w = g.constant(TensorType::f32([4, 1]), vec![1.0, 0.2, -0.3, 0.1])?;
            let [loss, kd] = g.linear_distillation([v[0], v[1]], targets, [teacher_x, teacher_w], 2.0)?;
            let kd = g.mul_scalar(kd, 1.7)?;
            g.add(loss, kd)
        });
        let mut g = Graph::new();
        let (x, w) = (g.parameter("x", x_ty).unwrap(), g.parameter("w", w_ty).unwrap());
        let targets = g.feed("targets", TensorType::i32([3])).unwrap();
        let [_, kd] = g.linear_distillation([x, w], targets, [x, w], 1.0).unwrap();
        let loss = g.sum_all(kd).unwrap();
        let error = gradients(&mut g, loss, &[w]).unwrap_err();
        assert!(matches!(error, Error::NotDifferentiable { op: "linear_distillation", .. }), "{error}");
    }
}
