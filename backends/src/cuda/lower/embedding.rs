//! Launches of the embedding and its gradient.

use moebius_ir::{Graph, Node};

use super::{Lowered, dtype, int, shapes, typed};
use crate::cuda::launch::{Arg, Launch};
use crate::cuda::source::VECTORS;

const TEXT: &str = include_str!("../kernels/embedding.cu");
const THREADS: usize = 256;

pub(super) fn lower_embedding(graph: &Graph, node: &Node) -> Lowered {
    let [table, ids] = shapes(graph, node);
    let (rows, d, n) = (table[0], table[1], ids.elements());
    let source = typed("embedding.cu", &[VECTORS], TEXT, dtype(graph, node, 0))?.define("VECTOR", 1);
    let sizes = [Arg::I32(int(rows, "a table")?), Arg::I32(int(d, "a width")?)];
    let args = [&[Arg::Operand(0), Arg::Operand(1)][..], &sizes, &[Arg::Result(0), Arg::Fault, Arg::Step]].concat();
    let launch = Launch::one(source, "embedding", [n, 1, 1], THREADS as u32, args);
    Ok(launch.rejecting(format!("ids below {rows}, the rows of the table"), "an id of"))
}

pub(super) fn lower_embedding_grad(graph: &Graph, node: &Node) -> Lowered {
    let [ids] = shapes(graph, node);
    let out = graph.shape(node.results[0]);
    let (n, rows, d) = (ids.elements(), out[0], out[1]);
    let whole = 16 / dtype(graph, node, 1).bytes();
    let vector = if d.is_multiple_of(whole) { whole } else { 1 };
    let source = typed("embedding.cu", &[VECTORS], TEXT, dtype(graph, node, 1))?.define("VECTOR", vector);
    let sizes = [Arg::I32(int(n, "ids")?), Arg::I32(int(rows, "a table")?), Arg::I32(int(d, "a width")?)];
    let args = [&[Arg::Operand(0), Arg::Operand(1)][..], &sizes, &[Arg::Result(0), Arg::Fault, Arg::Step]].concat();
    let launch = Launch::one(source, "embedding_grad", [rows, d.div_ceil(THREADS * vector), 1], THREADS as u32, args);
    Ok(launch.rejecting(format!("ids below {rows}, the rows of the table"), "an id of"))
}
