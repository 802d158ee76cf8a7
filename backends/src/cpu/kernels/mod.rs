//! Kernels over plain slices, one file per op.

pub mod adamw;
pub mod assign;
pub mod attention;
pub mod attention_cached;
pub mod combine;
pub mod dispatch;
pub mod elementwise;
pub mod embedding;
pub mod gate_grad;
pub mod global_norm;
pub mod layer_norm;
pub mod linear_cross_entropy;
pub mod movement;
pub(crate) mod par;
mod product;
pub mod random;
pub mod random_fill;
pub mod reduce;
pub mod rms_norm;
pub mod route;
pub mod route_any;
mod rows;
pub mod segment_sum;
pub mod softmax;
mod tile;
