//! Kernels over plain slices, one file per op.
