//! Launches of reductions: reduced axes that lie side by side are one axis between an outer and an inner one.

use moebius_ir::ops::{Reduce, ReduceFn};
use moebius_ir::{Graph, Node};

use super::{Lowered, dtype, int, typed};
use crate::cuda::launch::{Arg, Launch, Scratch, kernel};
use crate::cuda::source::VECTORS;
use crate::lowering::reduced;

const TEXT: &str = include_str!("../kernels/reduce.cu");
const THREADS: usize = 256;
/// Elements of a row that one block takes.
const ROW_CHUNK: usize = 16_384;
/// As many where there are few rows.
const FEW_ROWS_CHUNK: usize = 2048;
/// Up to this many rows there are fewer blocks than multiprocessors.
const FEW_ROWS: usize = 16;
/// Elements of a column that one thread takes, where there are few columns.
const COLUMN_CHUNK: usize = 256;
/// As many where a warp has each eighth of them.
const VECTOR_CHUNK: usize = 128;
/// From this many columns on there are enough threads without cutting the columns.
const MANY_COLUMNS: usize = 1 << 17;
/// The most chunks: blocks along y.
const MOST_CHUNKS: usize = 4096;

pub(super) fn lower_reduce(graph: &Graph, node: &Node, op: &Reduce) -> Lowered {
    let [outer, n, inner] = reduced(&graph.ty(node.operands[0]).shape, &op.axes)?;
    let function = match op.function {
        ReduceFn::Sum => 0,
        ReduceFn::Mean => 1,
        ReduceFn::Max => 2,
    };
    let source = typed("reduce.cu", &[VECTORS], TEXT, dtype(graph, node, 0))?.define("FUNCTION", function);
    let results = outer * inner;
    let rows = inner == 1;
    let vector = 16 / dtype(graph, node, 0).bytes();
    let vectors = inner.is_multiple_of(vector);
    let wanted = match (rows, results >= MANY_COLUMNS) {
        (true, _) => n.div_ceil(if outer <= FEW_ROWS { FEW_ROWS_CHUNK } else { ROW_CHUNK }),
        (false, true) => 1,
        (false, false) if vectors => n.div_ceil(VECTOR_CHUNK),
        (false, false) => n.div_ceil(COLUMN_CHUNK),
    };
    let chunks = wanted.clamp(1, MOST_CHUNKS);
    let chunk = n.div_ceil(chunks).max(1);
    let mut scratch = Scratch::default();
    let partial = if chunks > 1 { scratch.take(4 * chunks * results) } else { Arg::Null };
    let size = Arg::size;
    let (name, blocks, args) = if rows {
        let counters = if chunks > 1 { Arg::Counters } else { Arg::Null };
        let sizes = [size(outer), size(n), size(chunk), partial.clone(), counters];
        ("reduce_rows", outer, [&[Arg::Operand(0)], &sizes[..], &[Arg::Result(0)]].concat())
    } else {
        let sizes = [size(outer), size(n), size(inner), size(chunk)];
        let args = [vec![Arg::Operand(0)], sizes.to_vec(), vec![partial.clone(), Arg::Result(0)]].concat();
        if vectors {
            ("reduce_vectors", results.div_ceil(32 * vector), args)
        } else {
            ("reduce_columns", results.div_ceil(THREADS), args)
        }
    };
    let mut actions = vec![kernel(source.clone(), name, [blocks, chunks, 1], THREADS as u32, args)];
    if chunks > 1 && !rows {
        let args = vec![partial, size(results), Arg::I32(int(chunks, "chunks")?), size(n), Arg::Result(0)];
        let blocks = results.div_ceil(THREADS);
        actions.push(kernel(source, "reduce_finish", [blocks, 1, 1], THREADS as u32, args));
    }
    let mut launch = Launch::of(actions).with_scratch(scratch.bytes());
    launch.counters = if chunks > 1 && rows { outer } else { 0 };
    Ok(launch)
}
