//! Backends of Moebius: each runs a plan of the IR on one kind of device. This is the only crate with `unsafe`.

pub mod cpu;
