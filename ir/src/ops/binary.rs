//! `binary`: one function of two values, element by element.
//!
//! `a, b (same dtype) -> the shape both broadcast to` (aligned at the last axis). Differentiable in both operands, summed
//! back to the operand's shape; `max` and `min` give the gradient to the first operand on a tie. The `*_grad` functions
//! `dy * f'(x)` are differentiable in `dy` only.
//!
//! `add`, `sub`, `mul` of integers wrap around like `i32` and `u32` do; `div`, `pow` and the `*_grad` are for floats.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::broadcast::{read_at, unify};
use super::unary::{gelu_erf_grad, gelu_tanh_grad, silu_grad};
use super::{CompareFn, Cotangents, ReduceFn, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// The functions of two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BinaryFn {
    /// `a + b`.
    Add,
    /// `a - b`.
    Sub,
    /// `a * b`.
    Mul,
    /// `a / b`.
    Div,
    /// The larger; NaN if either is.
    Max,
    /// The smaller; NaN if either is.
    Min,
    /// `a` to the power `b`.
    Pow,
    /// `b` times the derivative of [`super::UnaryFn::GeluTanh`] at `a`.
    GeluTanhGrad,
    /// `b` times the derivative of [`super::UnaryFn::GeluErf`] at `a`.
    GeluErfGrad,
    /// `b` times the derivative of [`super::UnaryFn::Silu`] at `a`.
    SiluGrad,
    /// `b` where `a` is above 0, else 0, whatever `b` is: the gradient of [`super::UnaryFn::Relu`].
    ReluGrad,
}

impl BinaryFn {
    /// Every function.
    pub const ALL: [BinaryFn; 11] = [
        BinaryFn::Add,
        BinaryFn::Sub,
        BinaryFn::Mul,
        BinaryFn::Div,
        BinaryFn::Max,
        BinaryFn::Min,
        BinaryFn::Pow,
        BinaryFn::GeluTanhGrad,
        BinaryFn::GeluErfGrad,
        BinaryFn::SiluGrad,
        BinaryFn::ReluGrad,
    ];

    /// The dtype of the result for operands of dtypes `a` and `b`.
    ///
    /// # Errors
    /// [`Mismatch`] if they differ or the function is not defined on them.
    pub fn result(self, a: DType, b: DType) -> Result<DType, Mismatch> {
        let integers = match self {
            BinaryFn::Add | BinaryFn::Sub | BinaryFn::Mul | BinaryFn::Max | BinaryFn::Min => true,
            BinaryFn::Div
            | BinaryFn::Pow
            | BinaryFn::GeluTanhGrad
            | BinaryFn::GeluErfGrad
            | BinaryFn::SiluGrad
            | BinaryFn::ReluGrad => false,
        };
        if a == DType::Bool || !(integers || a.is_float()) {
            return Err(Mismatch::operand(0, if integers { "a float, i32 or u32" } else { "a float" }));
        }
        if a == b { Ok(a) } else { Err(Mismatch::operand(1, format!("{a}, the dtype of operand 0"))) }
    }

    /// The meaning of the function on two values of `dtype`, in f64: integers wrap, floats are not rounded.
    pub fn evaluate(self, a: f64, b: f64, dtype: DType) -> f64 {
        match self {
            BinaryFn::Add => wrapping(a, b, dtype, |a, b| a + b, i64::wrapping_add),
            BinaryFn::Sub => wrapping(a, b, dtype, |a, b| a - b, i64::wrapping_sub),
            BinaryFn::Mul => wrapping(a, b, dtype, |a, b| a * b, i64::wrapping_mul),
            BinaryFn::Div => a / b,
            BinaryFn::Max if a > b || a.is_nan() => a,
            BinaryFn::Min if a < b || a.is_nan() => a,
            BinaryFn::Max | BinaryFn::Min => b,
            BinaryFn::Pow => a.powf(b),
            BinaryFn::GeluTanhGrad => b * gelu_tanh_grad(a),
            BinaryFn::GeluErfGrad => b * gelu_erf_grad(a),
            BinaryFn::SiluGrad => b * silu_grad(a),
            BinaryFn::ReluGrad if a > 0.0 => b,
            BinaryFn::ReluGrad => 0.0,
        }
    }
}

/// Float arithmetic for floats; for integers the low 32 bits of what 64-bit arithmetic gives, which any sum or product of
/// two has right.
fn wrapping(a: f64, b: f64, dtype: DType, float: fn(f64, f64) -> f64, integer: fn(i64, i64) -> i64) -> f64 {
    match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => float(a, b),
        DType::I32 => f64::from(integer(a as i64, b as i64) as i32),
        DType::U32 => f64::from(integer(a as i64, b as i64) as u32),
        DType::Bool => unreachable!("no arithmetic on bools passes the shape rule"),
    }
}

/// One function of two values, element by element.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binary {
    /// The function.
    pub function: BinaryFn,
}

impl Rule for Binary {
    const NAME: &'static str = "binary";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        let dtype = self.function.result(operands[0].dtype, operands[1].dtype)?;
        Ok(smallvec![TensorType::new(dtype, unify(operands)?)])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (a, b, y) = (cx.operands[0], cx.operands[1], cx.results[0]);
        let d = cx.cotangent();
        let shapes = [a, b].map(|v| cx.graph.ty(v).shape.clone());
        let (for_a, for_b): (Cotangent, Cotangent) = match self.function {
            BinaryFn::Add => (Cotangent::Value(d), Cotangent::Value(d)),
            BinaryFn::Sub => (Cotangent::Value(d), cx.when(1, |cx| cx.graph.neg(d))?),
            BinaryFn::Mul => (cx.when(0, |cx| cx.graph.mul(d, b))?, cx.when(1, |cx| cx.graph.mul(d, a))?),
            BinaryFn::Div => {
                let for_b = cx.when(1, |cx| {
                    let product = cx.graph.mul(d, y)?;
                    let quotient = cx.graph.div(product, b)?;
                    cx.graph.neg(quotient)
                })?;
                (cx.when(0, |cx| cx.graph.div(d, b))?, for_b)
            }
            BinaryFn::Max | BinaryFn::Min => {
                let order = if self.function == BinaryFn::Max { CompareFn::Ge } else { CompareFn::Le };
                let first = cx.graph.compare(order, a, b)?;
                let zero = zero_like(cx.graph, d)?;
                let for_a = cx.when(0, |cx| cx.graph.select(first, d, zero))?;
                (for_a, cx.when(1, |cx| cx.graph.select(first, zero, d))?)
            }
            BinaryFn::Pow => (cx.when(0, |cx| pow_by_base(cx.graph, a, b, d))?, {
                cx.when(1, |cx| pow_by_exponent(cx.graph, a, y, d))?
            }),
            BinaryFn::GeluTanhGrad | BinaryFn::GeluErfGrad | BinaryFn::SiluGrad | BinaryFn::ReluGrad => {
                if cx.needed[0] {
                    return cx.refuse(Self::NAME, "the second derivative of an activation is not an op of the set");
                }
                (Cotangent::Zero, Cotangent::Value(cx.graph.binary(self.function, a, d)?))
            }
        };
        let mut cotangents = Cotangents::new();
        for (i, (cotangent, shape)) in [for_a, for_b].into_iter().zip(&shapes).enumerate() {
            cotangents.push(match cotangent {
                Cotangent::Value(v) => cx.when(i, |cx| unbroadcast(cx.graph, v, shape))?,
                Cotangent::Zero => Cotangent::Zero,
            });
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (a, b) = (operands[0], operands[1]);
        let shape = &results[0].shape;
        let data = (0..shape.elements())
            .map(|i| {
                let (x, y) = (a.data[read_at(i, shape, &a.ty.shape)], b.data[read_at(i, shape, &b.ty.shape)]);
                self.function.evaluate(x, y, a.ty.dtype)
            })
            .collect();
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

/// `d b a^(b-1)`, which is 0 for `b = 0` also where `a = 0`.
fn pow_by_base(g: &mut Graph, a: Value, b: Value, d: Value) -> Result<Value> {
    let less = g.add_scalar(b, -1.0)?;
    let power = g.pow(a, less)?;
    let slope = g.mul(b, power)?;
    let zero = zero_like(g, d)?;
    let constant = g.compare(CompareFn::Eq, b, zero)?;
    let slope = g.select(constant, zero, slope)?;
    g.mul(d, slope)
}

/// `d y ln a`, which is 0 for `a = 0`.
fn pow_by_exponent(g: &mut Graph, a: Value, y: Value, d: Value) -> Result<Value> {
    let zero = zero_like(g, d)?;
    let vanished = g.compare(CompareFn::Eq, a, zero)?;
    let ln = g.ln(a)?;
    let ln = g.select(vanished, zero, ln)?;
    let slope = g.mul(y, ln)?;
    g.mul(d, slope)
}

/// The scalar 0 of the dtype of `value`; it broadcasts to any shape.
pub(crate) fn zero_like(graph: &mut Graph, value: Value) -> Result<Value> {
    let dtype = graph.ty(value).dtype;
    graph.splat(TensorType::new(dtype, Shape::default()), 0.0)
}

/// The cotangent of something of shape `shape` that was broadcast to the cotangent's shape: the sum over what was repeated.
pub(crate) fn unbroadcast(graph: &mut Graph, cotangent: Value, shape: &Shape) -> Result<Value> {
    let from = graph.ty(cotangent).shape.clone();
    let added = from.len() - shape.len();
    let repeated = |&axis: &usize| axis < added || (shape[axis - added] == 1 && from[axis] != 1);
    let axes: Vec<usize> = (0..from.len()).filter(repeated).collect();
    // One run of neighbouring axes at a time, the last run first: backends need not reduce others.
    let mut sum = cotangent;
    for run in axes.chunk_by(|a, b| a + 1 == *b).rev() {
        sum = graph.reduce(ReduceFn::Sum, sum, run)?;
    }
    graph.reshape(sum, shape.clone())
}

macro_rules! builders {
    ($($name:ident: $Function:ident),* $(,)?) => {
        impl Graph {
            $(
                #[doc = concat!("[`BinaryFn::", stringify!($Function), "`] of `a` and `b`, broadcast against each other.")]
                ///
                /// # Errors
                /// [`crate::Error::Operands`] if the dtypes differ or do not suit the function, or the shapes clash.
                #[track_caller]
                pub fn $name(&mut self, a: Value, b: Value) -> Result<Value> {
                    self.binary(BinaryFn::$Function, a, b)
                }
            )*
        }
    };
}

builders! { add: Add, sub: Sub, mul: Mul, div: Div, maximum: Max, minimum: Min, pow: Pow }

impl Graph {
    /// `function` of `a` and `b`, broadcast against each other.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the dtypes differ or do not suit the function, or the shapes clash.
    #[track_caller]
    pub fn binary(&mut self, function: BinaryFn, a: Value, b: Value) -> Result<Value> {
        self.push_one(Binary { function }, &[a, b])
    }

    /// `x + value`, the latter in the dtype of `x`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if that dtype cannot hold `value` or is bool.
    #[track_caller]
    pub fn add_scalar(&mut self, x: Value, value: f64) -> Result<Value> {
        let dtype = self.ty(x).dtype;
        let scalar = self.splat(TensorType::new(dtype, Shape::default()), value)?;
        self.add(x, scalar)
    }

    /// `x * value`, the latter in the dtype of `x`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if that dtype cannot hold `value` or is bool.
    #[track_caller]
    pub fn mul_scalar(&mut self, x: Value, value: f64) -> Result<Value> {
        let dtype = self.ty(x).dtype;
        let scalar = self.splat(TensorType::new(dtype, Shape::default()), value)?;
        self.mul(x, scalar)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::autodiff::gradients;

    #[test]
    fn integers_wrap_and_nan_is_never_hidden() {
        let (max, min) = (f64::from(i32::MAX), f64::from(i32::MIN));
        assert_eq!(BinaryFn::Add.evaluate(max, 1.0, DType::I32), min);
        assert_eq!(BinaryFn::Mul.evaluate(min, min, DType::I32), 0.0);
        assert_eq!(BinaryFn::Mul.evaluate(65537.0, 65537.0, DType::I32), f64::from(65537_i32.wrapping_mul(65537)));
        assert_eq!(BinaryFn::Sub.evaluate(0.0, 1.0, DType::U32), f64::from(u32::MAX));
        let big = f64::from(u32::MAX);
        assert_eq!(BinaryFn::Mul.evaluate(big, big, DType::U32), 1.0);
        for function in [BinaryFn::Max, BinaryFn::Min] {
            assert!(function.evaluate(f64::NAN, 1.0, DType::F32).is_nan());
            assert!(function.evaluate(1.0, f64::NAN, DType::F32).is_nan());
        }
        let relu_grad = [-1.0, 0.0, 1.0].map(|x| BinaryFn::ReluGrad.evaluate(x, f64::INFINITY, DType::F32));
        assert_eq!(relu_grad, [0.0, 0.0, f64::INFINITY]);
    }

    #[test]
    fn a_misfit_names_the_operand() {
        let clash = [TensorType::f32([2, 3]), TensorType::f32([2])];
        let add = Binary { function: BinaryFn::Add };
        assert!(add.infer(&clash).unwrap_err().wanted.contains("broadcasts with [2,3]"));
        let mixed = [TensorType::f32([2]), TensorType::i32([2])];
        assert_eq!(add.infer(&mixed).unwrap_err().operand, Some(1));
        let integers = [TensorType::i32([2]), TensorType::i32([2])];
        assert!(Binary { function: BinaryFn::Div }.infer(&integers).is_err());
        assert_eq!(add.infer(&integers).unwrap()[0], TensorType::i32([2]));
        let grown = [TensorType::f32([2, 1]), TensorType::f32([3])];
        assert_eq!(add.infer(&grown).unwrap()[0], TensorType::f32([2, 3]));
    }

    #[test]
    fn gradients_agree_with_differences_through_broadcasts() {
        let a = Tensor::f32([2, 1, 3], vec![0.4, 1.3, 2.2, 0.7, 1.9, 0.6]);
        let b = Tensor::f32([2, 1], vec![1.1, 1.6]);
        for function in BinaryFn::ALL {
            let grads = [BinaryFn::GeluTanhGrad, BinaryFn::GeluErfGrad, BinaryFn::SiluGrad, BinaryFn::ReluGrad];
            if grads.contains(&function) {
                check::assert_gradients(std::slice::from_ref(&b), |g, v| {
                    let x = g.constant(a.ty.clone(), a.data.clone())?;
                    g.binary(function, x, v[0])
                });
            } else {
                check::assert_gradients(&[a.clone(), b.clone()], |g, v| g.binary(function, v[0], v[1]));
            }
        }
    }

    #[test]
    fn ties_go_to_the_first_operand_and_pow_has_no_nan_at_zero() {
        let both = [Tensor::f32([3], vec![1.0, 2.0, 3.0]), Tensor::f32([3], vec![2.0, 2.0, 2.0])];
        let max = check::gradients_of(&both, |g, v| g.maximum(v[0], v[1]));
        assert_eq!([max[0].data.as_slice(), &max[1].data], [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]);
        let min = check::gradients_of(&both, |g, v| g.minimum(v[0], v[1]));
        assert_eq!([min[0].data.as_slice(), &min[1].data], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]);
        let powers = [Tensor::f32([3], vec![0.0; 3]), Tensor::f32([3], vec![0.0, 1.0, 2.0])];
        let pow = check::gradients_of(&powers, |g, v| g.pow(v[0], v[1]));
        assert_eq!([pow[0].data.as_slice(), &pow[1].data], [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]);
    }

    #[test]
    fn a_second_derivative_of_an_activation_is_refused() {
        let mut g = Graph::new();
        let x = g.parameter("x", TensorType::f32([2])).unwrap();
        let y = g.gelu(x).unwrap();
        let loss = g.sum_all(y).unwrap();
        let dx = gradients(&mut g, loss, &[x]).unwrap()[0];
        let second = g.sum_all(dx).unwrap();
        let error = gradients(&mut g, second, &[x]).unwrap_err();
        assert!(matches!(error, Error::NotDifferentiable { op: "binary", operand: 0, .. }), "{error}");
    }
}
