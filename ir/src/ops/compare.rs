//! `compare`: an ordering of two values, element by element.
//!
//! `a, b (same dtype) -> bool of the shape both broadcast to`. A comparison with NaN is false, except `ne`. No gradient:
//! the result is a bool.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::broadcast::{read_at, unify};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The orderings; false is below true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CompareFn {
    /// `a = b`.
    Eq,
    /// `a != b`.
    Ne,
    /// `a < b`.
    Lt,
    /// `a <= b`.
    Le,
    /// `a > b`.
    Gt,
    /// `a >= b`.
    Ge,
}

impl CompareFn {
    /// Every ordering.
    pub const ALL: [CompareFn; 6] =
        [CompareFn::Eq, CompareFn::Ne, CompareFn::Lt, CompareFn::Le, CompareFn::Gt, CompareFn::Ge];

    /// The dtype of the result for operands of dtypes `a` and `b`: bool.
    ///
    /// # Errors
    /// [`Mismatch`] if they differ.
    pub fn result(self, a: DType, b: DType) -> Result<DType, Mismatch> {
        if a == b { Ok(DType::Bool) } else { Err(Mismatch::operand(1, format!("{a}, the dtype of operand 0"))) }
    }

    /// Whether it holds: IEEE comparison.
    pub fn evaluate(self, a: f64, b: f64) -> bool {
        match self {
            CompareFn::Eq => a == b,
            CompareFn::Ne => a != b,
            CompareFn::Lt => a < b,
            CompareFn::Le => a <= b,
            CompareFn::Gt => a > b,
            CompareFn::Ge => a >= b,
        }
    }
}

/// An ordering of two values, element by element.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compare {
    /// The ordering.
    pub function: CompareFn,
}

impl Rule for Compare {
    const NAME: &'static str = "compare";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        let dtype = self.function.result(operands[0].dtype, operands[1].dtype)?;
        Ok(smallvec![TensorType::new(dtype, unify(operands)?)])
    }

    fn vjp(&self, _cx: &mut Vjp<'_>) -> Result<Cotangents> {
        Ok(smallvec![Cotangent::Zero, Cotangent::Zero])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (a, b) = (operands[0], operands[1]);
        let shape = &results[0].shape;
        let holds = |i| {
            let (x, y) = (a.data[read_at(i, shape, &a.ty.shape)], b.data[read_at(i, shape, &b.ty.shape)]);
            self.function.evaluate(x, y)
        };
        let data = (0..shape.elements()).map(|i| f64::from(u8::from(holds(i)))).collect();
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Whether `function` holds between `a` and `b`, broadcast against each other.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the dtypes differ or the shapes clash.
    #[track_caller]
    pub fn compare(&mut self, function: CompareFn, a: Value, b: Value) -> Result<Value> {
        self.push_one(Compare { function }, &[a, b])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ordering_on_less_equal_greater_and_nan() {
        let pairs = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0), (f64::NAN, f64::NAN)];
        let table = CompareFn::ALL.map(|f| pairs.map(|(a, b)| u8::from(f.evaluate(a, b))));
        assert_eq!(table, [[0, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]]);
    }

    #[test]
    fn a_column_against_a_row_is_a_table() {
        let op = Compare { function: CompareFn::Ge };
        let (column, row) = (Tensor::i32([2, 1], &[0, 1]), Tensor::i32([3], &[0, 1, 2]));
        let types = op.infer(&[column.ty.clone(), row.ty.clone()]).unwrap();
        assert_eq!(types[0], TensorType::new(DType::Bool, [2, 3]));
        assert_eq!(op.reference(&[&column, &row], &types)[0].data, [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
        assert!(op.infer(&[TensorType::f32([1]), TensorType::i32([1])]).is_err());
    }
}
