//! One instruction over one tile: a vectorised loop for each operation and kind.

use half::{bf16, f16};

use super::program::{Binary, Compare, Kind, Unary};
use crate::cpu::element::Element;
use crate::cpu::vmath;

#[inline(always)]
fn map(x: &[u32], out: &mut [u32], f: impl Fn(u32) -> u32) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = f(x);
    }
}

#[inline(always)]
fn map_f(x: &[u32], out: &mut [u32], f: impl Fn(f32) -> f32) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = f(f32::from_bits(x)).to_bits();
    }
}

#[inline(always)]
fn zip(a: &[u32], b: &[u32], out: &mut [u32], f: impl Fn(u32, u32) -> u32) {
    for (o, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *o = f(a, b);
    }
}

#[inline(always)]
fn zip_f(a: &[u32], b: &[u32], out: &mut [u32], f: impl Fn(f32, f32) -> f32) {
    for (o, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *o = f(f32::from_bits(a), f32::from_bits(b)).to_bits();
    }
}

/// `op` of operands of `kind`, which the program has checked to exist.
#[inline(always)]
pub(super) fn unary(op: Unary, kind: Kind, x: &[u32], out: &mut [u32]) {
    let integer = kind != Kind::F32;
    match op {
        Unary::Neg if integer => map(x, out, u32::wrapping_neg),
        Unary::Neg => map_f(x, out, |x| -x),
        Unary::Relu if integer => map(x, out, |x| (x as i32).max(0) as u32),
        // The comparison is false for a NaN, which stays.
        Unary::Relu => map_f(x, out, |x| if x < 0.0 { 0.0 } else { x }),
        Unary::Abs if integer => map(x, out, |x| (x as i32).wrapping_abs() as u32),
        Unary::Abs => map_f(x, out, f32::abs),
        Unary::Sign if integer => map(x, out, |x| (x as i32).signum() as u32),
        Unary::Sign => map_f(x, out, |x| {
            let sign = f32::from(u8::from(x > 0.0)) - f32::from(u8::from(x < 0.0));
            if x.is_nan() { x } else { sign }
        }),
        Unary::Square if integer => map(x, out, |x| x.wrapping_mul(x)),
        Unary::Square => map_f(x, out, |x| x * x),
        Unary::Exp => map_f(x, out, vmath::exp),
        Unary::Ln => map_f(x, out, vmath::ln),
        Unary::Sqrt => map_f(x, out, f32::sqrt),
        Unary::Rsqrt => map_f(x, out, |x| 1.0 / x.sqrt()),
        Unary::Reciprocal => map_f(x, out, |x| 1.0 / x),
        Unary::Tanh => map_f(x, out, vmath::tanh),
        Unary::Sigmoid => map_f(x, out, vmath::sigmoid),
        Unary::GeluTanh => map_f(x, out, vmath::gelu_tanh),
        Unary::GeluErf => map_f(x, out, vmath::gelu_erf),
        Unary::Silu => map_f(x, out, vmath::silu),
        Unary::Sin => map_f(x, out, vmath::sin),
        Unary::Cos => map_f(x, out, vmath::cos),
        Unary::Floor => map_f(x, out, f32::floor),
        Unary::RoundBf16 => map_f(x, out, |x| <bf16 as Element>::from_f32(x).to_f32()),
        Unary::RoundF16 => map_f(x, out, |x| <f16 as Element>::from_f32(x).to_f32()),
        Unary::IsFinite => map(x, out, |x| u32::from(f32::from_bits(x).is_finite())),
        Unary::Not => map(x, out, |x| x ^ 1),
    }
}

/// `op` of operands of `kind`, which the program has checked to exist.
#[inline(always)]
pub(super) fn binary(op: Binary, kind: Kind, a: &[u32], b: &[u32], out: &mut [u32]) {
    match kind {
        Kind::F32 => binary_f32(op, a, b, out),
        Kind::I32 => binary_integer(op, a, b, out, |x| i64::from(x as i32)),
        // Bool is 0 or 1, so that or and and are the maximum and the minimum.
        Kind::U32 | Kind::Bool => binary_integer(op, a, b, out, i64::from),
    }
}

#[inline(always)]
fn binary_f32(op: Binary, a: &[u32], b: &[u32], out: &mut [u32]) {
    match op {
        Binary::Add => zip_f(a, b, out, |a, b| a + b),
        Binary::Sub => zip_f(a, b, out, |a, b| a - b),
        Binary::Mul => zip_f(a, b, out, |a, b| a * b),
        Binary::Div => zip_f(a, b, out, |a, b| a / b),
        // The comparison is false for a NaN b, which is then taken.
        Binary::Max => zip_f(a, b, out, |a, b| if a > b || a.is_nan() { a } else { b }),
        Binary::Min => zip_f(a, b, out, |a, b| if a < b || a.is_nan() { a } else { b }),
        Binary::Pow => zip_f(a, b, out, f32::powf),
        Binary::GeluTanhGrad => zip_f(a, b, out, |x, dy| dy * vmath::gelu_tanh_grad(x)),
        Binary::GeluErfGrad => zip_f(a, b, out, |x, dy| dy * vmath::gelu_erf_grad(x)),
        Binary::SiluGrad => zip_f(a, b, out, |x, dy| dy * vmath::silu_grad(x)),
        Binary::ReluGrad => zip_f(a, b, out, |x, dy| if x > 0.0 { dy } else { 0.0 }),
    }
}

/// `wide` gives the value of a word; sums, differences and products have the same low words for either sign.
#[inline(always)]
fn binary_integer(op: Binary, a: &[u32], b: &[u32], out: &mut [u32], wide: impl Fn(u32) -> i64 + Copy) {
    match op {
        Binary::Add => zip(a, b, out, u32::wrapping_add),
        Binary::Sub => zip(a, b, out, u32::wrapping_sub),
        Binary::Mul => zip(a, b, out, u32::wrapping_mul),
        // In i64 neither the sign nor i32::MIN / -1 needs a case.
        Binary::Div => zip(a, b, out, |a, b| if b == 0 { 0 } else { (wide(a) / wide(b)) as u32 }),
        Binary::Max => zip(a, b, out, |a, b| if wide(a) > wide(b) { a } else { b }),
        Binary::Min => zip(a, b, out, |a, b| if wide(a) < wide(b) { a } else { b }),
        Binary::Pow | Binary::GeluTanhGrad | Binary::GeluErfGrad | Binary::SiluGrad | Binary::ReluGrad => {
            unreachable!("refused for integers when the program was built")
        }
    }
}

/// `op` of operands of `kind`, giving 0 or 1.
#[inline(always)]
pub(super) fn compare(op: Compare, kind: Kind, a: &[u32], b: &[u32], out: &mut [u32]) {
    match kind {
        Kind::F32 => compare_as(op, a, b, out, f32::from_bits),
        Kind::I32 => compare_as(op, a, b, out, |x| x as i32),
        Kind::U32 | Kind::Bool => compare_as(op, a, b, out, |x| x),
    }
}

#[inline(always)]
fn compare_as<V: PartialOrd>(op: Compare, a: &[u32], b: &[u32], out: &mut [u32], v: impl Fn(u32) -> V + Copy) {
    match op {
        Compare::Eq => zip(a, b, out, |a, b| u32::from(v(a) == v(b))),
        Compare::Ne => zip(a, b, out, |a, b| u32::from(v(a) != v(b))),
        Compare::Lt => zip(a, b, out, |a, b| u32::from(v(a) < v(b))),
        Compare::Le => zip(a, b, out, |a, b| u32::from(v(a) <= v(b))),
        Compare::Gt => zip(a, b, out, |a, b| u32::from(v(a) > v(b))),
        Compare::Ge => zip(a, b, out, |a, b| u32::from(v(a) >= v(b))),
    }
}

/// `a` where `condition` is not 0, else `b`.
#[inline(always)]
pub(super) fn select(condition: &[u32], a: &[u32], b: &[u32], out: &mut [u32]) {
    for ((o, &c), (&a, &b)) in out.iter_mut().zip(condition).zip(a.iter().zip(b)) {
        *o = if c != 0 { a } else { b };
    }
}

/// A conversion between kinds.
#[inline(always)]
pub(super) fn cast(from: Kind, to: Kind, x: &[u32], out: &mut [u32]) {
    match (from, to) {
        (Kind::F32, Kind::I32) => map(x, out, |x| f32::from_bits(x) as i32 as u32),
        (Kind::F32, Kind::U32) => map(x, out, |x| f32::from_bits(x) as u32),
        (Kind::F32, Kind::Bool) => map(x, out, |x| u32::from(f32::from_bits(x) != 0.0)),
        (Kind::I32 | Kind::U32, Kind::Bool) => map(x, out, |x| u32::from(x != 0)),
        (Kind::I32 | Kind::Bool, Kind::F32) => map(x, out, |x| (x as i32 as f32).to_bits()),
        (Kind::U32, Kind::F32) => map(x, out, |x| (x as f32).to_bits()),
        (Kind::F32, Kind::F32) | (Kind::Bool, Kind::Bool) => out.copy_from_slice(x),
        (Kind::I32 | Kind::U32 | Kind::Bool, Kind::I32 | Kind::U32) => out.copy_from_slice(x),
    }
}
