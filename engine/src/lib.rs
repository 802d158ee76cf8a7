//! Crate root.

pub mod checkpoint;
