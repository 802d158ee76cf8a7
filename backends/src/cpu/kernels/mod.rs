//! Kernels over plain slices, one file per op.

pub mod assign;
pub mod combine;
pub mod dispatch;
pub mod gate_grad;
pub(crate) mod par;
pub mod route;
pub mod segment_sum;
