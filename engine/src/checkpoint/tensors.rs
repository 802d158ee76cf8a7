//! Named tensors on their way to and from a file.

use std::{borrow::Cow, error::Error, fmt};

use moebius_ir::DType;

/// The dtypes a checkpoint can hold. All are little-endian, dense, in row-major order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit float.
    F16,
    /// 32-bit signed integer.
    I32,
    /// 32-bit unsigned integer.
    U32,
    /// One byte, 0 or 1.
    Bool,
}

const DTYPES: [(Dtype, safetensors::Dtype); 6] = [
    (Dtype::F32, safetensors::Dtype::F32),
    (Dtype::Bf16, safetensors::Dtype::BF16),
    (Dtype::F16, safetensors::Dtype::F16),
    (Dtype::I32, safetensors::Dtype::I32),
    (Dtype::U32, safetensors::Dtype::U32),
    (Dtype::Bool, safetensors::Dtype::BOOL),
];

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::Bool => 1,
        }
    }

    /// The same dtype in the words of safetensors.
    pub fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::Bf16 => safetensors::Dtype::BF16,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::I32 => safetensors::Dtype::I32,
            Dtype::U32 => safetensors::Dtype::U32,
            Dtype::Bool => safetensors::Dtype::BOOL,
        }
    }

    /// The engine's dtype for one of safetensors, `None` for those the engine does not have.
    pub fn from_safetensors(dtype: safetensors::Dtype) -> Option<Dtype> {
        DTYPES.iter().find(|(_, theirs)| *theirs == dtype).map(|(ours, _)| *ours)
    }
}

impl From<DType> for Dtype {
    fn from(dtype: DType) -> Dtype {
        match dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::Bf16,
            DType::F16 => Dtype::F16,
            DType::I32 => Dtype::I32,
            DType::U32 => Dtype::U32,
            DType::Bool => Dtype::Bool,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::I32 => "i32",
            Dtype::U32 => "u32",
            Dtype::Bool => "bool",
        })
    }
}

/// Name, dtype and shape of a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorInfo {
    /// Name, unique in its file.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// A tensor's description.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        TensorInfo { name: name.into(), dtype, shape: shape.into() }
    }

    /// Bytes of the whole tensor; `None` when they do not fit 64 bits.
    pub fn bytes(&self) -> Option<u64> {
        self.shape.iter().try_fold(self.dtype.size() as u64, |n, &d| n.checked_mul(d as u64))
    }
}

type BoxError = Box<dyn Error + Send + Sync>;
type Produce<'a> = Box<dyn FnOnce() -> Result<Cow<'a, [u8]>, BoxError> + 'a>;

/// A tensor to save. Its bytes are borrowed, or fetched one tensor at a time while the file is written, so that saving
/// a model on a device never holds a second copy of it.
pub struct Tensor<'a> {
    info: TensorInfo,
    produce: Produce<'a>,
}

impl fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tensor").field(&self.info).finish()
    }
}

impl<'a> Tensor<'a> {
    /// A tensor whose little-endian bytes lie in memory.
    pub fn borrowed(info: TensorInfo, bytes: &'a [u8]) -> Self {
        Tensor { info, produce: Box::new(move || Ok(Cow::Borrowed(bytes))) }
    }

    /// A tensor whose little-endian bytes are had by calling `read` once, when it is this tensor's turn in the file.
    pub fn lazy(info: TensorInfo, read: impl FnOnce() -> Result<Cow<'a, [u8]>, BoxError> + 'a) -> Self {
        Tensor { info, produce: Box::new(read) }
    }

    /// Name, dtype and shape.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    pub(super) fn into_parts(self) -> (TensorInfo, Produce<'a>) {
        (self.info, self.produce)
    }
}
