//! What can be wrong with a configuration: each error names the key, what was wanted and what was found.

use std::{io, path::PathBuf};

use super::Family;
use crate::health::AlarmError;

/// A key no configuration has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownKey {
    /// The key, with its section.
    pub key: String,
    /// The nearest keys there are, best first.
    pub nearest: Vec<String>,
}

/// Two values that do not go together, or one that is out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// Alarms that cannot be.
    #[error("train.alarm: {why}")]
    Alarm {
        /// Why not.
        why: AlarmError,
    },
    /// A value out of its range.
    #[error("{key}: wanted {wanted}, found {found}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// The range.
        wanted: String,
        /// The value.
        found: String,
    },
    /// A value that must divide another does not.
    #[error("{key}: wanted a multiple of {by_key} = {by}, found {value}")]
    NotDivisible {
        /// The key of the value that is divided.
        key: &'static str,
        /// The value.
        value: usize,
        /// The key of the divisor.
        by_key: &'static str,
        /// The divisor.
        by: usize,
    },
    /// The list of experts has the wrong length.
    #[error(
        "model.experts: wanted 1 entry or {wanted} (model.layers = {layers} / model.expert_interval = {interval}), \
         found {found}"
    )]
    ExpertList {
        /// MoE layers.
        wanted: usize,
        /// Entries.
        found: usize,
        /// All layers.
        layers: usize,
        /// Layers to an MoE layer.
        interval: usize,
    },
    /// More experts for a token than a layer has.
    #[error("model.top_k: wanted at most the {experts} experts of layer {layer}, found {top_k}")]
    TopK {
        /// The first such layer, counted from 1.
        layer: usize,
        /// Its experts.
        experts: usize,
        /// Experts for a token.
        top_k: usize,
    },
    /// A router for another number of choices.
    #[error("model.top_k: router {router} wants {wanted}, found {found}")]
    RouterTopK {
        /// The router.
        router: Family,
        /// The only number it takes.
        wanted: usize,
        /// `top_k`.
        found: usize,
    },
    /// Gates that are 1 whatever the router says.
    #[error(
        "model.top_k: wanted at least 2, as gates that are normalised (model.router.normalise) are always 1 with one \
         choice and the router would learn nothing from the loss, found 1"
    )]
    ConstantGate,
    /// Groups that do not fit the experts of a layer.
    #[error(
        "model.router.groups: wanted {wanted} for layer {layer} with {experts} experts, found {groups} (keep {keep})"
    )]
    Groups {
        /// The first such layer, counted from 1.
        layer: usize,
        /// Its experts.
        experts: usize,
        /// The groups.
        groups: usize,
        /// Those a token may use.
        keep: usize,
        /// What would fit.
        wanted: String,
    },
    /// Experts that choose tokens, without a number of tokens to choose.
    #[error("model.capacity_factor: wanted the mean number of experts of a token, as experts choose, found none")]
    ExpertChoiceCapacity,
    /// A length given in steps and in tokens.
    #[error("{steps} and {tokens}: wanted one of the two, found both")]
    BothForms {
        /// The key in steps.
        steps: &'static str,
        /// The key in tokens.
        tokens: &'static str,
    },
    /// No length of the run.
    #[error("train.steps or train.tokens: wanted one of the two, found neither")]
    NoLength,
    /// The learning rate would come down before it is up.
    #[error("wanted the decay of the learning rate to end after its warm-up, found {decay} tokens and {warmup} tokens")]
    DecayBeforeWarmup {
        /// End of the warm-up, in tokens.
        warmup: u64,
        /// End of the decay, in tokens.
        decay: u64,
    },
    /// More parameters than can be counted in bytes.
    #[error("wanted at most {limit} parameters, found {found}")]
    TooLarge {
        /// The most there may be.
        limit: u128,
        /// Those of this model.
        found: u128,
    },
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file that cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A text longer than any configuration is: to parse one takes many times its length.
    #[error("{origin}: wanted a configuration of at most {most} bytes, found {found}")]
    TooLong {
        /// Where the text came from.
        origin: String,
        /// Bytes a configuration may have.
        most: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A text of more parts than any configuration has: to parse one takes many times its length.
    #[error(
        "{origin}: wanted at most {most} parts (a name, number, sign, blank or end of a line is one, a dot or an opening \
         bracket {table}), found {found}"
    )]
    TooManyParts {
        /// Where the text came from.
        origin: String,
        /// Parts a configuration may have.
        most: usize,
        /// What a dot or an opening bracket counts as.
        table: usize,
        /// Parts it has.
        found: usize,
    },
    /// Not TOML, or a value of the wrong kind, with its line.
    #[error("{origin}: {source}")]
    Toml {
        /// Where the text came from.
        origin: String,
        /// Line, column and what was wanted.
        source: Box<toml::de::Error>,
    },
    /// A value that TOML cannot hold.
    #[error("cannot write the configuration as TOML: {source}")]
    Write {
        /// Which value.
        source: Box<toml::ser::Error>,
    },
    /// Keys no configuration has.
    #[error("{origin}: unknown {}", list_unknown(keys))]
    UnknownKeys {
        /// Where they came from.
        origin: String,
        /// The first of them.
        keys: Vec<UnknownKey>,
    },
    /// A preset that does not exist.
    #[error("unknown preset `{name}`{}; there are {}", did_you_mean(nearest), known.join(", "))]
    UnknownPreset {
        /// The name.
        name: String,
        /// The nearest names, best first.
        nearest: Vec<String>,
        /// All names.
        known: Vec<&'static str>,
    },
    /// A change that is not `key=value`.
    #[error("wanted key=value, as train.steps=100, found `{found}`")]
    OverrideForm {
        /// The text.
        found: String,
    },
    /// A change to a value its key does not take.
    #[error("cannot set {key} to `{value}`: {}", why.message())]
    OverrideValue {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What was wanted. Not a source: the message has it without the line of a file that nobody wrote.
        why: Box<toml::de::Error>,
    },
    /// A number that no key takes.
    #[error("cannot set {key} to `{value}`: wanted a number of at most {}", i64::MAX)]
    OverrideTooLarge {
        /// The key.
        key: String,
        /// The number.
        value: String,
    },
    /// Values that do not go together. All of them at once.
    #[error("invalid configuration: {}", list(violations))]
    Invalid {
        /// Every violation.
        violations: Vec<Violation>,
    },
}

fn list(violations: &[Violation]) -> String {
    violations.iter().map(Violation::to_string).collect::<Vec<_>>().join("; ")
}

fn did_you_mean(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!(" (nearest: {})", nearest.join(", ")) }
}

fn list_unknown(keys: &[UnknownKey]) -> String {
    keys.iter().map(|k| format!("key `{}`{}", k.key, did_you_mean(&k.nearest))).collect::<Vec<_>>().join(", ")
}
