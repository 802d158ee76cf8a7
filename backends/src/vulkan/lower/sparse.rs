//! Launches of the sparse-expert ops that are not matrix products.

use moebius_ir::ops::{Assign, Balance, Combine, GroupScore, NoiseUse, Order, Route, RouteGrad, Score};
use moebius_ir::{DType, Graph, Node};

use super::{Lowered, dtype, dtype_of_result};
use crate::lowering::shapes;
use crate::vulkan::launch::{At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// The most experts: what a workgroup counts in its memory.
const MOST_EXPERTS: usize = 1024;
/// Threads of the router's kernels: each has a token.
const ROUTER_THREADS: usize = 64;
const THREADS: usize = 256;
/// Threads that share a row.
const ROW_THREADS: usize = 64;

fn counted(balance: Balance, k: usize) -> usize {
    match balance {
        Balance::FirstChoice => 1,
        Balance::AllChoices => k,
    }
}

fn few_experts(experts: usize) -> Result<(), String> {
    if experts > MOST_EXPERTS { Err(format!("at most {MOST_EXPERTS} experts, not {experts}")) } else { Ok(()) }
}

/// A kernel of the router for its extents and score.
fn router(
    limits: Limits,
    name: &'static str,
    [experts, k]: [usize; 2],
    score: Score,
    balance: Balance,
) -> Result<Shader, String> {
    few_experts(experts)?;
    let (which, jitter) = match score {
        Score::Softmax => (0, 0.0),
        Score::Sigmoid => (1, 0.0),
        Score::SqrtSoftplus => (2, 0.0),
        Score::Identity => (3, 0.0),
        Score::SparseMixer { jitter_eps } => (4, 2.0 * jitter_eps as f32),
    };
    Ok(Shader::file(limits, name, ROUTER_THREADS)
        .with("router")
        .constant("MOST_EXPERTS", MOST_EXPERTS)
        .constant("SCORE", which)
        // Bit for bit.
        .declare(&format!("fn jitter() -> f32 {{ return from_bits(0x{:08x}u); }}", jitter.to_bits()))
        .number("experts", experts)
        .number("k", k)
        .number("counted", counted(balance, k))
        .buffer("logits", DType::F32, At::Operand(0)))
}

pub(super) fn lower_route(graph: &Graph, node: &Node, op: &Route, limits: Limits) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let (r, at) = (op.router, op.operands());
    let (groups, keep, top2) = r.groups.map_or((0, 0, false), |g| (g.count, g.keep, g.by == GroupScore::Top2Sum));
    let mut scratch = Scratch::default();
    let probabilities = scratch.take(4 * n * e);
    let of_tokens = scratch.take(8 * n);
    let shares = scratch.take(4 * e);
    let optional = |i: Option<usize>| i.map_or(At::Null, At::Operand);
    let tokens = router(limits, "route", [e, r.k], r.score, r.balance)?
        .constant("GROUPS", groups)
        .constant("KEEP", keep)
        .flag("TOP2", top2)
        .flag("LATER", op.noise == Some(NoiseUse::LaterChoices))
        .number("n", n)
        .buffer("bias", DType::F32, optional(at.selection_bias))
        .buffer("noise", DType::F32, optional(at.noise))
        .buffer("used", DType::Bool, optional(at.used))
        .buffer("given", DType::I32, optional(at.choices))
        .buffer("probabilities", DType::F32, probabilities)
        .buffer("of_tokens", DType::F32, of_tokens)
        .buffer("gate", DType::F32, At::Result(0))
        .buffer("index", DType::I32, At::Result(1));
    let experts = Shader::file(limits, "route_experts", THREADS)
        .with("sums")
        .number("n", n)
        .number("experts", e)
        .number("k", r.k)
        .number("counted", counted(r.balance, r.k))
        .buffer("probabilities", DType::F32, probabilities)
        .buffer("index", DType::I32, At::Result(1))
        .buffer("shares", DType::F32, shares)
        .buffer("counts", DType::I32, At::Result(4));
    let totals = Shader::file(limits, "route_totals", THREADS)
        .with("sums")
        .number("n", n)
        .number("experts", e)
        .buffer("of_tokens", DType::F32, of_tokens)
        .buffer("shares", DType::F32, shares)
        .buffer("balance", DType::F32, At::Result(2))
        .buffer("z", DType::F32, At::Result(3))
        .buffer("entropy", DType::F32, At::Result(5));
    let actions = vec![tokens.line(n.div_ceil(ROUTER_THREADS))?, experts.line(e)?, totals.line(1)?];
    Ok(Launch::of(actions).with_scratch(&scratch))
}

pub(super) fn lower_route_grad(graph: &Graph, node: &Node, op: &RouteGrad, limits: Limits) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let mut scratch = Scratch::default();
    let counts = scratch.take(4 * e);
    let of_choices = Shader::file(limits, "count_choices", THREADS)
        .with("sums")
        .number("n", n)
        .number("k", op.k)
        .number("counted", counted(op.balance, op.k))
        .buffer("index", DType::I32, At::Operand(1))
        .buffer("counts", DType::I32, counts);
    let of_tokens = router(limits, "route_grad", [e, op.k], op.score, op.balance)?
        .number("n", n)
        .buffer("index", DType::I32, At::Operand(1))
        .buffer("d_gate", DType::F32, At::Operand(2))
        .buffer("d_balance", DType::F32, At::Operand(3))
        .buffer("d_z", DType::F32, At::Operand(4))
        .buffer("counts", DType::I32, counts)
        .buffer("d", DType::F32, At::Result(0));
    let actions = vec![of_choices.line(e)?, of_tokens.line(n.div_ceil(ROUTER_THREADS))?];
    Ok(Launch::of(actions).with_scratch(&scratch))
}

pub(super) fn lower_assign(graph: &Graph, node: &Node, op: &Assign, limits: Limits) -> Lowered {
    let (n, k) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    few_experts(op.experts)?;
    // A capacity that no expert can reach is none.
    let capacity = op.capacity.filter(|&c| c < n * k);
    let priority = if node.operands.len() > 1 { At::Operand(1) } else { At::Null };
    let choice_major = match op.order {
        Order::TokenMajor => false,
        Order::ChoiceMajor => true,
    };
    let mut scratch = Scratch::default();
    let kept = if capacity.is_some() { scratch.take(4 * n * k) } else { At::Null };
    let shader = Shader::file(limits, "assign", THREADS)
        .constant("MOST_EXPERTS", MOST_EXPERTS)
        .flag("LIMITED", capacity.is_some())
        .flag("CHOICE_MAJOR", choice_major)
        .number("n", n)
        .number("k", k)
        .number("experts", op.experts)
        .number("capacity", capacity.unwrap_or(0))
        .number("slots", graph.ty(node.results[0]).elements())
        .buffer("index", DType::I32, At::Operand(0))
        .buffer("priority", DType::F32, priority)
        .buffer("slot_choice", DType::I32, At::Result(0))
        .buffer("choice_slot", DType::I32, At::Result(1))
        .buffer("offsets", DType::I32, At::Result(2))
        .buffer("dropped", DType::I32, At::Result(3))
        .buffer("kept", DType::U32, kept);
    Ok(Launch::of(vec![shader.line(op.experts)?]).with_scratch(&scratch))
}

/// The kernel of rows of `d` elements, which are moved eight at a time where a row has a multiple of eight; and how many at a time.
fn of_rows(limits: Limits, [one, eight]: [&'static str; 2], d: usize) -> (Shader, usize) {
    if d.is_multiple_of(8) {
        (Shader::file(limits, eight, THREADS).with("eight"), 8)
    } else {
        (Shader::file(limits, one, THREADS), 1)
    }
}

/// A buffer of such a kernel.
fn moved(shader: Shader, wide: usize, name: &str, dtype: DType, at: At) -> Shader {
    if wide == 8 { shader.by_eight(name, dtype, at) } else { shader.buffer(name, dtype, at) }
}

/// A kernel with a thread for each of `elements`.
fn each(shader: Shader, elements: usize) -> Lowered {
    Ok(Launch::of(vec![shader.line(elements.div_ceil(THREADS))?]))
}

pub(super) fn lower_dispatch(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (d, slots, ty) = (x[1], slot_choice[0], dtype(graph, node, 0));
    let gate = if node.operands.len() > 3 { At::Operand(3) } else { At::Null };
    let (shader, wide) = of_rows(limits, ["dispatch", "dispatch_eight"], d);
    let shader = shader
        .number("slots", slots)
        .number("choices", choice_slot.elements())
        .number("k", choice_slot[1])
        .number("d", d)
        .buffer("slot_choice", DType::I32, At::Operand(1))
        .buffer("gate", DType::F32, gate);
    let shader = moved(shader, wide, "x", ty, At::Operand(0));
    each(moved(shader, wide, "rows", ty, At::Result(0)), slots * d / wide)
}

pub(super) fn lower_combine(graph: &Graph, node: &Node, op: Combine, limits: Limits) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (d, tokens, ty) = (x[1], choice_slot[0], dtype(graph, node, 0));
    let [gate, side, coefficient] = op.operands().map(|i| i.map_or(At::Null, At::Operand));
    let (shader, wide) = of_rows(limits, ["combine", "combine_eight"], d);
    let shader = shader
        .number("slots", slot_choice[0])
        .number("tokens", tokens)
        .number("k", choice_slot[1])
        .number("d", d)
        .buffer("choice_slot", DType::I32, At::Operand(2))
        .buffer("gate", DType::F32, gate)
        .buffer("coefficient", DType::F32, coefficient);
    let shader = moved(shader, wide, "rows", ty, At::Operand(0));
    let shader = moved(shader, wide, "side", ty, side);
    each(moved(shader, wide, "y", dtype_of_result(graph, node, 0), At::Result(0)), tokens * d / wide)
}

pub(super) fn lower_gate_grad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [x, _, slot_choice, choice_slot] = shapes(graph, node);
    let shader = Shader::file(limits, "gate_grad", ROW_THREADS)
        .with("sums")
        .number("slots", slot_choice[0])
        .number("k", choice_slot[1])
        .number("d", x[1])
        .buffer("rows", dtype(graph, node, 0), At::Operand(0))
        .buffer("y", dtype(graph, node, 1), At::Operand(1))
        .buffer("choice_slot", DType::I32, At::Operand(3))
        .buffer("gates", DType::F32, At::Result(0));
    Ok(Launch::of(vec![shader.line(choice_slot.elements())?]))
}

pub(super) fn lower_segment_sum(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [x, offsets] = shapes(graph, node);
    let (width, experts) = (x[1], offsets[0] - 1);
    let shader = Shader::file(limits, "segment_sum", THREADS)
        .number("width", width)
        .number("experts", experts)
        .buffer("rows", dtype(graph, node, 0), At::Operand(0))
        .buffer("offsets", DType::I32, At::Operand(1))
        .buffer("y", dtype_of_result(graph, node, 0), At::Result(0));
    each(shader, experts * width)
}
