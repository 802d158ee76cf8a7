//! Kernels over plain slices, one file per op.

pub mod attention;
pub mod attention_cached;
pub mod layer_norm;
pub mod linear_cross_entropy;
mod product;
pub mod rms_norm;
mod rows;
pub mod softmax;
mod tile;
