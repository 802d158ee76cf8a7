//! How close a device must come to the reference: one table by dtype and kind of op, and how far it is.

use moebius_ir::{DType, Tensor};

/// Kinds of cases, by how their results are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nothing is computed in floats: the bits of the reference.
    Exact,
    /// One function per element, so that each element is close by itself.
    Element,
    /// Sums, products and chains: errors compare with the size of the whole result.
    Sum,
    /// Sums of thousands of products, which a device may add up one after another.
    LongSum,
    /// A mean of values by weights that a device may round to the dtype first, as the tensor cores want them.
    Weighted,
    /// A gradient: a chain of several ops.
    Gradient,
    /// A whole layer or its gradient: some dozens of ops, each with a rounding.
    Layer,
}

/// `|got - wanted| <= relative |wanted| + of_rms size`, where `size` is the root mean square of the finite wanted elements, but
/// at least `least` and at most `most`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Part of the element.
    pub relative: f64,
    /// Part of the root mean square of all elements.
    pub of_rms: f64,
    /// The size of the terms whose sum or difference the elements are: what is left where they cancel is as inexact as they.
    pub least: f64,
    /// Where each element is computed by itself, a large one excuses no other.
    pub most: f64,
}

impl Tolerance {
    /// The same for elements that are differences of terms of about this size.
    #[must_use]
    pub fn of_terms(self, size: f64) -> Tolerance {
        Tolerance { least: size, ..self }
    }

    /// The size that `of_rms` is a part of.
    fn size(&self, wanted: &Tensor) -> f64 {
        rms(wanted).max(self.least).min(self.most)
    }
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

/// Spacing of the numbers of a dtype at a number of this size: one unit in the last place. 1 for integers and bools.
pub fn spacing(dtype: DType, size: f64) -> f64 {
    let least = match dtype {
        DType::F32 | DType::Bf16 => -126,
        DType::F16 => -14,
        DType::I32 | DType::U32 | DType::Bool => return 1.0,
    };
    // Every number of these dtypes is a normal number in f64, so that its exponent can be read off.
    let exponent = (size.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    let power = f64::from_bits(((exponent.max(least) + 1023) as u64) << 52);
    ulp(dtype) * power
}

/// The table, in spacings of the dtype.
pub fn tolerance(class: Class, dtype: DType) -> Tolerance {
    let wide = dtype == DType::F32;
    let (relative, of_rms) = match class {
        Class::Exact => (0.0, 0.0),
        // The functions are computed in f32: some spacings there, a flipped rounding in the half-width types. What is left of the
        // size in f16 are the error of f32 and two of its smallest numbers.
        Class::Element => (if wide { 16.0 } else { 1.0 }, if wide { 1.0 } else { 2.5e-4 }),
        Class::Sum => (if wide { 16.0 } else { 1.0 }, if wide { 16.0 } else { 0.02 }),
        // In f32 each addition rounds by up to half a spacing of what is summed so far. Of 2^14 additions those make a random walk of some
        // 64 spacings of the size; twice that is allowed.
        Class::LongSum => (if wide { 16.0 } else { 1.0 }, if wide { 128.0 } else { 0.02 }),
        // A rounding of each weight is half a spacing of it; their sum has about the size of one, a few times that at its worst.
        // In f32 what counts is the score, a sum over the columns of a head: its error is one of the weight relative to itself.
        Class::Weighted => (if wide { 16.0 } else { 1.0 }, if wide { 64.0 } else { 1.5 }),
        Class::Gradient => (if wide { 64.0 } else { 2.0 }, if wide { 64.0 } else { 4.0 }),
        Class::Layer => (if wide { 128.0 } else { 4.0 }, if wide { 128.0 } else { 16.0 }),
    };
    let most = if class == Class::Element { 1.0 } else { f64::INFINITY };
    Tolerance { relative: relative * ulp(dtype), of_rms: of_rms * ulp(dtype), least: 0.0, most }
}

/// The tolerance of a whole layer's result or gradient in a half-width `dtype`, from what rounding does to it: `rounded` is the
/// reference with every value rounded to its dtype, `exact` the one with none. A device rounds the same values after sums in another
/// order, and may flip some of those roundings: together they do less than all roundings, `|rounded - exact|` at its worst
/// element, do, and the last one of each element is half a spacing of it. In parts of the largest element, not of the root mean
/// square, and with a floor of half a spacing of it, as a difference may happen to be small.
pub fn of_roundings(exact: &Tensor, rounded: &Tensor, dtype: DType) -> Tolerance {
    let largest =
        |values: &mut dyn Iterator<Item = f64>| values.filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs()));
    let moved = largest(&mut exact.data.iter().zip(&rounded.data).map(|(e, r)| e - r));
    let bound = moved + 0.5 * ulp(dtype) * largest(&mut rounded.data.iter().copied());
    Tolerance { relative: 0.5 * ulp(dtype), of_rms: 1.0, least: bound, most: bound }
}

/// Root mean square of the finite elements.
pub fn rms(tensor: &Tensor) -> f64 {
    let (mut sum, mut finite) = (0.0, 0usize);
    for at in 0..tensor.data.len() {
        let v = tensor.data[at];
        if v.is_finite() {
            sum += v * v;
            finite += 1;
        }
    }
    (sum / finite.max(1) as f64).sqrt()
}

/// How far a result is from the wanted one, at its worst element by each measure. All are infinite where one of the two is
/// not finite and the other is another number.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// In [`spacing`]s of the larger of the wanted element and the tolerance's floor: the size below which only the part of the
    /// root mean square is left of the tolerance.
    pub ulp: f64,
    /// Relative to the same size.
    pub relative: f64,
    /// In parts of what the tolerance allows: above 1 it is too far.
    pub of_allowed: f64,
    /// The element that is worst by `of_allowed`.
    pub worst: usize,
}

impl Distance {
    /// The larger by each measure.
    #[must_use]
    pub fn max(self, other: Distance) -> Distance {
        let worst = if other.of_allowed > self.of_allowed { other.worst } else { self.worst };
        Distance {
            ulp: self.ulp.max(other.ulp),
            relative: self.relative.max(other.relative),
            of_allowed: self.of_allowed.max(other.of_allowed),
            worst,
        }
    }
}

/// How far `got` is from `wanted`, element by element; both have as many elements.
///
/// `dtype` is the one whose spacing counts and that the tolerance is of.
pub fn distance(got: &Tensor, wanted: &Tensor, tolerance: Tolerance, dtype: DType) -> Distance {
    let size = tolerance.size(wanted);
    let floor = if tolerance.relative > 0.0 { tolerance.of_rms * size / tolerance.relative } else { 0.0 };
    // Below the normal numbers a kernel may flush to zero.
    let tiny = if tolerance.relative == 0.0 { 0.0 } else { 1.2e-38 };
    // A loop over indices, as in `rms`: where tests run it, on a low level of optimisation, each step of an iterator is a call.
    let mut distance = Distance::default();
    for worst in 0..got.data.len().min(wanted.data.len()) {
        let (g, w) = (got.data[worst], wanted.data[worst]);
        if g == w || (g.is_nan() && w.is_nan()) {
            continue;
        }
        let error = (g - w).abs();
        let least = w.abs().max(floor);
        let allowed = tolerance.relative * w.abs() + tolerance.of_rms * size + tiny;
        distance = distance.max(match error.is_finite() {
            true => Distance {
                ulp: error / spacing(dtype, least),
                relative: error / least,
                of_allowed: error / allowed,
                worst,
            },
            false => Distance { ulp: f64::INFINITY, relative: f64::INFINITY, of_allowed: f64::INFINITY, worst },
        });
    }
    distance
}

/// In words, the element of `got` that is further from `wanted` than allowed; the worst of them.
pub fn difference(got: &Tensor, wanted: &Tensor, tolerance: Tolerance) -> Option<String> {
    if got.ty != wanted.ty {
        return Some(format!("type {} for {}", got.ty, wanted.ty));
    }
    let Distance { of_allowed, worst, .. } = distance(got, wanted, tolerance, wanted.ty.dtype);
    // Not a number of the right sort is as wrong as any.
    if of_allowed <= 1.0 {
        return None;
    }
    let (g, w) = (got.data[worst], wanted.data[worst]);
    let (error, size) = ((g - w).abs(), tolerance.size(wanted));
    Some(format!("element {worst} of {}: {g:e} for {w:e}, error {error:e}, size {size:e}", wanted.ty))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_in_the_last_place_are_those_of_the_size() {
        assert_eq!(spacing(DType::F32, 1.0), 2f64.powi(-23));
        assert_eq!(spacing(DType::F32, -1.99), 2f64.powi(-23));
        assert_eq!(spacing(DType::Bf16, 2.0), 2f64.powi(-6));
        assert_eq!(spacing(DType::F16, 1e-7), 2f64.powi(-24));
        assert_eq!(spacing(DType::F32, 0.0), 2f64.powi(-149));
        assert_eq!(spacing(DType::I32, 1e9), 1.0);
    }

    #[test]
    fn a_large_element_excuses_no_other_where_each_stands_for_itself() {
        let wanted = Tensor::f32([3], vec![1e30, 1.0, 0.0]);
        let got = Tensor::f32([3], vec![1e30, 1.001, 0.0]);
        let found = |class| difference(&got, &wanted, tolerance(class, DType::F32));
        assert!(found(Class::Element).is_some());
        assert_eq!(found(Class::Sum), None);
    }

    #[test]
    fn what_is_left_of_terms_is_as_inexact_as_they() {
        let (wanted, got) = (Tensor::f32([1], vec![1e-4]), Tensor::f32([1], vec![1e-4 + 1e-7]));
        let tolerance = tolerance(Class::Sum, DType::F32);
        assert!(difference(&got, &wanted, tolerance).is_some());
        assert_eq!(difference(&got, &wanted, tolerance.of_terms(0.25)), None);
        assert!(difference(&Tensor::f32([1], vec![0.0]), &wanted, tolerance.of_terms(0.25)).is_some());
    }

    #[test]
    fn the_distance_is_that_of_the_worst_element() {
        let one = 1.0 + 4.0 * 2f64.powi(-23);
        let wanted = Tensor::f32([3], vec![4.0, 1.0, f64::NAN]);
        let got = Tensor::f32([3], vec![4.0, one, f64::NAN]);
        let found = distance(&got, &wanted, tolerance(Class::Element, DType::F32), DType::F32);
        assert_eq!((found.ulp, found.worst), (4.0, 1));
        assert!((found.relative - 4.0 * 2f64.powi(-23)).abs() < 1e-12 && found.of_allowed < 1.0, "{found:?}");
        let infinite = Tensor::f32([3], vec![4.0, f64::INFINITY, f64::NAN]);
        let found = distance(&infinite, &wanted, tolerance(Class::Sum, DType::F32), DType::F32);
        assert_eq!((found.of_allowed, found.worst), (f64::INFINITY, 1));
        // What must be exact has no floor: a difference from zero is infinitely far.
        let zero = Tensor::i32([1], &[0]);
        let found = distance(&Tensor::i32([1], &[3]), &zero, tolerance(Class::Exact, DType::I32), DType::I32);
        assert_eq!((found.ulp, found.of_allowed), (3.0, f64::INFINITY));
    }
}
