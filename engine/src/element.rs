//! The Rust types that the elements of a tensor can be given and read as.

use half::{bf16, f16};
use moebius_ir::DType;

/// A Rust type with the bytes of one dtype.
pub trait Element: bytemuck::Pod {
    /// The dtype it stands for.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

/// A bool is one byte, 0 or 1.
impl Element for u8 {
    const DTYPE: DType = DType::Bool;
}
