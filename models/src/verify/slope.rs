//! Gradients against differences: along one random direction for all inputs at once, in f64, by the exact reference. Two
//! evaluations tell a wrong gradient whatever the number of inputs.

use moebius_ir::reference::{Evaluation, Precision, run};
use moebius_ir::{Error, Graph, Result, Value};

use super::sketch::{Inputs, Sketch};

/// Size of the step along the direction, to both sides.
pub(super) const STEP: f64 = 1e-5;

/// Directions that are drawn at most; along the last one the two ways are compared in any case.
const DIRECTIONS: usize = 16;

/// A directional derivative, computed in two ways.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    /// The gradient times the direction.
    pub gradient: f64,
    /// The central difference of the loss.
    pub difference: f64,
    /// What the terms of the product of gradient and direction add up to without a common sign.
    pub size: f64,
}

impl Slope {
    /// The two ways' distance, relative to the size of what was summed.
    pub fn error(&self) -> f64 {
        let error = (self.gradient - self.difference).abs();
        if error == 0.0 { 0.0 } else { error / self.size.max(self.gradient.abs()) }
    }

    /// Whether the two agree to what a difference quotient in f64 can tell.
    pub fn agrees(&self) -> bool {
        // A NaN agrees with nothing.
        (self.gradient - self.difference).abs() <= 1e-6 * self.size.max(self.gradient.abs()) + 1e-9
    }
}

/// A direction: a standard normal number for each element of each differentiated input.
fn direction(sketch: &mut Sketch) -> Vec<(String, Vec<f64>)> {
    let wrt: Vec<(String, usize)> =
        sketch.wrt.iter().map(|(name, v)| (name.clone(), sketch.graph.ty(*v).elements())).collect();
    wrt.into_iter().map(|(name, n)| (name, sketch.normals(n))).collect()
}

/// The inputs, moved by `step` along the direction.
fn moved(inputs: &Inputs, direction: &[(String, Vec<f64>)], step: f64) -> Inputs {
    let mut inputs = inputs.clone();
    for (name, by) in direction {
        if let Some(tensor) = inputs.get_mut(name) {
            tensor.data.iter_mut().zip(by).for_each(|(x, v)| *x += step * v);
        }
    }
    inputs
}

/// Both ways for a sketch whose gradients are outputs `d.NAME`, as [`Sketch::differentiate`] leaves it, and its loss. A direction
/// along which a choice of the graph changes is drawn again; of kinks that are no choice, such as that of an absolute value, the
/// inputs must keep clear.
///
/// # Errors
/// [`Error::Feed`] if an input has no value or no gradient.
pub fn slope(sketch: &mut Sketch, loss: Value) -> Result<Slope> {
    let base = run(&sketch.graph, &sketch.inputs, Precision::Exact)?;
    let chosen = choices(&sketch.graph, &base);
    let mut found = None;
    for _ in 0..DIRECTIONS {
        let direction = direction(sketch);
        let at = |step| run(&sketch.graph, &moved(&sketch.inputs, &direction, step), Precision::Exact);
        let (up, down) = (at(STEP)?, at(-STEP)?);
        let steady = [&up, &down].into_iter().all(|run| choices(&sketch.graph, run) == chosen);
        found = Some((direction, (up.value(loss).data[0] - down.value(loss).data[0]) / (2.0 * STEP)));
        if steady {
            break;
        }
    }
    let (direction, difference) = found.unwrap_or_else(|| unreachable!("there is more than one direction"));
    let (mut gradient, mut size) = (0.0, 0.0);
    for (name, by) in &direction {
        let d = base.output(&sketch.graph, &format!("d.{name}")).ok_or_else(|| Error::Feed {
            name: name.clone(),
            wanted: "an output with its gradient".into(),
            found: "none".into(),
        })?;
        for (v, d) in by.iter().zip(&d.data) {
            gradient += v * d;
            size += (v * d).powi(2);
        }
    }
    Ok(Slope { gradient, difference, size: size.sqrt() })
}

/// Every integer and bool of a run: choices of experts, slots, masks.
fn choices(graph: &Graph, run: &Evaluation) -> Vec<f64> {
    let whole = graph.values().filter(|v| !graph.ty(*v).dtype.is_float());
    whole.flat_map(|v| run.value(v).data.iter().copied()).collect()
}

/// Whether roundings and small steps leave every choice of the graph as it is: the choice of experts, the order of slots, every
/// comparison. Where they do not, neither a difference quotient nor a device in another precision has to agree with the
/// reference, and other inputs have to be drawn. `step` is the size of the steps, along one direction.
///
/// # Errors
/// [`Error::Feed`] if an input has no value.
pub fn steady(sketch: &mut Sketch, step: f64) -> Result<bool> {
    let direction = direction(sketch);
    let Sketch { graph, inputs, .. } = sketch;
    let at = |inputs: &Inputs, precision| run(graph, inputs, precision).map(|run| choices(graph, &run));
    let base = at(inputs, Precision::Exact)?;
    if at(inputs, Precision::Rounded)? != base {
        return Ok(false);
    }
    for step in [step, -step] {
        if at(&moved(inputs, &direction, step), Precision::Exact)? != base {
            return Ok(false);
        }
    }
    Ok(true)
}
