//! The configuration of a model and of its training run, as TOML text: read strictly, checked at once, counted.
//!
//! Sizes follow DeepSpeed-MoE (arXiv 2201.05596) and its released scripts; section numbers are those of that code's
//! specification: 2.2 which layers route, 2.5 the block and the optimizer, 3.1 the models.

mod count;
mod edit;
mod error;
mod families;
pub(crate) mod limits;
mod presets;
mod recompute;
mod router;
mod schedule;
#[cfg(test)]
mod tests;
mod validate;

use std::{fs, path::Path};

pub use moebius_ir::Moments;
use serde::{Deserialize, Serialize};

pub(crate) use self::edit::nearest;
pub(crate) use self::validate::{MOST_EXPERTS, MOST_LAYERS};
pub use self::{
    count::{Bytes, Flops, LayerCount, ParameterCount},
    error::{ConfigError, UnknownKey, Violation},
    families::Family,
    recompute::Recompute,
    router::{
        ApplyTo, BalanceOf, CapacityRule, GroupScore, Noise, Normalise, Order, RouterTable, Routing, Score, Side,
    },
    schedule::LearningRate,
};

/// A model and its training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Section `[model]`.
    pub model: ModelConfig,
    /// Section `[train]`.
    pub train: TrainConfig,
}

/// Section `[model]`: a GPT of pre-norm blocks with learned positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name of the model.
    pub name: String,
    /// Number of token kinds; 256 for bytes.
    pub vocab: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Width of a token between blocks.
    pub width: usize,
    /// Query heads; divide `width`.
    pub heads: usize,
    /// Key and value heads; divide `heads`. Absent: as many as `heads`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Inner width of a feed-forward network. Absent: 4 times `width`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ffn: Option<usize>,
    /// Longest sequence, in tokens.
    pub sequence: usize,
    /// Experts of each MoE layer, one number for all or one for each. At most 1 means a dense layer.
    #[serde(default = "default::experts")]
    pub experts: Vec<usize>,
    /// Layer n, counted from 1, is an MoE layer when n is a multiple of this.
    #[serde(default = "default::expert_interval")]
    pub expert_interval: usize,
    /// The feed-forward part of MoE layers.
    #[serde(default)]
    pub mlp: Mlp,
    /// Experts a token goes to. Absent: as many as in the router's preset, 1 without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Slots of an expert in training, as a multiple of its share of the tokens. Absent: dropless.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_factor: Option<f64>,
    /// The same in evaluation. Absent: as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_capacity_factor: Option<f64>,
    /// Least slots of an expert when there is a capacity.
    #[serde(default = "default::min_capacity")]
    pub min_capacity: usize,
    /// Whether a token's gates are made to sum to 1: two of the rules of `router.normalise`, which wins. Absent: as the
    /// router's preset says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renormalise: Option<Renormalise>,
    /// Coefficient of the load-balancing loss, summed over layers.
    #[serde(default = "default::aux_coef")]
    pub aux_coef: f64,
    /// Coefficient of the router z-loss, summed over layers.
    #[serde(default)]
    pub z_coef: f64,
    /// Nonlinearity of the feed-forward networks.
    #[serde(default)]
    pub activation: Activation,
    /// Normalisation.
    #[serde(default)]
    pub norm: Norm,
    /// Added to the variance in a normalisation.
    #[serde(default = "default::norm_eps")]
    pub norm_eps: f64,
    /// Standard deviation of the initial weights.
    #[serde(default = "default::init_std")]
    pub init_std: f64,
    /// Whether the experts of a layer and its residual network begin with the same weights, as in DeepSpeed.
    #[serde(default = "default::yes")]
    pub identical_experts: bool,
    /// Whether the output matrix is the token embedding.
    #[serde(default = "default::yes")]
    pub tied_embeddings: bool,
    /// Dtype of the matrix products. The parameters an optimizer keeps are f32 in any case.
    #[serde(default)]
    pub dtype: ComputeDtype,
    /// Section `[model.router]`, or the name of a preset for it: how experts are chosen and weighted. Absent: `top1` for
    /// `top_k` 1, `top2` for 2, else `topk`, as DeepSpeed does but without its noise.
    #[serde(
        default,
        deserialize_with = "router::read",
        serialize_with = "router::write",
        skip_serializing_if = "Option::is_none"
    )]
    pub router: Option<RouterTable>,
}

/// Section `[train]`. Lengths are in steps or in tokens: exactly one of the two for each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Sequences in a micro-batch: what the device computes at once.
    pub batch: usize,
    /// Micro-batches in a step. The gradient of a step is the mean of theirs.
    #[serde(default = "default::accumulate")]
    pub accumulate: usize,
    /// What the backward pass computes again instead of keeping it from the forward pass on: `false`, `true` (the inside of each
    /// block) or `"light"` (what costs little).
    #[serde(default)]
    pub recompute: Recompute,
    /// Length of the run in steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Length of the run in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Learning rate after the decay.
    #[serde(default)]
    pub min_learning_rate: f64,
    /// Steps in which the learning rate rises from 0. With neither form it begins at its highest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// The same in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_tokens: Option<u64>,
    /// Step at which the learning rate has come down. With neither form: the end of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// The same in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_tokens: Option<u64>,
    /// How the learning rate comes down.
    #[serde(default)]
    pub schedule: Schedule,
    /// Decay rates of AdamW's moments.
    #[serde(default = "default::betas")]
    pub betas: [f64; 2],
    /// Added to AdamW's denominator.
    #[serde(default = "default::eps")]
    pub eps: f64,
    /// Decoupled weight decay, of matrices only.
    #[serde(default = "default::weight_decay")]
    pub weight_decay: f64,
    /// How AdamW's moments are kept between steps: `f32`, or rounded stochastically in `bf16` or `8bit`.
    #[serde(default)]
    pub moments: Moments,
    /// Largest norm of all gradients together; 0 for no clipping.
    #[serde(default = "default::clip")]
    pub clip: f64,
    /// Seed of everything random, at most 2^63 - 1 (TOML's largest integer).
    #[serde(default = "default::seed")]
    pub seed: u64,
    /// Steps between evaluations; 0 for none.
    #[serde(default = "default::every")]
    pub eval_every: u64,
    /// Sequences of an evaluation; 0 for all of the validation data.
    #[serde(default = "default::eval_windows")]
    pub eval_windows: usize,
    /// Steps between checkpoints; 0 for one at the end only.
    #[serde(default = "default::every")]
    pub checkpoint_every: u64,
    /// Checkpoints kept; 0 for all.
    #[serde(default = "default::keep_checkpoints")]
    pub keep_checkpoints: usize,
    /// Steps after which the host looks at what the device did, and at the health of the routers. Every step has its line of metrics.
    #[serde(default = "default::log_every")]
    pub log_every: u64,
    /// Limits for the health of the routers, as [`crate::health::Alarms::parse`] reads them: `dead-experts=100,drop=0.3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// Whether an alarm ends the run. Absent is no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm_exit: Option<bool>,
}

/// The feed-forward part of an MoE layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mlp {
    /// The routed experts alone.
    #[default]
    Standard,
    /// Routed experts and a dense network, weighted by two coefficients of each token (PR-MoE).
    Residual,
}

/// Whether a token's gates are made to sum to 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Renormalise {
    /// Gates are the router's probabilities.
    Never,
    /// Gates of the choices that were not dropped sum to 1.
    AfterDropping,
}

/// Nonlinearity of the feed-forward networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU in its tanh form.
    #[default]
    GeluTanh,
}

/// Normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Layer norm with scale and bias.
    #[default]
    Layer,
    /// RMS norm with scale.
    Rms,
}

/// Dtype of the matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// 32-bit float.
    #[default]
    F32,
    /// bfloat16 with f32 accumulation.
    Bf16,
}

impl ComputeDtype {
    /// Bytes of one number.
    pub const fn bytes(self) -> usize {
        match self {
            ComputeDtype::F32 => 4,
            ComputeDtype::Bf16 => 2,
        }
    }
}

/// How the learning rate comes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine from the highest to the lowest, constant after.
    #[default]
    Cosine,
    /// It stays at the highest.
    Constant,
}

/// Defaults: those of DeepSpeed and Megatron-DeepSpeed where they have one (2.3, 2.5).
mod default {
    pub(super) fn experts() -> Vec<usize> {
        vec![1]
    }
    pub(super) fn expert_interval() -> usize {
        2
    }
    pub(super) fn min_capacity() -> usize {
        4
    }
    pub(super) fn aux_coef() -> f64 {
        0.01
    }
    pub(super) fn norm_eps() -> f64 {
        1e-5
    }
    pub(super) fn init_std() -> f64 {
        0.02
    }
    pub(super) fn yes() -> bool {
        true
    }
    pub(super) fn betas() -> [f64; 2] {
        [0.9, 0.95]
    }
    pub(super) fn eps() -> f64 {
        1e-8
    }
    pub(super) fn weight_decay() -> f64 {
        0.1
    }
    pub(super) fn clip() -> f64 {
        1.0
    }
    pub(super) fn seed() -> u64 {
        1234
    }
    pub(super) fn every() -> u64 {
        1000
    }
    pub(super) fn eval_windows() -> usize {
        64
    }
    pub(super) fn keep_checkpoints() -> usize {
        3
    }
    pub(super) fn log_every() -> u64 {
        10
    }
    pub(super) fn accumulate() -> usize {
        1
    }
}

impl ModelConfig {
    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Inner width of a feed-forward network.
    pub fn ffn(&self) -> usize {
        self.ffn.unwrap_or(self.width.saturating_mul(4))
    }

    /// Width of a head. The configuration must be valid.
    pub fn head_width(&self) -> usize {
        self.width / self.heads
    }

    /// Capacity factor in training (`true`) or evaluation (`false`); `None` for dropless.
    pub fn capacity_factor(&self, training: bool) -> Option<f64> {
        if training { self.capacity_factor } else { self.eval_capacity_factor.or(self.capacity_factor) }
    }

    /// Experts of each layer, 0 for a dense one, after 2.2: layer n, counted from 1, is an MoE layer when n is a multiple
    /// of `expert_interval`; the list has one entry for all or one for each, and an entry of at most 1 means dense. The
    /// configuration must be valid; entries missing from a list that is too short count as dense.
    pub fn experts_per_layer(&self) -> Vec<usize> {
        let experts = |n: usize| {
            if self.expert_interval == 0 || !n.is_multiple_of(self.expert_interval) {
                return 0;
            }
            let entry = if self.experts.len() == 1 { 0 } else { n / self.expert_interval - 1 };
            self.experts.get(entry).copied().filter(|&e| e > 1).unwrap_or(0)
        };
        (1..=self.layers).map(experts).collect()
    }
}

impl Config {
    /// Reads TOML text. `origin` names it in errors, such as a file's path. What is wrong between values is told by
    /// `validate`, so that a configuration can be changed first.
    ///
    /// # Errors
    /// `TooLong` above 64 KiB, `TooManyParts`, `Toml` with line and column, `UnknownKeys` with the nearest known ones.
    pub fn from_toml(text: &str, origin: &str) -> Result<Config, ConfigError> {
        limits::check(text, origin)?;
        let wrong = |source| ConfigError::Toml { origin: origin.to_string(), source: Box::new(source) };
        edit::check_keys(&text.parse().map_err(wrong)?, origin)?;
        toml::from_str(text).map_err(wrong)
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// `Read` naming the file; else as `from_toml`.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Config, ConfigError> {
        let path = path.as_ref();
        let read = |source| ConfigError::Read { path: path.to_path_buf(), source };
        let origin = path.display().to_string();
        limits::check_bytes(fs::metadata(path).map_err(read)?.len(), &origin)?;
        let text = fs::read_to_string(path).map_err(read)?;
        Self::from_toml(&text, &origin)
    }

    /// The preset of that name.
    ///
    /// # Errors
    /// `UnknownPreset` with the nearest names and all names.
    pub fn preset(name: &str) -> Result<Config, ConfigError> {
        match presets::PRESETS.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::from_toml(text, name),
            None => Err(ConfigError::UnknownPreset {
                name: name.to_string(),
                nearest: edit::nearest(name, Self::presets()),
                known: Self::presets().collect(),
            }),
        }
    }

    /// Names of all presets.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        presets::PRESETS.iter().map(|(name, _)| *name)
    }

    /// The configuration as TOML text, which `from_toml` reads back to an equal one.
    ///
    /// # Errors
    /// `Write` for a number TOML cannot hold; a valid configuration has none.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|source| ConfigError::Write { source: Box::new(source) })
    }

    /// Hash of all values, the same on every machine and in every run: 32 hexadecimal digits of xxh3-128.
    pub fn hash(&self) -> String {
        hash(self)
    }

    /// Hash of the values of section `[model]` alone: equal hashes mean checkpoints of the same model.
    pub fn model_hash(&self) -> String {
        hash(&self.model)
    }

    /// Tokens of a step, over all its micro-batches.
    pub fn tokens_per_step(&self) -> u64 {
        let sequences = (self.train.batch as u64).saturating_mul(self.train.accumulate as u64);
        sequences.saturating_mul(self.model.sequence as u64)
    }

    /// Steps of the run; a length in tokens is rounded up to whole steps. 0 when no length is given.
    pub fn total_steps(&self) -> u64 {
        let by_tokens = self.train.tokens.map(|t| t.div_ceil(self.tokens_per_step().max(1)));
        self.train.steps.or(by_tokens).unwrap_or(0)
    }
}

/// A hash of the JSON form of a value.
pub(crate) fn hash<T: Serialize>(value: &T) -> String {
    // Structs of numbers, strings and lists: JSON has a form for all of them.
    let json = serde_json::to_string(value).expect("a configuration has a JSON form");
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(json.as_bytes()))
}
