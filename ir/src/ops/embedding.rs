//! `embedding`: rows of a table by id.
//!
//! `table [V,D], ids i32 [..] -> [..,D]`: `out[i] = table[ids[i]]`; an id outside `0..V` gives a row of NaN.
//! Differentiable in the table.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// Rows of a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {}

/// The index that an i32 element is, if it lies in `0..end`.
pub(super) fn index(element: f64, end: usize) -> Option<usize> {
    (element >= 0.0 && element < end as f64).then_some(element as usize)
}

impl Rule for Embedding {
    const NAME: &'static str = "embedding";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        check::rank(operands, 0, 2)?;
        check::float(operands, 0)?;
        check::dtype(operands, 1, DType::I32)?;
        let width = operands[0].shape.last();
        let shape = Shape::new(operands[1].shape.iter().copied().chain([width]));
        Ok(smallvec![TensorType::new(operands[0].dtype, shape)])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (table, ids, d) = (cx.operands[0], cx.operands[1], cx.cotangent());
        Ok(smallvec![
            cx.when(0, |cx| {
                let rows = cx.graph.shape(table)[0];
                cx.graph.embedding_grad(ids, d, rows)
            })?,
            Cotangent::Zero,
        ])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (table, ids) = (operands[0], operands[1]);
        let (v, d) = (table.ty.shape[0], table.ty.shape[1]);
        let mut data = Vec::with_capacity(results[0].elements());
        for &id in &ids.data {
            match index(id, v) {
                Some(id) => data.extend(&table.data[id * d..(id + 1) * d]),
                None => data.extend(std::iter::repeat_n(f64::NAN, d)),
            }
        }
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The rows of `table [V,D]` that `ids` i32 `[..]` name, as `[..,D]`; NaN for an id outside `0..V`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn embedding(&mut self, table: Value, ids: Value) -> Result<Value> {
        self.push_one(Embedding {}, &[table, ids])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_without_a_row_gives_nan() {
        let table = Tensor::f32([2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        let ids = Tensor::i32([2, 2], &[1, -1, 2, 0]);
        let types = Embedding {}.infer(&[table.ty.clone(), ids.ty.clone()]).unwrap();
        assert_eq!(types[0], TensorType::f32([2, 2, 2]));
        let out = &Embedding {}.reference(&[&table, &ids], &types)[0].data;
        assert_eq!((&out[..2], &out[6..]), ([3.0, 4.0].as_slice(), [1.0, 2.0].as_slice()));
        assert!(out[2..6].iter().all(|v| v.is_nan()));
        assert_eq!(Embedding {}.infer(&[table.ty.clone(), table.ty]).unwrap_err().wanted, "i32");
    }

    #[test]
    fn gradients_agree_with_differences() {
        let table = Tensor::f32([3, 2], vec![0.1, -1.0, 0.7, 2.0, 0.3, -0.2]);
        check::assert_gradients(&[table], |g, v| {
            let ids = g.constant(TensorType::i32([4]), vec![2.0, 0.0, 2.0, 2.0])?;
            g.embedding(v[0], ids)
        });
    }
}
