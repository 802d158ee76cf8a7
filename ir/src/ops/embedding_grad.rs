//! `embedding_grad`: the cotangent of the table of an embedding.
//!
//! `ids i32 [..], dy [..,D] -> [V,D]` (dtype of `dy`): row v is the sum of `dy[i]` over the i with `ids[i] = v`; ids outside
//! `0..V` are ignored. Not differentiable.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::embedding::index;
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// The gradient of [`super::Embedding`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingGrad {
    /// Rows V of the table.
    pub rows: usize,
}

impl Rule for EmbeddingGrad {
    const NAME: &'static str = "embedding_grad";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        check::dtype(operands, 0, DType::I32)?;
        check::float(operands, 1)?;
        let (ids, dy) = (&operands[0].shape, &operands[1].shape);
        if dy.len() != ids.len() + 1 || dy[..ids.len()] != ids[..] {
            let wanted = ids.iter().map(ToString::to_string).chain(["D".to_owned()]).collect::<Vec<_>>().join(",");
            return Err(Mismatch::operand(1, format!("shape [{wanted}]")));
        }
        Ok(smallvec![TensorType::new(operands[1].dtype, Shape::from([self.rows, dy.last()]))])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        cx.refuse(Self::NAME, "the second derivative of an embedding is not an op of the set")
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let (ids, dy) = (operands[0], operands[1]);
        let d = dy.ty.shape.last();
        let mut out = Tensor::zeros(results[0].clone());
        for (i, &id) in ids.data.iter().enumerate() {
            let Some(row) = index(id, self.rows) else { continue };
            for c in 0..d {
                out.data[row * d + c] += dy.data[i * d + c];
            }
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The cotangent of a table of `rows` rows from the ids and the cotangent `dy [..,D]` of the rows they took.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the operands do not fit.
    #[track_caller]
    pub fn embedding_grad(&mut self, ids: Value, dy: Value, rows: usize) -> Result<Value> {
        self.push_one(EmbeddingGrad { rows }, &[ids, dy])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_up_and_ids_outside_are_ignored() {
        let ids = Tensor::i32([4], &[1, 3, 1, -1]);
        let dy = Tensor::f32([4, 1], vec![1.0, 20.0, 300.0, 4000.0]);
        let op = EmbeddingGrad { rows: 3 };
        let types = op.infer(&[ids.ty.clone(), dy.ty.clone()]).unwrap();
        assert_eq!(op.reference(&[&ids, &dy], &types)[0].data, [0.0, 301.0, 0.0]);
        let refused = op.infer(&[ids.ty, TensorType::f32([5, 1])]).unwrap_err();
        assert_eq!((refused.operand, refused.wanted.as_str()), (Some(1), "shape [4,D]"));
    }
}
