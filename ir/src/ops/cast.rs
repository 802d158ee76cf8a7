//! `cast`: the same values in another dtype.
//!
//! `x -> same shape, other dtype`. To a float: rounded to nearest even. From a float to an integer: truncated towards 0
//! and saturated, NaN gives 0. Between `i32` and `u32`: the same bits. To a bool: whether it is not 0; from a bool: 0 or 1.
//! Differentiable from float to float, where the gradient is cast back; any other cast has the derivative 0.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The same values in another dtype.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    /// The dtype of the result.
    pub dtype: DType,
}

/// `x` of dtype `from` in dtype `to`; floats are not rounded, which is left to whoever stores the value.
pub(super) fn evaluate(x: f64, from: DType, to: DType) -> f64 {
    match (from, to) {
        (_, DType::F32 | DType::Bf16 | DType::F16) => x,
        (DType::U32, DType::I32) => f64::from(x as u32 as i32),
        (DType::I32, DType::U32) => f64::from(x as i32 as u32),
        (_, DType::I32 | DType::U32 | DType::Bool) => to.round(x),
    }
}

impl Rule for Cast {
    const NAME: &'static str = "cast";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        Ok(smallvec![TensorType::new(self.dtype, operands[0].shape.clone())])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let from = cx.graph.ty(cx.operands[0]).dtype;
        if !from.is_float() || !self.dtype.is_float() {
            return Ok(smallvec![Cotangent::Zero]);
        }
        let d = cx.cotangent();
        Ok(smallvec![Cotangent::Value(cx.graph.cast(d, from)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let data = operands[0].data.iter().map(|&x| evaluate(x, operands[0].ty.dtype, self.dtype)).collect();
        vec![Tensor::new(results[0].clone(), data)]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `x` in another dtype; `x` itself if it has that dtype.
    ///
    /// # Errors
    /// None.
    #[track_caller]
    pub fn cast(&mut self, x: Value, dtype: DType) -> Result<Value> {
        if self.ty(x).dtype == dtype { Ok(x) } else { self.push_one(Cast { dtype }, &[x]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_saturate_in_integers_which_keep_their_bits_among_themselves() {
        let to = |dtype, xs: [f64; 4]| xs.map(|x| evaluate(x, DType::F32, dtype));
        assert_eq!(to(DType::I32, [-1.9, f64::NAN, 1e20, 2.9]), [-1.0, 0.0, 2_147_483_647.0, 2.0]);
        assert_eq!(to(DType::U32, [-1.0, f64::NEG_INFINITY, 1e20, 7.0]), [0.0, 0.0, 4_294_967_295.0, 7.0]);
        assert_eq!(to(DType::Bool, [0.0, -0.0, 0.5, -3.0]), [0.0, 0.0, 1.0, 1.0]);
        assert_eq!(evaluate(0.1, DType::F32, DType::Bf16), 0.1);
        assert_eq!(evaluate(-1.0, DType::I32, DType::U32), 4_294_967_295.0);
        assert_eq!(evaluate(4_294_967_295.0, DType::U32, DType::I32), -1.0);
        assert_eq!(evaluate(1.0, DType::Bool, DType::I32), 1.0);
    }

    #[test]
    fn no_node_where_nothing_changes_and_the_gradient_is_cast_back() {
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::f32([2])).unwrap();
        assert_eq!(g.cast(x, DType::F32).unwrap(), x);
        assert_eq!(g.nodes().len(), 1);
        let x = Tensor::new(TensorType::new(DType::Bf16, [2]), vec![1.0, 2.0]);
        let dx = check::gradients_of(&[x], |g, v| g.cast(v[0], DType::F32));
        assert_eq!((dx[0].ty.dtype, dx[0].data.as_slice()), (DType::Bf16, [1.0, 1.0].as_slice()));
    }
}
