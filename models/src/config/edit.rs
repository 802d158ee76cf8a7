//! Keys of the configuration by name: which there are, which is meant by a wrong one, and changing one.

use toml::{Table, Value};

use super::{Config, ConfigError, UnknownKey, limits};

/// Every key, and whether it can be absent.
pub(super) const KEYS: [(&str, bool); 73] = [
    ("model.name", false),
    ("model.vocab", false),
    ("model.layers", false),
    ("model.width", false),
    ("model.heads", false),
    ("model.kv_heads", true),
    ("model.ffn", true),
    ("model.sequence", false),
    ("model.experts", false),
    ("model.expert_interval", false),
    ("model.mlp", false),
    ("model.top_k", true),
    ("model.capacity_factor", true),
    ("model.eval_capacity_factor", true),
    ("model.min_capacity", false),
    ("model.renormalise", true),
    ("model.aux_coef", false),
    ("model.z_coef", false),
    ("model.activation", false),
    ("model.norm", false),
    ("model.norm_eps", false),
    ("model.init_std", false),
    ("model.identical_experts", false),
    ("model.tied_embeddings", false),
    ("model.dtype", false),
    ("model.router", true),
    ("model.router.preset", true),
    ("model.router.score", true),
    ("model.router.normalise", true),
    ("model.router.scale", true),
    ("model.router.apply_to", true),
    ("model.router.bias", true),
    ("model.router.selection_bias", true),
    ("model.router.bias_rate", true),
    ("model.router.groups", true),
    ("model.router.group_keep", true),
    ("model.router.group_score", true),
    ("model.router.jitter", true),
    ("model.router.noise", true),
    ("model.router.mixer_eps", true),
    ("model.router.order", true),
    ("model.router.capacity", true),
    ("model.router.balance", true),
    ("model.router.side", true),
    ("model.router.shared_ffn", true),
    ("model.router.hash_layers", true),
    ("model.router.expert_choice", true),
    ("model.router.allow_expert_choice_decoding", true),
    ("train.batch", false),
    ("train.accumulate", false),
    ("train.recompute", false),
    ("train.steps", true),
    ("train.tokens", true),
    ("train.learning_rate", false),
    ("train.min_learning_rate", false),
    ("train.warmup_steps", true),
    ("train.warmup_tokens", true),
    ("train.decay_steps", true),
    ("train.decay_tokens", true),
    ("train.schedule", false),
    ("train.betas", false),
    ("train.eps", false),
    ("train.weight_decay", false),
    ("train.moments", false),
    ("train.clip", false),
    ("train.seed", false),
    ("train.eval_every", false),
    ("train.eval_windows", false),
    ("train.checkpoint_every", false),
    ("train.keep_checkpoints", false),
    ("train.log_every", false),
    ("train.alarm", true),
    ("train.alarm_exit", true),
];

/// Lengths that have two forms, of which one excludes the other.
pub(super) const FORMS: [(&str, &str); 3] = [
    ("train.steps", "train.tokens"),
    ("train.warmup_steps", "train.warmup_tokens"),
    ("train.decay_steps", "train.decay_tokens"),
];

/// A longer name is no slip of the pen, and comparing it costs memory and time for each of its letters times each key's.
const LONGEST_NAME: usize = 64;

/// How alike two names are, from 0 to 1. A name that is a part of the other is taken as meant.
fn likeness(a: &str, b: &str) -> f64 {
    if a.len() > LONGEST_NAME || b.len() > LONGEST_NAME {
        return 0.0;
    }
    let part = a.len() >= 3 && b.len() >= 3 && (a.contains(b) || b.contains(a));
    strsim::normalized_damerau_levenshtein(a, b).max(if part { 0.75 } else { 0.0 })
}

/// At most three of the names that are like `wanted`, the most alike first. Names of sections are looked past where
/// `wanted` has none.
pub(crate) fn nearest<'a>(wanted: &str, known: impl Iterator<Item = &'a str>) -> Vec<String> {
    let lower = wanted.to_lowercase();
    let last = |name: &str| name.rsplit_once('.').map_or(name.to_string(), |(_, last)| last.to_string());
    let mut scored: Vec<(f64, &str)> =
        known.map(|name| (likeness(&lower, name).max(likeness(&last(&lower), &last(name)) - 0.01), name)).collect();
    scored.retain(|(score, _)| *score >= 0.5);
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, name)| name.to_string()).collect()
}

fn unknown(key: &str) -> UnknownKey {
    UnknownKey { key: key.to_string(), nearest: nearest(key, KEYS.iter().map(|(k, _)| *k)) }
}

/// Unknown keys of a text that are told; there may be hundreds.
const MOST_TOLD: usize = 16;

/// Names the keys that no configuration has, the first of them. What is no table is left to the reader of values, which
/// knows its line.
pub(super) fn check_keys(table: &Table, origin: &str) -> Result<(), ConfigError> {
    let mut keys = Vec::new();
    for (section, value) in table {
        match value.as_table() {
            Some(inner) if section == "model" || section == "train" => {
                let router = inner.get("router").and_then(Value::as_table);
                let router = router.into_iter().flat_map(Table::keys).map(|key| format!("{section}.router.{key}"));
                let full = inner.keys().map(|key| format!("{section}.{key}")).chain(router);
                let other = full.filter(|k| KEYS.iter().all(|(known, _)| known != k));
                keys.extend(other.take(MOST_TOLD).map(|k| unknown(&k)));
            }
            Some(_) => {
                let nearest = nearest(section, ["model", "train"].into_iter());
                keys.push(UnknownKey { key: section.clone(), nearest });
            }
            None if section == "model" || section == "train" => {}
            None => keys.push(unknown(section)),
        }
        if keys.len() >= MOST_TOLD {
            break;
        }
    }
    if keys.is_empty() { Ok(()) } else { Err(ConfigError::UnknownKeys { origin: origin.to_string(), keys }) }
}

/// A value as TOML, or as the bare text when it is none: `top2` needs no quotes on a command line.
fn parse(text: &str) -> Value {
    let table = format!("value = {text}").parse::<Table>().ok().filter(|t| t.len() == 1);
    table.and_then(|mut t| t.remove("value")).unwrap_or_else(|| Value::String(text.to_string()))
}

/// The value under a key of several parts.
fn at<'t>(table: &'t Table, key: &str) -> Option<&'t Value> {
    match key.split_once('.') {
        Some((part, rest)) => at(table.get(part)?.as_table()?, rest),
        None => table.get(key),
    }
}

/// The table under `part`, made if it is absent; a router that is the name of a preset becomes a table with it.
fn inner<'t>(table: &'t mut Table, part: &str) -> Option<&'t mut Table> {
    let value = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
    if let Value::String(preset) = value {
        *value = Value::Table([("preset".to_string(), Value::String(std::mem::take(preset)))].into_iter().collect());
    }
    value.as_table_mut()
}

impl Config {
    /// The settings of the model in which `found` differs, as people read them: `model.width: wanted 64, found 32`.
    ///
    /// # Errors
    /// `Write`, if a value cannot be written as TOML.
    pub fn model_difference(&self, found: &Config) -> Result<String, ConfigError> {
        let table = |config: &Config| {
            Table::try_from(&config.model).map_err(|source| ConfigError::Write { source: Box::new(source) })
        };
        let (wanted, found) = (table(self)?, table(found)?);
        let shown = |value: Option<&Value>| value.map_or("none".into(), ToString::to_string);
        let keys = KEYS.iter().filter_map(|(key, _)| key.strip_prefix("model."));
        let lines = keys.filter_map(|key| {
            let (wanted, found) = (at(&wanted, key), at(&found, key));
            (wanted != found).then(|| format!("model.{key}: wanted {}, found {}", shown(wanted), shown(found)))
        });
        Ok(lines.collect::<Vec<_>>().join("; "))
    }

    /// Changes one value: `train.steps=100`, `model.experts=[4,8]`, `model.router=mixtral`, `model.router.scale=2.5`.
    /// `none` makes a value absent that
    /// may be (`model.capacity_factor=none` is dropless). Giving a length in one form (steps or tokens) takes away the
    /// other. Call `validate` after the last change.
    ///
    /// # Errors
    /// `OverrideForm`; `UnknownKeys` with the nearest keys; `OverrideValue`; `OverrideTooLarge`; `TooLong`; `TooManyParts`. The configuration is then as it was.
    pub fn set(&mut self, assignment: &str) -> Result<(), ConfigError> {
        let Some((key, text)) = assignment.split_once('=') else {
            return Err(ConfigError::OverrideForm { found: assignment.to_string() });
        };
        let (key, text) = (key.trim(), text.trim());
        let known = KEYS.iter().find(|(known, _)| *known == key);
        let Some((&(_, optional), (section, name))) = known.zip(key.rsplit_once('.')) else {
            return Err(ConfigError::UnknownKeys { origin: assignment.to_string(), keys: vec![unknown(key)] });
        };
        limits::check(text, key)?;
        let mut table = Table::try_from(&*self).map_err(|source| ConfigError::Write { source: Box::new(source) })?;
        let change = |table: &mut Table, section: &str, name: &str, value: Option<Value>| {
            let mut within = Some(table);
            for part in section.split('.') {
                within = within.and_then(|table| inner(table, part));
            }
            if let Some(section) = within {
                match value {
                    Some(value) => drop(section.insert(name.to_string(), value)),
                    None => drop(section.remove(name)),
                }
            }
        };
        if optional && text == "none" {
            change(&mut table, section, name, None);
        } else {
            for (steps, tokens) in FORMS {
                let other = if key == steps { tokens } else { steps };
                if (key == steps || key == tokens)
                    && let Some((section, name)) = other.split_once('.')
                {
                    change(&mut table, section, name, None);
                }
            }
            change(&mut table, section, name, Some(parse(text)));
        }
        let source = match table.clone().try_into() {
            Ok(changed) => {
                *self = changed;
                return Ok(());
            }
            Err(source) => source,
        };
        // A name may look like a number.
        change(&mut table, section, name, Some(Value::String(text.to_string())));
        match table.try_into() {
            Ok(changed) => *self = changed,
            Err(_) => {
                let (key, value) = (key.to_string(), text.to_string());
                if value.bytes().all(|b| b.is_ascii_digit()) && value.parse::<i64>().is_err() && !value.is_empty() {
                    return Err(ConfigError::OverrideTooLarge { key, value });
                }
                return Err(ConfigError::OverrideValue { key, value, why: Box::new(source) });
            }
        }
        Ok(())
    }
}
