//! The CPU backend.

pub mod element;
pub mod gemm;
pub mod kernels;
pub mod vmath;
