//! Launches of the ops on rows of slots and tokens.

use moebius_ir::ops::Combine;
use moebius_ir::{Graph, Node};

use super::joined::{self, Joined};
use super::{Lowered, dtype, float, int, per_lane, shapes, typed};
use crate::cuda::launch::{Arg, Launch, Scratch, kernel};
use crate::cuda::source::{FUNCTIONS, Source, VECTORS};
use crate::joined::Beside;

const ROWS: &str = include_str!("../kernels/rows.cu");
const COMBINE: &str = include_str!("../kernels/combine.cu");

/// The most tokens of which each has a block where they are combined.
const FEW_TOKENS: usize = 64;
/// Threads of a block of the kernels on rows.
const THREADS: usize = 128;
/// Blocks of a sum over segments that keep a large GPU busy: eight for each of 132 processors.
const ENOUGH_BLOCKS: usize = 1056;
/// Rows that a part of the longest segment should have.
const LEAST_ROWS: usize = 64;

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

pub(super) fn lower_combine(graph: &Graph, node: &Node, op: Combine, beside: Beside) -> Lowered {
    let [x, slot_choice, choice_slot] = shapes(graph, node);
    let (d, n) = (x[1], choice_slot[0]);
    let [slots, _, k, width] = extents(slot_choice[0], n, choice_slot[1], d)?;
    let optional = op.operands().map(|i| i.map_or(Arg::Null, Arg::Operand));
    let sizes = [slots, int(n, "tokens")?, k, width].map(Arg::I32);
    // Where a token's row would wait for one warp to go through it, a block has it.
    let few = n <= FEW_TOKENS;
    let joined = Joined::new(graph, node, beside.behind)?.filter(|_| few);
    let joined = joined.as_ref();
    let args = [&[Arg::Operand(0), Arg::Operand(2)][..], &optional, &sizes, &[joined::out(joined)]].concat();
    let args = [args, joined::args(joined)].concat();
    let dtype = dtype(graph, node, 0);
    let whole = per_lane(dtype, d);
    let per_lane = if joined.is_none_or(|joined| joined.eights) { whole } else { 1 };
    let lanes = if few { THREADS } else { 32 };
    let source = joined::source(joined, "combine.cu", &[FUNCTIONS, VECTORS], COMBINE)
        .define("T", float(dtype)?)
        .define("PER_LANE", per_lane)
        .define("LANES", lanes);
    let launch = Launch::one(source, "combine", [n.div_ceil(THREADS / lanes), 1, 1], THREADS as u32, args);
    Ok(joined::with(joined, launch))
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
