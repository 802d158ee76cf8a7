//! Launches of the router: the choice of experts, its gradient, and the slots of the chosen ones.
//!
//! A token has as many threads as experts, up to 32, so that the order of a sum depends on the number of experts alone, and a workgroup
//! some tokens, one after another.

use moebius_ir::ops::{Assign, Balance, GroupScore, NoiseUse, Order, Route, RouteGrad, Score};
use moebius_ir::{DType, Graph, Node};

use super::Lowered;
use crate::vulkan::launch::{Action, At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// The most experts: 32 of each of 32 threads.
const MOST_EXPERTS: usize = 1024;
const THREADS: usize = 256;
/// The most threads of a token.
const MOST_LANES: usize = 32;
/// The most scores of groups of experts that a workgroup keeps.
const MOST_SCORES: usize = 2048;
/// Workgroups that keep a large GPU busy.
const ENOUGH: usize = 264;
/// Choices that a workgroup counts, for the gradient; and, for slots, the most chunks of them and the least choices of one.
const COUNTED_CHUNK: usize = 1024;
const MOST_CHUNKS: usize = 128;
const LEAST_CHUNK: usize = THREADS;

fn counted(balance: Balance, k: usize) -> usize {
    match balance {
        Balance::FirstChoice => 1,
        Balance::AllChoices => k,
    }
}

/// How the tokens are shared out.
struct Shares {
    lanes: usize,
    /// Of a workgroup at a time, and how many times.
    tokens: usize,
    rounds: usize,
    groups: usize,
}

impl Shares {
    /// Of `n` tokens, each with `scores` scores of groups of experts.
    fn of(n: usize, experts: usize, scores: usize) -> Result<Shares, String> {
        if experts > MOST_EXPERTS {
            return Err(format!("at most {MOST_EXPERTS} experts, not {experts}"));
        }
        let lanes = experts.max(1).next_power_of_two().min(MOST_LANES);
        // One token has a subgroup for itself, in which threads do not wait for each other.
        let some = n.max(1).next_power_of_two().clamp(MOST_LANES / lanes, THREADS / lanes);
        let tokens = some.min((MOST_SCORES / scores.max(1)).max(1));
        let rounds = n.div_ceil(tokens * ENOUGH).max(1);
        Ok(Shares { lanes, tokens, rounds, groups: n.div_ceil(tokens * rounds) })
    }

    /// A kernel of the router for its extents and score.
    fn kernel(
        &self,
        limits: Limits,
        name: &'static str,
        [n, experts, k]: [usize; 3],
        score: Score,
        balance: Balance,
    ) -> Shader {
        let (which, jitter) = match score {
            Score::Softmax => (0, 0.0),
            Score::Sigmoid => (1, 0.0),
            Score::SqrtSoftplus => (2, 0.0),
            Score::Identity => (3, 0.0),
            Score::SparseMixer { jitter_eps } => (4, 2.0 * jitter_eps as f32),
        };
        Shader::file(limits, name, self.lanes * self.tokens)
            .with(if limits.shuffles { "router_lanes" } else { "router_apart" })
            .with("router")
            .constant("LANES", self.lanes)
            .constant("TOKENS", self.tokens)
            .constant("OWN", experts.div_ceil(self.lanes).max(1))
            .constant("SCORE", which)
            // Bit for bit.
            .declare(&format!("fn jitter() -> f32 {{ return from_bits(0x{:08x}u); }}", jitter.to_bits()))
            .number("n", n)
            .number("experts", experts)
            .number("k", k)
            .number("counted", counted(balance, k))
            .number("rounds", self.rounds)
            .buffer("logits", DType::F32, At::Operand(0))
    }
}

/// With the statistics of all tokens.
fn ending(shader: Shader) -> Shader {
    shader
        .with("route_end")
        .buffer("counts", DType::I32, At::Result(4))
        .buffer("balance", DType::F32, At::Result(2))
        .buffer("z", DType::F32, At::Result(3))
        .buffer("entropy", DType::F32, At::Result(5))
}

pub(super) fn lower_route(graph: &Graph, node: &Node, op: &Route, limits: Limits) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let (r, at) = (op.router, op.operands());
    let (groups, keep, top2) = r.groups.map_or((0, 0, false), |g| (g.count, g.keep, g.by == GroupScore::Top2Sum));
    let shares = Shares::of(n, e, groups)?;
    let all = shares.groups == 1;
    let mut scratch = Scratch::default();
    let mut of_groups = |each: usize| if all { At::Null } else { scratch.take((4 * shares.groups * each).max(4)) };
    let (parts, choices) = (of_groups(2 + e), of_groups(2 * e));
    let kernel = |shares: &Shares, name| {
        let shader = shares.kernel(limits, name, [n, e, r.k], r.score, r.balance);
        ending(shader).buffer("parts", DType::F32, parts).buffer("choices", DType::I32, choices)
    };
    let optional = |i: Option<usize>| i.map_or(At::Null, At::Operand);
    let of_tokens = kernel(&shares, "route")
        .constant("GROUPS", groups)
        .constant("KEEP", keep)
        .flag("TOP2", top2)
        .flag("LATER", op.noise == Some(NoiseUse::LaterChoices))
        .flag("ALL", all)
        .buffer("bias", DType::F32, optional(at.selection_bias))
        .buffer("noise", DType::F32, optional(at.noise))
        .buffer("used", DType::Bool, optional(at.used))
        .buffer("given", DType::I32, optional(at.choices))
        .buffer("gate", DType::F32, At::Result(0))
        .buffer("index", DType::I32, At::Result(1));
    let mut actions = vec![of_tokens.line(shares.groups)?];
    if !all {
        let whole = Shares { tokens: THREADS / shares.lanes, ..shares };
        actions.push(kernel(&whole, "route_totals").number("parts_count", whole.groups).line(1)?);
    }
    Ok(Launch::of(actions).with_scratch(&scratch))
}

/// The kernel that counts `counted` of the `k` choices of each of `n` tokens in `index`, by chunks.
fn count(
    limits: Limits,
    [n, counted, k]: [usize; 3],
    [experts, chunk, chunks]: [usize; 3],
    index: At,
    counts: At,
) -> Result<Action, String> {
    Shader::file(limits, "count_choices", THREADS)
        .constant("EXPERTS", experts)
        .number("n", n)
        .number("k", k)
        .number("counted", counted)
        .number("chunk", chunk)
        .buffer("index", DType::I32, index)
        .buffer("counts", DType::I32, counts)
        .line(chunks)
}

pub(super) fn lower_route_grad(graph: &Graph, node: &Node, op: &RouteGrad, limits: Limits) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let shares = Shares::of(n, e, 0)?;
    let counted = counted(op.balance, op.k);
    let chunks = (n * counted).div_ceil(COUNTED_CHUNK);
    let mut scratch = Scratch::default();
    let counts = scratch.take((4 * chunks * e).max(4));
    let of_tokens = shares
        .kernel(limits, "route_grad", [n, e, op.k], op.score, op.balance)
        .number("chunks", chunks)
        .buffer("index", DType::I32, At::Operand(1))
        .buffer("d_gate", DType::F32, At::Operand(2))
        .buffer("d_balance", DType::F32, At::Operand(3))
        .buffer("d_z", DType::F32, At::Operand(4))
        .buffer("counts", DType::I32, counts)
        .buffer("d", DType::F32, At::Result(0));
    let actions = vec![
        count(limits, [n, counted, op.k], [e, COUNTED_CHUNK, chunks], At::Operand(1), counts)?,
        of_tokens.line(shares.groups)?,
    ];
    Ok(Launch::of(actions).with_scratch(&scratch))
}

pub(super) fn lower_assign(graph: &Graph, node: &Node, op: &Assign, limits: Limits) -> Lowered {
    let (n, k) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    if op.experts > MOST_EXPERTS {
        return Err(format!("at most {MOST_EXPERTS} experts, not {}", op.experts));
    }
    // A capacity that no expert can reach is none.
    let capacity = op.capacity.filter(|&c| c < n * k);
    let priority = if node.operands.len() > 1 { At::Operand(1) } else { At::Null };
    let choice_major = match op.order {
        Order::TokenMajor => false,
        Order::ChoiceMajor => k > 1,
    };
    // Slots are in the order of the choices; who is dropped may not be.
    let in_order = capacity.is_none() || (priority == At::Null && !choice_major);
    let (mut scratch, mut actions) = (Scratch::default(), Vec::new());
    let shader = |name| {
        Shader::file(limits, name, THREADS)
            .flag("LIMITED", capacity.is_some())
            .number("capacity", capacity.unwrap_or(0))
            .number("slots", graph.ty(node.results[0]).elements())
            .buffer("index", DType::I32, At::Operand(0))
            .buffer("slot_choice", DType::I32, At::Result(0))
            .buffer("choice_slot", DType::I32, At::Result(1))
            .buffer("offsets", DType::I32, At::Result(2))
            .buffer("dropped", DType::I32, At::Result(3))
    };
    if in_order {
        let chunk = (n * k).div_ceil(MOST_CHUNKS).next_multiple_of(LEAST_CHUNK).max(LEAST_CHUNK);
        let chunks = (n * k).div_ceil(chunk).max(1);
        let counts = if chunks > 1 { scratch.take(4 * chunks * op.experts) } else { At::Null };
        if chunks > 1 {
            actions.push(count(limits, [n, k, k], [op.experts, chunk, chunks], At::Operand(0), counts)?);
        }
        let shader = shader("assign_in_order").constant("EXPERTS", op.experts).number("choices", n * k);
        let shader = shader.number("chunk", chunk).number("chunks", chunks).buffer("counts", DType::I32, counts);
        actions.push(shader.line(chunks)?);
    } else {
        let kept = scratch.take(4 * n * k);
        let shader = shader("assign").constant("MOST_EXPERTS", MOST_EXPERTS).flag("CHOICE_MAJOR", choice_major);
        let shader = shader.number("n", n).number("k", k).number("experts", op.experts);
        let shader = shader.buffer("priority", DType::F32, priority).buffer("kept", DType::U32, kept);
        actions.push(shader.line(op.experts)?);
    }
    Ok(Launch::of(actions).with_scratch(&scratch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_threads_and_a_workgroup_is_no_larger_than_allowed() {
        for experts in [1, 2, 5, 32, 33, 1024] {
            for scores in [0, 8, 1024] {
                for n in [0, 1, 3, 8, 9, 1000, 16_384, 1 << 20] {
                    let s = Shares::of(n, experts, scores).unwrap();
                    let work = s.groups * s.rounds * s.tokens;
                    assert!(work >= n && work < n + s.rounds * s.tokens, "{experts} {scores} {n}");
                    assert!(s.lanes * s.tokens <= THREADS && s.groups <= ENOUGH, "{experts} {scores} {n}");
                    assert!(s.lanes * MOST_LANES >= experts && s.tokens * scores <= MOST_SCORES, "{experts} {scores}");
                }
            }
        }
        assert!(Shares::of(1, 1025, 0).is_err());
    }
}
