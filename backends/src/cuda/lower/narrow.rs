//! Launches of products of a long matrix of bf16 and a narrow one of f32 with a result of f32: a router's logits, and the gradient of
//! its weights.

use moebius_ir::DType;

use super::few_rows::{Operands, chunks, finish};
use super::gemm::Product;
use super::int;
use crate::cuda::launch::{Arg, Launch, Scratch, kernel};
use crate::cuda::source::{HALVES, MMA, PARTS, Source, VECTORS};

const TEXT: &str = include_str!("../kernels/narrow.cu");
const THREADS: usize = 256;
/// Rows of a tile, and elements of k of a round.
const ROWS: usize = 64;
const DEPTH: usize = 32;
/// Columns of a tile.
const NARROW: [usize; 2] = [32, 64];
/// The most columns: for more, the long matrix would be read often.
const MOST_COLUMNS: usize = 128;
/// Blocks that keep a large GPU busy, with so many tiles that cutting k is not worth another kernel, and two for each of 132 processors
/// else.
const ENOUGH_TILES: usize = 128;
const ENOUGH_BLOCKS: usize = 264;

/// A matrix: whether elements lie together along k, elements from one line to the next, and of a line.
struct Side {
    along_k: bool,
    line: usize,
    width: usize,
}

impl Side {
    /// A matrix of `extent` along the other axis, with strides along k and along that.
    fn new(of_k: usize, of_other: usize, k: usize, extent: usize) -> Side {
        match of_k {
            1 => Side { along_k: true, line: of_other, width: k },
            _ => Side { along_k: false, line: of_k, width: extent },
        }
    }

    /// Whether lines begin at multiples of `elements` and are made of as many.
    fn in_segments_of(&self, elements: usize) -> bool {
        self.line.is_multiple_of(elements) && self.width.is_multiple_of(elements)
    }
}

/// The launch of a product of factors of these dtypes, if it is one for this kernel.
///
/// # Errors
/// Of sizes that kernels cannot count.
pub(super) fn launch(dtypes: [DType; 2], p: &Product, operands: &Operands) -> Result<Option<Launch>, String> {
    let [a, b] = [Side::new(p.a.column, p.a.row, p.k, p.m), Side::new(p.b.row, p.b.column, p.k, p.n)];
    // The long one is x, the narrow one w; c by rows of x and columns of w.
    let (x, w, rows, columns, c_row, c_column) = match dtypes {
        [DType::Bf16, DType::F32] => (a, b, p.m, p.n, p.n, 1),
        [DType::F32, DType::Bf16] if operands.bias == Arg::Null => (b, a, p.n, p.m, 1, p.n),
        _ => return Ok(None),
    };
    let fits = rows >= ROWS && columns <= MOST_COLUMNS && p.k > 0 && x.in_segments_of(8) && w.in_segments_of(4);
    if !fits {
        return Ok(None);
    }
    let of_x = if dtypes[0] == DType::Bf16 { [&operands.a, &operands.b] } else { [&operands.b, &operands.a] };
    let narrow = NARROW[usize::from(columns > NARROW[0])];
    let tiles = [rows.div_ceil(ROWS), columns.div_ceil(narrow)];
    let all = tiles[0] * tiles[1];
    // As many chunks as run at once.
    let enough = if all < ENOUGH_TILES { ENOUGH_BLOCKS / all * all } else { all };
    let chunks = chunks(all, p.k, DEPTH, enough);
    let total = rows * columns;
    let mut bytes = Vec::with_capacity(56);
    [x.line, w.line, c_row, c_column, total].iter().for_each(|&n| bytes.extend((n as i64).to_le_bytes()));
    for n in [rows, columns, p.k, chunks.length] {
        bytes.extend(int(n, "an extent of a product")?.to_le_bytes());
    }
    let source = Source::new("narrow.cu", &[VECTORS, HALVES, MMA, PARTS], TEXT)
        .define("NARROW", narrow)
        .define("X_ALONG_K", u8::from(x.along_k))
        .define("W_ALONG_K", u8::from(w.along_k));
    let mut scratch = Scratch::default();
    let partial = if chunks.count > 1 { scratch.take(4 * chunks.count * total) } else { Arg::Null };
    let [x, w] = of_x.map(Arg::clone);
    let args = vec![x, w, operands.bias.clone(), partial.clone(), Arg::Result(0), Arg::Bytes(bytes)];
    let mut actions = vec![kernel(source.clone(), "narrow", [tiles[0], tiles[1], chunks.count], THREADS as u32, args)];
    if chunks.count > 1 {
        actions.push(finish(source, "parts_finish", THREADS, 1, (partial, total), &chunks, None)?);
    }
    let why = format!(
        "tiles {ROWS} x {narrow} x {DEPTH}: bf16 and f32 with at most {MOST_COLUMNS} columns ({columns}); {all} tiles, k in {} chunks",
        chunks.count
    );
    Ok(Some(Launch::of(actions).with_scratch(scratch.bytes()).because(why)))
}
