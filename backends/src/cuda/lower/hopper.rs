//! Launches of the products of 16-bit floats on Hopper: by the tensor memory accelerator and wgmma.
//!
//! One rule says which products these are ([`action`] gives `None` for others) and how high their tiles are ([`height`]).

use moebius_ir::DType;

use super::few_rows::{Chunks, Operands, finish};
use super::gemm::{MOST_EXPERTS, Product};
use super::joined::{self, Joined};
use super::wgmma::instructions;
use super::{float, int, optimizer};
use crate::cuda::chip::Chip;
use crate::cuda::launch::{Action, Arg, Joint, Kernel, Launch, Scratch, TensorBox};
use crate::cuda::source::{CLUSTER, FUNCTIONS, HALVES, HOPPER, Source, VECTORS};

const PRODUCTS: &str = include_str!("../kernels/gemm_hopper.cuh");
const STORED: &str = include_str!("../kernels/gemm_hopper.cu");
const ADDED: &str = include_str!("../kernels/gemm_added_hopper.cu");
const SQUARES: &str = include_str!("../kernels/gemm_squares_hopper.cu");
const FINISH: &str = include_str!("../kernels/gemm_finish.cu");
const CROSS_ENTROPY: &str = include_str!("../kernels/cross_entropy_hopper.cu");
/// Columns of the tile of a block, and elements of k of a stage, as in the kernel.
const COLUMNS: usize = 128;
const DEPTH: usize = 64;
/// Heights of a tile that one may be limited to.
const HEIGHTS: [usize; 3] = [256, 128, 64];
/// What a tile costs beside its rows, in rows: its loads of w and its start and end.
const OVERHEAD: usize = 150;
/// Columns below which most of a tile would be empty.
const LEAST_COLUMNS: usize = 64;
/// Row lengths are multiples of this: 16 bytes.
const ALIGNED: usize = 8;
const THREADS: u32 = 384;
/// Threads of a block that adds up chunks.
const FINISH_THREADS: usize = 256;
/// Bytes of shared memory: four stages, the pieces of the result, the barriers, two tiles found ahead, the segments, and what aligns them.
const SHARED: usize = 4 * (COLUMNS + 256) * DEPTH * 2
    + 2 * 2 * 32 * 64 * 2
    + 2 * 4 * 8
    + 2 * (24 + 16)
    + 2 * (MOST_EXPERTS + 2) * 4
    + 1024;

/// What a tile costs at its start and end, in blocks of k times rows; those cost 2.1 ns on an H100.
const TILE_COST: usize = 1900;
/// What it costs to add up the chunks of k, likewise, and the elements of chunks that are written and read in the time of one.
const FINISH_COST: usize = 1400;
const FINISH_ELEMENTS: usize = 790;
/// The most chunks of k.
const MOST_CHUNKS: usize = 16;

/// What cuts a product into segments.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Segments {
    /// Nothing.
    None,
    /// The rows are slots of so many experts.
    Rows(usize),
    /// k are slots of so many experts.
    K(usize),
    /// k is cut into chunks of this length, whose sums are a result each.
    Chunks(usize),
}

impl Segments {
    /// Segments, by 0 where there is but one.
    fn experts(self, k: usize) -> usize {
        match self {
            Segments::None => 0,
            Segments::Rows(experts) | Segments::K(experts) => experts,
            Segments::Chunks(length) => k.div_ceil(length),
        }
    }

    /// Elements of a chunk.
    fn chunk(self) -> usize {
        match self {
            Segments::None | Segments::Rows(_) | Segments::K(_) => 0,
            Segments::Chunks(length) => length,
        }
    }
}

/// A matrix as the tensor memory accelerator copies it: `rows` lines along the tile, `k` along the sum, of `count` matrices.
struct Side {
    along_k: bool,
    /// Elements from one line in memory to the next.
    pitch: usize,
    rows: usize,
    k: usize,
    count: usize,
    apart: usize,
}

impl Side {
    /// Whether its lines and their starts are multiples of 16 bytes.
    fn aligned(&self) -> bool {
        [self.pitch, self.apart, if self.along_k { self.k } else { self.rows }]
            .iter()
            .all(|n| n.is_multiple_of(ALIGNED))
    }

    /// In boxes of `rows` along the tile where those lie together along k, else of 64.
    fn boxed(&self, at: Arg, dtype: DType, rows: usize) -> Arg {
        let (inner, outer) = if self.along_k { (self.k, self.rows) } else { (self.rows, self.k) };
        Arg::Box(Box::new(TensorBox {
            at,
            dtype,
            dims: [inner, outer, self.count],
            strides: [2 * self.pitch, 2 * self.apart],
            extent: if self.along_k { [DEPTH, rows, 1] } else { [64, DEPTH, 1] },
        }))
    }
}

/// The most rows of a tile: with `groups` products of `rows` rows and `columns` columns each, the height whose rounds over the
/// GPU take the least time.
fn height(chip: Chip, groups: usize, rows: usize, columns: usize) -> usize {
    let cost = |height: usize| rounds(chip, groups, rows, columns, height) * (height.min(rows) + OVERHEAD);
    HEIGHTS.into_iter().min_by_key(|&height| cost(height)).unwrap_or(HEIGHTS[0])
}

/// How often each multiprocessor has a tile, if tiles are at most so high.
fn rounds(chip: Chip, groups: usize, rows: usize, columns: usize, height: usize) -> usize {
    (groups * rows.div_ceil(height) * columns.div_ceil(2 * COLUMNS) * 2).div_ceil(chip.processors)
}

/// The products of a kind that are cut into tiles by themselves, and the rows of each: as if slots were dealt out evenly.
fn dealt(p: &Product, segments: Segments) -> (usize, usize) {
    match segments {
        Segments::None => (1, p.m),
        Segments::Rows(experts) => (experts.max(1), p.m.div_ceil(experts.max(1))),
        Segments::K(_) | Segments::Chunks(_) => (segments.experts(p.k), p.m),
    }
}

/// The rule of [`height`] with its numbers, in words.
fn why(chip: Chip, p: &Product, segments: Segments) -> String {
    let (groups, rows) = dealt(p, segments);
    let of = match segments {
        Segments::None => "all".to_owned(),
        Segments::Rows(experts) => format!("each of {experts} experts"),
        Segments::K(experts) => format!("each of {experts} experts' weights"),
        Segments::Chunks(length) => {
            format!("each of {groups} chunks of {length} of k, as most tiles would wait for few")
        }
    };
    let cost = |height: usize| {
        let rounds = rounds(chip, groups, rows, p.n, height);
        let one = height.min(rows) + OVERHEAD;
        format!("{height} high {rounds} x {one} = {}", rounds * one)
    };
    format!(
        "tiles up to {} x {COLUMNS} x {DEPTH}: {rows} rows of {of}, {} SMs; rounds x (rows + {OVERHEAD}): {}",
        height(chip, groups, rows, p.n),
        chip.processors,
        HEIGHTS.map(cost).join(", ")
    )
}

/// The length of the chunks that k of a product is best cut into, if it is faster so: where there are few tiles and k is long, most of the
/// GPU would be idle.
fn chunk(chip: Chip, rows: usize, columns: usize, k: usize) -> Option<usize> {
    let cost = |length: usize| {
        let chunks = k.div_ceil(length);
        let height = height(chip, chunks, rows, columns);
        let tiles = chunks * rows.div_ceil(height) * columns.div_ceil(2 * COLUMNS) * 2;
        let tile = (height.min(rows) + OVERHEAD) * length.div_ceil(DEPTH) + TILE_COST;
        let finish = if chunks > 1 { FINISH_COST + chunks * rows * columns / FINISH_ELEMENTS } else { 0 };
        tiles.div_ceil(chip.processors) * tile + finish
    };
    let lengths = (1..=MOST_CHUNKS).map(|chunks| k.div_ceil(chunks).next_multiple_of(DEPTH).max(DEPTH));
    lengths.min_by_key(|&length| cost(length)).filter(|&length| length < k)
}

/// What becomes of the sums: a kernel of a file, and its parameters behind those of the product.
pub(super) struct End<'a> {
    file: &'static str,
    text: &'static str,
    name: &'static str,
    args: Vec<Arg>,
    joined: Option<&'a Joined>,
}

impl<'a> End<'a> {
    /// Rows of `out`, with a bias or none, and the work of a chain or none.
    pub(super) fn stored(p: &Product, bias: &Arg, out: &Arg, joined: Option<&'a Joined>) -> End<'a> {
        let mut args = vec![bias.clone(), Arg::I32(i32::from(p.wide_bias)), out.clone()];
        args.extend(joined::args(joined));
        End { file: "gemm_hopper.cu", text: STORED, name: "gemm_hopper", args, joined }
    }

    /// Added to `add` if that is not null, and rows of f32 in `sum` if that is not null, else of `out`.
    pub(super) fn added(args: [&Arg; 3]) -> End<'a> {
        let args = args.map(Arg::clone).to_vec();
        End { file: "gemm_added_hopper.cu", text: ADDED, name: "gemm_added_hopper", args, joined: None }
    }

    /// Rows of `out`, and sums of their squares in f64 in `partial`, one for each warp of the grid.
    fn squared(out: Arg, partial: Arg) -> End<'a> {
        let (file, name) = ("gemm_squares_hopper.cu", "gemm_squares_hopper");
        End { file, text: SQUARES, name, args: vec![out, partial], joined: None }
    }

    /// The largest logit and the sum of exponentials of every 64 classes, as `cross_entropy_tiles`.
    pub(super) fn cross_entropy_tiles(args: Vec<Arg>) -> End<'a> {
        End {
            file: "cross_entropy_hopper.cu",
            text: CROSS_ENTROPY,
            name: "cross_entropy_tiles_hopper",
            args,
            joined: None,
        }
    }

    /// The gradient of the logits, as `cross_entropy_grad`.
    pub(super) fn cross_entropy_grad(args: Vec<Arg>) -> End<'a> {
        End {
            file: "cross_entropy_hopper.cu",
            text: CROSS_ENTROPY,
            name: "cross_entropy_grad_hopper",
            args,
            joined: None,
        }
    }
}

/// The kernel's text for a kind of product.
fn source(dtype: DType, x_along_k: bool, w_along_k: bool, segments: Segments, end: &End<'_>) -> Result<Source, String> {
    let step = if x_along_k { 16 } else { 64 };
    let rows: Vec<usize> = (1..=HEIGHTS[0] / step).map(|i| i * step).collect();
    let wgmma = instructions(dtype, &rows, x_along_k, w_along_k)?;
    let text = format!("{wgmma}\n#line 1 \"gemm_hopper.cuh\"\n{PRODUCTS}\n#line 1 \"{}\"\n{}", end.file, end.text);
    let source = joined::source(end.joined, end.file, &[FUNCTIONS, VECTORS, HALVES, CLUSTER, HOPPER], &text)
        .define("T", float(dtype)?)
        .define("SHARED", SHARED);
    let flag = |source: Source, name, on: bool| source.define(name, u8::from(on));
    let chunks = matches!(segments, Segments::Chunks(_));
    let source = flag(flag(source, "X_ALONG_K", x_along_k), "W_ALONG_K", w_along_k);
    Ok(flag(flag(source, "K_GROUPED", chunks || matches!(segments, Segments::K(_))), "K_CHUNKS", chunks))
}

/// Pairs of blocks, one block on each multiprocessor.
fn blocks(chip: Chip) -> usize {
    chip.processors / 2 * 2
}

/// The launch of a product with an end, if it is one for these kernels: `a` and `b` are its operands, `offsets` those of the
/// segments.
///
/// # Errors
/// Of sizes that kernels cannot count.
pub(super) fn action(
    chip: Chip,
    dtype: DType,
    p: &Product,
    segments: Segments,
    [a, b, offsets]: [&Arg; 3],
    end: End<'_>,
) -> Result<Option<Action>, String> {
    let experts = segments.experts(p.k);
    let along = |line: usize, other: usize| if line == 1 { (true, other) } else { (false, line) };
    let ((x_along_k, x_pitch), (w_along_k, w_pitch)) = (along(p.a.column, p.a.row), along(p.b.row, p.b.column));
    let x = Side { along_k: x_along_k, pitch: x_pitch, rows: p.m, k: p.k, count: 1, apart: p.m * p.k };
    let weights = if let Segments::Rows(experts) = segments { experts } else { 1 };
    let w = Side { along_k: w_along_k, pitch: w_pitch, rows: p.n, k: p.k, count: weights, apart: p.n * p.k };
    let half = matches!(dtype, DType::Bf16 | DType::F16);
    let large = p.m > 0 && p.k > 0 && p.n >= LEAST_COLUMNS && experts <= MOST_EXPERTS;
    if !(chip.hopper && half && large && p.n.is_multiple_of(ALIGNED) && x.aligned() && w.aligned()) {
        return Ok(None);
    }
    let (groups, rows) = dealt(p, segments);
    let most = height(chip, groups, rows, p.n);
    let mut sizes = Vec::with_capacity(24);
    for n in [p.m, p.n, p.k, experts, most, segments.chunk()] {
        sizes.extend(int(n, "an extent of a product")?.to_le_bytes());
    }
    let (x, w) = (x.boxed(a.clone(), dtype, 32), w.boxed(b.clone(), dtype, COLUMNS));
    let mut args = vec![x, w, offsets.clone(), Arg::Bytes(sizes)];
    let (source, name) = (source(dtype, x_along_k, w_along_k, segments, &end)?, end.name);
    args.extend(end.args);
    let grid = [blocks(chip), 1, 1];
    Ok(Some(Action::Kernel(Kernel { source, name, grid, threads: THREADS, shared: SHARED, args })))
}

/// The launch of a product whose sums, with a bias or none, are the result, if it is one for these kernels; with the work of a chain
/// whose elements can be taken together, and which reads nothing else unless the chunks' sums are added up by a kernel of their own.
///
/// # Errors
/// As [`action`].
pub(super) fn launch(
    chip: Chip,
    dtype: DType,
    p: &Product,
    segments: Segments,
    of: &Operands,
    joined: Option<&Joined>,
) -> Result<Option<Launch>, String> {
    let factors = [&of.a, &of.b, &of.offsets];
    let joined = joined.filter(|joined| joined.eights);
    let length = if segments == Segments::None && of.bias == Arg::Null { chunk(chip, p.m, p.n, p.k) } else { None };
    let Some(length) = length else {
        let joined = joined.filter(|joined| joined.alone);
        let whole = action(chip, dtype, p, segments, factors, End::stored(p, &of.bias, &joined::out(joined), joined));
        let launch = whole?.map(|action| joined::with(joined, Launch::of(vec![action])));
        return Ok(launch.map(|launch| launch.because(why(chip, p, segments))));
    };
    let (total, chunks) = (p.m * p.n, p.k.div_ceil(length));
    let mut scratch = Scratch::default();
    let partial = scratch.take(4 * chunks * total);
    let end = End::added([&Arg::Null, &partial, &Arg::Null]);
    let Some(products) = action(chip, dtype, p, Segments::Chunks(length), factors, end)? else { return Ok(None) };
    let chunks = Chunks { count: chunks, length };
    let source =
        joined::source(joined, "gemm_finish.cu", &[FUNCTIONS, VECTORS, HALVES], FINISH).define("T", float(dtype)?);
    // Four elements for each thread.
    let finish = finish(source, "gemm_finish", FINISH_THREADS, 4, (partial, total), &chunks, joined)?;
    let launch = Launch::of(vec![products, finish]).with_scratch(scratch.bytes());
    Ok(Some(joined::with(joined, launch).because(why(chip, p, Segments::Chunks(length)))))
}

/// The launch of the gradients of experts' weights and of the norm of them all, the first result of the node behind, if it is one for these
/// kernels.
///
/// # Errors
/// As [`action`].
pub(super) fn with_norm(
    chip: Chip,
    dtype: DType,
    p: &Product,
    segments: Segments,
    of: &Operands,
) -> Result<Option<Launch>, String> {
    let parts = blocks(chip) * THREADS as usize / 32;
    let mut scratch = Scratch::default();
    let partial = scratch.take(8 * parts);
    let end = End::squared(Arg::Result(0), partial.clone());
    let Some(products) = action(chip, dtype, p, segments, [&of.a, &of.b, &of.offsets], end)? else { return Ok(None) };
    let norm = optimizer::norm_of_parts(dtype, partial, parts, Arg::Result(1))?;
    let launch = Launch::of(vec![products, norm]).with_scratch(scratch.bytes()).because(why(chip, p, segments));
    Ok(Some(Launch { behind: Joint::Stored, ..launch }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_high_as_keeps_every_processor_busy() {
        let height = |groups, rows, columns| height(Chip::HOPPER, groups, rows, columns);
        assert_eq!(height(1, 8192, 4096), 256);
        assert_eq!(height(64, 256, 8192), 256);
        // 32 tiles of 256 rows would leave most processors idle.
        assert_eq!(height(1, 1024, 1024), 64);
    }

    #[test]
    fn k_is_cut_where_tiles_are_few_and_it_is_long() {
        let chunks =
            |rows, columns, k: usize| chunk(Chip::HOPPER, rows, columns, k).map_or(1, |length| k.div_ceil(length));
        assert_eq!((chunks(1024, 1024, 8192), chunks(384, 384, 32_768)), (4, 11));
        // Enough tiles, or nothing to cut.
        assert_eq!(
            (chunks(1024, 4096, 8192), chunks(8192, 1024, 1024), chunks(256, 256, 64), chunks(8, 8, 0)),
            (1, 1, 1, 1)
        );
    }
}
