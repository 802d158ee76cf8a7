//! What graphs give and take besides loss and logits: the health of each router, and the routes of each token.

use moebius::MicroBatches;
use moebius_ir::ops::CompareFn;
use moebius_ir::{Graph, Result, TensorType, Value};

use super::moe::MoeStatistics;
use crate::config::ModelConfig;

/// Name of the output with the load of the MoE layer at this index (0-based, over all layers): i32 `[E]`, choices per expert
/// before dropping.
pub fn load_output(layer: usize) -> String {
    format!("load/{layer}")
}

/// Name of the output with the number of dropped choices of the MoE layer at this index: i32 scalar.
pub fn dropped_output(layer: usize) -> String {
    format!("dropped/{layer}")
}

/// Name of the output with the mean entropy of the router's probabilities over the experts: f32 scalar, nats per token, 0 to
/// `ln E`.
pub fn entropy_output(layer: usize) -> String {
    format!("entropy/{layer}")
}

/// Name of the output with the router z-loss without its coefficient, `mean_n logsumexp(logits[n])²`: f32 scalar. Its root is the
/// scale of the logits.
pub fn z_output(layer: usize) -> String {
    format!("z/{layer}")
}

/// Name of the output with the means over the tokens of the coefficients of experts and side branch: f32 `[2]`. There where
/// the router learns the coefficients.
pub fn coefficient_output(layer: usize) -> String {
    format!("coefficient/{layer}")
}

/// Name of the state with the steps since each expert's last token: i32 `[E]`, 0 for an expert that had one in the last step.
pub fn idle_state(layer: usize) -> String {
    format!("layers.{layer}.moe.idle")
}

/// Name of the output with the experts of each token before dropping: i32 `[N,k]`, -1 for none.
pub fn expert_index_output(layer: usize) -> String {
    format!("expert_index/{layer}")
}

/// Name of the output with the score values of those experts: f32 `[N,k]`.
pub fn score_output(layer: usize) -> String {
    format!("score/{layer}")
}

/// Name of the feed with the experts that each token is sent to: i32 `[N,k]`, -1 for none.
pub fn choices_feed(layer: usize) -> String {
    format!("choices/{layer}")
}

/// What a graph does with the routes of its tokens, beside sending them their ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// For each MoE layer there are the outputs [`expert_index_output`], [`score_output`], [`load_output`] and [`dropped_output`].
    pub recorded: bool,
    /// For each MoE layer there is the feed [`choices_feed`], which is used instead of the router's choice. Gates are those of the
    /// router for these experts.
    pub given: bool,
}

impl Routes {
    /// The feed of a layer, if routes are given.
    pub(super) fn feed(
        self,
        g: &mut Graph,
        config: &ModelConfig,
        layer: usize,
        tokens: usize,
    ) -> Result<Option<Value>> {
        let ty = TensorType::i32([tokens, config.top_k()]);
        if self.given { g.feed(choices_feed(layer), ty).map(Some) } else { Ok(None) }
    }

    /// The outputs of all layers, if routes are recorded.
    pub(super) fn outputs(self, g: &mut Graph, statistics: &[(usize, MoeStatistics)]) -> Result<()> {
        for (layer, s) in statistics.iter().filter(|_| self.recorded) {
            g.output(expert_index_output(*layer), s.expert_index)?;
            g.output(score_output(*layer), s.score)?;
            for (name, value) in [(load_output(*layer), s.counts), (dropped_output(*layer), s.dropped)] {
                if g.output_named(&name).is_none() {
                    g.output(name, value)?;
                }
            }
        }
        Ok(())
    }
}

/// The mean of an f32 value over the micro-batches of a step; the value itself where there is one micro-batch alone.
pub(super) fn mean(
    g: &mut Graph,
    micro_batches: &mut Option<MicroBatches>,
    name: &str,
    value: Value,
) -> moebius::Result<Value> {
    micro_batches.as_mut().map_or(Ok(value), |micro| micro.mean(g, name, value))
}

/// What is told of a router after a whole step.
pub(super) struct StepStatistics {
    /// Choices per expert before dropping, i32 `[E]`.
    pub(super) counts: Value,
    /// Choices that found no slot, i32 scalar.
    dropped: Value,
    /// Mean entropy, f32 scalar.
    entropy: Value,
    /// Router z-loss, f32 scalar.
    z_loss: Value,
    /// Means of the coefficients, f32 `[2]`.
    coefficient: Option<Value>,
}

impl StepStatistics {
    /// Sums and means over the micro-batches of what `s` has of this one.
    pub(super) fn of(
        g: &mut Graph,
        layer: usize,
        s: &MoeStatistics,
        micro_batches: &mut Option<MicroBatches>,
    ) -> moebius::Result<StepStatistics> {
        let mut sum = |g: &mut Graph, name: String, value: Value| {
            micro_batches.as_mut().map_or(Ok(value), |micro| micro.sum(g, &name, value))
        };
        let counts = sum(g, load_output(layer), s.counts)?;
        let dropped = sum(g, dropped_output(layer), s.dropped)?;
        let entropy = mean(g, micro_batches, &entropy_output(layer), s.entropy)?;
        let z_loss = mean(g, micro_batches, &z_output(layer), s.z_loss)?;
        let coefficient = s.coefficient.map(|c| mean(g, micro_batches, &coefficient_output(layer), c)).transpose()?;
        Ok(StepStatistics { counts, dropped, entropy, z_loss, coefficient })
    }
}

/// The health of a router in a training step: its outputs, and the count of idle steps.
pub(super) fn health(g: &mut Graph, layer: usize, s: &StepStatistics) -> Result<()> {
    g.output(load_output(layer), s.counts)?;
    g.output(dropped_output(layer), s.dropped)?;
    g.output(entropy_output(layer), s.entropy)?;
    g.output(z_output(layer), s.z_loss)?;
    if let Some(coefficient) = s.coefficient {
        g.output(coefficient_output(layer), coefficient)?;
    }
    let scalar = |g: &mut Graph, value: f64| g.splat(TensorType::i32([]), value);
    let experts = g.shape(s.counts)[0];
    let idle = g.state(idle_state(layer), TensorType::i32([experts]))?;
    let (zero, one) = (scalar(g, 0.0)?, scalar(g, 1.0)?);
    let met = g.compare(CompareFn::Gt, s.counts, zero)?;
    let longer = g.add(idle, one)?;
    let now = g.select(met, zero, longer)?;
    g.update(idle, now)
}
