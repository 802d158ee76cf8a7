//! `random`: counter-based random numbers, the same bits on every backend.
//!
//! `key u32 [2] -> f32 shape` (`Bits`: u32). Element i is that of [`crate::philox`] for this key, this stream and index i.
//! The key has no gradient.

use serde::{Deserialize, Serialize};
use smallvec::smallvec;

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::{Cotangent, Vjp};
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::philox;
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// How random numbers are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// Multiples of 2^-24 in [0, 1): [`philox::uniform`].
    Uniform,
    /// Mean 0, variance 1: [`philox::normal`].
    Normal,
    /// -ln(-ln u): [`philox::gumbel`].
    Gumbel,
    /// The raw words, u32: [`philox::bits`].
    Bits,
}

/// Random numbers from a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Random {
    /// How they are distributed.
    pub distribution: Distribution,
    /// Extents of the result.
    pub shape: Shape,
    /// Streams of one key are independent of each other.
    pub stream: u32,
}

impl Rule for Random {
    const NAME: &'static str = "random";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 1)?;
        check::ty(operands, 0, &TensorType::new(DType::U32, [2]))?;
        let dtype = match self.distribution {
            Distribution::Uniform | Distribution::Normal | Distribution::Gumbel => DType::F32,
            Distribution::Bits => DType::U32,
        };
        Ok(smallvec![TensorType::new(dtype, self.shape.clone())])
    }

    fn vjp(&self, _cx: &mut Vjp<'_>) -> Result<Cotangents> {
        Ok(smallvec![Cotangent::Zero])
    }

    fn reference(&self, operands: &[&Tensor], results: &[TensorType]) -> Vec<Tensor> {
        let key = [operands[0].data[0] as u32, operands[0].data[1] as u32];
        let element = |i: u64| match self.distribution {
            Distribution::Uniform => f64::from(philox::uniform(key, self.stream, i)),
            Distribution::Normal => f64::from(philox::normal(key, self.stream, i)),
            Distribution::Gumbel => f64::from(philox::gumbel(key, self.stream, i)),
            Distribution::Bits => f64::from(philox::bits(key, self.stream, i)),
        };
        vec![Tensor::new(results[0].clone(), (0..results[0].elements() as u64).map(element).collect())]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// Random numbers of `shape` from `key` u32 `[2]`; f32, u32 for [`Distribution::Bits`].
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the key is of another type.
    #[track_caller]
    pub fn random(
        &mut self,
        distribution: Distribution,
        shape: impl Into<Shape>,
        stream: u32,
        key: Value,
    ) -> Result<Value> {
        self.push_one(Random { distribution, shape: shape.into(), stream }, &[key])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_words_are_the_known_answer() {
        let key = Tensor::zeros(TensorType::new(DType::U32, [2]));
        let op = Random { distribution: Distribution::Bits, shape: Shape::from([1, 5]), stream: 0 };
        let types = op.infer(std::slice::from_ref(&key.ty)).unwrap();
        assert_eq!(types[0], TensorType::new(DType::U32, [1, 5]));
        let out = op.reference(&[&key], &types);
        assert_eq!(out[0].data[..4], [0x6627_e8d5u32, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8].map(f64::from));
        let mismatch = op.infer(&[TensorType::i32([2])]).unwrap_err();
        assert_eq!((mismatch.operand, mismatch.wanted.as_str()), (Some(0), "u32[2]"));
    }

    #[test]
    fn floats_are_the_words_transformed() {
        let key = Tensor::new(TensorType::new(DType::U32, [2]), vec![7.0, f64::from(u32::MAX)]);
        for distribution in [Distribution::Uniform, Distribution::Normal, Distribution::Gumbel] {
            let op = Random { distribution, shape: Shape::from([6]), stream: 4 };
            let out = op.reference(&[&key], &[TensorType::f32([6])]);
            let want = match distribution {
                Distribution::Uniform => philox::uniform([7, u32::MAX], 4, 5),
                Distribution::Normal => philox::normal([7, u32::MAX], 4, 5),
                Distribution::Gumbel => philox::gumbel([7, u32::MAX], 4, 5),
                Distribution::Bits => unreachable!("not in the list"),
            };
            assert_eq!(out[0].data[5], f64::from(want));
        }
    }
}
