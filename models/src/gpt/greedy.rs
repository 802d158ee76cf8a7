//! The decoding step that chooses the next token itself, so that a device continues a text run by run, without the host in between.

use moebius_ir::ops::{CompareFn, ReduceFn};
use moebius_ir::{DType, Graph, Result, TensorType, Value};

use super::outputs::Routes;
use super::{DecodingError, Step, decoded};
use crate::config::ModelConfig;

/// State of [`greedy`]: the token that the next run takes, i32 `[1, 1]`.
pub const NEXT_TOKEN: &str = "greedy.token";
/// State of [`greedy`]: how many tokens the cache holds, i32 `[1]`.
pub const NEXT_POSITION: &str = "greedy.position";
/// State of [`greedy`]: at each position the token chosen after it, i32 `[sequence]`.
pub const CHOSEN: &str = "greedy.chosen";

/// [`super::decoding`] of one token that is not fed: a run takes [`NEXT_TOKEN`] at [`NEXT_POSITION`] and leaves there the first of the
/// most likely of the first `known` tokens, with the position after, and the token in [`CHOSEN`] too. The output `token`, i32 scalar,
/// is the same token. Where no logit is the greatest, as one is not a number, it is `vocab`, which is no token.
///
/// # Errors
/// As [`super::decoding`].
pub fn greedy(config: &ModelConfig, known: usize) -> Result<Graph, DecodingError> {
    let mut graph = Graph::new();
    let g = &mut graph;
    let ids = g.state(NEXT_TOKEN, TensorType::i32([1, 1]))?;
    let positions = g.state(NEXT_POSITION, TensorType::i32([1]))?;
    let chosen = g.state(CHOSEN, TensorType::i32([config.sequence]))?;
    let start = g.reshape(positions, [])?;
    let (logits, _) = decoded(g, config, Step { ids, positions, start }, Routes::default())?;
    let known = known.clamp(1, config.vocab);
    let logits = g.slice(logits, 0, 0, known)?;
    let token = g.scoped("choice", |g| most_likely(g, logits, config.vocab))?;
    g.output("token", token)?;

    let numbers = g.constant(TensorType::i32([config.sequence]), (0..config.sequence).map(|i| i as f64).collect())?;
    let here = g.compare(CompareFn::Eq, numbers, positions)?;
    let all_chosen = g.select(here, token, chosen)?;
    g.update(chosen, all_chosen)?;
    let one = g.splat(TensorType::i32([1]), 1.0)?;
    let after = g.add(positions, one)?;
    g.update(positions, after)?;
    let next = g.reshape(token, [1, 1])?;
    g.update(ids, next)?;
    Ok(graph)
}

/// The first place of the greatest of `logits`, f32 `[n]`, as an i32 scalar; `none` where one is NaN.
fn most_likely(g: &mut Graph, logits: Value, none: usize) -> Result<Value> {
    let n = g.ty(logits).elements();
    let most = g.reduce(ReduceFn::Max, logits, &[0])?;
    let is_most = g.compare(CompareFn::Eq, logits, most)?;
    // Negative, so that the first place is the greatest number. Whole numbers of f32 are exact to 2^24.
    let places = g.constant(TensorType::f32([n]), (0..n).map(|i| -(i as f64)).collect())?;
    let none = g.scalar(-(none as f64))?;
    let places = g.select(is_most, places, none)?;
    let first = g.reduce(ReduceFn::Max, places, &[0])?;
    let first = g.neg(first)?;
    g.cast(first, DType::I32)
}
