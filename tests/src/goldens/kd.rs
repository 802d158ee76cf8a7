//! Cases of `kd`: the distillation term and the gradient of the student's logits, in plain ops and by the ops that never hold all
//! logits.

use std::collections::HashMap;

use moebius_ir::{Tensor, TensorType, Value, gradients};
use moebius_models::gpt::{Distillation, distillation};

use super::compare::{Case, Roundings, difference};
use super::machine::{Machine, Sheet, output};
use super::rounding;
use super::set::{Fields, Problem};

/// Relative to the largest magnitude of the tensor.
const TOLERANCE: f64 = 1e-6;

/// How far roundings move the loss, and the gradient at most: measured on the plain ops, which compute each number that DeepSpeed's
/// functions compute by a node of its own. High temperatures multiply a small difference of logarithms.
#[derive(Clone, Copy)]
struct Moved {
    loss: f64,
    gradient: f64,
}

/// Compares one case: fields `temp`, `beta`, `loss`.
pub(super) fn check(case: &mut Case<'_>, fields: &Fields<'_>, machine: &Machine) -> Result<(), Problem> {
    let options = Distillation { temperature: fields.number("temp")?, beta: fields.number("beta")? };
    let (student, teacher) = (case.tensor("student")?.clone(), case.tensor("teacher")?.clone());
    let plain = sheet(|sheet| {
        let student = sheet.input("student", student.clone())?;
        let teacher = sheet.input("teacher", teacher.clone())?;
        Ok((student, distillation(&mut sheet.graph, student, teacher, options)?))
    })?;
    let moves = rounding::moves(&plain)?;
    let most = |name: &str| output(&moves, name).map(|moved| moved.iter().copied().fold(0.0, f64::max));
    let moved = Moved { loss: most("loss")?, gradient: most("grad_student")? };
    compare(case, fields, &machine.run(&plain)?, moved)?;
    let (v, n) = (student.ty.shape.last(), student.ty.shape.rows());
    // Logits are the rows of a classifier whose weights are the identity.
    let rows = |logits: &Tensor| Tensor::f32([n, v], logits.data.clone());
    let identity = Tensor::f32([v, v], (0..v * v).map(|i| f64::from(u8::from(i / v == i % v))).collect());
    let temperature = options.temperature as f32;
    let scaled = |sheet: &mut Sheet, kd: Value| {
        let mean = sheet.graph.mean_all(kd)?;
        sheet.graph.mul_scalar(mean, options.beta)
    };
    let live = sheet(|sheet| {
        let own = [sheet.input("student", rows(&student))?, sheet.input("identity", identity.clone())?];
        let of = [sheet.input("teacher", rows(&teacher))?, own[1]];
        let targets = sheet.graph.splat(TensorType::i32([n]), 0.0)?;
        let [_, kd] = sheet.graph.linear_distillation(own, targets, of, temperature)?;
        Ok((own[0], scaled(sheet, kd)?))
    })?;
    compare(case, fields, &machine.run(&live)?, moved)?;
    // Everything is kept, so that what is kept is all.
    let mut log_p = rows(&teacher);
    for row in log_p.data.chunks_mut(v) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|l| ((l - max) / options.temperature).exp()).sum();
        row.iter_mut().for_each(|l| *l = (*l - max) / options.temperature - sum.ln());
    }
    let cached = sheet(|sheet| {
        let own = [sheet.input("student", rows(&student))?, sheet.input("identity", identity.clone())?];
        let ids = Tensor::i32([n, v], &(0..n * v).map(|i| (i % v) as i32).collect::<Vec<_>>());
        let tail = Tensor::f32([n], vec![f64::NEG_INFINITY; n]);
        let kept = [sheet.input("ids", ids)?, sheet.input("log_p", log_p.clone())?, sheet.input("log_tail", tail)?];
        let targets = sheet.graph.splat(TensorType::i32([n]), 0.0)?;
        let [_, kd] = sheet.graph.linear_distillation_cached(own, targets, kept, temperature)?;
        Ok((own[0], scaled(sheet, kd)?))
    })?;
    compare(case, fields, &machine.run(&cached)?, moved)
}

/// The loss that `build` makes of the student's logits, and its gradient of them.
fn sheet(build: impl Fn(&mut Sheet) -> Result<(Value, Value), Problem>) -> Result<Sheet, Problem> {
    let mut sheet = Sheet::default();
    let (student, loss) = build(&mut sheet)?;
    let gradient = gradients(&mut sheet.graph, loss, &[student])?[0];
    sheet.output("loss", loss)?;
    sheet.output("grad_student", gradient)?;
    Ok(sheet)
}

/// Compares what a [`sheet`] gave.
fn compare(
    case: &mut Case<'_>,
    fields: &Fields<'_>,
    got: &HashMap<String, Vec<f64>>,
    moved: Moved,
) -> Result<(), Problem> {
    let beside = |values| Roundings { inputs: None, values };
    let loss = output(got, "loss")?;
    case.close_but_for("loss", loss, beside(moved.loss), TOLERANCE)?;
    let of_index = fields.number("loss")?;
    // Relative to the loss, as the tensor is.
    let tolerance = TOLERANCE.max(2.0 * moved.loss / of_index.abs().max(0.01));
    if let Some(wrong) = difference(loss, &[of_index], tolerance) {
        case.wrong(format!("loss of the index: {wrong}"));
    }
    case.close_but_for("grad_student", output(got, "grad_student")?, beside(moved.gradient), TOLERANCE)
}
