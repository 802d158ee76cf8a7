//! The `moebius` program.
fn main() {}
