//! What a run takes of a device's memory, known before it starts.

use moebius::ir::passes::{Kept, kept_for_backward, optimise};
use moebius::{Engine, Memory, training_step_with};

use crate::config::Config;
use crate::gpt::Distilling;

/// The memory of a training step of this configuration on a device, from its plan. Allocates nothing on the device.
///
/// # Errors
/// As [`Engine::memory`].
pub fn memory(engine: &Engine, config: &Config) -> moebius::Result<Memory> {
    memory_of(engine, config, None)
}

/// [`memory`] of a student while it follows a teacher, which is in memory too if it is a whole one.
///
/// # Errors
/// As [`Engine::memory`].
pub fn memory_of(engine: &Engine, config: &Config, lesson: Option<&Distilling<'_>>) -> moebius::Result<Memory> {
    let (graph, loss, options) = super::step::parts_of(config, lesson)?;
    engine.training_memory(&training_step_with(graph, loss, options)?)
}

/// What a training step of this configuration keeps from the forward pass for the backward pass, of each of its micro-batches.
///
/// # Errors
/// As [`crate::gpt::training`].
pub fn kept(config: &Config) -> moebius::Result<Kept> {
    let (graph, loss, options) = super::step::parts(config)?;
    Ok(kept_for_backward(&optimise(&training_step_with(graph, loss, options)?)?))
}

/// The largest batch up to the configuration's of which a training step takes at most `free` bytes; 0 if there is none.
///
/// # Errors
/// As [`Engine::memory`].
pub fn largest_batch(engine: &Engine, config: &Config, free: u64) -> moebius::Result<usize> {
    largest_batch_of(engine, config, None, free)
}

/// [`largest_batch`] of a student while it follows a teacher.
///
/// # Errors
/// As [`Engine::memory`].
pub(super) fn largest_batch_of(
    engine: &Engine,
    config: &Config,
    lesson: Option<&Distilling<'_>>,
    free: u64,
) -> moebius::Result<usize> {
    let mut config = config.clone();
    // `most` is too large, or one more than what was asked for; `fits` fits, or is 0.
    let (mut fits, mut most) = (0, config.train.batch + 1);
    while most - fits > 1 {
        config.train.batch = fits.midpoint(most);
        if memory_of(engine, &config, lesson)?.total() <= free {
            fits = config.train.batch;
        } else {
            most = config.train.batch;
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounded_copies_are_made_where_they_stay() {
        let engine = Engine::cpu(Some(1)).unwrap();
        let mut config = Config::preset("tiny-pr-moe").unwrap();
        config.set("model.dtype=bf16").unwrap();
        let (graph, loss, options) = crate::training::parts(&config).unwrap();
        let step = training_step_with(graph, loss, options).unwrap();
        let (alone, all) = (engine.memory(&step).unwrap(), memory(&engine, &config).unwrap());
        assert!(step.inputs().iter().any(|(name, _)| name.starts_with("rounded/")));
        assert_eq!(alone, all);
    }

    #[test]
    fn the_largest_batch_fits_and_the_next_does_not() {
        let engine = Engine::cpu(Some(1)).unwrap();
        let mut config = Config::preset("tiny-pr-moe").unwrap();
        let mut at = |batch: usize| {
            config.train.batch = batch;
            memory(&engine, &config).unwrap().total()
        };
        let (one, five, six, eight) = (at(1), at(5), at(6), at(8));
        assert!(one < five && five < six && six < eight);
        let largest = |free: u64| largest_batch(&engine, &config, free).unwrap();
        assert_eq!([largest(eight), largest(u64::MAX)], [8, 8]);
        assert_eq!([largest(six - 1), largest(five), largest(one), largest(one - 1), largest(0)], [5, 5, 1, 0, 0]);
    }
}
