//! `transpose`: the axes in another order.
//!
//! `x -> y` with `y`'s axis `i` being `x`'s axis `perm[i]`. Any dtype. Differentiable: the inverse order.

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use super::broadcast::{coordinates, position};
use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// The axes in another order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transpose {
    /// For each axis of the result, the operand's axis it is.
    pub perm: SmallVec<[usize; 4]>,
}

impl Rule for Transpose {
    const NAME: &'static str = "transpose";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        let rank = self.perm.len();
        let once = |axis| self.perm.iter().filter(|&&p| p == axis).count() == 1;
        check::attribute((0..rank).all(once), || format!("each axis below {rank} once, not {:?}", &self.perm[..]))?;
        check::rank(operands, 0, rank)?;
        let shape = Shape::new(self.perm.iter().map(|&p| operands[0].shape[p]));
        Ok(smallvec![TensorType::new(operands[0].dtype, shape)])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        let mut inverse = self.perm.clone();
        self.perm.iter().enumerate().for_each(|(i, &p)| inverse[p] = i);
        let d = cx.cotangent();
        Ok(smallvec![Cotangent::Value(cx.graph.transpose(d, &inverse)?)])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let x = operands[0];
        let mut out = Tensor::zeros(results[0].clone());
        for i in 0..x.data.len() {
            let from = coordinates(i, &x.ty.shape);
            let to: SmallVec<[usize; 4]> = self.perm.iter().map(|&p| from[p]).collect();
            out.data[position(&to, &results[0].shape)] = x.data[i];
        }
        vec![out]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `x` with its axes in the order `perm`.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if `perm` is not an order of all axes of `x`.
    #[track_caller]
    pub fn transpose(&mut self, x: Value, perm: &[usize]) -> Result<Value> {
        self.push_one(Transpose { perm: perm.into() }, &[x])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_move_as_told() {
        let x = Tensor::i32([1, 2, 3], &[0, 1, 2, 3, 4, 5]);
        let op = Transpose { perm: smallvec![2, 0, 1] };
        let types = op.infer(std::slice::from_ref(&x.ty)).unwrap();
        assert_eq!(types[0], TensorType::i32([3, 1, 2]));
        assert_eq!(op.reference(&[&x], &types)[0].data, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let x = Tensor::f32([1, 2, 3], x.data);
        check::assert_gradients(&[x], |g, v| g.transpose(v[0], &[2, 0, 1]));
    }

    #[test]
    fn an_axis_twice_or_too_many_is_refused() {
        let infer = |perm: &[usize]| Transpose { perm: perm.into() }.infer(&[TensorType::f32([2, 3])]);
        assert!(infer(&[0, 0]).unwrap_err().wanted.contains("not [0, 0]"));
        assert!(infer(&[0, 7]).is_err());
        assert_eq!(infer(&[2, 0, 1]).unwrap_err().operand, Some(0));
    }
}
