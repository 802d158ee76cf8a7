//! The router of one MoE layer as graph nodes: noise, choice, gates, slots.
//!
//! [`gate`] goes from logits to gates and slots by the fields of a [`Routing`]; a feature that is off adds no node. Noise
//! comes as values or is drawn from a key, so that a recorded or resumed step has the same bits.

mod capacity;

use moebius_ir::ops::{Balance, CompareFn, Distribution, GroupScore, Groups, NoiseUse, Order as Priority, ReduceFn};
use moebius_ir::ops::{RouteInputs, Router, Score};
use moebius_ir::{DType, Graph, Result, Shape, TensorType, Value, philox};

use crate::config::{self, BalanceOf, Noise, Normalise, Order, Routing};

pub use capacity::{CapacityOf, capacity};

/// Where the random numbers of one purpose come from.
#[derive(Clone, Copy, Debug, Default)]
pub enum Source {
    /// There are none: the router does without.
    #[default]
    Off,
    /// This value; its shape is that of the purpose in [`RouterNoise`].
    Given(Value),
    /// Drawn by the `random` op from a key u32 `[2]`, in a stream of the layer and the purpose.
    Drawn {
        /// The key, another one for each step.
        key: Value,
        /// The layer.
        layer: usize,
    },
}

/// The random numbers of a router, for N tokens of width D, E experts and k choices.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouterNoise {
    /// f32 `[N,D]`: what the router's copy of x is multiplied with, in `[1 - jitter, 1 + jitter)`.
    pub jitter: Source,
    /// f32 `[N,E]`, Gumbel, for [`Noise::Sample`] and [`Noise::SampleSecond`]; f32 `[N,k]`, uniform in `[0, 1)`, for
    /// [`Noise::RandomSecond`].
    pub choice: Source,
    /// f32 `[N,E]`, uniform, of which the entries of the chosen experts count: who stays, for [`Order::Random`].
    pub priority: Source,
}

impl RouterNoise {
    /// All that the router wants is drawn from `key` u32 `[2]`.
    pub fn drawn(key: Value, layer: usize) -> RouterNoise {
        let source = Source::Drawn { key, layer };
        RouterNoise { jitter: source, choice: source, priority: source }
    }
}

/// Streams of one key: each purpose of each layer has its own.
#[derive(Clone, Copy)]
enum Purpose {
    Jitter,
    Choice,
    Priority,
}

impl Source {
    fn value(
        self,
        g: &mut Graph,
        purpose: Purpose,
        distribution: Distribution,
        shape: impl Into<Shape>,
    ) -> Result<Option<Value>> {
        match self {
            Source::Off => Ok(None),
            Source::Given(value) => Ok(Some(value)),
            Source::Drawn { key, layer } => {
                let stream = (4 * layer + purpose as usize) as u32;
                g.random(distribution, shape, stream, key).map(Some)
            }
        }
    }
}

/// What [`gate`] is given beside the logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct GateInputs {
    /// Random numbers; [`RouterNoise::jitter`] is not used here.
    pub noise: RouterNoise,
    /// bool `[N]`, false for tokens that route nowhere.
    pub used: Option<Value>,
    /// f32 `[E]`, added to the scores that choose.
    pub selection_bias: Option<Value>,
    /// i32 `[N,k]`: the experts, instead of the router's choice.
    pub choices: Option<Value>,
}

/// The result of [`gate`]: what moves the rows, and statistics.
#[derive(Clone, Copy, Debug)]
pub struct Gating {
    /// f32 `[N,k]`: the score values of the choices, as `route` gives them; 0 where a choice goes nowhere.
    pub score: Value,
    /// f32 `[N,k]`, normalised and scaled; of a dropped choice without meaning unless gates are normalised after dropping.
    pub gate: Value,
    /// i32 `[N,k]`, -1 where a choice goes nowhere; for routers in which experts choose, k = E.
    pub expert_index: Value,
    /// i32 `[S]`: the choice in each slot.
    pub slot_choice: Value,
    /// i32 `[N,k]`: the slot of each choice, -1 for dropped ones.
    pub choice_slot: Value,
    /// i32 `[E+1]`: the segment of each expert.
    pub offsets: Value,
    /// i32 `[E]`: choices of each expert before dropping; where experts choose, the tokens they took.
    pub counts: Value,
    /// i32 scalar: choices that found no slot; where experts choose, tokens that no expert took.
    pub dropped: Value,
    /// f32 scalar, without a coefficient; 0 where experts choose.
    pub load_balancing_loss: Value,
    /// f32 scalar, without a coefficient.
    pub z_loss: Value,
    /// f32 scalar, nats per token: mean entropy of the probabilities that the balance loss has.
    pub entropy: Value,
}

/// The router's copy of its input, `x32` f32 `[N,D]`, with jitter if the router has any and the source is on.
///
/// # Errors
/// Those of the ops, for a given value of another shape.
pub fn jittered(g: &mut Graph, routing: &Routing, x32: Value, source: Source) -> Result<Value> {
    if routing.jitter <= 0.0 {
        return Ok(x32);
    }
    let shape = g.ty(x32).shape.clone();
    let Some(mut factor) = source.value(g, Purpose::Jitter, Distribution::Uniform, shape)? else { return Ok(x32) };
    if let Source::Drawn { .. } = source {
        factor = g.mul_scalar(factor, 2.0 * routing.jitter)?;
        factor = g.add_scalar(factor, 1.0 - routing.jitter)?;
    }
    g.mul(x32, factor)
}

/// Chooses `k` experts for each row of `logits` f32 `[N,E]`, weights them, and gives the choices slots, at most `capacity` for
/// each expert.
///
/// # Errors
/// Those of the ops, for operands of other shapes or a routing that does not fit E and k.
pub fn gate(
    g: &mut Graph,
    routing: &Routing,
    k: usize,
    capacity: Option<usize>,
    logits: Value,
    inputs: &GateInputs,
) -> Result<Gating> {
    let [tokens, experts] = [g.shape(logits)[0], g.shape(logits).get(1).copied().unwrap_or(0)];
    let k = if routing.expert_choice { experts } else { k };
    let noise = match routing.noise {
        Noise::None | Noise::RandomSecond => None,
        Noise::Sample => Some(NoiseUse::AllChoices),
        Noise::SampleSecond => Some(NoiseUse::LaterChoices),
    };
    let noise = match noise {
        Some(used) => {
            let value = inputs.noise.choice.value(g, Purpose::Choice, Distribution::Gumbel, [tokens, experts])?;
            value.map(|value| (value, used))
        }
        None => None,
    };
    let router = description(routing, k);
    let operands =
        RouteInputs { selection_bias: inputs.selection_bias, noise, used: inputs.used, choices: inputs.choices };
    let [score, mut expert_index, load_balancing_loss, z_loss, counts, entropy] =
        g.route_with(logits, &router, operands)?;
    let mut gate = match routing.normalise {
        Normalise::None | Normalise::AfterDropping => score,
        Normalise::Softmax => g.softmax(score)?,
        Normalise::BeforeDropping => normalised(g, score, LEAST_SUM)?,
    };
    if routing.noise == Noise::RandomSecond && k > 1 {
        expert_index = randomly_kept(g, gate, expert_index, inputs.noise.choice)?;
    }
    let [slot_choice, choice_slot, offsets, dropped] =
        slots(g, routing.order, experts, capacity, score, expert_index, inputs.noise.priority)?;
    if routing.normalise == Normalise::AfterDropping {
        let kept = kept(g, choice_slot)?;
        gate = g.mul(gate, kept)?;
        gate = normalised(g, gate, f64::from(f32::EPSILON))?;
    }
    if routing.scale != 1.0 {
        gate = g.mul_scalar(gate, routing.scale)?;
    }
    let mut gating = Gating {
        score,
        gate,
        expert_index,
        slot_choice,
        choice_slot,
        offsets,
        counts,
        dropped,
        load_balancing_loss,
        z_loss,
        entropy,
    };
    if routing.expert_choice {
        statistics_of_experts_that_choose(g, &mut gating, tokens, experts)?;
    }
    Ok(gating)
}

/// The least sum that scores are divided by before dropping: far below any sum of softmax scores, and what DeepSeek-V3 adds
/// to a sum of sigmoids, which may all underflow.
const LEAST_SUM: f64 = 1e-20;

/// The op's description of these fields.
fn description(routing: &Routing, k: usize) -> Router {
    let score = match routing.score {
        config::Score::Softmax => Score::Softmax,
        config::Score::Sigmoid => Score::Sigmoid,
        config::Score::SqrtSoftplus => Score::SqrtSoftplus,
        config::Score::Identity => Score::Identity,
        config::Score::SparseMixer => Score::SparseMixer { jitter_eps: routing.mixer_eps },
    };
    let by = match routing.group_score {
        config::GroupScore::Max => GroupScore::Max,
        config::GroupScore::Top2Sum => GroupScore::Top2Sum,
    };
    let groups = (routing.groups > 1).then_some(Groups { count: routing.groups, keep: routing.group_keep, by });
    let balance = match routing.balance {
        BalanceOf::First => Balance::FirstChoice,
        BalanceOf::All => Balance::AllChoices,
    };
    Router { k, score, groups, balance }
}

/// Gives the choices `expert_index` i32 `[N,k]` slots, at most `capacity` for each expert, and turns the rest away in `order`,
/// which may look at their `score` f32 `[N,k]`. Returns `[slot_choice, choice_slot, offsets, dropped]` as `assign` does.
///
/// # Errors
/// Those of the ops, for operands of other shapes.
pub fn slots(
    g: &mut Graph,
    order: Order,
    experts: usize,
    capacity: Option<usize>,
    score: Value,
    expert_index: Value,
    noise: Source,
) -> Result<[Value; 4]> {
    let (priority, order) = match capacity {
        Some(_) => priority(g, order, score, expert_index, noise)?,
        None => (None, Priority::TokenMajor),
    };
    g.assign(expert_index, priority, experts, capacity, order)
}

/// Which choices an expert keeps first: a priority f32 `[N,k]` and the order among equals.
fn priority(
    g: &mut Graph,
    order: Order,
    score: Value,
    expert_index: Value,
    source: Source,
) -> Result<(Option<Value>, Priority)> {
    let [tokens, k] = [g.shape(score)[0], g.shape(score)[1]];
    match order {
        Order::Token => Ok((None, Priority::TokenMajor)),
        Order::Choice => Ok((None, Priority::ChoiceMajor)),
        Order::Probability => Ok((Some(score), Priority::TokenMajor)),
        Order::Random => {
            let drawn = source.value(g, Purpose::Priority, Distribution::Uniform, [tokens, k])?;
            let drawn = match drawn {
                Some(value) if matches!(source, Source::Given(_)) => Some(at_experts(g, value, expert_index)?),
                other => other,
            };
            Ok((drawn, Priority::TokenMajor))
        }
        Order::Batch => {
            // First gates are moved into [0, 1], so that 2 for each rank keeps the ranks apart whatever the score is; the difference
            // of two gates in one rank survives to 2^-22 of their range for the ranks that matter.
            let first = g.slice(score, 1, 0, 1)?;
            let finite = g.is_finite(first)?;
            let zero = g.scalar(0.0)?;
            let known = g.select(finite, first, zero)?;
            let most = g.reduce(ReduceFn::Max, known, &[0, 1])?;
            let negative = g.neg(known)?;
            let least = g.reduce(ReduceFn::Max, negative, &[0, 1])?;
            let range = g.add(most, least)?;
            let smallest = g.scalar(f64::from(f32::MIN_POSITIVE))?;
            let range = g.maximum(range, smallest)?;
            let above = g.add(first, least)?;
            let first = g.div(above, range)?;
            let rank = g.constant(TensorType::f32([1, k]), (0..k).map(|j| -2.0 * j as f64).collect())?;
            let rank = g.broadcast(rank, [tokens, k])?;
            Ok((Some(g.add(rank, first)?), Priority::ChoiceMajor))
        }
    }
}

/// `values[n, expert_index[n,j]]`, f32 `[N,k]`; of no meaning where a choice goes nowhere, as that takes no slot.
fn at_experts(g: &mut Graph, values: Value, expert_index: Value) -> Result<Value> {
    let [tokens, experts] = [g.shape(values)[0], g.shape(values)[1]];
    let k = g.shape(expert_index)[1];
    let table = g.reshape(values, [tokens * experts, 1])?;
    let start = (0..tokens).map(|n| (n * experts) as f64).collect();
    let start = g.constant(TensorType::i32([tokens, 1]), start)?;
    let ids = g.add(expert_index, start)?;
    // The index -1 of the first token would lie before the table.
    let first = g.splat(TensorType::i32([]), 0.0)?;
    let inside = g.compare(CompareFn::Ge, ids, first)?;
    let ids = g.select(inside, ids, first)?;
    let picked = g.embedding(table, ids)?;
    g.reshape(picked, [tokens, k])
}

/// Choices after the first stay with probability `2 gate` (arXiv 2006.16668, algorithm 1); the others go nowhere.
fn randomly_kept(g: &mut Graph, gate: Value, expert_index: Value, source: Source) -> Result<Value> {
    let shape = g.ty(gate).shape.clone();
    let Some(drawn) = source.value(g, Purpose::Choice, Distribution::Uniform, shape)? else { return Ok(expert_index) };
    let k = g.shape(gate)[1];
    let double = g.mul_scalar(gate, 2.0)?;
    let stays = g.compare(CompareFn::Gt, double, drawn)?;
    let nowhere = g.splat(TensorType::i32([]), -1.0)?;
    let kept = g.select(stays, expert_index, nowhere)?;
    let (first, later) = (g.slice(expert_index, 1, 0, 1)?, g.slice(kept, 1, 1, k - 1)?);
    g.concat(&[first, later], 1)
}

/// 1 for the choices that found a slot, else 0.
fn kept(g: &mut Graph, choice_slot: Value) -> Result<Value> {
    let zero = g.splat(TensorType::i32([]), 0.0)?;
    let kept = g.compare(CompareFn::Ge, choice_slot, zero)?;
    g.cast(kept, DType::F32)
}

/// Gates divided by their sum over the token, at least `least` (spec 1.4, 1.5).
fn normalised(g: &mut Graph, gate: Value, least: f64) -> Result<Value> {
    let sum = g.reduce(ReduceFn::Sum, gate, &[1])?;
    let tokens = g.shape(sum)[0];
    let sum = g.reshape(sum, [tokens, 1])?;
    let least = g.scalar(least)?;
    let sum = g.maximum(sum, least)?;
    g.div(gate, sum)
}

/// Where experts choose, all have an equal load and no loss has to make it so; of interest is who is left over.
fn statistics_of_experts_that_choose(g: &mut Graph, gating: &mut Gating, tokens: usize, experts: usize) -> Result<()> {
    let ends = g.slice(gating.offsets, 0, 1, experts)?;
    let starts = g.slice(gating.offsets, 0, 0, experts)?;
    gating.counts = g.sub(ends, starts)?;
    let kept = kept(g, gating.choice_slot)?;
    let met = g.reduce(ReduceFn::Sum, kept, &[1])?;
    let half = g.scalar(0.5)?;
    let left = g.compare(CompareFn::Lt, met, half)?;
    let left = g.cast(left, DType::F32)?;
    let left = g.reshape(left, [tokens])?;
    let left = g.sum_all(left)?;
    gating.dropped = g.cast(left, DType::I32)?;
    gating.load_balancing_loss = g.scalar(0.0)?;
    Ok(())
}

/// The selection bias after a step: moved by `rate` towards experts with less than the mean load (arXiv 2408.15664, algorithm 1).
///
/// # Errors
/// None for a bias f32 `[E]` and counts i32 `[E]`.
pub(super) fn moved_bias(g: &mut Graph, bias: Value, counts: Value, rate: f64) -> Result<Value> {
    let experts = g.shape(bias)[0];
    let load = g.cast(counts, DType::F32)?;
    let mean = g.sum_all(load)?;
    let mean = g.mul_scalar(mean, 1.0 / experts as f64)?;
    let error = g.sub(mean, load)?;
    let sign = g.sign(error)?;
    let change = g.mul_scalar(sign, rate)?;
    g.add(bias, change)
}

/// The experts of every token id in a layer that routes by id, f32 `[vocab, k]`: k different ones, drawn from the id.
pub(super) fn experts_by_id(vocab: usize, experts: usize, k: usize, layer: usize) -> Vec<f64> {
    let mut table = Vec::with_capacity(vocab * k);
    for id in 0..vocab {
        let start = table.len();
        let mut draw = 0u64;
        while table.len() < start + k {
            let expert = f64::from(philox::bits([id as u32, 0x6964], layer as u32, draw) % experts.max(1) as u32);
            draw += 1;
            if !table[start..].contains(&expert) {
                table.push(expert);
            }
        }
    }
    table
}
