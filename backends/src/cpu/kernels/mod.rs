//! Kernels over plain slices, one file per op.

pub mod adamw;
pub mod assign;
pub mod combine;
pub mod dispatch;
pub mod elementwise;
pub mod embedding;
pub mod gate_grad;
pub mod global_norm;
pub mod movement;
pub(crate) mod par;
pub mod random;
pub mod random_fill;
pub mod reduce;
pub mod route;
pub mod segment_sum;
