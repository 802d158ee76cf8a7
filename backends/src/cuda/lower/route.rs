//! Launches of the router: route, its gradient, and assign, which are one kernel for few tokens.

use moebius_ir::ops::{Assign, Balance, GroupScore, NoiseUse, Order, Route, RouteGrad, Score};
use moebius_ir::{Graph, Node, Op};

use super::{Lowered, int};
use crate::cuda::launch::{Action, Arg, Joint, Launch, Scratch, kernel};
use crate::cuda::source::{ORDER, ROUTE, ROUTER, ROUTING, Source, VECTORS};
use crate::joined::Beside;

const TEXT: &str = include_str!("../kernels/route.cu");
const FEW: &str = include_str!("../kernels/route_few.cu");
const GRAD: &str = include_str!("../kernels/route_grad.cu");
const ASSIGN: &str = include_str!("../kernels/assign.cu");

/// Tokens of a warp, and threads that join the blocks' statistics, as in the kernel.
const WARP_TOKENS: usize = 4;
const FINISH_THREADS: u32 = 1024;
/// The most experts: what shared memory holds of a token.
const MOST_EXPERTS: usize = 1024;
/// The most warps of the block that routes few tokens, and bytes of shared memory for what each has of an expert.
const FEW_WARPS: usize = 16;
const FEW_BYTES: usize = 32 * 1024;
/// Threads of a block of the gradient's kernels.
const THREADS: usize = 128;

fn counted(balance: Balance, k: usize) -> usize {
    match balance {
        Balance::FirstChoice => 1,
        Balance::AllChoices => k,
    }
}

/// A file of the router for its extents and score.
fn router(source: Source, experts: usize, k: usize, score: Score, balance: Balance) -> Result<Source, String> {
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
    let source =
        source.define("EXPERTS", experts).define("K", k).define("COUNTED", counted(balance, k)).define("SCORE", which);
    // Twice the epsilon, bit for bit.
    Ok(match jitter {
        Some(eps) => source.define("JITTER", format!("__uint_as_float(0x{:08x}u)", (2.0 * eps as f32).to_bits())),
        None => source,
    })
}

/// A file with [`ROUTE`] for a route over so many experts by blocks of so many warps.
fn choosing(source: Source, op: &Route, experts: usize, warps: usize) -> Result<Source, String> {
    let r = op.router;
    let (groups, keep, top2) = r.groups.map_or((0, 0, false), |g| (g.count, g.keep, g.by == GroupScore::Top2Sum));
    Ok(router(source, experts, r.k, r.score, r.balance)?
        .define("GROUPS", groups)
        .define("KEEP", keep)
        .define("TOP2", u8::from(top2))
        .define("LATER", u8::from(op.noise == Some(NoiseUse::LaterChoices)))
        .define("ROUTING_WARPS", warps))
}

/// The operands of a route, null where there is none.
fn operands(op: &Route) -> Vec<Arg> {
    let at = op.operands();
    let optional = [at.selection_bias, at.noise, at.used, at.choices].map(|i| i.map_or(Arg::Null, Arg::Operand));
    [&[Arg::Operand(0)][..], &optional].concat()
}

pub(super) fn lower_route(graph: &Graph, node: &Node, op: &Route, beside: Beside) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    if let Some(assign) = beside.behind.map(|id| graph.node(id))
        && let Op::Assign(slots) = &assign.op
        && n > 0
        && e <= MOST_EXPERTS
    {
        return lower_few(graph, [node, assign], op, slots, [n, e]);
    }
    // Few tokens of many experts: shared memory holds a row of each for every warp.
    let warps = if e <= 256 { 4 } else { 1 };
    let source = choosing(Source::new("route.cu", &[ROUTER, ROUTE], TEXT), op, e, warps)?;
    let blocks = n.div_ceil(WARP_TOKENS * warps);
    let (tokens, blocks_arg) = (Arg::I32(int(n, "tokens")?), Arg::I32(int(blocks, "tokens")?));
    let mut scratch = Scratch::default();
    let p = scratch.take(4 * blocks * e);
    let counts = scratch.take(8 * blocks * e);
    let sums = scratch.take(8 * blocks);
    let partial = [p, counts, sums];
    let of_tokens = [&operands(op)[..], &[tokens.clone(), Arg::Result(0), Arg::Result(1)], &partial].concat();
    let of_blocks = [&partial[..], &[blocks_arg, tokens], &[2, 3, 4, 5].map(Arg::Result)].concat();
    let actions = vec![
        kernel(source.clone(), "route", [blocks, 1, 1], 32 * warps as u32, of_tokens),
        kernel(source, "route_finish", [1, 1, 1], FINISH_THREADS, of_blocks),
    ];
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

/// A route of few tokens with the assign behind it.
fn lower_few(graph: &Graph, nodes: [&Node; 2], op: &Route, slots: &Assign, [n, e]: [usize; 2]) -> Lowered {
    // A row of each warp: two or three numbers and a flag for each expert.
    let warps = n.min(FEW_WARPS).min(FEW_BYTES / (13 * e.max(1))).max(1);
    let routing = Routing { nodes, op, slots, extents: [n, e] };
    let source = Source::new("route_few.cu", &[ROUTER, ROUTE, ORDER, ROUTING], FEW);
    let behind = [nodes[0].operands.len(), nodes[0].results.len()];
    let args = routing.args(graph, [[0, 0], behind])?;
    let launch = Launch::one(routing.source(source, warps)?, "route_few", [1, 1, 1], 32 * warps as u32, args);
    Ok(Launch { behind: Joint::Stored, ..launch })
}

/// A route of few tokens and the assign behind it, as one block does them.
pub(super) struct Routing<'a> {
    pub(super) nodes: [&'a Node; 2],
    pub(super) op: &'a Route,
    pub(super) slots: &'a Assign,
    /// Tokens and experts.
    pub(super) extents: [usize; 2],
}

impl Routing<'_> {
    /// A file with [`ROUTING`], by a block of so many warps.
    ///
    /// # Errors
    /// Of too many experts.
    pub(super) fn source(&self, source: Source, warps: usize) -> Result<Source, String> {
        let [n, e] = self.extents;
        Ok(choosing(source, self.op, e, warps)?.define("TOKENS", n).define("ASSIGNED", self.slots.experts))
    }

    /// The arguments for `ROUTING_PARAMETERS`; operands and results of both nodes begin behind so many others.
    ///
    /// # Errors
    /// Of sizes that kernels cannot count.
    pub(super) fn args(&self, graph: &Graph, [of_route, of_assign]: [[usize; 2]; 2]) -> Result<Vec<Arg>, String> {
        let [_, assign] = self.nodes;
        let priority = if assign.operands.len() > 1 { Arg::Operand(1) } else { Arg::Null };
        let [capacity, choice_major, count] = numbers(graph, assign, self.slots)?;
        let route = operands(self.op).into_iter().chain((0..6).map(Arg::Result)).map(|arg| arg.behind(of_route));
        let assign = [priority, capacity, choice_major, count].into_iter().chain((0..4).map(Arg::Result));
        Ok(route.chain(assign.map(|arg| arg.behind(of_assign))).collect())
    }
}

pub(super) fn lower_route_grad(graph: &Graph, node: &Node, op: &RouteGrad) -> Lowered {
    let (n, e) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    let source = router(Source::new("route_grad.cu", &[ROUTER], GRAD), e, op.k, op.score, op.balance)?;
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

/// Of an assign its capacity, -1 for none, whether first choices come first, and its slots.
fn numbers(graph: &Graph, node: &Node, op: &Assign) -> Result<[Arg; 3], String> {
    let choices = graph.ty(node.operands[0]).elements();
    // A capacity that no expert can reach is none.
    let capacity = op.capacity.filter(|&c| c < choices).map_or(-1, |c| c as i32);
    let choice_major = match op.order {
        Order::TokenMajor => 0,
        Order::ChoiceMajor => 1,
    };
    Ok([capacity, choice_major, int(graph.ty(node.results[0]).elements(), "slots")?].map(Arg::I32))
}

pub(super) fn lower_assign(graph: &Graph, node: &Node, op: &Assign) -> Lowered {
    let (n, k) = (graph.shape(node.operands[0])[0], graph.shape(node.operands[0])[1]);
    if op.experts > MOST_EXPERTS {
        return Err(format!("at most {MOST_EXPERTS} experts, not {}", op.experts));
    }
    let [capacity, choice_major, slots] = numbers(graph, node, op)?;
    let priority = if node.operands.len() > 1 { Arg::Operand(1) } else { Arg::Null };
    let mut scratch = Scratch::default();
    let kept = scratch.take(if capacity == Arg::I32(-1) { 0 } else { n * k });
    let sizes = [int(n, "tokens")?, int(k, "choices")?, op.experts as i32].map(Arg::I32);
    let results = [0, 1, 2, 3].map(Arg::Result);
    let operands = [Arg::Operand(0), priority];
    let args = [&operands[..], &sizes, &[capacity, choice_major, slots], &results, &[kept]].concat();
    let source = Source::new("assign.cu", &[VECTORS, ORDER], ASSIGN);
    Ok(Launch::one(source, "assign", [op.experts, 1, 1], 512, args).with_scratch(scratch.bytes()))
}
