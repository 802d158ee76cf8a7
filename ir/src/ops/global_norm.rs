//! `global_norm`: the Euclidean norm of tensors taken together, for clipping.
//!
//! `x_0, x_1, .. (floats of any shape, at least one) -> f32 []`: `sqrt(sum of all squares)`. Differentiable: `dx = x d / norm`,
//! 0 where the norm is 0.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{CompareFn, Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The norm of several tensors together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GlobalNorm {}

impl Rule for GlobalNorm {
    const NAME: &'static str = "global_norm";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::attribute(!operands.is_empty(), || "at least one operand".into())?;
        (0..operands.len()).try_for_each(|i| check::float(operands, i))?;
        Ok(smallvec![TensorType::f32([])])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let (norm, d) = (cx.results[0], cx.cotangent());
        let ratio = cx.graph.div(d, norm)?;
        let zero = cx.graph.scalar(0.0)?;
        let at_zero = cx.graph.compare(CompareFn::Eq, norm, zero)?;
        let ratio = cx.graph.select(at_zero, zero, ratio)?;
        let mut cotangents = Cotangents::new();
        for (i, &x) in cx.operands.iter().enumerate() {
            cotangents.push(cx.when(i, |cx| {
                // In f32, as the ratio may be outside a narrow type.
                let wide = cx.graph.cast(x, DType::F32)?;
                let dx = cx.graph.mul(wide, ratio)?;
                let dtype = cx.graph.ty(x).dtype;
                cx.graph.cast(dx, dtype)
            })?);
        }
        Ok(cotangents)
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let sum: f64 = operands.iter().flat_map(|x| &x.data).map(|v| v * v).sum();
        vec![Tensor::new(results[0].clone(), vec![sum.sqrt()])]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// The Euclidean norm f32 `[]` of all elements of `xs` together.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if there are none, or one is no float.
    #[track_caller]
    pub fn global_norm(&mut self, xs: &[Value]) -> Result<Value> {
        self.push_one(GlobalNorm {}, xs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_count_together() {
        let (a, b) = (Tensor::f32([2, 1], vec![2.0, 1.0]), Tensor::f32([], vec![-2.0]));
        let types = GlobalNorm {}.infer(&[a.ty.clone(), TensorType::new(DType::Bf16, [])]).unwrap();
        assert_eq!(GlobalNorm {}.reference(&[&a, &b], &types)[0].data, [3.0]);
        assert!(GlobalNorm {}.infer(&[]).unwrap_err().wanted.contains("at least one"));
        assert_eq!(GlobalNorm {}.infer(&[a.ty, TensorType::i32([2])]).unwrap_err().operand, Some(1));
    }

    #[test]
    fn gradients_agree_with_differences_and_are_zero_at_zero() {
        let (a, b) = (Tensor::f32([2], vec![2.0, 1.0]), Tensor::f32([], vec![-2.0]));
        check::assert_gradients(&[a, b], |g, v| g.global_norm(v));
        let zero = Tensor::f32([2], vec![0.0, 0.0]);
        assert_eq!(check::gradients_of(&[zero], |g, v| g.global_norm(v))[0].data, [0.0, 0.0]);
    }
}
