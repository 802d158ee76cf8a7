//! Cases without tensors: `pyramid`, which layers route, and `lr`, the learning rate.

use moebius_models::config::{Config, Schedule};

use super::compare::Case;
use super::set::{Fields, Problem};

/// Both sides compute in f64, by formulas that may differ in the order of their operations.
const LEARNING_RATE_TOLERANCE: f64 = 1e-12;

/// A small configuration, of which a case changes what it is about.
pub(super) fn any_config() -> Result<Config, Problem> {
    let text = "[model]\nname = \"golden\"\nvocab = 256\nlayers = 1\nwidth = 8\nheads = 1\nsequence = 8\n\
                [train]\nbatch = 1\nsteps = 1\nlearning_rate = 1.0\n";
    Config::from_toml(text, "golden").map_err(|e| Problem::Format {
        path: "golden".into(),
        wanted: "a configuration",
        found: e.to_string(),
    })
}

/// Fields `num_experts`, `num_layers`, `interval`, and `per_layer`, in which 1 is a dense layer.
pub(super) fn check_pyramid(case: &mut Case<'_>, fields: &Fields<'_>) -> Result<(), Problem> {
    let mut config = any_config()?.model;
    config.experts = fields.counts("num_experts")?;
    config.layers = fields.count("num_layers")?;
    config.expert_interval = fields.count("interval")?;
    let got: Vec<usize> = config.experts_per_layer().into_iter().map(|experts| experts.max(1)).collect();
    let wanted: Vec<usize> = fields.counts("per_layer")?.into_iter().map(|experts| experts.max(1)).collect();
    case.same("per_layer", &got, &wanted);
    Ok(())
}

/// Fields `lr`, `min_lr`, `warmup_tokens`, `decay_tokens`, `tokens`, and `value`.
pub(super) fn check_learning_rate(case: &mut Case<'_>, fields: &Fields<'_>) -> Result<(), Problem> {
    let mut config = any_config()?;
    let train = &mut config.train;
    train.learning_rate = fields.number("lr")?;
    train.min_learning_rate = fields.number("min_lr")?;
    train.warmup_tokens = Some(fields.number("warmup_tokens")? as u64);
    train.decay_tokens = Some(fields.number("decay_tokens")? as u64);
    train.schedule = Schedule::Cosine;
    let got = config.learning_rate().at(fields.number("tokens")? as u64);
    let wanted = fields.number("value")?;
    if (got - wanted).abs() > LEARNING_RATE_TOLERANCE * wanted.abs() {
        case.wrong(format!("value: {got:e} for {wanted:e}"));
    }
    Ok(())
}
