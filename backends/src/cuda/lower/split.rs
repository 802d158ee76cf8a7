//! Launches of dense products with a result of f32: the tensor cores multiply parts of the numbers.

use moebius_ir::DType;

use super::few_rows::{Operands, chunks, finish};
use super::gemm::{Product, Strides};
use super::{float, int};
use crate::cuda::launch::{Arg, Launch, Scratch, kernel};
use crate::cuda::source::{HALVES, MMA, PARTS, Source, VECTORS};

const TEXT: &str = include_str!("../kernels/split.cu");
const THREADS: usize = 128;
/// Rows and columns of a block, and elements of k of a round.
const TILE: usize = 64;
const DEPTH: usize = 32;
/// Blocks that keep a large GPU busy: four for each of 132 processors.
const ENOUGH_BLOCKS: usize = 528;

/// How a factor is read: whether elements lie together along k, and from one line in memory to the next.
fn side(dtype: DType, along: usize, other: usize) -> Result<(u8, usize, &'static str, u8), String> {
    let (along_k, line) = if along == 1 { (1, other) } else { (0, along) };
    let parts = match dtype {
        DType::F32 => 3,
        DType::F16 => 2,
        DType::Bf16 | DType::I32 | DType::U32 | DType::Bool => 1,
    };
    Ok((along_k, line, float(dtype)?, parts))
}

/// The launch of `batch` products of factors of these dtypes, one of them f32; a bias is f32.
///
/// # Errors
/// Of sizes that kernels cannot count.
pub(super) fn launch(
    [of_a, of_b]: [DType; 2],
    p: &Product,
    batch: usize,
    operands: &Operands,
) -> Result<Launch, String> {
    let Strides { row, column } = p.a;
    let (a_along_k, a_line, a, a_parts) = side(of_a, column, row)?;
    let (b_along_k, b_line, b, b_parts) = side(of_b, p.b.row, p.b.column)?;
    let [rows, columns] = [p.m.div_ceil(TILE), p.n.div_ceil(TILE)];
    let chunks = chunks(rows.saturating_mul(columns).saturating_mul(batch), p.k, DEPTH, ENOUGH_BLOCKS);
    let total = batch * p.m * p.n;
    let mut bytes = Vec::with_capacity(72);
    for n in [a_line, p.a_batch, b_line, p.b_batch, p.c_batch, total] {
        bytes.extend((n as i64).to_le_bytes());
    }
    for n in [p.m, p.n, p.k, batch, chunks.length] {
        bytes.extend(int(n, "an extent of a product")?.to_le_bytes());
    }
    let source = Source::new("split.cu", &[VECTORS, HALVES, MMA, PARTS], TEXT)
        .define("TA", a)
        .define("TB", b)
        .define("A_PARTS", a_parts)
        .define("B_PARTS", b_parts)
        .define("A_ALONG_K", a_along_k)
        .define("B_ALONG_K", b_along_k);
    let mut scratch = Scratch::default();
    let partial = if chunks.count > 1 { scratch.take(4 * chunks.count * total) } else { Arg::Null };
    let args = [&operands.a, &operands.b, &operands.bias, &partial, &Arg::Result(0)].map(Arg::clone);
    let args = [&args[..], &[Arg::Bytes(bytes)]].concat();
    let mut actions =
        vec![kernel(source.clone(), "split", [rows, columns, chunks.count * batch], THREADS as u32, args)];
    if chunks.count > 1 {
        actions.push(finish(source, "parts_finish", THREADS, 1, (partial, total), &chunks, None)?);
    }
    let why = format!(
        "tiles {TILE} x {TILE} x {DEPTH}: a factor of f32, in parts of 16 bits; {} tiles of {ENOUGH_BLOCKS} wanted, k in {} chunks",
        rows * columns * batch,
        chunks.count
    );
    Ok(Launch::of(actions).with_scratch(scratch.bytes()).because(why))
}
