//! A tensor on the host in f64: what the reference computes with. Every dtype's values are exact in it.

use crate::{DType, Shape, TensorType};

/// A host tensor whose elements are held as f64, whatever its dtype.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type and shape.
    pub ty: TensorType,
    /// Row-major elements.
    pub data: Vec<f64>,
}

impl Tensor {
    /// A tensor of these elements.
    ///
    /// # Panics
    /// If the number of elements is not that of the type: a bug of the caller.
    pub fn new(ty: TensorType, data: Vec<f64>) -> Self {
        assert_eq!(ty.elements(), data.len(), "elements of {ty}");
        Tensor { ty, data }
    }

    /// All elements zero.
    pub fn zeros(ty: TensorType) -> Self {
        let n = ty.elements();
        Tensor { ty, data: vec![0.0; n] }
    }

    /// `f32` elements.
    pub fn f32(shape: impl Into<Shape>, data: Vec<f64>) -> Self {
        Tensor::new(TensorType::f32(shape), data)
    }

    /// `i32` elements.
    pub fn i32(shape: impl Into<Shape>, data: &[i32]) -> Self {
        Tensor::new(TensorType::i32(shape), data.iter().map(|&v| f64::from(v)).collect())
    }

    /// Every element as it would read back after being stored in the tensor's dtype.
    pub fn rounded(mut self) -> Self {
        let dtype = self.ty.dtype;
        self.data.iter_mut().for_each(|v| *v = dtype.round(*v));
        self
    }

    /// The little-endian bytes of the stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self.ty.dtype {
            DType::F32 => self.stored(|v| (v as f32).to_le_bytes()),
            DType::Bf16 => self.stored(|v| half::bf16::from_f64(v).to_le_bytes()),
            DType::F16 => self.stored(|v| half::f16::from_f64(v).to_le_bytes()),
            DType::I32 => self.stored(|v| (v as i32).to_le_bytes()),
            DType::U32 => self.stored(|v| (v as u32).to_le_bytes()),
            DType::Bool => self.stored(|v| [u8::from(v != 0.0)]),
        }
    }

    /// The bytes of all elements, from those of one.
    fn stored<const N: usize>(&self, of: impl Fn(f64) -> [u8; N]) -> Vec<u8> {
        let mut bytes = vec![0; N * self.data.len()];
        for (place, &v) in bytes.chunks_exact_mut(N).zip(&self.data) {
            place.copy_from_slice(&of(v));
        }
        bytes
    }

    /// A tensor from the little-endian bytes of its stored form.
    ///
    /// # Panics
    /// If the number of bytes is not that of the type: a bug of the caller.
    pub fn from_bytes(ty: TensorType, bytes: &[u8]) -> Self {
        assert_eq!(ty.bytes(), bytes.len(), "bytes of {ty}");
        let four = |c: &[u8]| [c[0], c[1], c[2], c[3]];
        let data = match ty.dtype {
            DType::F32 => bytes.chunks_exact(4).map(|c| f64::from(f32::from_le_bytes(four(c)))).collect(),
            DType::I32 => bytes.chunks_exact(4).map(|c| f64::from(i32::from_le_bytes(four(c)))).collect(),
            DType::U32 => bytes.chunks_exact(4).map(|c| f64::from(u32::from_le_bytes(four(c)))).collect(),
            DType::Bf16 => bytes.chunks_exact(2).map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f64()).collect(),
            DType::F16 => bytes.chunks_exact(2).map(|c| half::f16::from_le_bytes([c[0], c[1]]).to_f64()).collect(),
            DType::Bool => bytes.iter().map(|&b| f64::from(b)).collect(),
        };
        Tensor { ty, data }
    }
}
