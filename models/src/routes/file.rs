//! The parts of a route file.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::RouteError;
use crate::config::{CapacityRule, Config, MOST_EXPERTS, MOST_LAYERS, Order};
use crate::gpt::router::CapacityOf;
use crate::health;

pub(super) const MAGIC: &[u8; 8] = b"moeroute";
pub(super) const VERSION: u32 = 1;
/// Bytes before the header's text.
pub(super) const FIXED: usize = 48;

/// The model that routes are of: what is needed to force them on one, and to ask what other capacities do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteHeader {
    /// Name of the model.
    pub model: String,
    /// Hash of its section `[model]`.
    pub model_hash: String,
    /// Token kinds.
    pub vocab: usize,
    /// Choices of each token, k.
    pub top_k: usize,
    /// The MoE layers, lowest first.
    pub layers: Vec<RouteLayer>,
    /// Who stays when an expert is full.
    pub order: Order,
    /// How a capacity factor becomes a number of slots.
    pub capacity: CapacityRule,
    /// Least slots of an expert.
    pub min_capacity: usize,
    /// The capacity factor that the routes were recorded with; `None`: nothing was dropped.
    #[serde(default)]
    pub capacity_factor: Option<f64>,
    /// Whether that is a factor of evaluation alone (`model.eval_capacity_factor`).
    pub evaluation_factor: bool,
}

/// An MoE layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteLayer {
    /// Its number in the model, from 0.
    pub layer: usize,
    /// Its experts.
    pub experts: usize,
}

/// What a model was given at once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pass {
    /// The n token ids.
    pub ids: Vec<i32>,
    /// For each MoE layer its routes.
    pub layers: Vec<LayerRoutes>,
}

/// The routes of the tokens of a pass in one layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerRoutes {
    /// Choices that found no slot.
    pub dropped: u32,
    /// The experts of each token before dropping, `[n,k]`, -1 for none.
    pub expert_index: Vec<i32>,
    /// Their score values, `[n,k]`.
    pub score: Vec<f32>,
}

impl RouteHeader {
    /// The header of a model's routes in evaluation and generation.
    ///
    /// # Errors
    /// [`RouteError::Dense`]; [`RouteError::ExpertsChoose`].
    pub fn of(config: &Config) -> Result<RouteHeader, RouteError> {
        let model = &config.model;
        let routing = model.routing();
        let layer = |(layer, experts)| RouteLayer { layer, experts };
        let layers: Vec<RouteLayer> = health::moe_layers(model).into_iter().map(layer).collect();
        if layers.is_empty() {
            return Err(RouteError::Dense { model: model.name.clone() });
        }
        if routing.expert_choice {
            return Err(RouteError::ExpertsChoose);
        }
        let CapacityOf { rule, k, min, evaluation } = CapacityOf::new(model, false);
        Ok(RouteHeader {
            model: model.name.clone(),
            model_hash: config.model_hash(),
            vocab: model.vocab,
            top_k: k,
            layers,
            order: routing.order,
            capacity: rule,
            min_capacity: min,
            capacity_factor: model.capacity_factor(false),
            evaluation_factor: evaluation,
        })
    }

    /// The capacity as a function of the factor.
    pub fn capacity_of(&self) -> CapacityOf {
        let RouteHeader { capacity, top_k, min_capacity, evaluation_factor, .. } = *self;
        CapacityOf { rule: capacity, k: top_k, min: min_capacity, evaluation: evaluation_factor }
    }

    /// What is wrong with a header that was read: what was wanted, and what was found.
    pub(super) fn fault(&self) -> Option<(String, String)> {
        if !(1..=MOST_LAYERS).contains(&self.layers.len()) {
            return Some((format!("1 to {MOST_LAYERS} MoE layers"), self.layers.len().to_string()));
        }
        if !self.layers.is_sorted_by(|a, b| a.layer < b.layer) {
            return Some(("MoE layers in ascending order".into(), "another order".into()));
        }
        for &RouteLayer { layer, experts } in &self.layers {
            if experts > MOST_EXPERTS {
                return Some((format!("at most {MOST_EXPERTS} experts in layer {layer}"), experts.to_string()));
            }
            if !(1..=experts).contains(&self.top_k) {
                let wanted = format!("a top_k of 1 to the {experts} experts of layer {layer}");
                return Some((wanted, self.top_k.to_string()));
            }
        }
        let factor = self.capacity_factor.filter(|f| !(f.is_finite() && *f > 0.0));
        factor.map(|factor| ("a capacity factor above 0".into(), factor.to_string()))
    }

    /// Bytes of a pass of n tokens.
    pub(super) fn pass_bytes(&self, n: u64) -> Option<u64> {
        n.checked_mul(self.token_bytes()?)?.checked_add(self.frame_bytes()?)
    }

    /// Bytes of `tokens` tokens in `passes` passes.
    pub(super) fn body_bytes(&self, tokens: u64, passes: u64) -> Option<u64> {
        tokens.checked_mul(self.token_bytes()?)?.checked_add(passes.checked_mul(self.frame_bytes()?)?)
    }

    fn token_bytes(&self) -> Option<u64> {
        (self.layers.len() as u64).checked_mul(8)?.checked_mul(self.top_k as u64)?.checked_add(4)
    }

    fn frame_bytes(&self) -> Option<u64> {
        (self.layers.len() as u64).checked_mul(4)?.checked_add(12)
    }
}

/// The fixed part of a file with all hashes, from what is behind it.
pub(super) fn fixed_part(text: &[u8], tokens: u64, passes: u64, last: u64) -> [u8; FIXED] {
    let mut fixed = [0; FIXED];
    fixed[..8].copy_from_slice(MAGIC);
    fixed[8..12].copy_from_slice(&VERSION.to_le_bytes());
    // A header of 4 GiB is never written.
    fixed[12..16].copy_from_slice(&(text.len() as u32).to_le_bytes());
    fixed[16..24].copy_from_slice(&tokens.to_le_bytes());
    fixed[24..32].copy_from_slice(&passes.to_le_bytes());
    fixed[32..40].copy_from_slice(&last.to_le_bytes());
    let hash = head_hash(&fixed[..40], text);
    fixed[40..].copy_from_slice(&hash.to_le_bytes());
    fixed
}

pub(super) fn head_hash(fixed: &[u8], text: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(fixed);
    hash.update(text);
    hash.digest()
}

/// What the hash of the first pass is seeded with.
pub(super) fn seed(text: &[u8]) -> u64 {
    xxh3_64(text)
}
