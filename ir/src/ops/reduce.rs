//! `reduce`: the sum, mean or maximum over some axes, which disappear.
//!
//! `x float -> shape without axes`. Over no elements the sum is 0, the mean NaN and the maximum -inf; the maximum is NaN
//! if any element is. Differentiable; the maximum gives the cotangent in equal shares to all elements that reach it.

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::broadcast::{coordinates, position};
use super::{BinaryFn, CompareFn, Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// What a reduction computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceFn {
    /// The sum.
    Sum,
    /// The sum divided by the number of elements.
    Mean,
    /// The largest element.
    Max,
}

impl ReduceFn {
    /// Every function.
    pub const ALL: [ReduceFn; 3] = [ReduceFn::Sum, ReduceFn::Mean, ReduceFn::Max];
}

/// The sum, mean or maximum over some axes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reduce {
    /// What is computed.
    pub function: ReduceFn,
    /// The axes that disappear: at least one, ascending, each once.
    pub axes: SmallVec<[usize; 4]>,
}

impl Reduce {
    /// `shape` with the axes left in as extent 1.
    fn kept(&self, shape: &Shape) -> Shape {
        Shape::new(shape.iter().enumerate().map(|(i, &n)| if self.axes.contains(&i) { 1 } else { n }))
    }

    /// `value`, of the result's shape, broadcast back to the operand's shape.
    fn spread(&self, graph: &mut Graph, value: Value, shape: &Shape) -> Result<Value> {
        let kept = graph.reshape(value, self.kept(shape))?;
        graph.broadcast(kept, shape.clone())
    }
}

impl Rule for Reduce {
    const NAME: &'static str = "reduce";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        check::float(operands, 0)?;
        let shape = &operands[0].shape;
        let ascending = self.axes.windows(2).all(|w| w[0] < w[1]);
        check::attribute(ascending && !self.axes.is_empty(), || {
            format!("at least one axis, ascending and each once, not {:?}", &self.axes[..])
        })?;
        check::axis(operands, 0, self.axes[self.axes.len() - 1])?;
        let kept = (0..shape.len()).filter(|i| !self.axes.contains(i)).map(|i| shape[i]);
        Ok(smallvec![TensorType::new(operands[0].dtype, Shape::new(kept))])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (x, y, d) = (cx.operands[0], cx.results[0], cx.cotangent());
        let g = &mut *cx.graph;
        let TensorType { dtype, shape } = g.ty(x).clone();
        let dx = match self.function {
            ReduceFn::Sum => self.spread(g, d, &shape)?,
            ReduceFn::Mean => {
                let n: usize = self.axes.iter().map(|&a| shape[a]).product();
                let share = g.mul_scalar(d, 1.0 / n.max(1) as f64)?;
                self.spread(g, share, &shape)?
            }
            ReduceFn::Max => {
                let largest = self.spread(g, y, &shape)?;
                let reaches = g.compare(CompareFn::Eq, x, largest)?;
                // Counted in f32, as a 16-bit float cannot count far.
                let reaches = g.cast(reaches, DType::F32)?;
                let ties = g.reduce(ReduceFn::Sum, reaches, &self.axes)?;
                let wide = g.cast(d, DType::F32)?;
                let share = g.div(wide, ties)?;
                let share = self.spread(g, share, &shape)?;
                let dx = g.binary(BinaryFn::Mul, reaches, share)?;
                g.cast(dx, dtype)?
            }
        };
        Ok(smallvec![Cotangent::Value(dx)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let x = operands[0];
        let mut out = Tensor::zeros(results[0].clone());
        if self.function == ReduceFn::Max {
            out.data.fill(f64::NEG_INFINITY);
        }
        let n = self.axes.iter().map(|&a| x.ty.shape[a]).product::<usize>() as f64;
        for i in 0..x.data.len() {
            let mut at = coordinates(i, &x.ty.shape);
            self.axes.iter().rev().for_each(|&axis| {
                at.remove(axis);
            });
            let sum = &mut out.data[position(&at, &results[0].shape)];
            match self.function {
                ReduceFn::Sum | ReduceFn::Mean => *sum += x.data[i],
                ReduceFn::Max => *sum = BinaryFn::Max.evaluate(*sum, x.data[i], x.ty.dtype),
            }
        }
        if self.function == ReduceFn::Mean {
            out.data.iter_mut().for_each(|v| *v /= n);
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The sum, mean or maximum of `x` over `axes`, given in any order; `x` itself if there are none.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `x` is no float, lacks an axis, or an axis is given twice.
    #[track_caller]
    pub fn reduce(&mut self, function: ReduceFn, x: Value, axes: &[usize]) -> Result<Value> {
        if axes.is_empty() && self.ty(x).dtype.is_float() {
            return Ok(x);
        }
        let mut axes: SmallVec<[usize; 4]> = axes.into();
        axes.sort_unstable();
        self.push_one(Reduce { function, axes }, &[x])
    }

    /// The sum of all elements, a scalar.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `x` is no float.
    #[track_caller]
    pub fn sum_all(&mut self, x: Value) -> Result<Value> {
        let axes: Vec<usize> = (0..self.shape(x).len()).collect();
        self.reduce(ReduceFn::Sum, x, &axes)
    }

    /// The mean of all elements, a scalar.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `x` is no float.
    #[track_caller]
    pub fn mean_all(&mut self, x: Value) -> Result<Value> {
        let axes: Vec<usize> = (0..self.shape(x).len()).collect();
        self.reduce(ReduceFn::Mean, x, &axes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(function: ReduceFn, axes: &[usize], x: &Tensor) -> Tensor {
        let op = Reduce { function, axes: axes.into() };
        let types = op.infer(std::slice::from_ref(&x.ty)).unwrap();
        op.reference(&[x], &types).remove(0)
    }

    #[test]
    fn axes_disappear_wherever_they_are() {
        let x = Tensor::f32([2, 2, 2], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!(over(ReduceFn::Sum, &[0, 2], &x), Tensor::f32([2], vec![10.0, 18.0]));
        assert_eq!(over(ReduceFn::Mean, &[1], &x), Tensor::f32([2, 2], vec![1.0, 2.0, 5.0, 6.0]));
        assert_eq!(over(ReduceFn::Max, &[0, 1, 2], &x), Tensor::f32([], vec![7.0]));
        let empty = Tensor::f32([0, 1], vec![]);
        assert_eq!(over(ReduceFn::Max, &[0], &empty).data, [f64::NEG_INFINITY]);
        assert_eq!(over(ReduceFn::Sum, &[0], &empty).data, [0.0]);
        for at in 0..2 {
            let mut pair = vec![1.0; 2];
            pair[at] = f64::NAN;
            assert!(over(ReduceFn::Max, &[0], &Tensor::f32([2], pair)).data[0].is_nan());
        }
    }

    #[test]
    fn gradients_agree_with_differences_and_ties_share() {
        let x = Tensor::f32([2, 3, 2], (0..12).map(|i| f64::from(i * 7 % 12) * 0.3 - 1.0).collect());
        for function in ReduceFn::ALL {
            check::assert_gradients(std::slice::from_ref(&x), |g, v| g.reduce(function, v[0], &[2, 0]));
        }
        let tied = Tensor::new(TensorType::new(DType::Bf16, [2, 2]), vec![3.0, 3.0, 1.0, 2.0]);
        let dx = check::gradients_of(&[tied], |g, v| g.reduce(ReduceFn::Max, v[0], &[1]));
        assert_eq!((dx[0].ty.dtype, dx[0].data.as_slice()), (DType::Bf16, [0.5, 0.5, 0.0, 1.0].as_slice()));
    }

    #[test]
    fn axes_that_are_not_there_or_twice_are_refused() {
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::f32([2, 3])).unwrap();
        let n = g.feed("n", TensorType::i32([2])).unwrap();
        let mut wanted = |x, axes: &[usize]| g.reduce(ReduceFn::Sum, x, axes).unwrap_err().to_string();
        assert!(wanted(x, &[2]).contains("axis 2"));
        assert!(wanted(x, &[1, 1]).contains("not [1, 1]"));
        assert!(wanted(n, &[0]).contains("a float"));
        assert!(wanted(n, &[]).contains("a float"));
    }
}
