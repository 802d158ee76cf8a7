//! Models of the DeepSpeed-MoE paper and what a program needs to train them: text, tokenizers, metrics, the report.

pub mod data;
pub mod metrics;
pub mod report;
pub mod tokenizer;
