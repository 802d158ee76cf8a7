//! Alarms: limits for the health of routers, and who has left them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::moe_layers;
use crate::config::{ModelConfig, Side, nearest};
use crate::metrics::{AlarmKind, AlarmRecord, LayerLoad};

/// Successive steps within its limit after which a value counts as well again. A value that wanders about its limit so gives one
/// alarm, not hundreds.
const CALM: u32 = 100;

/// The limits. A limit that is absent is not watched.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Alarms {
    /// Steps without a token after which an expert is dead, from 1.
    pub dead_experts: Option<u32>,
    /// The largest fraction of choices that may be dropped in a step.
    pub drop: Option<f64>,
    /// The least mean entropy of a router, nats per token.
    pub entropy: Option<f64>,
    /// The least and the greatest mean coefficient of the network beside the experts.
    pub coefficient: Option<[f64; 2]>,
    /// The greatest scale of the logits, see [`LayerLoad::logit_scale`].
    pub logit_scale: Option<f64>,
}

/// The keys of alarms, and what their values are.
const KEYS: [(&str, &str); 5] = [
    ("dead-experts", "a number of steps without a token, from 1, as dead-experts=100"),
    ("drop", "a fraction of at least 0 and below 1, as drop=0.3"),
    ("entropy", "a number of nats above 0, as entropy=0.1"),
    ("coefficient", "two numbers from 0 to 1, the least and the greatest, as coefficient=0.05..0.95"),
    ("logit-scale", "a number above 0, as logit-scale=20"),
];

/// Why there is no such alarm.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AlarmError {
    /// Not `key=value`.
    #[error("wanted key=value, as dead-experts=100, found `{found}`")]
    Form {
        /// The text.
        found: String,
    },
    /// A key that no alarm has.
    #[error(
        "unknown key `{key}`{}; there are {}",
        if nearest.is_empty() { String::new() } else { format!(" (nearest: {})", nearest.join(", ")) },
        KEYS.map(|(key, _)| key).join(", ")
    )]
    UnknownKey {
        /// The key.
        key: String,
        /// The nearest keys, best first.
        nearest: Vec<String>,
    },
    /// A value that its key does not take.
    #[error("wanted for {key} {wanted}, found `{found}`")]
    Value {
        /// The key.
        key: &'static str,
        /// What it takes.
        wanted: &'static str,
        /// The value.
        found: String,
    },
    /// A key that is given twice.
    #[error("wanted {key} once, found it twice")]
    Twice {
        /// The key.
        key: &'static str,
    },
    /// An alarm that this model can never give.
    #[error("{key}: this model never gives it: {why}")]
    Never {
        /// The key.
        key: &'static str,
        /// What the model does not have.
        why: &'static str,
    },
}

impl Alarms {
    /// Reads a list `key=value,key=value`.
    ///
    /// # Errors
    /// [`AlarmError`], all but `Never`.
    pub fn parse(text: &str) -> Result<Alarms, AlarmError> {
        let mut alarms = Alarms::default();
        let mut seen: Vec<&str> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let Some((name, value)) = part.split_once('=') else {
                return Err(AlarmError::Form { found: part.into() });
            };
            let (name, value) = (name.trim(), value.trim());
            let Some(&(key, wanted)) = KEYS.iter().find(|(key, _)| *key == name) else {
                let nearest = nearest(name, KEYS.iter().map(|(key, _)| *key));
                return Err(AlarmError::UnknownKey { key: name.into(), nearest });
            };
            if seen.contains(&key) {
                return Err(AlarmError::Twice { key });
            }
            seen.push(key);
            let number = |text: &str| text.trim().parse::<f64>().ok().filter(|n| n.is_finite());
            let above = || number(value).filter(|n| *n > 0.0);
            let taken = match key {
                "dead-experts" => {
                    alarms.dead_experts = value.parse().ok().filter(|&n| n >= 1 && n <= i32::MAX as u32);
                    alarms.dead_experts.is_some()
                }
                "drop" => {
                    alarms.drop = number(value).filter(|n| (0.0..1.0).contains(n));
                    alarms.drop.is_some()
                }
                "entropy" => {
                    alarms.entropy = above();
                    alarms.entropy.is_some()
                }
                "coefficient" => {
                    let bounds = value.split_once("..").and_then(|(low, high)| Some([number(low)?, number(high)?]));
                    alarms.coefficient = bounds.filter(|[low, high]| 0.0 <= *low && low < high && *high <= 1.0);
                    alarms.coefficient.is_some()
                }
                _logit_scale => {
                    alarms.logit_scale = above();
                    alarms.logit_scale.is_some()
                }
            };
            if !taken {
                return Err(AlarmError::Value { key, wanted, found: value.into() });
            }
        }
        Ok(alarms)
    }

    /// The alarms can be given by this model.
    ///
    /// # Errors
    /// [`AlarmError::Never`].
    pub fn check(&self, config: &ModelConfig) -> Result<(), AlarmError> {
        let never = |key, why| Err(AlarmError::Never { key, why });
        if moe_layers(config).is_empty() {
            let set = [
                self.dead_experts.is_some(),
                self.drop.is_some(),
                self.entropy.is_some(),
                self.coefficient.is_some(),
                self.logit_scale.is_some(),
            ];
            return match KEYS.iter().zip(set).find(|(_, set)| *set) {
                Some(((key, _), _)) => never(key, "it has no MoE layer"),
                None => Ok(()),
            };
        }
        if self.drop.is_some() && config.capacity_factor(true).is_none() {
            return never("drop", "it is dropless (model.capacity_factor is absent)");
        }
        match config.routing().side {
            Side::None | Side::Constant if self.coefficient.is_some() => {
                never("coefficient", "its routers learn no coefficient (model.mlp = \"residual\" has one)")
            }
            Side::None | Side::Constant | Side::Sigmoid | Side::Softmax => Ok(()),
        }
    }

    /// Whether nothing is watched.
    pub fn is_empty(&self) -> bool {
        *self == Alarms::default()
    }

    /// The limit that a layer's value has passed, for each kind that is watched and is one value a layer.
    fn of_layer(&self, kind: AlarmKind, layer: &LayerLoad) -> Option<(f32, Option<f64>)> {
        // A value that is no number has left every limit. Compared is what the device computes in.
        let above = |value: f32, limit: f64| (value.is_nan() || value > limit as f32).then_some(limit);
        let below = |value: f32, limit: f64| (value.is_nan() || value < limit as f32).then_some(limit);
        match kind {
            AlarmKind::DeadExperts => None,
            AlarmKind::Drop => self.drop.map(|limit| (layer.dropped, above(layer.dropped, limit))),
            AlarmKind::Entropy => layer.entropy.zip(self.entropy).map(|(value, limit)| (value, below(value, limit))),
            AlarmKind::Coefficient => {
                let both = layer.coefficient.zip(self.coefficient);
                both.map(|(value, [low, high])| (value, below(value, low).or(above(value, high))))
            }
            AlarmKind::LogitScale => {
                layer.logit_scale.zip(self.logit_scale).map(|(value, limit)| (value, above(value, limit)))
            }
        }
    }
}

/// Who has left the limits and was told of. It is part of a checkpoint, so that a resumed run tells nothing twice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    alarms: Alarms,
    told: Vec<Told>,
}

/// A value that was told of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Told {
    alarm: AlarmKind,
    layer: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert: Option<usize>,
    /// Successive steps within the limit since then.
    calm: u32,
}

impl Watch {
    /// The limits that are watched.
    pub fn alarms(&self) -> &Alarms {
        &self.alarms
    }

    /// Goes on with other limits: what was told by a limit that has changed is forgotten.
    pub fn set(&mut self, alarms: Alarms) {
        let old = &self.alarms;
        let same = |kind| match kind {
            AlarmKind::DeadExperts => old.dead_experts == alarms.dead_experts,
            AlarmKind::Drop => old.drop == alarms.drop,
            AlarmKind::Entropy => old.entropy == alarms.entropy,
            AlarmKind::Coefficient => old.coefficient == alarms.coefficient,
            AlarmKind::LogitScale => old.logit_scale == alarms.logit_scale,
        };
        self.told.retain(|told| same(told.alarm));
        self.alarms = alarms;
    }

    /// Looks at the health of all layers after a step; gives what has left its limit and was not told of before.
    pub fn look(&mut self, step: u64, layers: &[LayerLoad]) -> Vec<AlarmRecord> {
        let mut records = Vec::new();
        for load in layers {
            let layer = load.layer;
            if let Some(limit) = self.alarms.dead_experts {
                for (expert, &idle) in load.idle.iter().enumerate() {
                    let dead = idle >= limit;
                    // One token ends it at once: the next alarm needs as many steps again.
                    if self.is_new(AlarmKind::DeadExperts, layer, Some(expert), dead, 1) {
                        let (value, limit) = (f64::from(idle), f64::from(limit));
                        let alarm = AlarmKind::DeadExperts;
                        records.push(AlarmRecord { step, alarm, layer, expert: Some(expert), value, limit });
                    }
                }
            }
            for alarm in [AlarmKind::Drop, AlarmKind::Entropy, AlarmKind::Coefficient, AlarmKind::LogitScale] {
                let Some((value, passed)) = self.alarms.of_layer(alarm, load) else { continue };
                if self.is_new(alarm, layer, None, passed.is_some(), CALM) {
                    let (value, limit) = (f64::from(value), passed.unwrap_or(f64::NAN));
                    records.push(AlarmRecord { step, alarm, layer, expert: None, value, limit });
                }
            }
        }
        records
    }

    /// Whether a value that is `out` of its limit is to be told of; `calm` steps within it make it new again.
    fn is_new(&mut self, alarm: AlarmKind, layer: usize, expert: Option<usize>, out: bool, calm: u32) -> bool {
        let same = |told: &Told| (told.alarm, told.layer, told.expert) == (alarm, layer, expert);
        match (self.told.iter().position(same), out) {
            (None, false) => false,
            (None, true) => {
                self.told.push(Told { alarm, layer, expert, calm: 0 });
                true
            }
            (Some(at), true) => {
                self.told[at].calm = 0;
                false
            }
            (Some(at), false) => {
                self.told[at].calm += 1;
                if self.told[at].calm >= calm {
                    self.told.remove(at);
                }
                false
            }
        }
    }
}

impl fmt::Display for AlarmRecord {
    /// One line for people: layer, expert, step, value and limit.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AlarmRecord { step, alarm, layer, expert, value, limit } = *self;
        write!(f, "step {step}: layer {layer}")?;
        if let Some(expert) = expert {
            write!(f, ", expert {expert}")?;
        }
        match alarm {
            AlarmKind::DeadExperts => write!(f, ": no token for {value} steps (limit {limit})"),
            AlarmKind::Drop => {
                write!(f, ": {:.1} % of the choices were dropped (limit {:.1} %)", 100.0 * value, 100.0 * limit)
            }
            AlarmKind::Entropy => {
                write!(f, ": the router's entropy is {value:.4} nats per token (limit: at least {limit:.4})")
            }
            AlarmKind::Coefficient => {
                let side = if value < limit { "at least" } else { "at most" };
                write!(f, ": the mean coefficient beside the experts is {value:.4} (limit: {side} {limit:.4})")
            }
            AlarmKind::LogitScale => write!(f, ": the scale of the logits is {value:.3} (limit {limit:.3})"),
        }
    }
}

#[cfg(test)]
mod tests;
