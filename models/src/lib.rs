//! Crate root.

pub mod config;
