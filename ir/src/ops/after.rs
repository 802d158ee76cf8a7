//! `after`: a value that cannot be had before another one.
//!
//! `x, trigger -> x`: the elements of `x`, once `trigger` is computed. Any dtypes and shapes. Costs nothing: a plan lets the result
//! share the storage of `x` and does not keep `trigger` for it. It keeps what is computed from the result apart from what is
//! computed from `x` itself, so that work can be put off on purpose ([`crate::passes::recompute`]). Differentiable in `x`.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// The same elements, not before another value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct After {}

impl Rule for After {
    const NAME: &'static str = "after";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 2)?;
        Ok(smallvec![operands[0].clone()])
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<Cotangents> {
        Ok(smallvec![Cotangent::Value(cx.cotangent()), Cotangent::Zero])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        vec![Tensor::new(results[0].clone(), operands[0].data.clone())]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// `x`, not before `trigger` is computed.
    ///
    /// # Errors
    /// None for two values of this graph.
    #[track_caller]
    pub fn after(&mut self, x: Value, trigger: Value) -> Result<Value> {
        self.push_one(After {}, &[x, trigger])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_goes_to_the_value_and_none_to_the_trigger() {
        let x = Tensor::f32([2], vec![0.5, -2.0]);
        let trigger = Tensor::f32([3], vec![1.0, 2.0, 3.0]);
        check::assert_gradients(std::slice::from_ref(&x), |g, v| {
            let trigger = g.exp(v[0])?;
            let y = g.after(v[0], trigger)?;
            g.mul(y, y)
        });
        let gradients = check::gradients_of(&[x, trigger], |g, v| g.after(v[0], v[1]));
        assert_eq!((&gradients[0].data[..], &gradients[1].data[..]), (&[1.0, 1.0][..], &[0.0; 3][..]));
    }

    #[test]
    fn a_trigger_is_wanted() {
        let ty = TensorType::f32([2]);
        assert!(After {}.infer(std::slice::from_ref(&ty)).unwrap_err().wanted.contains("2 operands"));
        assert_eq!(After {}.infer(&[ty.clone(), TensorType::i32([])]).unwrap()[0], ty);
    }
}
