//! Launches of the router: the choice of experts, its gradient, and the slots of the chosen ones.
//!
//! A token has as many threads as experts, up to 32, so that the order of a sum depends on the number of experts alone, and a workgroup
//! some tokens, one after another.

use moebius_ir::ops::{Assign, Balance, GroupScore, NoiseUse, Order, Route, RouteGrad, Score};
use moebius_ir::{DType, Graph, Node};

use super::Lowered;
use super::routed::Routed;
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
pub(super) struct Shares {
    lanes: usize,
    /// Of a workgroup at a time, and how many times.
    tokens: usize,
    rounds: usize,
    groups: usize,
}

impl Shares {
    /// Of `n` tokens, each with `scores` scores of groups of experts.
    fn of(n: usize, experts: usize, scores: usize) -> Result<Shares, String> {
        let lanes = lanes(experts)?;
        // One token has a subgroup for itself, in which threads do not wait for each other.
        let some = n.max(1).next_power_of_two().clamp(MOST_LANES / lanes, THREADS / lanes);
        let tokens = some.min((MOST_SCORES / scores.max(1)).max(1));
        let rounds = n.div_ceil(tokens * ENOUGH).max(1);
        Ok(Shares { lanes, tokens, rounds, groups: n.div_ceil(tokens * rounds) })
    }

    /// Of few tokens, all at once in a workgroup of so many threads.
    /// None of its threads has another token, and its rooms take half of a workgroup's memory at most.
    pub(super) fn of_one(limits: Limits, [n, experts, scores]: [usize; 3], threads: usize) -> Result<Shares, String> {
        let lanes = lanes(experts)?;
        let tokens = threads / lanes;
        // Nine of every thread, three of every expert in a chunk of choices, and the scores.
        let rooms = 9 * threads + 3 * experts + tokens * scores;
        if n == 0 || n > tokens || 2 * 4 * rooms > limits.shared {
            return Err(format!("few tokens in a workgroup of {threads} threads, not {n} of {experts} experts"));
        }
        Ok(Shares { lanes, tokens, rounds: 1, groups: 1 })
    }

    fn threads(&self) -> usize {
        self.lanes * self.tokens
    }

    /// What kernels of the router have, added for its extents and score; they also have the logits.
    pub(super) fn add(
        &self,
        shader: Shader,
        limits: Limits,
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
        shader
            .with(if limits.shuffles { "router_lanes" } else { "router_apart" })
            .with("router")
            .constant("LANES", self.lanes)
            .constant("TOKENS", self.tokens)
            .constant("OWN_EXPERTS", experts.div_ceil(self.lanes).max(1))
            .constant("SCORE", which)
            // Bit for bit.
            .declare(&format!("fn jitter() -> f32 {{ return from_bits(0x{:08x}u); }}", jitter.to_bits()))
            .number("tokens", n)
            .number("experts", experts)
            .number("chosen", k)
            .number("counted", counted(balance, k))
            .number("rounds", self.rounds)
    }

    /// What the kernels of a route have, whose first operand is this, and whose first result, if they leave any; they also have the logits.
    /// `parts` and `choices` are what the workgroups leave of the statistics, if there is more than one.
    pub(super) fn route(
        &self,
        shader: Shader,
        limits: Limits,
        graph: &Graph,
        (node, op): (&Node, &Route),
        (operand, result): (usize, Option<usize>),
        parts: [At; 2],
    ) -> Shader {
        let ((n, e), r) = (extents(graph, node), op.router);
        let (groups, keep, top2) = r.groups.map_or((0, 0, false), |g| (g.count, g.keep, g.by == GroupScore::Top2Sum));
        let optional = |i: Option<usize>| i.map_or(At::Null, |i| At::Operand(operand + i));
        let at = op.operands();
        let shader = self.add(shader, limits, [n, e, r.k], r.score, r.balance);
        self.ending(shader, result, parts)
            .constant("GROUPS", groups)
            .constant("KEEP", keep)
            .flag("TOP2", top2)
            .flag("LATER", op.noise == Some(NoiseUse::LaterChoices))
            .flag("ALL", self.groups == 1)
            .buffer("selection_bias", DType::F32, optional(at.selection_bias))
            .buffer("noise", DType::F32, optional(at.noise))
            .buffer("used", DType::Bool, optional(at.used))
            .buffer("given", DType::I32, optional(at.choices))
            .buffer("gate", DType::F32, left(result, 0))
            .buffer("index", DType::I32, left(result, 1))
    }

    /// With the statistics of all tokens.
    fn ending(&self, shader: Shader, result: Option<usize>, [parts, choices]: [At; 2]) -> Shader {
        shader
            .with("route_end")
            .number("parts_count", self.groups)
            .buffer("balance", DType::F32, left(result, 2))
            .buffer("z", DType::F32, left(result, 3))
            .buffer("counts", DType::I32, left(result, 4))
            .buffer("entropy", DType::F32, left(result, 5))
            .buffer("parts", DType::F32, parts)
            .buffer("choices", DType::I32, choices)
    }
}

/// A result of a route whose first is this, if it leaves any.
fn left(first: Option<usize>, nth: usize) -> At {
    first.map_or(At::Null, |first| At::Result(first + nth))
}

fn lanes(experts: usize) -> Result<usize, String> {
    if experts > MOST_EXPERTS {
        return Err(format!("at most {MOST_EXPERTS} experts, not {experts}"));
    }
    Ok(experts.max(1).next_power_of_two().min(MOST_LANES))
}

/// Tokens and experts.
fn extents(graph: &Graph, node: &Node) -> (usize, usize) {
    (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1])
}

pub(super) fn lower_route(
    graph: &Graph,
    node: &Node,
    op: &Route,
    with_assign: Option<&Routed<'_>>,
    limits: Limits,
) -> Lowered {
    let logits = |shader: Shader| shader.buffer("logits", DType::F32, At::Operand(0));
    if let Some(routed) = with_assign {
        return Ok(Launch::of(vec![routed.alone(limits)?]));
    }
    let (n, e) = extents(graph, node);
    let shares = Shares::of(n, e, op.router.groups.map_or(0, |g| g.count))?;
    let all = shares.groups == 1;
    let mut scratch = Scratch::default();
    let mut of_groups = |each: usize| if all { At::Null } else { scratch.take((4 * shares.groups * each).max(4)) };
    let parts = [of_groups(2 + e), of_groups(2 * e)];
    let of_tokens = Shader::file(limits, "route", shares.threads());
    let of_tokens = of_tokens.declare("fn kernel(group: u32, thread: u32) { route_tokens(group, thread); }");
    let of_tokens = logits(shares.route(of_tokens, limits, graph, (node, op), (0, Some(0)), parts));
    let mut actions = vec![of_tokens.line(shares.groups)?];
    if !all {
        let whole = Shares { tokens: THREADS / shares.lanes, ..shares };
        let r = op.router;
        let totals = Shader::file(limits, "route_totals", whole.threads());
        let totals = whole.add(totals, limits, [n, e, r.k], r.score, r.balance);
        actions.push(logits(whole.ending(totals, Some(0), parts)).line(1)?);
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
    let (n, e) = extents(graph, node);
    let shares = Shares::of(n, e, 0)?;
    let counted = counted(op.balance, op.k);
    let chunks = (n * counted).div_ceil(COUNTED_CHUNK);
    let mut scratch = Scratch::default();
    let counts = scratch.take((4 * chunks * e).max(4));
    let of_tokens = Shader::file(limits, "route_grad", shares.threads());
    let of_tokens = shares
        .add(of_tokens, limits, [n, e, op.k], op.score, op.balance)
        .number("chunks", chunks)
        .buffer("logits", DType::F32, At::Operand(0))
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

fn choice_major(op: &Assign, k: usize) -> bool {
    op.order == Order::ChoiceMajor && k > 1
}

/// How the slots of a node are given: the choices of a chunk of them, where slots are in the order of the choices and so is who is
/// dropped; and the capacity, if an expert can reach it.
fn assigning(graph: &Graph, node: &Node, op: &Assign) -> Result<(Option<usize>, Option<usize>), String> {
    let (n, k) = extents(graph, node);
    if op.experts > MOST_EXPERTS {
        return Err(format!("at most {MOST_EXPERTS} experts, not {}", op.experts));
    }
    // A capacity that no expert can reach is none.
    let capacity = op.capacity.filter(|&c| c < n * k);
    let in_order = capacity.is_none() || (node.operands.len() == 1 && !choice_major(op, k));
    let chunk = (n * k).div_ceil(MOST_CHUNKS).next_multiple_of(LEAST_CHUNK).max(LEAST_CHUNK);
    Ok((in_order.then_some(chunk), capacity))
}

/// What the kernels of an assign have, whose first result is this; they also have the `index`.
fn assign(shader: Shader, graph: &Graph, node: &Node, capacity: Option<usize>, result: usize) -> Shader {
    shader
        .flag("LIMITED", capacity.is_some())
        .number("capacity", capacity.unwrap_or(0))
        .number("slots", graph.ty(node.results[0]).elements())
        .buffer("slot_choice", DType::I32, At::Result(result))
        .buffer("choice_slot", DType::I32, At::Result(result + 1))
        .buffer("offsets", DType::I32, At::Result(result + 2))
        .buffer("dropped", DType::I32, At::Result(result + 3))
}

/// What `assign_in_order.wgsl` needs for choices that are one chunk, or are counted by chunks.
///
/// # Errors
/// What is wanted instead of an assign whose slots are not in order, or of more chunks than one that are not counted.
pub(super) fn assign_in_order(
    shader: Shader,
    graph: &Graph,
    (node, op): (&Node, &Assign),
    [_, result]: [usize; 2],
    counts: Option<At>,
) -> Result<Shader, String> {
    let ((n, k), (chunk, capacity)) = (extents(graph, node), assigning(graph, node, op)?);
    let chunk = chunk.filter(|&chunk| counts.is_some() || n * k <= chunk);
    let chunk = chunk.ok_or("choices that are given slots in their order, in one chunk")?;
    let shader = assign(shader, graph, node, capacity, result).constant("EXPERTS", op.experts);
    let shader = shader.number("choices", n * k).number("chunk", chunk);
    let shader = shader.number("chunks", (n * k).div_ceil(chunk).max(1));
    Ok(shader.buffer("chunk_counts", DType::I32, counts.unwrap_or(At::Null)))
}

pub(super) fn lower_assign(graph: &Graph, node: &Node, op: &Assign, limits: Limits) -> Lowered {
    let ((n, k), (chunk, capacity)) = (extents(graph, node), assigning(graph, node, op)?);
    let (mut scratch, mut actions) = (Scratch::default(), Vec::new());
    let shader = |name| Shader::file(limits, name, THREADS).buffer("index", DType::I32, At::Operand(0));
    if let Some(chunk) = chunk {
        let chunks = (n * k).div_ceil(chunk).max(1);
        let counts = if chunks > 1 { scratch.take(4 * chunks * op.experts) } else { At::Null };
        if chunks > 1 {
            actions.push(count(limits, [n, k, k], [op.experts, chunk, chunks], At::Operand(0), counts)?);
        }
        let shader = assign_in_order(shader("assign_in_order"), graph, (node, op), [0, 0], Some(counts))?;
        let shader = shader.declare("fn kernel(group: u32, thread: u32) { assign_chunk(group, thread); }");
        actions.push(shader.line(chunks)?);
    } else {
        let kept = scratch.take(4 * n * k);
        let priority = if node.operands.len() > 1 { At::Operand(1) } else { At::Null };
        let shader = assign(shader("assign"), graph, node, capacity, 0);
        let shader = shader.constant("MOST_EXPERTS", MOST_EXPERTS);
        let shader = shader.flag("CHOICE_MAJOR", choice_major(op, k));
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
