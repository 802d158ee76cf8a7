//! One case of an op or layer on devices against the reference, values and gradients: as close as its tolerance wants, the same
//! bits from each variant of a backend, from a second run, and before and after the passes.

use std::collections::HashMap;

use moebius_ir::reference::Precision;
use moebius_ir::{DType, Tensor, passes};
use moebius_models::verify::cases::Case;
use moebius_models::verify::tolerance::{Tolerance, difference, rms};

use crate::device::{self, Device, Live};

/// Makes sure that a comparison with the reference's result can fail.
fn can_fail(name: &str, wanted: &Tensor, tolerance: Tolerance) -> Result<(), String> {
    if rms(wanted) > 0.0 {
        let zeros = Tensor::zeros(wanted.ty.clone());
        if difference(&zeros, wanted, tolerance).is_none() {
            return Err(format!("{name}: the tolerance would let zeros pass"));
        }
    }
    Ok(())
}

/// Compares a backend's result with the reference's.
fn compare(name: &str, got: &Tensor, wanted: &Tensor, tolerance: Tolerance) -> Result<(), String> {
    match difference(got, wanted, tolerance) {
        Some(what) => Err(format!("{name}: {what}")),
        None => Ok(()),
    }
}

/// The values of a case whose open floats are `dtype`.
///
/// # Errors
/// In words, what is wrong, and on which device.
pub fn forward(case: &Case, dtype: DType, devices: &[Device]) -> Result<(), String> {
    let sketch = case.sketch(dtype).map_err(|e| e.to_string())?;
    let wanted = device::reference(&sketch.graph, &sketch.inputs, Precision::Rounded);
    // The meaning does not change by the passes, to the bit.
    let optimised = passes::optimise(&sketch.graph).map_err(|e| e.to_string())?;
    let fused = device::reference(&optimised, &sketch.inputs, Precision::Rounded);
    if !device::same_bits(&wanted, &fused) {
        return Err("the passes change the reference's results".into());
    }
    // Feeds for a run in between, so that nothing stale can pass for a result.
    let other = sketch.inputs.clone().into_iter().map(|(name, mut t)| {
        if t.ty.dtype.is_float() {
            t.data.iter_mut().for_each(|v| *v = if v.is_finite() { 0.5 * *v } else { 1.0 });
        }
        (name, t.rounded())
    });
    let other = other.collect();
    let tolerance = |wanted: &Tensor| {
        let own = sketch.direct || !wanted.ty.dtype.is_float();
        case.tolerance(if own { wanted.ty.dtype } else { dtype })
    };
    wanted.iter().try_for_each(|(name, wanted)| can_fail(name, wanted, tolerance(wanted)))?;
    let mut first = HashMap::new();
    for device in devices {
        let fail = |e: moebius_backends::Error| format!("{}: {e}", device.name);
        let mut live = Live::new(device.backend.as_ref(), &sketch.graph).map_err(fail)?;
        let got = live.run(&sketch.inputs).map_err(fail)?;
        for (name, wanted) in &wanted {
            compare(name, &got[name], wanted, tolerance(wanted)).map_err(|e| format!("{}: {e}", device.name))?;
        }
        live.run(&other).map_err(fail)?;
        let again = live.run(&sketch.inputs).map_err(fail)?;
        if !device::same_bits(&got, &again) {
            return Err(format!("{}: two runs differ", device.name));
        }
        if !device::same_bits(first.entry(device.backend.name()).or_insert_with(|| got.clone()), &got) {
            return Err(format!("{}: other bits than in another variant of the backend", device.name));
        }
    }
    Ok(())
}

/// The gradients of a case whose open floats are `dtype`, if it has any.
///
/// # Errors
/// In words, what is wrong, and on which device.
pub fn backward(case: &Case, dtype: DType, devices: &[Device]) -> Result<(), String> {
    let mut sketch = case.sketch(dtype).map_err(|e| e.to_string())?;
    if !sketch.differentiable() {
        return Ok(());
    }
    sketch.differentiate().map_err(|e| e.to_string())?;
    let wanted = device::reference(&sketch.graph, &sketch.inputs, Precision::Rounded);
    let optimised = passes::optimise(&sketch.graph).map_err(|e| e.to_string())?;
    if !device::same_bits(&wanted, &device::reference(&optimised, &sketch.inputs, Precision::Rounded)) {
        return Err("the passes change the reference's gradients".into());
    }
    let tolerance = case.gradient_tolerance(dtype);
    let gradients = || wanted.iter().filter(|(name, _)| name.starts_with("d."));
    gradients().try_for_each(|(name, wanted)| can_fail(name, wanted, tolerance))?;
    let mut first = HashMap::new();
    for device in devices {
        let fail = |e: moebius_backends::Error| format!("{}: {e}", device.name);
        let mut live = Live::new(device.backend.as_ref(), &sketch.graph).map_err(fail)?;
        let got = live.run(&sketch.inputs).map_err(fail)?;
        for (name, wanted) in gradients() {
            compare(name, &got[name], wanted, tolerance).map_err(|e| format!("{}: {e}", device.name))?;
        }
        if !device::same_bits(first.entry(device.backend.name()).or_insert_with(|| got.clone()), &got) {
            return Err(format!("{}: other bits than in another variant of the backend", device.name));
        }
    }
    Ok(())
}
