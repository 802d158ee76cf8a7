//! Launches of products of f32 numbers over a short k with a large result: the gradient that a router's logits give to the tokens.

use moebius_ir::DType;

use super::few_rows::Operands;
use super::gemm::Product;
use super::int;
use crate::cuda::launch::{Arg, Launch};
use crate::cuda::source::{HALVES, MMA, PARTS, Source, VECTORS};

const TEXT: &str = include_str!("../kernels/short.cu");
const THREADS: usize = 128;
/// Rows of a warp at a time, and columns of a block.
const ROWS: usize = 16;
const COLUMNS: usize = 64;
/// The longest k that there is a kernel for.
const SHORT: [usize; 2] = [32, 64];
/// The least rows: less would not be worth the parts of the columns.
const LEAST_ROWS: usize = 128;
/// Blocks that run at once on a large GPU: three on each of 132 processors.
const BLOCKS: usize = 396;

/// The launch of a product of factors of these dtypes, if it is one for this kernel.
///
/// # Errors
/// Of sizes that kernels cannot count.
pub(super) fn launch(dtypes: [DType; 2], p: &Product, operands: &Operands) -> Result<Option<Launch>, String> {
    let Some(short) = SHORT.into_iter().find(|&short| p.k <= short) else { return Ok(None) };
    let wide = dtypes == [DType::F32; 2];
    let as_stored = p.a.column == 1 && p.a.row == p.k && p.b.column == 1 && p.b.row == p.n;
    let fits = p.m >= LEAST_ROWS && p.n >= COLUMNS && p.k > 0 && p.k.is_multiple_of(2) && p.n.is_multiple_of(4);
    if !(wide && as_stored && fits) {
        return Ok(None);
    }
    let tiles = p.n.div_ceil(COLUMNS);
    let shares = (BLOCKS / tiles).clamp(1, p.m.div_ceil(THREADS / 32 * ROWS));
    let mut bytes = Vec::with_capacity(12);
    for n in [p.m, p.n, p.k] {
        bytes.extend(int(n, "an extent of a product")?.to_le_bytes());
    }
    let source = Source::new("short.cu", &[VECTORS, HALVES, MMA, PARTS], TEXT).define("SHORT", short);
    let args = [&operands.a, &operands.b, &operands.bias, &Arg::Result(0)].map(Arg::clone);
    let args = [&args[..], &[Arg::Bytes(bytes)]].concat();
    let why = format!("tiles {ROWS} x {COLUMNS} x {short}: f32, k of {} is at most {}, {} rows", p.k, SHORT[1], p.m);
    Ok(Some(Launch::one(source, "short_k", [tiles, shares, 1], THREADS as u32, args).because(why)))
}
