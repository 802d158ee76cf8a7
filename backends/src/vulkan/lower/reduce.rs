//! Launches of reductions: reduced axes that lie side by side are one axis between an outer and an inner one.

use moebius_ir::ops::{Reduce, ReduceFn};
use moebius_ir::{DType, Graph, Node};

use super::{Lowered, dtype};
use crate::lowering::reduced;
use crate::vulkan::launch::{At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 256;
/// Elements of a row that one workgroup takes.
const ROW_CHUNK: usize = 16_384;
/// Elements of a column that one thread takes, where there are few columns.
const COLUMN_CHUNK: usize = 256;
/// From this many columns on there are enough threads without cutting the columns.
const MANY_COLUMNS: usize = 1 << 17;
/// The most chunks.
const MOST_CHUNKS: usize = 4096;

pub(super) fn lower_reduce(graph: &Graph, node: &Node, op: &Reduce, limits: Limits) -> Lowered {
    let [outer, n, inner] = reduced(&graph.ty(node.operands[0]).shape, &op.axes)?;
    let function = match op.function {
        ReduceFn::Sum => 0,
        ReduceFn::Mean => 1,
        ReduceFn::Max => 2,
    };
    let (results, rows) = (outer * inner, inner == 1);
    let wanted = match (rows, results >= MANY_COLUMNS) {
        (true, _) => n.div_ceil(ROW_CHUNK),
        (false, true) => 1,
        (false, false) => n.div_ceil(COLUMN_CHUNK),
    };
    let chunks = wanted.clamp(1, MOST_CHUNKS);
    let mut scratch = Scratch::default();
    let parts = if chunks > 1 { scratch.take(4 * chunks * results) } else { At::Null };
    let ty = dtype(graph, node, 0);
    let kernel = |name| {
        let shader = Shader::file(limits, name, THREADS).sums().with("reduce").constant("FUNCTION", function);
        let sizes = shader.number("results", results).number("n", n).number("inner", inner).number("chunks", chunks);
        sizes.number("chunk", n.div_ceil(chunks).max(1)).buffer("parts", DType::F32, parts).buffer(
            "y",
            ty,
            At::Result(0),
        )
    };
    let mut actions = if rows {
        vec![kernel("reduce_rows").buffer("x", ty, At::Operand(0)).line(results * chunks)?]
    } else {
        vec![kernel("reduce_columns").buffer("x", ty, At::Operand(0)).line((results * chunks).div_ceil(THREADS))?]
    };
    if chunks > 1 {
        actions.push(kernel("reduce_finish").line(results.div_ceil(THREADS))?);
    }
    Ok(Launch::of(actions).with_scratch(&scratch))
}
