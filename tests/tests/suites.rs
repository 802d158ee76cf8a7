//! Suites that need no process of their own, a module each. They are one binary, because each one more links the whole engine and has
//! the machine to itself while its last test runs.

mod distillation;
mod engine;
mod families;
mod gradcheck;
mod moments;
mod negative_controls;
mod parsers;
mod plan;
mod properties;
mod router_rules;
mod routers;
mod steps;
mod tidy;
mod verify;
