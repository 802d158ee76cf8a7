//! One instruction over one tile: a vectorised loop for each operation and kind.

use half::{bf16, f16};

use super::program::{Binary, Compare, Kind, Unary};
use crate::cpu::element::Element;
use crate::cpu::vmath::{self, BLOCK, map_block};

// The loops are macros rather than functions over closures: a closure is a function of its own, which the compiler may
// leave outside the loop and so outside the vector instructions.

/// `out[i]` = f(`x[i]`) on words.
macro_rules! map {
    ($x:ident, $out:ident, |$v:ident| $e:expr) => {
        for (o, &$v) in $out.iter_mut().zip($x) {
            *o = $e;
        }
    };
}

/// `out[i]` = f(`x[i]`) on f32.
macro_rules! map_f {
    ($x:ident, $out:ident, |$v:ident| $e:expr) => {
        map!($x, $out, |$v| {
            let $v = f32::from_bits($v);
            f32::to_bits($e)
        })
    };
}

/// `out[i]` = f(`a[i]`, `b[i]`) on words.
macro_rules! zip {
    ($a:ident, $b:ident, $out:ident, |$v:ident, $w:ident| $e:expr) => {
        for (o, (&$v, &$w)) in $out.iter_mut().zip($a.iter().zip($b)) {
            *o = $e;
        }
    };
}

/// `out[i]` = f(`a[i]`, `b[i]`) on f32.
macro_rules! zip_f {
    ($a:ident, $b:ident, $out:ident, |$v:ident, $w:ident| $e:expr) => {
        zip!($a, $b, $out, |$v, $w| {
            let ($v, $w) = (f32::from_bits($v), f32::from_bits($w));
            f32::to_bits($e)
        })
    };
}

/// `out[i]` = f(`x[i]`) on f32 for a function of [`vmath`] that takes many values at once.
macro_rules! blocks {
    ($x:ident, $out:ident, $f:path) => {{
        let ((x, x_rest), (out, out_rest)) = ($x.as_chunks::<BLOCK>(), $out.as_chunks_mut::<BLOCK>());
        for (x, out) in x.iter().zip(out) {
            *out = bytemuck::cast(map_block!(&bytemuck::cast(*x), $f));
        }
        if !x_rest.is_empty() {
            let mut last = [0; BLOCK];
            last[..x_rest.len()].copy_from_slice(x_rest);
            let last: [u32; BLOCK] = bytemuck::cast(map_block!(&bytemuck::cast(last), $f));
            out_rest.copy_from_slice(&last[..out_rest.len()]);
        }
    }};
}

/// `out[i]` = `dy[i]` f(`x[i]`), likewise.
macro_rules! times_slope {
    ($x:ident, $dy:ident, $out:ident, $f:path) => {{
        blocks!($x, $out, $f);
        for (o, &dy) in $out.iter_mut().zip($dy) {
            *o = (f32::from_bits(dy) * f32::from_bits(*o)).to_bits();
        }
    }};
}

/// `op` of operands of `kind`, which the program has checked to exist.
#[inline(always)]
pub(super) fn unary(op: Unary, kind: Kind, x: &[u32], out: &mut [u32]) {
    let integer = kind != Kind::F32;
    match op {
        Unary::Neg if integer => map!(x, out, |x| x.wrapping_neg()),
        Unary::Neg => map_f!(x, out, |x| -x),
        Unary::Relu if integer => map!(x, out, |x| (x as i32).max(0) as u32),
        // The comparison is false for a NaN, which stays.
        Unary::Relu => map_f!(x, out, |x| if x < 0.0 { 0.0 } else { x }),
        Unary::Abs if integer => map!(x, out, |x| (x as i32).wrapping_abs() as u32),
        Unary::Abs => map_f!(x, out, |x| f32::abs(x)),
        Unary::Sign if integer => map!(x, out, |x| (x as i32).signum() as u32),
        Unary::Sign => map_f!(x, out, |x| {
            let sign = f32::from(u8::from(x > 0.0)) - f32::from(u8::from(x < 0.0));
            if x.is_nan() { x } else { sign }
        }),
        Unary::Square if integer => map!(x, out, |x| x.wrapping_mul(x)),
        Unary::Square => map_f!(x, out, |x| x * x),
        Unary::Exp => blocks!(x, out, vmath::exps),
        Unary::Ln => blocks!(x, out, vmath::lns),
        Unary::Sqrt => map_f!(x, out, |x| f32::sqrt(x)),
        Unary::Rsqrt => map_f!(x, out, |x| 1.0 / x.sqrt()),
        Unary::Reciprocal => map_f!(x, out, |x| 1.0 / x),
        Unary::Tanh => blocks!(x, out, vmath::tanhs),
        Unary::Sigmoid => blocks!(x, out, vmath::sigmoids),
        Unary::GeluTanh => blocks!(x, out, vmath::gelus_tanh),
        Unary::GeluErf => blocks!(x, out, vmath::gelus_erf),
        Unary::Silu => blocks!(x, out, vmath::silus),
        Unary::Sin => map_f!(x, out, |x| vmath::sin(x)),
        Unary::Cos => map_f!(x, out, |x| vmath::cos(x)),
        Unary::Floor => map_f!(x, out, |x| f32::floor(x)),
        Unary::RoundBf16 => map_f!(x, out, |x| <bf16 as Element>::from_f32(x).to_f32()),
        Unary::RoundF16 => map_f!(x, out, |x| <f16 as Element>::from_f32(x).to_f32()),
        Unary::IsFinite => map!(x, out, |x| u32::from(f32::from_bits(x).is_finite())),
        Unary::Not => map!(x, out, |x| x ^ 1),
    }
}

/// `op` of operands of `kind`, which the program has checked to exist.
#[inline(always)]
pub(super) fn binary(op: Binary, kind: Kind, a: &[u32], b: &[u32], out: &mut [u32]) {
    match kind {
        Kind::F32 => binary_f32(op, a, b, out),
        Kind::I32 => binary_integer::<true>(op, a, b, out),
        // Bool is 0 or 1, so that or and and are the maximum and the minimum.
        Kind::U32 | Kind::Bool => binary_integer::<false>(op, a, b, out),
    }
}

#[inline(always)]
fn binary_f32(op: Binary, a: &[u32], b: &[u32], out: &mut [u32]) {
    match op {
        Binary::Add => zip_f!(a, b, out, |a, b| a + b),
        Binary::Sub => zip_f!(a, b, out, |a, b| a - b),
        Binary::Mul => zip_f!(a, b, out, |a, b| a * b),
        Binary::Div => zip_f!(a, b, out, |a, b| a / b),
        // The comparison is false for a NaN b, which is then taken.
        Binary::Max => zip_f!(a, b, out, |a, b| if a > b || a.is_nan() { a } else { b }),
        Binary::Min => zip_f!(a, b, out, |a, b| if a < b || a.is_nan() { a } else { b }),
        Binary::Pow => zip_f!(a, b, out, |a, b| a.powf(b)),
        Binary::GeluTanhGrad => times_slope!(a, b, out, vmath::gelus_tanh_grad),
        Binary::GeluErfGrad => times_slope!(a, b, out, vmath::gelus_erf_grad),
        Binary::SiluGrad => times_slope!(a, b, out, vmath::silus_grad),
        Binary::ReluGrad => zip_f!(a, b, out, |x, dy| if x > 0.0 { dy } else { 0.0 }),
    }
}

/// The value of a word.
#[inline(always)]
fn wide<const SIGNED: bool>(word: u32) -> i64 {
    if SIGNED { i64::from(word as i32) } else { i64::from(word) }
}

/// A word whose signed order is the order of the values.
#[inline(always)]
fn key<const SIGNED: bool>(word: u32) -> i32 {
    if SIGNED { word as i32 } else { (word ^ (1 << 31)) as i32 }
}

/// Sums, differences and products have the same words for either sign.
#[inline(always)]
fn binary_integer<const SIGNED: bool>(op: Binary, a: &[u32], b: &[u32], out: &mut [u32]) {
    match op {
        Binary::Add => zip!(a, b, out, |a, b| a.wrapping_add(b)),
        Binary::Sub => zip!(a, b, out, |a, b| a.wrapping_sub(b)),
        Binary::Mul => zip!(a, b, out, |a, b| a.wrapping_mul(b)),
        // In i64 neither the sign nor i32::MIN / -1 needs a case.
        Binary::Div => zip!(a, b, out, |a, b| if b == 0 { 0 } else { (wide::<SIGNED>(a) / wide::<SIGNED>(b)) as u32 }),
        Binary::Max => zip!(a, b, out, |a, b| if key::<SIGNED>(a) > key::<SIGNED>(b) { a } else { b }),
        Binary::Min => zip!(a, b, out, |a, b| if key::<SIGNED>(a) < key::<SIGNED>(b) { a } else { b }),
        Binary::Pow | Binary::GeluTanhGrad | Binary::GeluErfGrad | Binary::SiluGrad | Binary::ReluGrad => {
            unreachable!("refused for integers when the program was built")
        }
    }
}

/// `op` of operands of `kind`, giving 0 or 1.
#[inline(always)]
pub(super) fn compare(op: Compare, kind: Kind, a: &[u32], b: &[u32], out: &mut [u32]) {
    macro_rules! with {
        (|$v:ident| $e:expr) => {
            match op {
                Compare::Eq => zip!(a, b, out, |a, b| u32::from(with!(a, $v, $e) == with!(b, $v, $e))),
                Compare::Ne => zip!(a, b, out, |a, b| u32::from(with!(a, $v, $e) != with!(b, $v, $e))),
                Compare::Lt => zip!(a, b, out, |a, b| u32::from(with!(a, $v, $e) < with!(b, $v, $e))),
                Compare::Le => zip!(a, b, out, |a, b| u32::from(with!(a, $v, $e) <= with!(b, $v, $e))),
                Compare::Gt => zip!(a, b, out, |a, b| u32::from(with!(a, $v, $e) > with!(b, $v, $e))),
                Compare::Ge => zip!(a, b, out, |a, b| u32::from(with!(a, $v, $e) >= with!(b, $v, $e))),
            }
        };
        ($word:ident, $v:ident, $e:expr) => {{
            let $v = $word;
            $e
        }};
    }
    match kind {
        Kind::F32 => with!(|x| f32::from_bits(x)),
        Kind::I32 => with!(|x| x as i32),
        Kind::U32 | Kind::Bool => with!(|x| key::<false>(x)),
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
        (Kind::F32, Kind::I32) => map!(x, out, |x| f32::from_bits(x) as i32 as u32),
        (Kind::F32, Kind::U32) => map!(x, out, |x| f32::from_bits(x) as u32),
        (Kind::F32, Kind::Bool) => map!(x, out, |x| u32::from(f32::from_bits(x) != 0.0)),
        (Kind::I32 | Kind::U32, Kind::Bool) => map!(x, out, |x| u32::from(x != 0)),
        (Kind::I32 | Kind::Bool, Kind::F32) => map!(x, out, |x| (x as i32 as f32).to_bits()),
        (Kind::U32, Kind::F32) => map!(x, out, |x| (x as f32).to_bits()),
        (Kind::F32, Kind::F32) | (Kind::Bool, Kind::Bool) => out.copy_from_slice(x),
        (Kind::I32 | Kind::U32 | Kind::Bool, Kind::I32 | Kind::U32) => out.copy_from_slice(x),
    }
}
