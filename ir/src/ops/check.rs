//! Checks that shape rules share.

use crate::dtype::DType;
use crate::error::Mismatch;
use crate::types::{Shape, TensorType};

type Check<T = ()> = Result<T, Mismatch>;

/// Exactly `n` operands.
pub(crate) fn count(operands: &[TensorType], n: usize) -> Check {
    between(operands, n, n)
}

/// From `least` to `most` operands.
pub(crate) fn between(operands: &[TensorType], least: usize, most: usize) -> Check {
    if (least..=most).contains(&operands.len()) {
        return Ok(());
    }
    let wanted = if least == most { format!("{least} operands") } else { format!("{least} to {most} operands") };
    Err(Mismatch::op(format!("{wanted}, not {}", operands.len())))
}

/// Operand `i` has this rank.
pub(crate) fn rank(operands: &[TensorType], i: usize, rank: usize) -> Check {
    if operands[i].shape.len() == rank { Ok(()) } else { Err(Mismatch::operand(i, format!("rank {rank}"))) }
}

/// Operand `i` is a float.
pub(crate) fn float(operands: &[TensorType], i: usize) -> Check {
    if operands[i].dtype.is_float() { Ok(()) } else { Err(Mismatch::operand(i, "a float")) }
}

/// Operand `i` has this dtype.
pub(crate) fn dtype(operands: &[TensorType], i: usize, dtype: DType) -> Check {
    if operands[i].dtype == dtype { Ok(()) } else { Err(Mismatch::operand(i, format!("{dtype}"))) }
}

/// Operand `i` has this shape.
pub(crate) fn shape(operands: &[TensorType], i: usize, wanted: impl Into<Shape>) -> Check {
    let wanted = wanted.into();
    if operands[i].shape == wanted { Ok(()) } else { Err(Mismatch::operand(i, format!("shape {wanted}"))) }
}

/// Operand `i` has this type.
pub(crate) fn ty(operands: &[TensorType], i: usize, wanted: &TensorType) -> Check {
    if operands[i] == *wanted { Ok(()) } else { Err(Mismatch::operand(i, wanted.to_string())) }
}

/// An attribute holds.
pub(crate) fn attribute(holds: bool, wanted: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(Mismatch::op(wanted())) }
}

/// Operand `i` has an axis `axis`.
pub(crate) fn axis(operands: &[TensorType], i: usize, axis: usize) -> Check {
    if axis < operands[i].shape.len() {
        Ok(())
    } else {
        Err(Mismatch::operand(i, format!("a tensor with axis {axis}")))
    }
}

/// Operand `i` has a last axis with at least one element on it.
pub(crate) fn last_axis(operands: &[TensorType], i: usize) -> Check {
    let shape = &operands[i].shape;
    let holds = !shape.is_empty() && shape.last() > 0;
    if holds { Ok(()) } else { Err(Mismatch::operand(i, "a last axis of at least 1")) }
}

/// The epsilon of a norm.
pub(crate) fn eps(eps: f32) -> Check {
    attribute(eps.is_finite() && eps >= 0.0, || format!("an eps that is finite and not negative, not {eps}"))
}

/// The graph whose loss is `sum(build(inputs) * weights)`, the inputs' gradients and the loss for other inputs.
#[cfg(test)]
struct Differentiated {
    graph: crate::Graph,
    loss: crate::Value,
    gradients: Vec<crate::Value>,
}

#[cfg(test)]
impl Differentiated {
    fn new(
        inputs: &[crate::Tensor],
        weights: impl Fn(usize) -> f64,
        build: impl Fn(&mut crate::Graph, &[crate::Value]) -> crate::Result<crate::Value>,
    ) -> Self {
        let make = || {
            let mut g = crate::Graph::new();
            let parameters: Vec<_> =
                (0..).zip(inputs).map(|(i, x)| g.parameter(format!("{i}"), x.ty.clone())).collect::<Result<_, _>>()?;
            let y = build(&mut g, &parameters)?;
            let ty = g.ty(y).clone();
            let weights = g.constant(TensorType::f32(ty.shape.clone()), (0..ty.elements()).map(&weights).collect())?;
            let y = g.cast(y, DType::F32)?;
            let weighted = g.mul(y, weights)?;
            let loss = g.sum_all(weighted)?;
            let gradients = crate::gradients(&mut g, loss, &parameters)?;
            Ok::<_, crate::Error>(Differentiated { graph: g, loss, gradients })
        };
        make().unwrap_or_else(|e| panic!("{e}"))
    }

    fn run(&self, inputs: &[crate::Tensor]) -> crate::reference::Evaluation {
        let named = inputs.iter().enumerate().map(|(i, x)| (i.to_string(), x.clone())).collect();
        crate::reference::run(&self.graph, &named, crate::reference::Precision::Exact).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// The gradients of the sum of what `build` makes with respect to its inputs.
#[cfg(test)]
pub(crate) fn gradients_of(
    inputs: &[crate::Tensor],
    build: impl Fn(&mut crate::Graph, &[crate::Value]) -> crate::Result<crate::Value>,
) -> Vec<crate::Tensor> {
    let d = Differentiated::new(inputs, |_| 1.0, build);
    let run = d.run(inputs);
    d.gradients.iter().map(|&v| run.value(v).clone()).collect()
}

/// The gradient of a weighted sum of what `build` makes agrees with central differences in f64, for each input along a
/// fixed irregular direction.
#[cfg(test)]
pub(crate) fn assert_gradients(
    inputs: &[crate::Tensor],
    build: impl Fn(&mut crate::Graph, &[crate::Value]) -> crate::Result<crate::Value>,
) {
    const STEP: f64 = 1e-5;
    let irregular = |i: usize| (i as f64 * 2.399_963).sin() + 1.25;
    let d = Differentiated::new(inputs, irregular, build);
    let run = d.run(inputs);
    for (which, input) in inputs.iter().enumerate() {
        let direction: Vec<f64> = (0..input.data.len()).map(|i| irregular(i + 7 * which + 3)).collect();
        let at = |step: f64| {
            let mut moved = inputs.to_vec();
            moved[which].data.iter_mut().zip(&direction).for_each(|(x, v)| *x += step * v);
            d.run(&moved).value(d.loss).data[0]
        };
        let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        let gradient = run.value(d.gradients[which]);
        let slope: f64 = gradient.data.iter().zip(&direction).map(|(g, v)| g * v).sum();
        let close = (slope - difference).abs() <= 1e-7 * (1.0 + difference.abs());
        assert!(close, "input {which}: gradient {slope}, difference {difference}");
    }
}
