//! Launches of everything that is a matrix product or made of them: matmul, the expert matmuls, attention and embedding.

use moebius_ir::ops::{Attention, AttentionCached, AttentionGrad, ExpertMatmul, Matmul};
use moebius_ir::{DType, Graph, Node, NodeId, Op, Value};

use super::args::{Args, Launch, Rejected};
use super::elementwise::{Chain, lower_chain};
use super::{Lowered, by_float, shapes};
use crate::cpu::gemm::{Batch, Bias, Gemm, GemmError, Mat, MatMut, Part, Storage, gemm, workspace_bytes};
use crate::cpu::kernels::attention::{
    AttentionShape, attention, attention_grad, attention_grad_workspace, attention_workspace,
};
use crate::cpu::kernels::attention_cached::{CachedAttentionShape, attention_cached, attention_cached_workspace};
use crate::cpu::kernels::embedding::{IdOutOfRange, embedding, embedding_grad, embedding_grad_workspace};

fn storage(graph: &Graph, value: Value) -> Result<Storage, String> {
    match graph.ty(value).dtype {
        DType::F32 => Ok(Storage::F32),
        DType::Bf16 => Ok(Storage::Bf16),
        DType::F16 => Ok(Storage::F16),
        other @ (DType::I32 | DType::U32 | DType::Bool) => Err(format!("a float, not {other}")),
    }
}

/// A row-major matrix at `data` whose stored form has `columns` columns, read transposed if asked.
fn stored(data: *const u8, storage: Storage, columns: usize, transpose: bool) -> Mat {
    let mat = Mat { data, storage, row_stride: columns as isize, col_stride: 1 };
    if transpose { mat.t() } else { mat }
}

fn result(data: *mut u8, storage: Storage, columns: usize) -> MatMut {
    MatMut { data, storage, row_stride: columns as isize, col_stride: 1 }
}

fn rejected(error: GemmError) -> Rejected {
    Rejected { wanted: "operands the matrix product can use".into(), found: error.to_string() }
}

/// Runs a product whose operands are the memory of this step.
fn run(product: &Gemm<'_>, a: &Args<'_>) -> Result<(), Rejected> {
    // SAFETY: the plan gives every operand and result memory of its type, and a result of a product overlaps no operand.
    unsafe { gemm(product, a.scratch()) }.map_err(rejected)
}

/// Runs a product of rows of `width` and, on each part of them that is done, the chain that is joined onto it.
fn run_with(chain: Option<&Joined>, product: &Gemm<'_>, width: usize, a: &Args<'_>) -> Result<(), Rejected> {
    let Some(Joined { chain, operands }) = chain else { return run(product, a) };
    let memory = chain.memory(a, *operands, 1);
    let finished = |part: Part| {
        // SAFETY: each element is in one part, which nobody else uses any more. The plan lets no result of the chain lie
        // over an operand of the product.
        unsafe { chain.run_part(&memory, width, part.rows, part.cols) };
    };
    run(&Gemm { finished: Some(&finished), ..*product }, a)
}

/// A chain that runs with a product, and how many operands that has: the chain's follow them.
pub(super) struct Joined {
    chain: Chain,
    operands: usize,
}

impl Joined {
    /// The chain of node `chain` for the product `node`.
    ///
    /// # Errors
    /// What is wanted instead of the chain.
    pub(super) fn new(graph: &Graph, node: &Node, chain: NodeId) -> Result<Joined, String> {
        let after = graph.node(chain);
        let Op::Elementwise(op) = &after.op else { return Err("a fused chain to join".into()) };
        Ok(Joined { chain: lower_chain(graph, after, op)?, operands: node.operands.len() })
    }
}

pub(super) fn lower_matmul(graph: &Graph, node: &Node, op: &Matmul, joined: Option<Joined>, threads: usize) -> Lowered {
    let [a_shape, b_shape] = shapes(graph, node);
    let out = &graph.ty(node.results[0]).shape;
    let (sa, sb, sc) =
        (storage(graph, node.operands[0])?, storage(graph, node.operands[1])?, storage(graph, node.results[0])?);
    let bias = node.operands.get(2).map(|&v| storage(graph, v)).transpose()?;
    let (n, k) = (out.last(), a_shape[a_shape.len() - if op.transpose_a { 2 } else { 1 }]);
    let rank = out.len();
    let batch: usize = out[..rank - 2].iter().product();
    let (a_columns, b_columns) = (a_shape.last(), b_shape.last());
    let shared = b_shape.len() == 2;
    // With one B for the whole batch and A not transposed, the batch is just more rows.
    let (batch, m) = if shared && !op.transpose_a { (1, batch * out[rank - 2]) } else { (batch, out[rank - 2]) };
    let (transpose_a, transpose_b) = (op.transpose_a, op.transpose_b);
    Ok(Launch::fallible(workspace_bytes(m, n, k, sc, threads), move |args| {
        let a = stored(args.operand_ptr(0), sa, a_columns, transpose_a);
        let b = stored(args.operand_ptr(1), sb, b_columns, transpose_b);
        let mut product = Gemm::new(m, n, k, a, b, result(args.result_ptr(0), sc, n));
        product.bias = bias.map(|storage| Bias { data: args.operand_ptr(2), storage, step: 0 });
        if batch != 1 {
            let of_b = if shared { 0 } else { (k * n) as isize };
            let (of_a, of_c) = ((m * k) as isize, (m * n) as isize);
            product.batch = Batch::Strided { counts: [1, batch], a: [0, of_a], b: [0, of_b], c: [0, of_c] };
        }
        run_with(joined.as_ref(), &product, n, args)
    }))
}

pub(super) fn lower_expert_matmul(
    graph: &Graph,
    node: &Node,
    op: &ExpertMatmul,
    joined: Option<Joined>,
    threads: usize,
) -> Lowered {
    let [rows, w, offsets] = shapes(graph, node);
    let (sa, sb, sc) =
        (storage(graph, node.operands[0])?, storage(graph, node.operands[1])?, storage(graph, node.results[0])?);
    let bias = node.operands.get(3).map(|&v| storage(graph, v)).transpose()?;
    let (m, k, n) = (rows[0], rows[1], graph.shape(node.results[0])[1]);
    let (columns, entries, transpose) = (w[2], offsets[0], op.transpose);
    Ok(Launch::fallible(workspace_bytes(m, n, k, sc, threads), move |args| {
        let a = stored(args.operand_ptr(0), sa, k, false);
        let b = stored(args.operand_ptr(1), sb, columns, transpose);
        let mut product = Gemm::new(m, n, k, a, b, result(args.result_ptr(0), sc, n));
        product.bias = bias.map(|storage| Bias { data: args.operand_ptr(3), storage, step: n as isize });
        product.batch = Batch::MGrouped { offsets: args.operand(2, entries), b: (k * n) as isize };
        run_with(joined.as_ref(), &product, n, args)
    }))
}

pub(super) fn lower_expert_matmul_wgrad(graph: &Graph, node: &Node, threads: usize) -> Lowered {
    let [a_shape, b_shape, offsets] = shapes(graph, node);
    let (sa, sb, sc) =
        (storage(graph, node.operands[0])?, storage(graph, node.operands[1])?, storage(graph, node.results[0])?);
    let (s, m, n, entries) = (a_shape[0], a_shape[1], b_shape[1], offsets[0]);
    Ok(Launch::fallible(workspace_bytes(m, n, s, sc, threads), move |args| {
        let a = stored(args.operand_ptr(0), sa, m, true);
        let b = stored(args.operand_ptr(1), sb, n, false);
        let mut product = Gemm::new(m, n, s, a, b, result(args.result_ptr(0), sc, n));
        product.batch = Batch::KGrouped { offsets: args.operand(2, entries), c: (m * n) as isize };
        run(&product, args)
    }))
}

fn attention_shape(
    graph: &Graph,
    node: &Node,
    heads: usize,
    kv_heads: usize,
    causal: bool,
    scale: f32,
) -> AttentionShape {
    let [qkv] = shapes(graph, node);
    let head_dim = qkv[2] / (heads + 2 * kv_heads);
    AttentionShape { batch: qkv[0], tokens: qkv[1], heads, kv_heads, head_dim, causal, scale }
}

pub(super) fn lower_attention(graph: &Graph, node: &Node, op: &Attention, threads: usize) -> Lowered {
    let shape = attention_shape(graph, node, op.heads, op.kv_heads, op.causal, op.scale);
    let rows = shape.batch * shape.tokens;
    let (packed, width, lse) = (rows * shape.packed(), rows * op.heads * shape.head_dim, rows * op.heads);
    let scratch = 4 * attention_workspace(&shape, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(scratch, move |a| {
        attention::<T>(&shape, a.operand(0, packed), a.result(0, width), a.result(1, lse), a.scratch());
    }))
}

pub(super) fn lower_attention_grad(graph: &Graph, node: &Node, op: &AttentionGrad, threads: usize) -> Lowered {
    let shape = attention_shape(graph, node, op.heads, op.kv_heads, op.causal, op.scale);
    let rows = shape.batch * shape.tokens;
    let (packed, width, lse) = (rows * shape.packed(), rows * op.heads * shape.head_dim, rows * op.heads);
    let scratch = 4 * attention_grad_workspace(&shape, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::new(scratch, move |a| {
        let (qkv, out, dout) = (a.operand::<T>(0, packed), a.operand(1, width), a.operand(3, width));
        attention_grad(&shape, qkv, out, a.operand(2, lse), dout, a.result(0, packed), a.scratch());
    }))
}

pub(super) fn lower_attention_cached(graph: &Graph, node: &Node, op: &AttentionCached, threads: usize) -> Lowered {
    let [qkv, cache] = shapes(graph, node);
    let (heads, kv_heads) = (op.heads, op.kv_heads);
    let head_dim = qkv[2] / (heads + 2 * kv_heads);
    let (batch, tokens, capacity, scale) = (qkv[0], qkv[1], cache[1], op.scale);
    let shape = CachedAttentionShape { batch, tokens, capacity, heads, kv_heads, head_dim, scale };
    let (packed, width) = (qkv.elements(), batch * tokens * heads * head_dim);
    let cached = cache.elements();
    let scratch = 4 * attention_cached_workspace(&shape, threads);
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(scratch, move |a| {
        let start = a.operand::<i32>(3, 1)[0];
        let reject = |found: String| Rejected { wanted: format!("a start and {tokens} tokens within the {capacity} rows of the cache"), found };
        let start = usize::try_from(start).map_err(|_| reject(format!("start {start}")))?;
        // The caches are results 1 and 2, in the storage of operands 1 and 2.
        let (k, v) = (a.result::<T>(1, cached), a.result::<T>(2, cached));
        attention_cached::<T>(&shape, a.operand(0, packed), start, k, v, a.result(0, width), a.scratch())
            .map_err(|e| reject(e.to_string()))
    }))
}

fn rejected_id(e: IdOutOfRange) -> Rejected {
    Rejected { wanted: "ids within the table".into(), found: e.to_string() }
}

pub(super) fn lower_embedding(graph: &Graph, node: &Node) -> Lowered {
    let [table, ids] = shapes(graph, node);
    let (v, d, n) = (table[0], table[1], ids.elements());
    by_float!(graph.ty(node.operands[0]).dtype, T => Launch::fallible(0, move |a| {
        embedding::<T>(a.operand(0, v * d), a.operand(1, n), v, d, a.result(0, n * d)).map_err(rejected_id)
    }))
}

pub(super) fn lower_embedding_grad(graph: &Graph, node: &Node) -> Lowered {
    let [ids] = shapes(graph, node);
    let (n, v, d) = (ids.elements(), graph.shape(node.results[0])[0], graph.shape(node.results[0])[1]);
    let scratch = 4 * embedding_grad_workspace(n, v);
    by_float!(graph.ty(node.operands[1]).dtype, T => Launch::fallible(scratch, move |a| {
        embedding_grad::<T, T>(a.operand(1, n * d), a.operand(0, n), v, d, a.result(0, v * d), a.scratch())
            .map_err(rejected_id)
    }))
}
