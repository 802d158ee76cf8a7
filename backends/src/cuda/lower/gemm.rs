//! Launches of everything that is a matrix product: matmul and the expert matmuls.

use moebius_ir::ops::{ExpertMatmul, Matmul};
use moebius_ir::{DType, Graph, Node, NodeId, Shape};

use super::chosen::Chosen;
use super::combined::Combined;
use super::early::stays;
use super::few_rows::{self, Around, Few, Number, Operands};
use super::hopper::{self, End, Segments};
use super::joined::{self, Joined};
use super::lead::Lead;
use super::twin::Twin;
use super::{Lowered, dtype, float, int, narrow, shapes, short, split};
use crate::cuda::chip::Chip;
use crate::cuda::launch::{Action, Arg, Launch, kernel};
use crate::cuda::source::{FUNCTIONS, GEMM, HALVES, Header, MMA, Source, VECTORS};
use crate::joined::Beside;

const TEXT: &str = include_str!("../kernels/gemm.cu");
/// Rows and columns of the tile of a block: the small one where sizes are small, and where more than the sums is kept.
pub(super) const TILE: usize = 64;
/// The large tile reads each element half as often.
const LARGE_TILE: usize = 128;
/// Blocks of the large tile that are enough to keep a GPU busy.
const ENOUGH_BLOCKS: usize = 96;
/// Up to so many rows, or columns, a product is mostly the reading of the other matrix.
const FEW: usize = 8;
/// As many if k is long.
const FEW_LONG: usize = 16;
/// From here on k is long.
const LONG: usize = 256;
/// The most blocks along z of a grid.
const MOST_Z: usize = 65_535;
/// The most experts of one product, as in the kernel.
pub(super) const MOST_EXPERTS: usize = 1024;

/// The kernels of a file of products for one float type and tile.
pub(super) struct Kernels {
    pub(super) source: Source,
    /// Threads of a block.
    pub(super) threads: u32,
    tile: usize,
}

pub(super) fn products(file: &'static str, text: &'static str, dtype: DType, tile: usize) -> Result<Kernels, String> {
    let headers: &[_] = if dtype == DType::F32 { &[GEMM] } else { &[HALVES, MMA, GEMM] };
    kernels(Source::new(file, headers, text), dtype, tile)
}

fn kernels(source: Source, dtype: DType, tile: usize) -> Result<Kernels, String> {
    let wide = dtype == DType::F32;
    let source = source.define("T", float(dtype)?).define("WIDE", u8::from(wide)).define("TILE", tile);
    Ok(Kernels { source, threads: if wide { 256 } else { 2 * tile as u32 }, tile })
}

/// The kernels of `gemm.cu`, with a chain or none.
fn gemm_kernels(dtype: DType, tile: usize, joined: Option<&Joined>) -> Result<Kernels, String> {
    const WIDE: &[Header] = &[FUNCTIONS, VECTORS, GEMM];
    const NARROW: &[Header] = &[FUNCTIONS, VECTORS, HALVES, MMA, GEMM];
    let headers = if dtype == DType::F32 { WIDE } else { NARROW };
    kernels(joined::source(joined, "gemm.cu", headers, TEXT), dtype, tile)
}

/// The tile for `batch` products of m rows and n columns.
fn tile(batch: usize, m: usize, n: usize) -> usize {
    let blocks = batch.saturating_mul(m.div_ceil(LARGE_TILE)).saturating_mul(n.div_ceil(LARGE_TILE));
    // Narrow products would leave most of a large tile empty.
    if m > TILE && n > TILE && blocks >= ENOUGH_BLOCKS { LARGE_TILE } else { TILE }
}

/// The rule of [`tile`], in words.
fn why(batch: usize, m: usize, n: usize) -> String {
    let (tile, blocks) =
        (tile(batch, m, n), batch.saturating_mul(m.div_ceil(LARGE_TILE)).saturating_mul(n.div_ceil(LARGE_TILE)));
    format!(
        "tiles {tile} x {tile}: {batch} x {m} x {n} are {blocks} tiles of {LARGE_TILE}, which are taken from {ENOUGH_BLOCKS} on where \
         rows and columns are more than {TILE}"
    )
}

/// Whether `batch` products of m rows and n columns over k are done by the kernels for few rows, and which side is the few.
fn few(batch: usize, m: usize, n: usize, k: usize) -> Option<Few> {
    let fits = |side: usize| few_rows::groups(batch, side) <= MOST_Z;
    let is = |side: usize| side <= FEW_LONG && k >= LONG;
    if (m <= FEW || is(m)) && fits(m) {
        Some(Few::Rows)
    } else if is(n) && fits(n) {
        Some(Few::Columns)
    } else {
        None
    }
}

/// Strides of a matrix, of rows and columns.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    pub(super) row: usize,
    pub(super) column: usize,
}

/// A row-major matrix whose stored form has `columns` columns, read transposed if asked.
pub(super) fn stored(columns: usize, transpose: bool) -> Strides {
    if transpose { Strides { row: 1, column: columns } } else { Strides { row: columns, column: 1 } }
}

/// The struct `Product` of the kernels.
pub(super) struct Product {
    pub(super) a: Strides,
    pub(super) a_batch: usize,
    pub(super) b: Strides,
    pub(super) b_batch: usize,
    pub(super) c_batch: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) wide_bias: bool,
}

impl Product {
    /// One product without a bias.
    pub(super) fn of(a: Strides, b: Strides, m: usize, n: usize, k: usize) -> Product {
        Product { a, a_batch: 0, b, b_batch: 0, c_batch: 0, m, n, k, wide_bias: false }
    }

    fn arg(&self) -> Result<Arg, String> {
        let mut bytes = Vec::with_capacity(72);
        let strides = [self.a.row, self.a.column, self.a_batch, self.b.row, self.b.column, self.b_batch, self.c_batch];
        strides.iter().for_each(|&s| bytes.extend((s as i64).to_le_bytes()));
        for n in [self.m, self.n, self.k] {
            bytes.extend(int(n, "an extent of a product")?.to_le_bytes());
        }
        bytes.extend(i32::from(self.wide_bias).to_le_bytes());
        Ok(Arg::Bytes(bytes))
    }
}

/// The bias operand, if there is one, and whether it is f32.
fn bias(graph: &Graph, node: &Node, i: usize) -> Result<(Arg, bool), String> {
    if i >= node.operands.len() {
        return Ok((Arg::Null, false));
    }
    let (own, of_bias) = (graph.ty(node.results[0]).dtype, dtype(graph, node, i));
    if of_bias != DType::F32 && of_bias != own {
        return Err(format!("a bias of {own} or f32, not {of_bias}"));
    }
    Ok((Arg::Operand(i), of_bias == DType::F32))
}

/// The product `a b` of one batch as an action, with the work of a chain or without.
fn gemm(
    dtype: DType,
    product: &Product,
    batch: usize,
    args: [Arg; 6],
    joined: Option<&Joined>,
) -> Result<Action, String> {
    let of = gemm_kernels(dtype, tile(batch, product.m, product.n), joined)?;
    let grid = [product.n.div_ceil(of.tile), product.m.div_ceil(of.tile), batch];
    let args = [&args[..], &[product.arg()?], &joined::args(joined)].concat();
    Ok(kernel(of.source, "gemm", grid, of.threads, args))
}

pub(super) fn lower_matmul(graph: &Graph, id: NodeId, op: &Matmul, beside: Beside, chip: Chip) -> Lowered {
    let node = graph.node(id);
    let joined = Joined::new(graph, node, beside.behind)?;
    let joined = joined.as_ref();
    let [a, b] = shapes(graph, node);
    let out = &graph.ty(node.results[0]).shape;
    let (bias, wide_bias) = bias(graph, node, 2)?;
    let (n, k) = (out.last(), a[a.len() - if op.transpose_a { 2 } else { 1 }]);
    let rank = out.len();
    let batch: usize = out[..rank - 2].iter().product();
    let shared = b.len() == 2;
    // With one B for the whole batch and A not transposed, the batch is just more rows.
    let (batch, m) = if shared && !op.transpose_a { (1, batch * out[rank - 2]) } else { (batch, out[rank - 2]) };
    let product = Product {
        a: stored(a.last(), op.transpose_a),
        a_batch: m * k,
        b: stored(b.last(), op.transpose_b),
        b_batch: if shared { 0 } else { k * n },
        c_batch: m * n,
        m,
        n,
        k,
        wide_bias,
    };
    let operands = Operands { a: Arg::Operand(0), b: Arg::Operand(1), offsets: Arg::Null, bias: bias.clone() };
    let dtypes = [0, 1].map(|i| dtype(graph, node, i));
    if let Some(side) = few(batch, m, n, k) {
        let lead = if side == Few::Rows && batch == 1 { Lead::new(graph, id, beside)? } else { None };
        let early = side == Few::Rows && node.operands[1..].iter().all(|&v| stays(graph, v));
        let around = Around { joined, lead: lead.as_ref(), chosen: None, twin: None, combined: None, early };
        return few_rows::launch(chip, dtypes, &product, side, Number::Batch(batch), operands, around);
    }
    if batch == 1 {
        for lowered in [narrow::launch, short::launch] {
            if let Some(launch) = lowered(dtypes, &product, &operands)? {
                return Ok(launch);
            }
        }
    }
    if dtypes.contains(&DType::F32) {
        return split::launch(dtypes, &product, batch, &operands);
    }
    if batch == 1 {
        let launch = hopper::launch(chip, dtype(graph, node, 0), &product, Segments::None, &operands, joined)?;
        if let Some(launch) = launch {
            return Ok(launch);
        }
    }
    let args = [Arg::Operand(0), Arg::Operand(1), bias, Arg::Null, Arg::Null, joined::out(joined)];
    let action = gemm(dtype(graph, node, 0), &product, batch, args, joined)?;
    Ok(joined::with(joined, Launch::of(vec![action])).because(why(batch, m, n)))
}

/// E, if the kernels can count it.
fn experts(offsets: &Shape) -> Result<usize, String> {
    let experts = offsets[0] - 1;
    if experts > MOST_EXPERTS { Err(format!("at most {MOST_EXPERTS} experts, not {experts}")) } else { Ok(experts) }
}

pub(super) fn lower_expert_matmul(graph: &Graph, id: NodeId, op: &ExpertMatmul, beside: Beside, chip: Chip) -> Lowered {
    let node = graph.node(id);
    let joined = Joined::new(graph, node, beside.behind)?;
    let joined = joined.as_ref();
    let [rows, w, offsets] = shapes(graph, node);
    let (bias, wide_bias) = bias(graph, node, 3)?;
    let experts = experts(&offsets)?;
    let (m, k, n) = (rows[0], rows[1], graph.shape(node.results[0])[1]);
    let product = Product {
        a: stored(k, false),
        a_batch: 0,
        b: stored(w[2], op.transpose),
        b_batch: k * n,
        c_batch: 0,
        m,
        n,
        k,
        wide_bias,
    };
    // The columns of experts are never the short side: their rows may be many.
    let operands = Operands { a: Arg::Operand(0), b: Arg::Operand(1), offsets: Arg::Operand(2), bias: bias.clone() };
    if few(1, m, usize::MAX, k) == Some(Few::Rows) {
        let dtypes = [dtype(graph, node, 0); 2];
        let lead = Lead::new(graph, id, beside)?;
        let twin = Twin::new(graph, id, beside, joined)?;
        let combined = Combined::new(graph, id, beside)?;
        let chosen = Chosen::new(graph, id, beside)?;
        let (chosen, twin, combined) = (chosen.as_ref(), twin.as_ref(), combined.as_ref());
        let around = Around { joined, lead: lead.as_ref(), chosen, twin, combined, early: false };
        return few_rows::launch(chip, dtypes, &product, Few::Rows, Number::Experts(experts), operands, around);
    }
    let segments = Segments::Rows(experts);
    let launch = hopper::launch(chip, dtype(graph, node, 0), &product, segments, &operands, joined)?;
    if let Some(launch) = launch {
        return Ok(launch);
    }
    // As if the rows were dealt out evenly.
    let rows = m / experts.max(1);
    let of = gemm_kernels(dtype(graph, node, 0), tile(experts, rows, n), joined)?;
    let tiles = if m == 0 { 0 } else { most_tiles(m, experts, of.tile) };
    let operands = [Arg::Operand(0), Arg::Operand(1), Arg::Operand(2), bias, joined::out(joined)];
    let args = [&operands[..], &[Arg::I32(experts as i32), product.arg()?], &joined::args(joined)].concat();
    let launch = Launch::one(of.source, "gemm_m_grouped", [n.div_ceil(of.tile), tiles, 1], of.threads, args);
    Ok(joined::with(joined, launch).because(why(experts, rows, n)))
}

pub(super) fn lower_expert_matmul_wgrad(graph: &Graph, node: &Node, beside: Beside, chip: Chip) -> Lowered {
    let [a, b, offsets] = shapes(graph, node);
    let (s, m, n) = (a[0], a[1], b[1]);
    let product = Product {
        a: stored(m, true),
        a_batch: 0,
        b: stored(n, false),
        b_batch: 0,
        c_batch: m * n,
        m,
        n,
        k: s,
        wide_bias: false,
    };
    let experts = offsets[0] - 1;
    let operands = Operands { a: Arg::Operand(0), b: Arg::Operand(1), offsets: Arg::Operand(2), bias: Arg::Null };
    let segments = Segments::K(experts);
    let dtype = dtype(graph, node, 0);
    let launch = match beside.behind {
        Some(_norm) => hopper::with_norm(chip, dtype, &product, segments, &operands)?,
        None => hopper::launch(chip, dtype, &product, segments, &operands, None)?,
    };
    if let Some(launch) = launch {
        return Ok(launch);
    }
    let of = gemm_kernels(dtype, tile(experts, m, n), None)?;
    let args = vec![Arg::Operand(0), Arg::Operand(1), Arg::Operand(2), Arg::Result(0), product.arg()?];
    let grid = [n.div_ceil(of.tile), m.div_ceil(of.tile), experts];
    Ok(Launch::one(of.source, "gemm_k_grouped", grid, of.threads, args).because(why(experts, m, n)))
}

/// The most tiles that `rows` rows in the segments of `experts` experts and an unused one can be cut into: each segment has at
/// most one tile that is not full.
fn most_tiles(rows: usize, experts: usize, tile: usize) -> usize {
    rows / tile + experts + 1
}

/// One product without a bias; `add`, `sum` and `c` as the kernel's.
pub(super) fn plain(
    chip: Chip,
    ty: DType,
    product: &Product,
    [a, b]: [&Arg; 2],
    [add, sum, c]: [&Arg; 3],
) -> Result<Action, String> {
    let end = if *add == Arg::Null && *sum == Arg::Null {
        End::stored(product, &Arg::Null, c, None)
    } else {
        End::added([add, sum, c])
    };
    if let Some(action) = hopper::action(chip, ty, product, Segments::None, [a, b, &Arg::Null], end)? {
        return Ok(action);
    }
    gemm(ty, product, 1, [a, b, &Arg::Null, add, sum, c].map(Arg::clone), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_block_for_every_tile_of_every_segment() {
        for tile in [TILE, LARGE_TILE] {
            for m in [1usize, 63, 64, 65, 1000] {
                for experts in [1usize, 2, 7, 64] {
                    let most = most_tiles(m, experts, tile);
                    // One row in each segment but the last is the worst there is; all rows in one is the other end.
                    let ones = experts.min(m);
                    assert!(ones + (m - ones).div_ceil(tile) <= most, "{m} rows, {experts} experts");
                    assert!(m.div_ceil(tile) <= most);
                }
            }
        }
    }

    #[test]
    fn few_rows_or_columns_have_kernels_of_their_own() {
        assert_eq!((few(1, 1, 1024, 1024), few(4, 8, 8, 3)), (Some(Few::Rows), Some(Few::Rows)));
        assert_eq!((few(1, 16, 900, 256), few(1, 16, 900, 255)), (Some(Few::Rows), None));
        assert_eq!((few(1, 2048, 2, 1024), few(1, 2048, 17, 1024)), (Some(Few::Columns), None));
        // More blocks than a grid has.
        assert_eq!((few(65_536, 4, 64, 64), few(65_535, 8, 64, 64)), (None, Some(Few::Rows)));
    }

    #[test]
    fn large_tiles_are_for_large_products() {
        assert_eq!((tile(1, 4096, 4096), tile(64, 256, 512)), (LARGE_TILE, LARGE_TILE));
        assert_eq!((tile(1, 512, 512), tile(1000, 4096, 16), tile(4096, 1, 4096)), (TILE, TILE, TILE));
    }
}
