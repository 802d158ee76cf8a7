//! `unary`: one function of one value, element by element.
//!
//! `x float -> same type`, except `is_finite: float -> bool` and `not: bool -> bool`. Differentiable in `x`;
//! `sign`, `floor`, `is_finite` and `not` are constant almost everywhere and have the derivative 0.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{BinaryFn, Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The functions of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnaryFn {
    /// `-x`.
    Neg,
    /// `e^x`.
    Exp,
    /// The natural logarithm.
    Ln,
    /// The square root.
    Sqrt,
    /// `1/sqrt(x)`.
    Rsqrt,
    /// `1/x`.
    Reciprocal,
    /// The hyperbolic tangent.
    Tanh,
    /// `1/(1+e^-x)`.
    Sigmoid,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel, arXiv 1606.08415).
    GeluTanh,
    /// `x Phi(x)`, Phi the normal distribution function (same paper).
    GeluErf,
    /// `x sigmoid(x)`.
    Silu,
    /// `x` above 0, else 0; NaN stays NaN.
    Relu,
    /// `|x|`.
    Abs,
    /// -1, 0 or 1; NaN stays NaN.
    Sign,
    /// `x^2`.
    Square,
    /// The sine of an angle in radians.
    Sin,
    /// The cosine of an angle in radians.
    Cos,
    /// The largest whole number that is not above `x`.
    Floor,
    /// Whether `x` is neither infinite nor NaN.
    IsFinite,
    /// The other bool.
    Not,
}

impl UnaryFn {
    /// Every function.
    pub const ALL: [UnaryFn; 20] = [
        UnaryFn::Neg,
        UnaryFn::Exp,
        UnaryFn::Ln,
        UnaryFn::Sqrt,
        UnaryFn::Rsqrt,
        UnaryFn::Reciprocal,
        UnaryFn::Tanh,
        UnaryFn::Sigmoid,
        UnaryFn::GeluTanh,
        UnaryFn::GeluErf,
        UnaryFn::Silu,
        UnaryFn::Relu,
        UnaryFn::Abs,
        UnaryFn::Sign,
        UnaryFn::Square,
        UnaryFn::Sin,
        UnaryFn::Cos,
        UnaryFn::Floor,
        UnaryFn::IsFinite,
        UnaryFn::Not,
    ];

    /// The dtype of the result for an operand of dtype `x`.
    ///
    /// # Errors
    /// [`Mismatch`] if the function is not defined on `x`.
    pub fn result(self, x: DType) -> Result<DType, Mismatch> {
        if self == UnaryFn::Not {
            return if x == DType::Bool { Ok(x) } else { Err(Mismatch::operand(0, "bool")) };
        }
        if !x.is_float() {
            return Err(Mismatch::operand(0, "a float"));
        }
        Ok(if self == UnaryFn::IsFinite { DType::Bool } else { x })
    }

    /// The meaning of the function, in f64; a bool is 0 or 1.
    pub fn evaluate(self, x: f64) -> f64 {
        match self {
            UnaryFn::Neg => -x,
            UnaryFn::Exp => x.exp(),
            UnaryFn::Ln => x.ln(),
            UnaryFn::Sqrt => x.sqrt(),
            UnaryFn::Rsqrt => 1.0 / x.sqrt(),
            UnaryFn::Reciprocal => 1.0 / x,
            UnaryFn::Tanh => x.tanh(),
            UnaryFn::Sigmoid => sigmoid(x),
            UnaryFn::GeluTanh => gated(x, sigmoid(2.0 * gelu_inner(x))),
            UnaryFn::GeluErf => gated(x, normal_distribution(x)),
            UnaryFn::Silu => gated(x, sigmoid(x)),
            UnaryFn::Relu if x > 0.0 || x.is_nan() => x,
            UnaryFn::Relu => 0.0,
            UnaryFn::Abs => x.abs(),
            UnaryFn::Sign if x == 0.0 => 0.0,
            UnaryFn::Sign => x.signum(),
            UnaryFn::Square => x * x,
            UnaryFn::Sin => x.sin(),
            UnaryFn::Cos => x.cos(),
            UnaryFn::Floor => x.floor(),
            UnaryFn::IsFinite => f64::from(u8::from(x.is_finite())),
            UnaryFn::Not => f64::from(u8::from(x == 0.0)),
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x * gate` with the limit 0 where the gate has vanished: the product would be NaN at -inf.
fn gated(x: f64, gate: f64) -> f64 {
    if gate == 0.0 { -0.0 } else { x * gate }
}

/// `gate + x * slope` with the limit where the slope has vanished: the product would be NaN at +-inf.
fn gated_grad(x: f64, gate: f64, slope: f64) -> f64 {
    if slope == 0.0 { gate } else { gate + x * slope }
}

const GELU_CUBIC: f64 = 0.044715;

/// `u` of the tanh form of GELU, for which `(1 + tanh u) / 2 = sigmoid(2u)`, the latter without cancellation below 0.
fn gelu_inner(x: f64) -> f64 {
    (2.0 / PI).sqrt() * (x + GELU_CUBIC * x * x * x)
}

/// Derivative of [`UnaryFn::GeluTanh`].
pub(super) fn gelu_tanh_grad(x: f64) -> f64 {
    let u = 2.0 * gelu_inner(x);
    let (s, r) = (sigmoid(u), sigmoid(-u));
    let inner = 2.0 * (2.0 / PI).sqrt() * (1.0 + 3.0 * GELU_CUBIC * x * x);
    gated_grad(x, s, if s * r == 0.0 { 0.0 } else { s * r * inner })
}

/// Derivative of [`UnaryFn::GeluErf`]: `Phi(x) + x phi(x)`.
pub(super) fn gelu_erf_grad(x: f64) -> f64 {
    gated_grad(x, normal_distribution(x), (-0.5 * x * x).exp() / (2.0 * PI).sqrt())
}

/// Derivative of [`UnaryFn::Silu`].
pub(super) fn silu_grad(x: f64) -> f64 {
    gated_grad(x, sigmoid(x), sigmoid(x) * sigmoid(-x))
}

/// `Phi(x) = erfc(-x / sqrt 2) / 2`, with full relative precision on the negative side.
fn normal_distribution(x: f64) -> f64 {
    let z = x.abs() * FRAC_1_SQRT_2;
    // Abramowitz and Stegun 7.1.6 (all terms positive) near 0, the continued fraction 7.1.14 beyond.
    let erfc = if z < 2.5 {
        let mut term = z;
        let mut sum = 0.0;
        let mut n = 1.0;
        while term > sum * 1e-18 {
            sum += term;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            n += 1.0;
        }
        1.0 - 2.0 / PI.sqrt() * (-z * z).exp() * sum
    } else {
        let tail = (1..=100).rev().fold(z, |tail, n| z + 0.5 * f64::from(n) / tail);
        (-z * z).exp() / (PI.sqrt() * tail)
    };
    if x < 0.0 { 0.5 * erfc } else { 1.0 - 0.5 * erfc }
}

/// One function of one value, element by element.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unary {
    /// The function.
    pub function: UnaryFn,
}

impl Rule for Unary {
    const NAME: &'static str = "unary";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        let dtype = self.function.result(operands[0].dtype)?;
        Ok(smallvec![TensorType::new(dtype, operands[0].shape.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (x, y) = (cx.operands[0], cx.results[0]);
        let d = cx.cotangent();
        let g = &mut *cx.graph;
        let dx = match self.function {
            UnaryFn::Neg => g.neg(d)?,
            UnaryFn::Exp => g.mul(d, y)?,
            UnaryFn::Ln => g.div(d, x)?,
            UnaryFn::Sqrt => {
                let half = g.mul_scalar(d, 0.5)?;
                g.div(half, y)?
            }
            UnaryFn::Rsqrt => {
                let squared = g.square(y)?;
                let cubed = g.mul(squared, y)?;
                let scaled = g.mul_scalar(d, -0.5)?;
                g.mul(scaled, cubed)?
            }
            UnaryFn::Reciprocal => {
                let squared = g.square(y)?;
                let product = g.mul(d, squared)?;
                g.neg(product)?
            }
            UnaryFn::Tanh => {
                let squared = g.square(y)?;
                let minus = g.neg(squared)?;
                let slope = g.add_scalar(minus, 1.0)?;
                g.mul(d, slope)?
            }
            UnaryFn::Sigmoid => {
                let minus = g.neg(y)?;
                let rest = g.add_scalar(minus, 1.0)?;
                let slope = g.mul(y, rest)?;
                g.mul(d, slope)?
            }
            UnaryFn::GeluTanh => g.binary(BinaryFn::GeluTanhGrad, x, d)?,
            UnaryFn::GeluErf => g.binary(BinaryFn::GeluErfGrad, x, d)?,
            UnaryFn::Silu => g.binary(BinaryFn::SiluGrad, x, d)?,
            UnaryFn::Relu => g.binary(BinaryFn::ReluGrad, x, d)?,
            UnaryFn::Abs => {
                let sign = g.sign(x)?;
                g.mul(d, sign)?
            }
            UnaryFn::Square => {
                let double = g.mul_scalar(x, 2.0)?;
                g.mul(d, double)?
            }
            UnaryFn::Sin => {
                let slope = g.cos(x)?;
                g.mul(d, slope)?
            }
            UnaryFn::Cos => {
                let sine = g.sin(x)?;
                let product = g.mul(d, sine)?;
                g.neg(product)?
            }
            UnaryFn::Sign | UnaryFn::Floor | UnaryFn::IsFinite | UnaryFn::Not => return Ok(smallvec![Cotangent::Zero]),
        };
        Ok(smallvec![Cotangent::Value(dx)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let data = operands[0].data.iter().map(|&x| self.function.evaluate(x)).collect();
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

macro_rules! builders {
    ($($name:ident: $Function:ident),* $(,)?) => {
        impl Graph {
            $(
                #[doc = concat!("[`UnaryFn::", stringify!($Function), "`] of every element of `x`.")]
                ///
                /// # Errors
                /// [`crate::Error::Operands`] if the function is not defined on the dtype of `x`.
                #[track_caller]
                pub fn $name(&mut self, x: Value) -> Result<Value> {
                    self.unary(UnaryFn::$Function, x)
                }
            )*
        }
    };
}

builders! {
    neg: Neg, exp: Exp, ln: Ln, sqrt: Sqrt, rsqrt: Rsqrt, reciprocal: Reciprocal, tanh: Tanh, sigmoid: Sigmoid,
    gelu: GeluTanh, gelu_erf: GeluErf, silu: Silu, relu: Relu, abs: Abs, sign: Sign, square: Square, sin: Sin, cos: Cos,
    floor: Floor, is_finite: IsFinite, not: Not,
}

impl Graph {
    /// `function` of every element of `x`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the function is not defined on the dtype of `x`.
    #[track_caller]
    pub fn unary(&mut self, function: UnaryFn, x: Value) -> Result<Value> {
        self.push_one(Unary { function }, &[x])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: f64, wanted: f64) {
        assert!((got - wanted).abs() <= 1e-13 * wanted.abs(), "{got:e} instead of {wanted:e}");
    }

    /// Values of Phi from the literature (1 - Q(x) tables to 15 digits).
    #[test]
    fn gelu_is_right_near_zero_and_far_out() {
        let erf_form = |x| UnaryFn::GeluErf.evaluate(x);
        near(erf_form(1.0), 0.841_344_746_068_542_9);
        near(erf_form(-1.0), -0.158_655_253_931_457_05);
        near(erf_form(-6.0) / -6.0, 9.865_876_450_376_98e-10);
        near(erf_form(-3.0) / -3.0, 1.349_898_031_630_094_6e-3);
        for function in [UnaryFn::GeluErf, UnaryFn::GeluTanh, UnaryFn::Silu] {
            assert_eq!(function.evaluate(f64::INFINITY), f64::INFINITY);
            assert_eq!(function.evaluate(f64::NEG_INFINITY), 0.0);
            assert_eq!(function.evaluate(0.0), 0.0);
            assert!(function.evaluate(f64::NAN).is_nan());
        }
        let tanh_form = 0.5 * 2.0 * (1.0 + ((2.0 / PI).sqrt() * (2.0 + 0.044715 * 8.0)).tanh());
        near(UnaryFn::GeluTanh.evaluate(2.0), tanh_form);
        for grad in [gelu_tanh_grad, gelu_erf_grad, silu_grad] {
            assert_eq!([grad(f64::INFINITY), grad(f64::NEG_INFINITY), grad(0.0)], [1.0, 0.0, 0.5]);
        }
    }

    #[test]
    fn edges_of_the_simple_functions() {
        let of = |f: UnaryFn, xs: [f64; 4]| xs.map(|x| f.evaluate(x));
        assert_eq!(of(UnaryFn::Sign, [-2.0, -0.0, 0.0, 5.0]), [-1.0, 0.0, 0.0, 1.0]);
        assert_eq!(of(UnaryFn::Relu, [-2.0, -0.0, 0.0, 5.0]), [0.0, 0.0, 0.0, 5.0]);
        assert_eq!(of(UnaryFn::Floor, [-1.5, -1.0, 0.5, 2.0]), [-2.0, -1.0, 0.0, 2.0]);
        assert_eq!(of(UnaryFn::IsFinite, [f64::NAN, f64::INFINITY, f64::MAX, 0.0]), [0.0, 0.0, 1.0, 1.0]);
        assert!(UnaryFn::Relu.evaluate(f64::NAN).is_nan() && UnaryFn::Sign.evaluate(f64::NAN).is_nan());
        assert_eq!(UnaryFn::Not.result(DType::F32).unwrap_err(), Mismatch::operand(0, "bool"));
        assert_eq!(UnaryFn::Exp.result(DType::I32).unwrap_err(), Mismatch::operand(0, "a float"));
        assert_eq!(UnaryFn::IsFinite.result(DType::Bf16), Ok(DType::Bool));
    }

    #[test]
    fn gradients_agree_with_differences() {
        // Away from the kink of abs and relu, and positive where the domain asks for it.
        let positive = Tensor::f32([4], vec![0.3, 0.9, 1.7, 3.1]);
        let both = Tensor::f32([4], vec![-2.3, -0.4, 0.6, 1.9]);
        for function in UnaryFn::ALL {
            if function.result(DType::F32) != Ok(DType::F32) {
                continue;
            }
            let roots = [UnaryFn::Ln, UnaryFn::Sqrt, UnaryFn::Rsqrt].contains(&function);
            let x = if roots { &positive } else { &both };
            check::assert_gradients(std::slice::from_ref(x), |g, v| g.unary(function, v[0]));
        }
    }
}
