//! Cases of `kd`: the distillation term and the gradient of the student's logits, in plain ops and by the ops that never hold all
//! logits.

use moebius_ir::{Tensor, TensorType, Value, gradients};
use moebius_models::gpt::{Distillation, distillation};

use super::compare::{Case, difference};
use super::machine::{Machine, Sheet, output};
use super::set::{Fields, Problem};

/// Relative to the largest magnitude of the tensor.
const TOLERANCE: f64 = 1e-6;

/// Compares one case: fields `temp`, `beta`, `loss`.
pub(super) fn check(case: &mut Case<'_>, fields: &Fields<'_>, machine: &Machine) -> Result<(), Problem> {
    let options = Distillation { temperature: fields.number("temp")?, beta: fields.number("beta")? };
    let (student, teacher) = (case.tensor("student")?.clone(), case.tensor("teacher")?.clone());
    compare(case, fields, machine, |sheet| {
        let student = sheet.input("student", student.clone())?;
        let teacher = sheet.input("teacher", teacher.clone())?;
        Ok((student, distillation(&mut sheet.graph, student, teacher, options)?))
    })?;
    let (v, n) = (student.ty.shape.last(), student.ty.shape.rows());
    // Logits are the rows of a classifier whose weights are the identity.
    let rows = |logits: &Tensor| Tensor::f32([n, v], logits.data.clone());
    let identity = Tensor::f32([v, v], (0..v * v).map(|i| f64::from(u8::from(i / v == i % v))).collect());
    let temperature = options.temperature as f32;
    let scaled = |sheet: &mut Sheet, kd: Value| {
        let mean = sheet.graph.mean_all(kd)?;
        sheet.graph.mul_scalar(mean, options.beta)
    };
    compare(case, fields, machine, |sheet| {
        let own = [sheet.input("student", rows(&student))?, sheet.input("identity", identity.clone())?];
        let of = [sheet.input("teacher", rows(&teacher))?, own[1]];
        let targets = sheet.graph.splat(TensorType::i32([n]), 0.0)?;
        let [_, kd] = sheet.graph.linear_distillation(own, targets, of, temperature)?;
        Ok((own[0], scaled(sheet, kd)?))
    })?;
    // Everything is kept, so that what is kept is all.
    let mut log_p = rows(&teacher);
    for row in log_p.data.chunks_mut(v) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|l| ((l - max) / options.temperature).exp()).sum();
        row.iter_mut().for_each(|l| *l = (*l - max) / options.temperature - sum.ln());
    }
    compare(case, fields, machine, |sheet| {
        let own = [sheet.input("student", rows(&student))?, sheet.input("identity", identity.clone())?];
        let ids = Tensor::i32([n, v], &(0..n * v).map(|i| (i % v) as i32).collect::<Vec<_>>());
        let tail = Tensor::f32([n], vec![f64::NEG_INFINITY; n]);
        let kept = [sheet.input("ids", ids)?, sheet.input("log_p", log_p.clone())?, sheet.input("log_tail", tail)?];
        let targets = sheet.graph.splat(TensorType::i32([n]), 0.0)?;
        let [_, kd] = sheet.graph.linear_distillation_cached(own, targets, kept, temperature)?;
        Ok((own[0], scaled(sheet, kd)?))
    })
}

/// Compares the loss that `build` makes of the student's logits, and its gradient of them.
fn compare(
    case: &mut Case<'_>,
    fields: &Fields<'_>,
    machine: &Machine,
    build: impl Fn(&mut Sheet) -> Result<(Value, Value), Problem>,
) -> Result<(), Problem> {
    let mut sheet = Sheet::default();
    let (student, loss) = build(&mut sheet)?;
    let gradient = gradients(&mut sheet.graph, loss, &[student])?[0];
    sheet.output("loss", loss)?;
    sheet.output("grad_student", gradient)?;
    let got = machine.run(&sheet)?;
    case.close("loss", output(&got, "loss")?, TOLERANCE)?;
    if let Some(wrong) = difference(output(&got, "loss")?, &[fields.number("loss")?], TOLERANCE) {
        case.wrong(format!("loss of the index: {wrong}"));
    }
    case.close("grad_student", output(&got, "grad_student")?, TOLERANCE)
}
