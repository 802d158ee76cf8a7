//! Launches of the sparse-expert ops that are not matrix products.

use moebius_ir::ops::{Assign, Balance, Combine, GroupScore, NoiseUse, Order, Route, RouteGrad, Score};
use moebius_ir::{Graph, Node};

use super::{Lowered, dtype, int, per_lane, shapes, typed};
use crate::cuda::launch::{Action, Arg, Launch, Scratch, kernel};
use crate::cuda::source::{ROUTER, Source, VECTORS};

const ROUTE: &str = include_str!("../kernels/route.cu");
const ROUTE_GRAD: &str = include_str!("../kernels/route_grad.cu");
const ASSIGN: &str = include_str!("../kernels/assign.cu");
const ROWS: &str = include_str!("../kernels/rows.cu");

/// Tokens of a warp of the router, and threads that join its blocks' statistics, as in the kernel.
const WARP_TOKENS: usize = 4;
const FINISH_THREADS: u32 = 1024;
/// The most experts: what shared memory holds of a token.
const MOST_EXPERTS: usize = 1024;
/// Threads of a block of the kernels on rows.
const THREADS: usize = 128;
/// Blocks of a sum over segments that keep a large GPU busy: eight for each of 132 processors.
const ENOUGH_BLOCKS: usize = 1056;
/// Rows that a part of the longest segment should have.
const LEAST_ROWS: usize = 64;

fn counted(balance: Balance, k: usize) -> usize {
    match balance {
        Balance::FirstChoice => 1,
        Balance::AllChoices => k,
    }
}

/// A file of the router for its extents and score.
fn router(
    file: &'static str,
    text: &'static str,
    experts: usize,
    k: usize,
    score: Score,
    balance: Balance,
) -> Result<Source, String> {
    if experts > MOST_EXPERTS {
        return Err(format!("at most {MOST_EXPERTS} experts, not {experts}"));
    }
    let (which, jitter) = match score {
        Score::Softmax => (0, None),
        Score::Sigmoid => (1, None),
        Score::SqrtSoftplus => (2, None),
        Score::Identity => (3, None),
        Score::SparseMixer { jitter_eps } => (4, Some(jitter_eps)),
    };
    let source = Source::new(file, &[ROUTER], text)
        .define("EXPERTS", experts)
        .define("K", k)
        .define("COUNTED", counted(balance, k))
        .define("SCORE", which);
    // Twice the epsilon, bit for bit.
    Ok(match jitter {
        Some(eps) => source.define("JITTER", format!("__uint_as_float(0x{:08x}u)", (2.0 * eps as f32).to_bits())),
        None => source,
    })
}

pub(super) fn lower_route(graph: &Graph, node: &Node, op: &Route) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let (r, at) = (op.router, op.operands());
    let (groups, keep, top2) = r.groups.map_or((0, 0, false), |g| (g.count, g.keep, g.by == GroupScore::Top2Sum));
    // Few tokens of many experts: shared memory holds a row of each for every warp.
    let warps = if e <= 256 { 4 } else { 1 };
    let source = router("route.cu", ROUTE, e, r.k, r.score, r.balance)?
        .define("GROUPS", groups)
        .define("KEEP", keep)
        .define("TOP2", u8::from(top2))
        .define("LATER", u8::from(op.noise == Some(NoiseUse::LaterChoices)))
        .define("WARPS", warps);
    let blocks = n.div_ceil(WARP_TOKENS * warps as usize);
    let (tokens, blocks_arg) = (Arg::I32(int(n, "tokens")?), Arg::I32(int(blocks, "tokens")?));
    let mut scratch = Scratch::default();
    let p = scratch.take(4 * blocks * e);
    let counts = scratch.take(8 * blocks * e);
    let sums = scratch.take(8 * blocks);
    let optional = [at.selection_bias, at.noise, at.used, at.choices].map(|i| i.map_or(Arg::Null, Arg::Operand));
    let partial = [p, counts, sums];
    let of_tokens =
        [&[Arg::Operand(0)][..], &optional, &[tokens.clone(), Arg::Result(0), Arg::Result(1)], &partial].concat();
    let of_blocks = [&partial[..], &[blocks_arg, tokens], &[2, 3, 4, 5].map(Arg::Result)].concat();
    let actions = vec![
        kernel(source.clone(), "route", [blocks, 1, 1], 32 * warps, of_tokens),
        kernel(source, "route_finish", [1, 1, 1], FINISH_THREADS, of_blocks),
    ];
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

pub(super) fn lower_route_grad(graph: &Graph, node: &Node, op: &RouteGrad) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let source = router("route_grad.cu", ROUTE_GRAD, e, op.k, op.score, op.balance)?;
    let tokens = Arg::I32(int(n, "tokens")?);
    let mut scratch = Scratch::default();
    let counts = scratch.take(4 * e);
    let blocks = (n * counted(op.balance, op.k)).div_ceil(THREADS);
    let of_choices = vec![Arg::Operand(1), tokens.clone(), counts.clone()];
    let operands = [0, 1, 2, 3, 4].map(Arg::Operand);
    let of_tokens = [&operands[..], &[counts.clone(), tokens, Arg::Result(0)]].concat();
    let actions = vec![
        Action::Clear { at: counts, bytes: 4 * e },
        kernel(source.clone(), "count_choices", [blocks, 1, 1], THREADS as u32, of_choices),
        kernel(source, "route_grad", [n.div_ceil(THREADS / 32), 1, 1], THREADS as u32, of_tokens),
    ];
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

pub(super) fn lower_assign(graph: &Graph, node: &Node, op: &Assign) -> Lowered {
    let (n, k) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let slots = graph.ty(node.results[0]).elements();
    if op.experts > MOST_EXPERTS {
        return Err(format!("at most {MOST_EXPERTS} experts, not {}", op.experts));
    }
    // A capacity that no expert can reach is none.
    let capacity = op.capacity.filter(|&c| c < n * k).map_or(-1, |c| c as i32);
    let choice_major = match op.order {
        Order::TokenMajor => 0,
        Order::ChoiceMajor => 1,
    };
    let priority = if node.operands.len() > 1 { Arg::Operand(1) } else { Arg::Null };
    let mut scratch = Scratch::default();
    let kept = scratch.take(if capacity < 0 { 0 } else { n * k });
    let sizes =
        [int(n, "tokens")?, int(k, "choices")?, op.experts as i32, capacity, choice_major, int(slots, "slots")?];
    let results = [0, 1, 2, 3].map(Arg::Result);
    let args = [&[Arg::Operand(0), priority][..], &sizes.map(Arg::I32), &results, &[kept]].concat();
    let source = Source::new("assign.cu", &[VECTORS], ASSIGN);
    Ok(Launch::one(source, "assign", [op.experts, 1, 1], 512, args).with_scratch(scratch.bytes()))
}

/// Slots, tokens, choices of each and width of the ops between tokens and slots; in i32 as the kernels count.
fn extents(slots: usize, n: usize, k: usize, d: usize) -> Result<[i32; 4], String> {
    Ok([int(slots, "slots")?, int(n * k, "choices")?, int(k, "choices")?, int(d, "a width")?])
}

/// The kernels on rows of `d` elements.
fn rows(graph: &Graph, node: &Node, d: usize) -> Result<Source, String> {
    let dtype = dtype(graph, node, 0);
    Ok(typed("rows.cu", &[VECTORS], ROWS, dtype)?.define("PER_LANE", per_lane(dtype, d)))
}

/// A warp for each of so many rows.
fn by_warp(source: Source, name: &'static str, rows: usize, args: Vec<Arg>) -> Launch {
    Launch::one(source, name, [rows.div_ceil(THREADS / 32), 1, 1], THREADS as u32, args)
}

pub(super) fn lower_dispatch(graph: &Graph, node: &Node) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (d, s, k) = (x[1], slot_choice[0], choice_slot[1]);
    let [slots, choices, k, width] = extents(s, choice_slot[0], k, d)?;
    let gate = if node.operands.len() > 3 { Arg::Operand(3) } else { Arg::Null };
    let sizes = [slots, choices, k, width].map(Arg::I32);
    let args = [&[Arg::Operand(0), Arg::Operand(1), gate][..], &sizes, &[Arg::Result(0)]].concat();
    Ok(by_warp(rows(graph, node, d)?, "dispatch", s, args))
}

pub(super) fn lower_combine(graph: &Graph, node: &Node, op: Combine) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (d, n) = (x[1], choice_slot[0]);
    let [slots, _, k, width] = extents(slot_choice[0], n, choice_slot[1], d)?;
    let optional = op.operands().map(|i| i.map_or(Arg::Null, Arg::Operand));
    let sizes = [slots, int(n, "tokens")?, k, width].map(Arg::I32);
    let args = [&[Arg::Operand(0), Arg::Operand(2)][..], &optional, &sizes, &[Arg::Result(0)]].concat();
    Ok(by_warp(rows(graph, node, d)?, "combine", n, args))
}

pub(super) fn lower_gate_grad(graph: &Graph, node: &Node) -> Lowered {
    let [x, y, slot_choice, choice_slot] = shapes(graph, node);
    let sizes = extents(slot_choice[0], y[0], choice_slot[1], x[1])?;
    let choices = choice_slot.elements();
    let operands = [Arg::Operand(0), Arg::Operand(1), Arg::Operand(3)];
    let args = [&operands[..], &sizes.map(Arg::I32), &[Arg::Result(0)]].concat();
    Ok(by_warp(rows(graph, node, x[1])?, "gate_grad", choices, args))
}

pub(super) fn lower_segment_sum(graph: &Graph, node: &Node) -> Lowered {
    let [x, offsets] = shapes(graph, node);
    let (width, experts) = (x[1], offsets[0] - 1);
    let blocks = width.div_ceil(THREADS) * experts;
    // As if the rows were dealt out evenly; a segment may have all of them.
    let parts = ENOUGH_BLOCKS.div_ceil(blocks.max(1)).min(x[0].div_ceil(LEAST_ROWS)).max(1);
    let results = experts * width;
    let mut scratch = Scratch::default();
    let partial = if parts > 1 { scratch.take(4 * parts * results) } else { Arg::Null };
    let sizes = Arg::I32(int(width, "a width")?);
    let args = vec![Arg::Operand(0), Arg::Operand(1), sizes, partial.clone(), Arg::Result(0)];
    let source = rows(graph, node, width)?;
    let grid = [width.div_ceil(THREADS), experts, parts];
    let mut actions = vec![kernel(source.clone(), "segment_sum", grid, THREADS as u32, args)];
    if parts > 1 {
        let args = vec![partial, Arg::size(results), Arg::I32(int(parts, "parts")?), Arg::Result(0)];
        actions.push(kernel(source, "segment_sum_finish", [results.div_ceil(THREADS), 1, 1], THREADS as u32, args));
    }
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}
