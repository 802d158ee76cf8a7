//! DeepSpeed's gates (spec 1.0 to 1.5) as settings of the models: which router, and which of its random numbers are given.

use moebius_ir::ops::CompareFn;
use moebius_ir::{Graph, Result, TensorType, Value};
use moebius_models::config::{Family, Mlp, ModelConfig, Noise, Order, RouterTable};
use moebius_models::gpt::router::{GateInputs, RouterNoise, Source};

use super::lists::any_config;
use super::set::{Fields, Problem};

/// Which function of DeepSpeed gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    /// `top1gating`.
    Top1,
    /// `top2gating`.
    Top2,
    /// `topkgating`, which evicts the least probable tokens, or the latest (`by_position`).
    TopK {
        /// Choices of a token.
        k: usize,
        /// Whether the place in the batch decides.
        by_position: bool,
    },
}

impl Function {
    /// From the fields `fn`, and for `topk` also `k` and `policy`.
    pub(super) fn named(fields: &Fields<'_>) -> std::result::Result<Function, Problem> {
        let unknown =
            |field: &str, wanted, found: &str| Problem::Field { field: field.into(), wanted, found: found.into() };
        match fields.text("fn")? {
            "top1" => Ok(Function::Top1),
            "top2" => Ok(Function::Top2),
            "topk" => {
                let by_position = match fields.text("policy")? {
                    "probs" => false,
                    "position" => true,
                    other => return Err(unknown("policy", "probs or position", other)),
                };
                Ok(Function::TopK { k: fields.count("k")?, by_position })
            }
            other => Err(unknown("fn", "top1, top2 or topk", other)),
        }
    }

    /// The one that a layer of `k` choices uses (spec 1.0).
    pub(super) fn of_layer(k: usize) -> Function {
        match k {
            1 => Function::Top1,
            2 => Function::Top2,
            _ => Function::TopK { k, by_position: false },
        }
    }

    /// Choices of a token.
    pub(super) fn k(self) -> usize {
        match self {
            Function::Top1 => 1,
            Function::Top2 => 2,
            Function::TopK { k, .. } => k,
        }
    }

    /// Whether the function draws who stays, of which the numbers may be given as [`Given::rts`].
    pub(super) fn draws_places(self) -> bool {
        self == Function::Top1
    }

    /// Whether the function can draw choices, of which the noise may be given as [`Given::gumbel`].
    pub(super) fn draws_choices(self) -> bool {
        matches!(self, Function::Top1 | Function::Top2)
    }
}

/// The random numbers and the mask of one gate.
#[derive(Clone, Copy, Default)]
pub(super) struct Given {
    /// f32 `[N,H]`: what the router's copy of the tokens is multiplied by.
    pub(super) jitter: Option<Value>,
    /// f32 `[N,E]`: who stays, larger first (`Top1`).
    pub(super) rts: Option<Value>,
    /// f32 `[N,E]`, added to the logits that choose: the only expert of `Top1`, the second of `Top2`.
    pub(super) gumbel: Option<Value>,
    /// i32 `[N]`: 0 for a token that routes nowhere.
    pub(super) used: Option<Value>,
}

impl Given {
    /// As the models' router takes it; what is not given is off.
    pub(super) fn noise(self) -> RouterNoise {
        let source = |value: Option<Value>| value.map_or(Source::Off, Source::Given);
        RouterNoise { jitter: source(self.jitter), choice: source(self.gumbel), priority: source(self.rts) }
    }

    /// As [`moebius_models::gpt::router::gate`] takes it.
    pub(super) fn inputs(self, g: &mut Graph) -> Result<GateInputs> {
        let used = match self.used {
            Some(used) => {
                let none = g.splat(TensorType::i32([]), 0.0)?;
                Some(g.compare(CompareFn::Gt, used, none)?)
            }
            None => None,
        };
        Ok(GateInputs { noise: self.noise(), used, ..GateInputs::default() })
    }
}

/// What fields say of capacity: factors in training and evaluation, and the least capacity.
#[derive(Clone, Copy)]
pub(super) struct Capacity {
    pub(super) training: f64,
    pub(super) evaluation: f64,
    pub(super) least: usize,
}

/// A model whose layers, with so many `experts` each, gate by `function`; without a capacity nothing is dropped.
pub(super) fn model(
    function: Function,
    experts: &[usize],
    residual: bool,
    capacity: Option<Capacity>,
    given: Given,
) -> std::result::Result<ModelConfig, Problem> {
    let mut m = any_config()?.model;
    let (preset, order) = match function {
        Function::Top1 => (Family::DeepspeedTop1, None),
        Function::Top2 => (Family::DeepspeedTop2, None),
        Function::TopK { by_position, .. } => (Family::DeepspeedTopK, by_position.then_some(Order::Token)),
    };
    // `RSample` of `top1gating` is no part of the preset, nor is jitter, whose half width does not matter where it is given.
    let noise = (function == Function::Top1 && given.gumbel.is_some()).then_some(Noise::Sample);
    let jitter = given.jitter.map(|_| 0.01);
    m.router = Some(RouterTable { preset: Some(preset), order, noise, jitter, ..RouterTable::default() });
    m.top_k = Some(function.k());
    m.mlp = if residual { Mlp::Residual } else { Mlp::Standard };
    (m.layers, m.expert_interval, m.experts) = (experts.len(), 1, experts.to_vec());
    m.capacity_factor = capacity.map(|c| c.training);
    m.eval_capacity_factor = capacity.map(|c| c.evaluation);
    m.min_capacity = capacity.map_or(0, |c| c.least);
    Ok(m)
}
