//! `constant`: a value that is known when the graph is built.
//!
//! `() -> ty`. One number everywhere, or every element in row-major order. Numbers are held as f64 and rounded to the
//! dtype when they are stored. A source: no operands, no gradient.

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::{SmallVec, smallvec};

use super::{Cotangents, Rule, Types, check};
use crate::autodiff::Vjp;
use crate::dtype::DType;
use crate::error::{Mismatch, Result};
use crate::graph::{Graph, Value};
use crate::tensor::Tensor;
use crate::types::{Shape, TensorType};

/// The elements of a constant. As text, a number that is not finite is one of the strings `"inf"`, `"-inf"`, `"nan"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Literal {
    /// One number for every element.
    Splat(#[serde(with = "number")] f64),
    /// Every element, row-major.
    Dense(#[serde(with = "numbers")] Vec<f64>),
}

/// A value that is known when the graph is built.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// Its type.
    pub ty: TensorType,
    /// Its elements.
    pub literal: Literal,
}

impl Constant {
    /// The elements in f64, not rounded to the dtype.
    ///
    /// # Panics
    /// If a dense literal does not have the type's number of elements, which the shape rule refuses.
    pub fn tensor(&self) -> Tensor {
        let data = match &self.literal {
            Literal::Splat(v) => vec![*v; self.ty.elements()],
            Literal::Dense(data) => data.clone(),
        };
        Tensor::new(self.ty.clone(), data)
    }
}

/// Whether `value` keeps its meaning in `dtype`: integers and bools exactly, floats without becoming infinite.
fn fits(dtype: DType, value: f64) -> bool {
    let stored = dtype.round(value);
    if dtype.is_float() { stored.is_finite() || !value.is_finite() } else { stored == value }
}

impl Rule for Constant {
    const NAME: &'static str = "constant";

    fn infer(&self, operands: &[TensorType]) -> Result<Types, Mismatch> {
        check::count(operands, 0)?;
        let data = match &self.literal {
            Literal::Splat(v) => std::slice::from_ref(v),
            Literal::Dense(data) => data,
        };
        if let Literal::Dense(data) = &self.literal
            && self.ty.shape.checked_elements() != Some(data.len())
        {
            return Err(Mismatch::op(format!("as many numbers as {} has elements, not {}", self.ty, data.len())));
        }
        if let Some(v) = data.iter().find(|&&v| !fits(self.ty.dtype, v)) {
            return Err(Mismatch::op(format!("numbers that {} can hold, not {v}", self.ty.dtype)));
        }
        Ok(smallvec![self.ty.clone()])
    }

    fn vjp(&self, _cx: &mut Vjp<'_>) -> Result<Cotangents> {
        Ok(SmallVec::new())
    }

    fn reference(&self, _operands: &[&Tensor], _results: &[TensorType]) -> Vec<Tensor> {
        vec![self.tensor()]
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }
}

impl Graph {
    /// A tensor with the same number everywhere.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if the dtype cannot hold the number.
    #[track_caller]
    pub fn splat(&mut self, ty: TensorType, value: f64) -> Result<Value> {
        self.push_one(Constant { ty, literal: Literal::Splat(value) }, &[])
    }

    /// A tensor of these elements, row-major.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if their number is not that of the type, or the dtype cannot hold one of them.
    #[track_caller]
    pub fn constant(&mut self, ty: TensorType, data: Vec<f64>) -> Result<Value> {
        self.push_one(Constant { ty, literal: Literal::Dense(data) }, &[])
    }

    /// An `f32[]` constant.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] if f32 cannot hold the number.
    #[track_caller]
    pub fn scalar(&mut self, value: f64) -> Result<Value> {
        self.splat(TensorType::f32(Shape::default()), value)
    }
}

/// One f64 that may be non-finite, which JSON numbers cannot be.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Number(#[serde(with = "number")] f64);

mod number {
    use super::*;

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            serializer.serialize_f64(*value)
        } else if value.is_nan() {
            serializer.serialize_str("nan")
        } else {
            serializer.serialize_str(if *value > 0.0 { "inf" } else { "-inf" })
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        deserializer.deserialize_any(NumberVisitor)
    }

    struct NumberVisitor;

    impl Visitor<'_> for NumberVisitor {
        type Value = f64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number, \"inf\", \"-inf\" or \"nan\"")
        }

        fn visit_f64<E: de::Error>(self, value: f64) -> Result<f64, E> {
            Ok(value)
        }

        fn visit_i64<E: de::Error>(self, value: i64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_u64<E: de::Error>(self, value: u64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_str<E: de::Error>(self, value: &str) -> Result<f64, E> {
            match value {
                "inf" => Ok(f64::INFINITY),
                "-inf" => Ok(f64::NEG_INFINITY),
                "nan" => Ok(f64::NAN),
                other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
            }
        }
    }
}

mod numbers {
    use super::*;

    pub(super) fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|&v| Number(v)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        Ok(Vec::<Number>::deserialize(deserializer)?.into_iter().map(|n| n.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_survive_text_bit_for_bit() {
        let hard = vec![0.1, -0.0, f64::MIN_POSITIVE / 3.0, 1.0 / 3.0, f64::MAX, f64::INFINITY, f64::NEG_INFINITY, 7.0];
        let text = serde_json::to_string(&Literal::Dense(hard.clone())).unwrap();
        assert!(text.contains(r#""inf","-inf",7.0]"#), "{text}");
        let Literal::Dense(back) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        let bits = |v: &[f64]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&back), bits(&hard));
        let nan = serde_json::to_string(&Literal::Splat(f64::NAN)).unwrap();
        assert_eq!(nan, r#"{"splat":"nan"}"#);
        assert!(matches!(serde_json::from_str(&nan), Ok(Literal::Splat(v)) if v.is_nan()));
        assert_eq!(serde_json::from_str::<Literal>(r#"{"splat":-3}"#).unwrap(), Literal::Splat(-3.0));
        assert!(serde_json::from_str::<Literal>(r#"{"splat":"Infinity"}"#).is_err());
    }

    #[test]
    fn numbers_the_type_cannot_hold_are_refused() {
        let mut g = Graph::new();
        let short = g.constant(TensorType::f32([2, 2]), vec![1.0; 3]).unwrap_err().to_string();
        assert!(short.contains("f32[2,2]") && short.contains("not 3") && short.contains("constant.rs"), "{short}");
        for (dtype, value) in [(DType::U32, -1.0), (DType::I32, 0.5), (DType::Bool, 2.0), (DType::F16, 1e6)] {
            let refused = g.splat(TensorType::new(dtype, [1]), value).unwrap_err().to_string();
            assert!(refused.contains(&format!("{dtype} can hold, not {value}")), "{refused}");
        }
        let mask = g.splat(TensorType::new(DType::F16, [2]), f64::NEG_INFINITY).unwrap();
        assert_eq!(g.shape(mask), [2]);
    }
}
