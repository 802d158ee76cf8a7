//! Cases of `kd`: the distillation term and the gradient of the student's logits.

use moebius_ir::gradients;
use moebius_models::gpt::{Distillation, distillation};

use super::compare::{Case, difference};
use super::machine::{Machine, Sheet, output};
use super::set::{Fields, Problem};

/// Relative to the largest magnitude of the tensor.
const TOLERANCE: f64 = 1e-6;

/// Compares one case: fields `temp`, `beta`, `loss`.
pub(super) fn check(case: &mut Case<'_>, fields: &Fields<'_>, machine: &Machine) -> Result<(), Problem> {
    let options = Distillation { temperature: fields.number("temp")?, beta: fields.number("beta")? };
    let mut sheet = Sheet::default();
    let student = sheet.input("student", case.tensor("student")?.clone())?;
    let teacher = sheet.input("teacher", case.tensor("teacher")?.clone())?;
    let loss = distillation(&mut sheet.graph, student, teacher, options)?;
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
