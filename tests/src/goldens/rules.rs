//! DeepSpeed's gates in ops (spec 1.1 to 1.5), with every random number given.

use moebius_ir::ops::{Balance, CompareFn, NoiseUse, Order, ReduceFn, RouteInputs, Router};
use moebius_ir::{DType, Graph, Result, TensorType, Value};

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

    /// Slots of an expert (spec 1.1), the product in f32: `max(ceil(tokens / experts * k factor), min_capacity)`.
    pub(super) fn capacity(self, tokens: usize, experts: usize, factor: f64, least: usize) -> usize {
        let share = (tokens as f64 / experts as f64) as f32;
        let slots = share * (self.k() as f64 * factor) as f32;
        (slots.ceil() as usize).max(least)
    }
}

/// The random numbers and the mask of one gate.
#[derive(Clone, Copy, Default)]
pub(super) struct Given {
    /// f32 `[N,E]`: who stays, larger first (`Top1`).
    pub(super) rts: Option<Value>,
    /// f32 `[N,E]`, added to the logits that choose: the only expert of `Top1`, the second of `Top2`.
    pub(super) gumbel: Option<Value>,
    /// i32 `[N]`: 0 for a token that routes nowhere.
    pub(super) used: Option<Value>,
}

/// What a gate gives.
pub(super) struct Gated {
    /// f32 `[N,k]`, 0 for an evicted choice.
    pub(super) gate: Value,
    /// i32 `[N,k]`.
    pub(super) expert_index: Value,
    /// i32 `[S]`.
    pub(super) slot_choice: Value,
    /// i32 `[N,k]`, -1 for an evicted choice.
    pub(super) choice_slot: Value,
    /// i32 `[E+1]`.
    pub(super) offsets: Value,
    /// i32 `[E]`, before dropping.
    pub(super) counts: Value,
    /// i32 scalar: choices evicted.
    pub(super) dropped: Value,
    /// f32 scalar.
    pub(super) load_balancing_loss: Value,
}

/// Gates `logits` f32 `[N,E]`; without a `capacity` nothing is dropped.
pub(super) fn gate(
    g: &mut Graph,
    function: Function,
    capacity: Option<usize>,
    logits: Value,
    given: Given,
) -> Result<Gated> {
    let experts = g.shape(logits)[1];
    let (balance, order, noise_use) = match function {
        Function::Top1 => (Balance::AllChoices, Order::TokenMajor, NoiseUse::AllChoices),
        Function::Top2 => (Balance::FirstChoice, Order::ChoiceMajor, NoiseUse::LaterChoices),
        Function::TopK { .. } => (Balance::AllChoices, Order::TokenMajor, NoiseUse::LaterChoices),
    };
    let used = match given.used {
        Some(used) => {
            let none = g.splat(TensorType::i32([]), 0.0)?;
            Some(g.compare(CompareFn::Gt, used, none)?)
        }
        None => None,
    };
    let noise = given.gumbel.map(|gumbel| (gumbel, noise_use));
    let inputs = RouteInputs { noise, used, ..RouteInputs::default() };
    let router = Router::softmax(function.k(), balance);
    let [probability, expert_index, load_balancing_loss, _, counts, _] = g.route_with(logits, &router, inputs)?;
    let priority = match (function, given.rts, capacity) {
        (Function::Top1, Some(rts), Some(_)) => Some(of_choices(g, rts, expert_index)?),
        (Function::TopK { by_position: false, .. }, _, Some(_)) => Some(probability),
        (_, _, _) => None,
    };
    let [slot_choice, choice_slot, offsets, dropped] = g.assign(expert_index, priority, experts, capacity, order)?;
    let zero = g.splat(TensorType::i32([]), 0.0)?;
    let kept = g.compare(CompareFn::Ge, choice_slot, zero)?;
    let kept = g.cast(kept, DType::F32)?;
    let mut gate = g.mul(probability, kept)?;
    if function != Function::Top1 {
        let tokens = g.shape(gate)[0];
        let sum = g.reduce(ReduceFn::Sum, gate, &[1])?;
        let sum = g.reshape(sum, [tokens, 1])?;
        let least = g.scalar(f64::from(f32::EPSILON))?;
        let sum = g.maximum(sum, least)?;
        gate = g.div(gate, sum)?;
    }
    Ok(Gated { gate, expert_index, slot_choice, choice_slot, offsets, counts, dropped, load_balancing_loss })
}

/// `values[n, expert_index[n,j]]` of f32 `[N,E]`; of no meaning for an index of -1, which takes no slot.
fn of_choices(g: &mut Graph, values: Value, expert_index: Value) -> Result<Value> {
    let [tokens, experts] = [g.shape(values)[0], g.shape(values)[1]];
    let shape = g.ty(expert_index).shape.clone();
    let table = g.reshape(values, [tokens * experts, 1])?;
    let rows = (0..tokens).map(|n| (n * experts) as f64).collect();
    let rows = g.constant(TensorType::i32([tokens, 1]), rows)?;
    let ids = g.add(expert_index, rows)?;
    // The index -1 of the first token would lie before the table.
    let first = g.splat(TensorType::i32([]), 0.0)?;
    let inside = g.compare(CompareFn::Ge, ids, first)?;
    let ids = g.select(inside, ids, first)?;
    let picked = g.embedding(table, ids)?;
    g.reshape(picked, shape)
}
