//! Launches of attention, its gradient, and attention over a cache.

use moebius_ir::ops::{Attention, AttentionCached, AttentionGrad};
use moebius_ir::{DType, Graph, Node};

use super::{Lowered, dtype};
use crate::lowering::shapes;
use crate::vulkan::launch::{At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 128;
/// Those of attention over a cache, at least as many as a head is wide.
const CACHE_THREADS: usize = 256;
/// Where another kernel has put the new keys and values into the caches.
const NOTHING_KEPT: &str = "fn keep(group: u32, thread: u32, newest: u32, own_key: Eight, own_value: Eight) {}";
/// The widest head that is tested.
const MOST_HEAD: usize = 256;

/// Queries and keys of a block, so that so many blocks of rows and two of scores fit the memory of a workgroup.
fn block(limits: Limits, head: usize, blocks: usize) -> Result<usize, String> {
    if head > MOST_HEAD {
        return Err(format!("heads of at most {MOST_HEAD}, not {head}"));
    }
    let bytes = |block: usize| 4 * (blocks * block * (head + 1) + 2 * block * (block + 1) + THREADS);
    let fits = [32, 16, 8, 4].into_iter().find(|&block| bytes(block) <= limits.shared);
    fits.ok_or_else(|| format!("heads for which 4 keys fit {} bytes, not {head}", limits.shared))
}

/// Extents of packed queries, keys and values.
struct Packed {
    limits: Limits,
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    causal: bool,
    scale: f32,
}

impl Packed {
    fn of(graph: &Graph, node: &Node, heads: [usize; 2], causal: bool, scale: f32, limits: Limits) -> Packed {
        let ([qkv], [heads, kv_heads]) = (shapes(graph, node), heads);
        let head = qkv[2] / (heads + 2 * kv_heads);
        Packed { limits, batch: qkv[0], tokens: qkv[1], heads, kv_heads, head, causal, scale }
    }

    /// A kernel on blocks of so many rows.
    fn kernel(&self, name: &'static str, block: usize) -> Shader {
        let lanes = THREADS / block;
        Shader::file(self.limits, name, THREADS)
            .with("heads")
            .constant("HEAD", self.head)
            .constant("BLOCK", block)
            .constant("LANES", lanes)
            .constant("COLUMNS", self.head.div_ceil(lanes))
            .number("head", self.head)
            .number("tokens", self.tokens)
            .number("heads", self.heads)
            .number("kv_heads", self.kv_heads)
            .number("causal", usize::from(self.causal))
            .float("scale", self.scale)
    }

    /// A workgroup for each block of each of `heads` heads.
    fn grid(&self, heads: usize, block: usize) -> [usize; 3] {
        [self.tokens.div_ceil(block), heads, self.batch]
    }
}

pub(super) fn lower_attention(graph: &Graph, node: &Node, op: &Attention, limits: Limits) -> Lowered {
    let p = Packed::of(graph, node, [op.heads, op.kv_heads], op.causal, op.scale, limits);
    let (block, ty) = (block(limits, p.head, 3)?, dtype(graph, node, 0));
    let shader = p.kernel("attention", block).buffer("qkv", ty, At::Operand(0)).buffer("y", ty, At::Result(0)).buffer(
        "lse",
        DType::F32,
        At::Result(1),
    );
    Ok(Launch::of(vec![shader.grid(p.grid(op.heads, block))?]))
}

pub(super) fn lower_attention_grad(graph: &Graph, node: &Node, op: &AttentionGrad, limits: Limits) -> Lowered {
    let p = Packed::of(graph, node, [op.heads, op.kv_heads], op.causal, op.scale, limits);
    let (block, ty) = (block(limits, p.head, 4)?, dtype(graph, node, 0));
    let rows = p.batch * p.heads * p.tokens;
    let mut scratch = Scratch::default();
    let delta = scratch.take(4 * rows);
    let of_deltas = Shader::file(limits, "attention_delta", THREADS)
        .constant("HEAD", p.head)
        .number("head", p.head)
        .number("rows", rows)
        .number("tokens", p.tokens)
        .number("heads", p.heads)
        .buffer("y", ty, At::Operand(1))
        .buffer("dy", ty, At::Operand(3))
        .buffer("delta", DType::F32, delta);
    let of_block = |name| {
        p.kernel(name, block)
            .buffer("qkv", ty, At::Operand(0))
            .buffer("lse", DType::F32, At::Operand(2))
            .buffer("dy", ty, At::Operand(3))
            .buffer("delta", DType::F32, delta)
            .buffer("dqkv", ty, At::Result(0))
    };
    let actions = vec![
        of_deltas.line(rows.div_ceil(THREADS))?,
        of_block("attention_grad_query").grid(p.grid(op.heads, block))?,
        of_block("attention_grad_key").grid(p.grid(op.kv_heads, block))?,
    ];
    Ok(Launch::of(actions).with_scratch(&scratch))
}

pub(super) fn lower_attention_cached(graph: &Graph, node: &Node, op: &AttentionCached, limits: Limits) -> Lowered {
    let [qkv, cache] = shapes(graph, node);
    let (batch, tokens, room) = (qkv[0], qkv[1], cache[1]);
    let (head, ty) = (qkv[2] / (op.heads + 2 * op.kv_heads), dtype(graph, node, 0));
    block(limits, head, 3)?;
    let kernel = |name, threads: usize| {
        Shader::file(limits, name, threads)
            .constant("HEAD", head)
            .number("head", head)
            .number("tokens", tokens)
            .number("room", room)
            .number("heads", op.heads)
            .number("kv_heads", op.kv_heads)
            .float("scale", op.scale)
            .buffer("start", DType::I32, At::Operand(3))
    };
    // The caches are results 1 and 2, in the storage of operands 1 and 2.
    let places = [("qkv", At::Operand(0)), ("k_cache", At::Result(1)), ("v_cache", At::Result(2))];
    let by_eight = |shader: Shader| places.iter().fold(shader.with("eight"), |s, &(name, at)| s.by_eight(name, ty, at));
    let by_one = |shader: Shader| places.iter().fold(shader, |s, &(name, at)| s.buffer(name, ty, at));
    let attend = if head.is_multiple_of(8) {
        // Lanes that have a key, and what the subgroups leave.
        let across = (head / 8).next_power_of_two();
        by_eight(kernel("attend_cache_eight", CACHE_THREADS)).folding(across, CACHE_THREADS / 32 * 8 * across)
    } else {
        by_one(kernel("attend_cache", THREADS)).sums().constant("COLUMNS", head.div_ceil(THREADS))
    };
    let attend = attend.with("cache_places").buffer("y", ty, At::Result(0));
    let groups = batch * tokens * op.heads;
    let actions = if head.is_multiple_of(8) && tokens == 1 {
        vec![attend.with("attend_one").rejecting().line(groups)?]
    } else {
        let attend = if head.is_multiple_of(8) { attend.declare(NOTHING_KEPT) } else { attend };
        vec![by_one(kernel("cache_rows", THREADS)).rejecting().line(batch * tokens)?, attend.line(groups)?]
    };
    let wanted =
        format!("a start of at most {}, so that {tokens} tokens fit the {room} rows of the cache", room - tokens);
    Ok(Launch::of(actions).rejecting(wanted, "a start of"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_the_memory_of_a_workgroup() {
        for head in [8, 64, 65, 128, 256] {
            for blocks in [3, 4] {
                let block = block(Limits::LEAST, head, blocks).unwrap();
                let bytes = 4 * (blocks * block * (head + 1) + 2 * block * (block + 1) + THREADS);
                assert!(bytes <= Limits::LEAST.shared && THREADS.is_multiple_of(block), "{head} {blocks}");
            }
        }
        assert!(block(Limits::LEAST, 257, 3).is_err());
    }
}
