//! Models of the DeepSpeed-MoE paper in the Moebius IR, and what a program needs to train them: configuration, text,
//! tokenizers, metrics, the report.
//!
//! - [`gpt`] writes the models as graphs, from a [`config::ModelConfig`]; it knows the IR only, no device.
//! - [`training`], [`evaluation`] and [`generate`] run those graphs on a [`moebius::Session`].
//! - [`distill`] teaches a student by a trained model, live or from a cache.
//! - [`study`] trains the few models that a claim of the paper is about, and says what it found.
//! - [`timed`] measures training steps one by one.
//! - [`verify`] compares a device with the reference, op by op and layer by layer.

pub mod config;
pub mod data;
pub mod distill;
pub mod evaluation;
pub mod generate;
pub mod gpt;
pub mod health;
pub mod metrics;
pub mod report;
pub mod routes;
pub mod sampling;
pub mod study;
pub mod timed;
pub mod tokenizer;
pub mod trained;
pub mod training;
pub mod verify;
