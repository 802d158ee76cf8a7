//! Checks what the values of a configuration mean together. Everything wrong is told at once.

use super::{Config, ConfigError, GroupScore, ModelConfig, Normalise, Schedule, Score, Violation, edit::FORMS};
use crate::health::Alarms;

/// Bounds that keep every count far inside 64 bits; no machine holds a model beyond them.
pub(crate) const MOST_LAYERS: usize = 1 << 12;
const MOST_WIDTH: usize = 1 << 20;
const MOST_VOCAB: usize = 1 << 24;
pub(crate) const MOST_EXPERTS: usize = 1 << 16;
/// Entries of a list of experts: with it, a configuration has fewer parts than its text may have.
const MOST_ENTRIES: usize = 128;
const MOST_BATCH: usize = 1 << 24;
/// 16 bytes for each parameter (weight, gradient, two moments) still fit 63 bits.
const MOST_PARAMETERS: u128 = 1 << 58;
/// TOML's integers end here.
const MOST_INTEGER: u64 = i64::MAX as u64;

struct Check(Vec<Violation>);

impl Check {
    fn that(&mut self, holds: bool, key: &'static str, wanted: impl ToString, found: impl ToString) {
        if !holds {
            self.0.push(Violation::OutOfRange { key, wanted: wanted.to_string(), found: found.to_string() });
        }
    }

    fn size(&mut self, key: &'static str, value: usize, most: usize) {
        self.that((1..=most).contains(&value), key, format!("1 to {most}"), value);
    }

    fn positive(&mut self, key: &'static str, value: f64) {
        self.that(value > 0.0 && value.is_finite(), key, "a finite number above 0", value);
    }

    fn not_negative(&mut self, key: &'static str, value: f64) {
        self.that(value >= 0.0 && value.is_finite(), key, "a finite number of at least 0", value);
    }

    fn divides(&mut self, key: &'static str, value: usize, by_key: &'static str, by: usize) {
        if by != 0 && !value.is_multiple_of(by) {
            self.0.push(Violation::NotDivisible { key, value, by_key, by });
        }
    }
}

impl Config {
    /// Checks the configuration.
    ///
    /// # Errors
    /// `Invalid` with every violation.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut check = Check(Vec::new());
        self.check_model(&mut check);
        self.check_train(&mut check);
        if check.0.is_empty() {
            let found = self.count();
            if found > MOST_PARAMETERS {
                check.0.push(Violation::TooLarge { limit: MOST_PARAMETERS, found });
            }
        }
        if check.0.is_empty() { Ok(()) } else { Err(ConfigError::Invalid { violations: check.0 }) }
    }

    fn check_model(&self, check: &mut Check) {
        let m = &self.model;
        check.that(!m.name.is_empty(), "model.name", "a name", "an empty one");
        check.size("model.vocab", m.vocab, MOST_VOCAB);
        check.size("model.layers", m.layers, MOST_LAYERS);
        check.size("model.width", m.width, MOST_WIDTH);
        check.size("model.heads", m.heads, MOST_WIDTH);
        check.size("model.kv_heads", m.kv_heads(), MOST_WIDTH);
        check.size("model.ffn", m.ffn(), 4 * MOST_WIDTH);
        check.size("model.sequence", m.sequence, MOST_VOCAB);
        check.size("model.top_k", m.top_k(), MOST_EXPERTS);
        check.size("model.min_capacity", m.min_capacity, MOST_VOCAB);
        check.size("model.expert_interval", m.expert_interval, usize::MAX);
        check.divides("model.width", m.width, "model.heads", m.heads);
        check.divides("model.heads", m.heads, "model.kv_heads", m.kv_heads());
        if let Some(&most) = m.experts.iter().max() {
            check.that(most <= MOST_EXPERTS, "model.experts", format!("entries of at most {MOST_EXPERTS}"), most);
        }
        let entries = m.experts.len();
        check.that(entries <= MOST_ENTRIES, "model.experts", format!("at most {MOST_ENTRIES} entries"), entries);
        if m.expert_interval != 0 {
            let (layers, interval, found) = (m.layers, m.expert_interval, m.experts.len());
            let wanted = layers / interval;
            if found != 1 && found != wanted {
                check.0.push(Violation::ExpertList { wanted, found, layers, interval });
            } else if layers <= MOST_LAYERS {
                let narrow = m.experts_per_layer().into_iter().enumerate().find(|&(_, e)| e != 0 && e < m.top_k());
                if let Some((i, experts)) = narrow {
                    check.0.push(Violation::TopK { layer: i + 1, experts, top_k: m.top_k() });
                }
            }
        }
        check_router(m, check);
        for (key, value) in
            [("model.capacity_factor", m.capacity_factor), ("model.eval_capacity_factor", m.eval_capacity_factor)]
        {
            if let Some(value) = value {
                check.positive(key, value);
            }
        }
        check.not_negative("model.aux_coef", m.aux_coef);
        check.not_negative("model.z_coef", m.z_coef);
        check.positive("model.norm_eps", m.norm_eps);
        check.positive("model.init_std", m.init_std);
    }

    fn check_train(&self, check: &mut Check) {
        let t = &self.train;
        check.size("train.batch", t.batch, MOST_BATCH);
        check.size("train.accumulate", t.accumulate, MOST_BATCH);
        for (key, value) in [
            ("train.steps", t.steps),
            ("train.tokens", t.tokens),
            ("train.decay_steps", t.decay_steps),
            ("train.decay_tokens", t.decay_tokens),
            ("train.log_every", Some(t.log_every)),
        ] {
            if let Some(value) = value {
                check.that((1..=MOST_INTEGER).contains(&value), key, "1 to 2^63 - 1", value);
            }
        }
        for (key, value) in [
            ("train.warmup_steps", t.warmup_steps.unwrap_or(0)),
            ("train.warmup_tokens", t.warmup_tokens.unwrap_or(0)),
            ("train.seed", t.seed),
            ("train.eval_every", t.eval_every),
            ("train.checkpoint_every", t.checkpoint_every),
        ] {
            check.that(value <= MOST_INTEGER, key, "0 to 2^63 - 1", value);
        }
        let given = [(t.steps, t.tokens), (t.warmup_steps, t.warmup_tokens), (t.decay_steps, t.decay_tokens)];
        for ((steps, tokens), given) in FORMS.into_iter().zip(given) {
            if let (Some(_), Some(_)) = given {
                check.0.push(Violation::BothForms { steps, tokens });
            }
        }
        if t.steps.is_none() && t.tokens.is_none() {
            check.0.push(Violation::NoLength);
        } else {
            let rate = self.learning_rate();
            // A run that ends while it warms up is none of the schedule's business, a stated end of the decay is.
            let stated = t.decay_steps.is_some() || t.decay_tokens.is_some();
            if stated && t.schedule == Schedule::Cosine && rate.decay <= rate.warmup {
                check.0.push(Violation::DecayBeforeWarmup { warmup: rate.warmup, decay: rate.decay });
            }
        }
        check.positive("train.learning_rate", t.learning_rate);
        check.not_negative("train.min_learning_rate", t.min_learning_rate);
        check.that(
            t.min_learning_rate.is_nan() || t.learning_rate.is_nan() || t.min_learning_rate <= t.learning_rate,
            "train.min_learning_rate",
            format!("at most train.learning_rate = {}", t.learning_rate),
            t.min_learning_rate,
        );
        for beta in t.betas {
            check.that((0.0..1.0).contains(&beta), "train.betas", "numbers of at least 0 and below 1", beta);
        }
        check.positive("train.eps", t.eps);
        check.not_negative("train.weight_decay", t.weight_decay);
        check.not_negative("train.clip", t.clip);
        if let Some(text) = &t.alarm
            && let Err(why) = Alarms::parse(text).and_then(|alarms| alarms.check(&self.model))
        {
            check.0.push(Violation::Alarm { why });
        }
        check.that(
            t.alarm.is_some() || t.alarm_exit != Some(true),
            "train.alarm_exit",
            "train.alarm beside it",
            "no train.alarm",
        );
    }
}

/// What the fields of the router mean together and for the experts of each layer.
fn check_router(m: &ModelConfig, check: &mut Check) {
    let (r, k) = (m.routing(), m.top_k());
    if let Some(wanted) = m.family().fixed_top_k().filter(|&wanted| wanted != k) {
        check.0.push(Violation::RouterTopK { router: m.family(), wanted, found: k });
    }
    check.positive("model.router.scale", r.scale);
    check.not_negative("model.router.bias_rate", r.bias_rate);
    check.that((0.0..1.0).contains(&r.jitter), "model.router.jitter", "a number of at least 0 and below 1", r.jitter);
    check.not_negative("model.router.mixer_eps", r.mixer_eps);
    check.size("model.router.groups", r.groups, MOST_EXPERTS);
    check.that(r.hash_layers <= MOST_LAYERS, "model.router.hash_layers", format!("0 to {MOST_LAYERS}"), r.hash_layers);
    if let Some(width) = r.shared_ffn {
        check.size("model.router.shared_ffn", width, 4 * MOST_WIDTH);
    }
    check.that(
        r.score == Score::Identity || r.normalise != Normalise::Softmax,
        "model.router.normalise",
        "softmax only of logits, that is with model.router.score = \"identity\"",
        "another score",
    );
    check.that(
        r.score != Score::Identity || matches!(r.normalise, Normalise::Softmax | Normalise::None),
        "model.router.normalise",
        "softmax or none for score = \"identity\", as logits can be negative",
        "a division by their sum",
    );
    let sparse = m.layers <= MOST_LAYERS && m.experts_per_layer().iter().any(|&e| e > 0);
    if k == 1 && r.normalise != Normalise::None && !r.expert_choice && sparse {
        check.0.push(Violation::ConstantGate);
    }
    if r.expert_choice && m.capacity_factor.is_none() {
        check.0.push(Violation::ExpertChoiceCapacity);
    }
    if r.groups <= 1 || m.layers > MOST_LAYERS {
        return;
    }
    for (i, experts) in m.experts_per_layer().into_iter().enumerate().filter(|&(_, e)| e > 0) {
        let size = experts / r.groups;
        let wanted = if !experts.is_multiple_of(r.groups) {
            "a divisor of the experts".to_string()
        } else if !(1..=r.groups).contains(&r.group_keep) {
            format!("group_keep of 1 to {}", r.groups)
        } else if size * r.group_keep < k {
            format!("at least {k} experts in the kept groups")
        } else if r.group_score == GroupScore::Top2Sum && size < 2 {
            "groups of at least 2 experts".to_string()
        } else {
            continue;
        };
        let (groups, keep) = (r.groups, r.group_keep);
        check.0.push(Violation::Groups { layer: i + 1, experts, groups, keep, wanted });
        return;
    }
}
