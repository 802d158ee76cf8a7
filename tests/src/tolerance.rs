//! How close a backend must come to the reference: one table by dtype and kind of op.

use moebius_ir::{DType, Tensor};

/// Kinds of ops, by how their results are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nothing is computed in floats: the bits of the reference.
    Exact,
    /// One function per element, so that each element is close by itself.
    Element,
    /// Sums, products and chains: errors compare with the size of the whole result.
    Sum,
    /// A gradient: a chain of several ops.
    Gradient,
}

/// `|got - wanted| <= relative |wanted| + of_rms rms(wanted)`, the rms over the finite elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Part of the element.
    pub relative: f64,
    /// Part of the root mean square of all elements.
    pub of_rms: f64,
}

/// Spacing of the numbers of a float dtype just above 1.
pub fn ulp(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-23),
        DType::Bf16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
        DType::I32 | DType::U32 | DType::Bool => 0.0,
    }
}

/// The table, in spacings of the dtype.
pub fn tolerance(class: Class, dtype: DType) -> Tolerance {
    let wide = dtype == DType::F32;
    let (relative, of_rms) = match class {
        Class::Exact => (0.0, 0.0),
        // The functions are computed in f32: some spacings there, a flipped rounding in the half-width types.
        Class::Element => (if wide { 16.0 } else { 1.0 }, if wide { 1.0 } else { 1e-4 }),
        Class::Sum => (if wide { 16.0 } else { 1.0 }, if wide { 16.0 } else { 0.02 }),
        Class::Gradient => (if wide { 64.0 } else { 2.0 }, if wide { 64.0 } else { 2.0 }),
    };
    Tolerance { relative: relative * ulp(dtype), of_rms: of_rms * ulp(dtype) }
}

/// Root mean square of the finite elements.
pub fn rms(tensor: &Tensor) -> f64 {
    let finite: Vec<f64> = tensor.data.iter().copied().filter(|v| v.is_finite()).collect();
    (finite.iter().map(|v| v * v).sum::<f64>() / finite.len().max(1) as f64).sqrt()
}

/// The first element of `got` that is further from `wanted` than allowed, in words.
pub fn difference(got: &Tensor, wanted: &Tensor, tolerance: Tolerance) -> Option<String> {
    if got.ty != wanted.ty {
        return Some(format!("type {} for {}", got.ty, wanted.ty));
    }
    let size = rms(wanted);
    // Below the normal numbers a kernel may flush to zero.
    let tiny = if tolerance.relative == 0.0 { 0.0 } else { 1.2e-38 };
    let worst = (0..wanted.data.len())
        .filter(|&i| {
            let (g, w) = (got.data[i], wanted.data[i]);
            let same = g == w || (g.is_nan() && w.is_nan());
            let most = tolerance.relative * w.abs() + tolerance.of_rms * size + tiny;
            let error = (g - w).abs();
            !same && (!w.is_finite() || error.is_nan() || error > most)
        })
        .max_by(|&a, &b| {
            let error = |i: usize| (got.data[i] - wanted.data[i]).abs();
            error(a).total_cmp(&error(b))
        })?;
    let (g, w) = (got.data[worst], wanted.data[worst]);
    Some(format!("element {worst} of {}: {g:e} for {w:e}, error {:e}, rms {size:e}", wanted.ty, (g - w).abs()))
}
