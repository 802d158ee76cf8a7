//! Router health in training: what each MoE layer's router measured in a step, and alarms on it.
//!
//! The values are a few numbers a layer that the training graph computes anyway or in passing ([`crate::gpt::training`]); they are
//! read from the device on the steps that go into `metrics.jsonl`, and on every step while there are alarms. The steps since an
//! expert's last token are counted on the device in every step, and kept in checkpoints.

mod alarm;

use std::collections::BTreeMap;

use moebius::{Program, Session};

use crate::config::ModelConfig;
use crate::gpt;
use crate::metrics::LayerLoad;

pub use alarm::{AlarmError, Alarms, Watch};

/// Steps without a token after which an expert counts as dead, unless an alarm says otherwise.
pub const DEAD_AFTER: u32 = 100;

/// The MoE layers of a model, from 0 over all layers, with their experts.
pub fn moe_layers(config: &ModelConfig) -> Vec<(usize, usize)> {
    config.experts_per_layer().into_iter().enumerate().filter(|&(_, experts)| experts > 0).collect()
}

/// The health of these layers after a run of the training step `program`; experts are dead after `dead_after` steps.
///
/// # Errors
/// As [`Program::output`], for a program or session of another model.
pub fn read(
    session: &Session,
    program: &Program,
    layers: &[(usize, usize)],
    dead_after: u32,
) -> moebius::Result<Vec<LayerLoad>> {
    let read_layer = |&(layer, _): &(usize, usize)| {
        let counts: Vec<i32> = program.output(&gpt::load_output(layer))?;
        let dropped: Vec<i32> = program.output(&gpt::dropped_output(layer))?;
        let all = counts.iter().sum::<i32>().max(1) as f32;
        let coefficient = gpt::coefficient_output(layer);
        let coefficient = match program.plan().graph().output_named(&coefficient) {
            Some(_) => program.output::<f32>(&coefficient)?.get(1).copied(),
            None => None,
        };
        let idle: Vec<u32> = idle(session, layer)?;
        Ok(LayerLoad {
            layer,
            load: counts.iter().map(|&c| c as f32 / all).collect(),
            dropped: dropped[0] as f32 / all,
            entropy: Some(program.scalar(&gpt::entropy_output(layer))?),
            logit_scale: Some(program.scalar(&gpt::z_output(layer))?.sqrt()),
            coefficient,
            dead: Some(idle.iter().filter(|&&steps| steps >= dead_after).count()),
            idle,
        })
    };
    layers.iter().map(read_layer).collect()
}

/// Steps since the last token of each expert of a layer.
fn idle(session: &Session, layer: usize) -> moebius::Result<Vec<u32>> {
    let steps: Vec<i32> = session.read(&gpt::idle_state(layer))?;
    Ok(steps.into_iter().map(|steps| u32::try_from(steps).unwrap_or(0)).collect())
}

/// The idle steps of all experts, by layer: what a checkpoint keeps.
///
/// # Errors
/// As [`read`].
pub fn idle_steps(session: &Session, layers: &[(usize, usize)]) -> moebius::Result<BTreeMap<usize, Vec<u32>>> {
    layers.iter().map(|&(layer, _)| Ok((layer, idle(session, layer)?))).collect()
}

/// Puts the idle steps of a checkpoint back. A layer that it does not have begins at 0, as in checkpoints of before.
///
/// # Errors
/// As [`Session::write`], for another number of experts.
pub fn restore_idle(
    session: &mut Session,
    layers: &[(usize, usize)],
    steps: &BTreeMap<usize, Vec<u32>>,
) -> moebius::Result<()> {
    for &(layer, experts) in layers {
        let absent = vec![0; experts];
        let steps = steps.get(&layer).unwrap_or(&absent);
        let steps: Vec<i32> = steps.iter().map(|&steps| i32::try_from(steps).unwrap_or(i32::MAX)).collect();
        session.write(&gpt::idle_state(layer), &steps)?;
    }
    Ok(())
}
