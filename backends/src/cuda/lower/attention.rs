//! Launches of attention, its gradient, and attention over a cache.

use moebius_ir::ops::{Attention, AttentionCached, AttentionGrad};
use moebius_ir::{DType, Graph, Node};

use super::early::{alone_writes, stays};
use super::few_rows::MOST_CLUSTER;
use super::wgmma::{held_instruction, instructions};
use super::{Lowered, dtype, float, int, per_lane, shapes, typed};
use crate::cuda::chip::Chip;
use crate::cuda::launch::{Action, Arg, Kernel, Launch, Scratch, TensorBox, kernel};
use crate::cuda::source::{CLUSTER, HALVES, HEADS, HOPPER, MMA, Source, TILES, VECTORS};

const TEXT: &str = include_str!("../kernels/attention.cu");
const FAST: &str = include_str!("../kernels/attention_mma.cu");
const FAST_GRAD: &str = include_str!("../kernels/attention_grad_mma.cu");
const HOPPERS: &str = include_str!("../kernels/attention_hopper.cu");
const CACHED: &str = include_str!("../kernels/attention_cached.cu");
const THREADS: usize = 128;
/// The widest head: four blocks of rows must fit shared memory.
const MOST_HEAD: usize = 256;

/// Keys of a cache that a block takes, whatever the room: the order of the sums depends on the keys alone.
const CHUNK: usize = 256;
/// Threads of such a block: as many as have all keys of the chunk on their way at once.
const CACHED_THREADS: u32 = 256;
/// The most lanes that share a key of a cache.
const MOST_GROUP: usize = 32;

/// Queries and keys of a block, so that four blocks of rows and two of scores fit 48 KB of shared memory.
fn block(head: usize) -> Result<usize, String> {
    match head {
        0..=64 => Ok(32),
        65..=128 => Ok(16),
        129..=MOST_HEAD => Ok(8),
        wider => Err(format!("heads of at most {MOST_HEAD}, not {wider}")),
    }
}

/// Rows of the blocks of the tensor cores' kernels, by the width of a head, so that two blocks of others at a time and the own
/// rows fit 48 KB of shared memory, and a warp's sums its registers.
#[derive(Clone, Copy)]
struct Fast {
    /// Rows of 16 queries that a warp has, forward.
    tall: usize,
    /// Keys of a block, forward.
    keys: usize,
    /// Rows of a block that the own rows meet, backward.
    others: usize,
    /// Backward, the own rows stay in registers.
    held: bool,
}

/// Warps of a block of the tensor cores' kernels.
const WARPS: usize = 4;
/// Own rows of a block, backward.
const OWN: usize = 16 * WARPS;

impl Fast {
    /// The rule that says what the tensor cores' kernels take: floats of 16 bits, and heads of a width that they are made for.
    fn of(dtype: DType, head: usize) -> Option<Fast> {
        match (dtype, head) {
            (DType::Bf16 | DType::F16, 32 | 64) => Some(Fast { tall: 2, keys: 64, others: 32, held: true }),
            (DType::Bf16 | DType::F16, 128) => Some(Fast { tall: 1, keys: 32, others: 16, held: false }),
            (DType::Bf16 | DType::F16 | DType::F32 | DType::I32 | DType::U32 | DType::Bool, _) => None,
        }
    }
}

/// Hopper's kernels: the width of a head, own rows of a block, its threads, those of the gradients', and bytes of its shared memory: own
/// rows twice, three stages of others with their numbers, the barriers, and what aligns them.
const HOPPER_HEAD: usize = 64;
const HOPPER_OWN: usize = 128;
const HOPPER_THREADS: u32 = 288;
const HOPPER_GRAD_THREADS: u32 = 384;
const HOPPER_SHARED: usize =
    2 * HOPPER_OWN * HOPPER_HEAD * 2 + 3 * (2 * 64 * HOPPER_HEAD * 2 + 2 * 64 * 4) + 8 * (1 + 2 * 3) + 1024 + 8;

/// Extents of packed queries, keys and values.
struct Packed {
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    dtype: DType,
}

impl Packed {
    fn of(graph: &Graph, node: &Node, heads: usize, kv_heads: usize) -> Packed {
        let [qkv] = shapes(graph, node);
        let head = qkv[2] / (heads + 2 * kv_heads);
        Packed { batch: qkv[0], tokens: qkv[1], heads, kv_heads, head, dtype: dtype(graph, node, 0) }
    }

    /// The struct `Heads` of the kernels.
    fn arg(&self, causal: bool, scale: f32) -> Result<Arg, String> {
        let mut bytes = Vec::with_capacity(24);
        for n in [self.batch, self.tokens, self.heads, self.kv_heads, usize::from(causal)] {
            bytes.extend(int(n, "an extent of attention")?.to_le_bytes());
        }
        bytes.extend(scale.to_le_bytes());
        Ok(Arg::Bytes(bytes))
    }

    /// The plain kernels, and the rows of their blocks.
    fn plain(&self) -> Result<(Source, usize), String> {
        let block = block(self.head)?;
        let source = typed("attention.cu", &[HEADS], TEXT, self.dtype)?;
        Ok((source.define("HEAD", self.head).define("BLOCK", block), block))
    }

    /// A file of the tensor cores' kernels.
    fn fast(&self, file: &'static str, text: &'static str) -> Result<Source, String> {
        Ok(typed(file, &[HALVES, MMA, HEADS, TILES], text, self.dtype)?.define("HEAD", self.head))
    }

    /// Whether Hopper's own kernels take it: heads that are one line of shared memory.
    fn is_for_hopper(&self, chip: Chip) -> bool {
        chip.hopper && matches!(self.dtype, DType::Bf16 | DType::F16) && self.head == HOPPER_HEAD && self.tokens > 0
    }

    /// A tensor `[batch, tokens, columns]` in boxes of 64 tokens of a head.
    fn boxed(&self, at: Arg, columns: usize) -> Arg {
        Arg::Box(Box::new(TensorBox {
            at,
            dtype: self.dtype,
            dims: [columns, self.tokens, self.batch],
            strides: [2 * columns, 2 * columns * self.tokens],
            extent: [HOPPER_HEAD, 64, 1],
        }))
    }

    /// One of Hopper's kernels, a block for each own rows of each of `heads` heads.
    fn hopper(&self, name: &'static str, threads: u32, heads: usize, args: Vec<Arg>) -> Result<Action, String> {
        let rows = instructions(self.dtype, &[64], true, true)? + &held_instruction(self.dtype, 64, false)?;
        let text = format!("{rows}\n#line 1 \"attention_hopper.cu\"\n{HOPPERS}");
        let source =
            Source::generated("attention_hopper.cu", &[HALVES, HOPPER, HEADS], text).define("T", float(self.dtype)?);
        Ok(Action::Kernel(Kernel {
            source: source.define("HEAD", self.head).define("SHARED", HOPPER_SHARED),
            name,
            grid: self.grid(heads, HOPPER_OWN),
            threads,
            shared: HOPPER_SHARED,
            args,
        }))
    }

    /// Columns of qkv, and of a result.
    fn columns(&self) -> [usize; 2] {
        [(self.heads + 2 * self.kv_heads) * self.head, self.heads * self.head]
    }

    /// A block for each block of `rows` rows of each of `heads` heads.
    fn grid(&self, heads: usize, rows: usize) -> [usize; 3] {
        [self.tokens.div_ceil(rows), heads, self.batch]
    }
}

pub(super) fn lower_attention(graph: &Graph, node: &Node, op: &Attention, chip: Chip) -> Lowered {
    let p = Packed::of(graph, node, op.heads, op.kv_heads);
    if p.is_for_hopper(chip) {
        let qkv = p.boxed(Arg::Operand(0), p.columns()[0]);
        let args = vec![qkv, Arg::Result(0), Arg::Result(1), p.arg(op.causal, op.scale)?];
        return Ok(Launch::of(vec![p.hopper("attention_hopper", HOPPER_THREADS, op.heads, args)?]));
    }
    let args = vec![Arg::Operand(0), Arg::Result(0), Arg::Result(1), p.arg(op.causal, op.scale)?];
    let (source, name, rows) = if let Some(fast) = Fast::of(p.dtype, p.head) {
        let source = p.fast("attention_mma.cu", FAST)?.define("TALL", fast.tall).define("KEYS", fast.keys);
        (source, "attention_mma", 16 * fast.tall * WARPS)
    } else {
        let (source, block) = p.plain()?;
        (source, "attention", block)
    };
    Ok(Launch::one(source, name, p.grid(op.heads, rows), THREADS as u32, args))
}

pub(super) fn lower_attention_grad(graph: &Graph, node: &Node, op: &AttentionGrad, chip: Chip) -> Lowered {
    let p = Packed::of(graph, node, op.heads, op.kv_heads);
    let extents = p.arg(op.causal, op.scale)?;
    // The kernels of both files have the same names and arguments.
    let (source, block, lanes) = if let Some(fast) = Fast::of(p.dtype, p.head) {
        let source = p.fast("attention_grad_mma.cu", FAST_GRAD)?;
        (source.define("OTHERS", fast.others).define("HELD", u8::from(fast.held)), OWN, p.head / 8)
    } else {
        let (source, block) = p.plain()?;
        (source, block, 32)
    };
    let rows = p.batch * p.heads * p.tokens;
    let mut scratch = Scratch::default();
    let delta = scratch.take(4 * rows);
    let of_rows = vec![Arg::Operand(1), Arg::Operand(3), delta.clone(), extents.clone()];
    let threads = THREADS as u32;
    let of_deltas = kernel(source.clone(), "attention_delta", [rows.div_ceil(THREADS / lanes), 1, 1], threads, of_rows);
    if p.is_for_hopper(chip) {
        let [packed, result] = p.columns();
        let boxes = [p.boxed(Arg::Operand(0), packed), p.boxed(Arg::Operand(3), result)];
        let args = [&boxes[..], &[Arg::Operand(2), delta, Arg::Result(0), extents]].concat();
        let queries = p.hopper("attention_grad_query_hopper", HOPPER_GRAD_THREADS, op.heads, args.clone())?;
        let keys = p.hopper("attention_grad_key_hopper", HOPPER_GRAD_THREADS, op.kv_heads, args)?;
        return Ok(Launch::of(vec![of_deltas, queries, keys]).with_scratch(scratch.bytes()));
    }
    let args = vec![Arg::Operand(0), Arg::Operand(2), Arg::Operand(3), delta, Arg::Result(0), extents];
    let actions = vec![
        of_deltas,
        kernel(source.clone(), "attention_grad_query", p.grid(op.heads, block), threads, args.clone()),
        kernel(source, "attention_grad_key", p.grid(op.kv_heads, block), threads, args),
    ];
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

pub(super) fn lower_attention_cached(graph: &Graph, node: &Node, op: &AttentionCached, chip: Chip) -> Lowered {
    let [qkv, cache] = shapes(graph, node);
    let (batch, tokens, room) = (qkv[0], qkv[1], cache[1]);
    let head = qkv[2] / (op.heads + 2 * op.kv_heads);
    // Only registers and a row of shared memory depend on the width, but no wider head is tested.
    block(head)?;
    let mut bytes = Vec::with_capacity(24);
    for n in [batch, tokens, room, op.heads, op.kv_heads] {
        bytes.extend(int(n, "an extent of attention")?.to_le_bytes());
    }
    bytes.extend(op.scale.to_le_bytes());
    let extents = Arg::Bytes(bytes);
    let (dtype, each) = (dtype(graph, node, 0), per_lane(dtype(graph, node, 0), head));
    // The lanes that have a head between them: a power of 2, so that a warp has whole groups.
    let group = head.div_ceil(each).next_power_of_two().min(MOST_GROUP);
    let (rows, chunks) = (batch * tokens, room.div_ceil(CHUNK));
    // The chunks of a query are a cluster where there are clusters as large.
    let clustered = chip.hopper && (2..=MOST_CLUSTER).contains(&chunks);
    let headers: &[_] = if clustered { &[VECTORS, HALVES, CLUSTER] } else { &[VECTORS] };
    let source = typed("attention_cached.cu", headers, CACHED, dtype)?
        .define("HEAD", head)
        .define("CHUNK", CHUNK)
        .define("PER_LANE", each)
        .define("GROUP", group)
        .define("CLUSTER", if clustered { chunks } else { 1 })
        .define("EARLY", u8::from(stays(graph, node.operands[3]) && alone_writes(graph, node)));
    let mut scratch = Scratch::default();
    let joins = chunks > 1 && !clustered;
    // A part is the greatest score, the sum of the weights, and a row.
    let parts = if joins { scratch.take(4 * rows * op.heads * chunks * (head + 2)) } else { Arg::Null };
    // The caches are results 1 and 2, in the storage of operands 1 and 2.
    let attend = vec![
        Arg::Operand(0),
        Arg::Operand(3),
        Arg::Result(1),
        Arg::Result(2),
        parts.clone(),
        Arg::Result(0),
        extents.clone(),
        Arg::Fault,
        Arg::Step,
    ];
    let mut actions = vec![kernel(source.clone(), "attend_cache", [op.heads, rows, chunks], CACHED_THREADS, attend)];
    if joins {
        let chunks = Arg::I32(int(chunks, "chunks of a cache")?);
        let join = vec![parts, Arg::Operand(3), Arg::Result(0), extents, chunks];
        actions.push(kernel(source, "join_cache", [op.heads, rows, 1], CACHED_THREADS, join));
    }
    let wanted =
        format!("a start of at most {}, so that {tokens} tokens fit the {room} rows of the cache", room - tokens);
    Ok(Launch::of(actions).with_scratch(scratch.bytes()).rejecting(wanted, "a start of"))
}
