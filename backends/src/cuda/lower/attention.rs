//! Launches of attention, its gradient, and attention over a cache.

use moebius_ir::ops::{Attention, AttentionCached, AttentionGrad};
use moebius_ir::{Graph, Node};

use super::{Lowered, dtype, int, shapes, typed};
use crate::cuda::launch::{Arg, Launch, Scratch, kernel};
use crate::cuda::source::Source;

const TEXT: &str = include_str!("../kernels/attention.cu");
const CACHED: &str = include_str!("../kernels/attention_cached.cu");
const THREADS: usize = 128;
/// The widest head: four blocks of rows must fit shared memory.
const MOST_HEAD: usize = 256;

/// Queries and keys of a block, so that four blocks of rows and two of scores fit 48 KB of shared memory.
fn block(head: usize) -> Result<usize, String> {
    match head {
        0..=64 => Ok(32),
        65..=128 => Ok(16),
        129..=MOST_HEAD => Ok(8),
        wider => Err(format!("heads of at most {MOST_HEAD}, not {wider}")),
    }
}

/// Extents of packed queries, keys and values.
struct Packed {
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    block: usize,
}

impl Packed {
    fn of(graph: &Graph, node: &Node, heads: usize, kv_heads: usize) -> Result<Packed, String> {
        let [qkv] = shapes(graph, node);
        let head = qkv[2] / (heads + 2 * kv_heads);
        Ok(Packed { batch: qkv[0], tokens: qkv[1], heads, kv_heads, head, block: block(head)? })
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

    fn source(&self, graph: &Graph, node: &Node) -> Result<Source, String> {
        let source = typed("attention.cu", &[], TEXT, dtype(graph, node, 0))?;
        Ok(source.define("HEAD", self.head).define("BLOCK", self.block))
    }

    /// A block for each block of rows of each of `heads` heads.
    fn grid(&self, heads: usize) -> [usize; 3] {
        [self.tokens.div_ceil(self.block), heads, self.batch]
    }
}

pub(super) fn lower_attention(graph: &Graph, node: &Node, op: &Attention) -> Lowered {
    let p = Packed::of(graph, node, op.heads, op.kv_heads)?;
    let args = vec![Arg::Operand(0), Arg::Result(0), Arg::Result(1), p.arg(op.causal, op.scale)?];
    Ok(Launch::one(p.source(graph, node)?, "attention", p.grid(op.heads), THREADS as u32, args))
}

pub(super) fn lower_attention_grad(graph: &Graph, node: &Node, op: &AttentionGrad) -> Lowered {
    let p = Packed::of(graph, node, op.heads, op.kv_heads)?;
    let (source, extents) = (p.source(graph, node)?, p.arg(op.causal, op.scale)?);
    let rows = p.batch * p.heads * p.tokens;
    let mut scratch = Scratch::default();
    let delta = scratch.take(4 * rows);
    let of_rows = vec![Arg::Operand(1), Arg::Operand(3), delta.clone(), extents.clone()];
    let args = vec![Arg::Operand(0), Arg::Operand(2), Arg::Operand(3), delta, Arg::Result(0), extents];
    let threads = THREADS as u32;
    let actions = vec![
        kernel(source.clone(), "attention_delta", [rows.div_ceil(THREADS / 32), 1, 1], threads, of_rows),
        kernel(source.clone(), "attention_grad_query", p.grid(op.heads), threads, args.clone()),
        kernel(source, "attention_grad_key", p.grid(op.kv_heads), threads, args),
    ];
    Ok(Launch::of(actions).with_scratch(scratch.bytes()))
}

pub(super) fn lower_attention_cached(graph: &Graph, node: &Node, op: &AttentionCached) -> Lowered {
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
    let source = typed("attention_cached.cu", &[], CACHED, dtype(graph, node, 0))?.define("HEAD", head);
    let rows = batch * tokens;
    // The caches are results 1 and 2, in the storage of operands 1 and 2.
    let caches = [Arg::Result(1), Arg::Result(2)];
    let from = [Arg::Operand(0), Arg::Operand(3)];
    let write = [&from[..], &caches, &[extents.clone(), Arg::Fault, Arg::Step]].concat();
    let attend = [&from[..], &caches, &[Arg::Result(0), extents]].concat();
    let actions = vec![
        kernel(source.clone(), "cache_rows", [rows, 1, 1], THREADS as u32, write),
        kernel(source, "attend_cache", [op.heads, rows, 1], THREADS as u32, attend),
    ];
    let wanted =
        format!("a start of at most {}, so that {tokens} tokens fit the {room} rows of the cache", room - tokens);
    Ok(Launch::of(actions).rejecting(wanted, "a start of"))
}
