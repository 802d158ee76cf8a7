//! Launches of the embedding and its gradient.

use moebius_ir::{DType, Graph, Node};

use super::{Lowered, dtype};
use crate::lowering::shapes;
use crate::vulkan::launch::{At, Launch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 128;

fn rejecting(launch: Launch, rows: usize) -> Launch {
    launch.rejecting(format!("ids below {rows}, the rows of the table"), "an id of")
}

pub(super) fn lower_embedding(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [table, ids] = shapes(graph, node);
    let (ty, rows) = (dtype(graph, node, 0), table[0]);
    let shader = Shader::file(limits, "embedding", THREADS)
        .rejecting()
        .number("rows", rows)
        .number("d", table[1])
        .buffer("table", ty, At::Operand(0))
        .buffer("ids", DType::I32, At::Operand(1))
        .buffer("y", ty, At::Result(0));
    Ok(rejecting(Launch::of(vec![shader.line(ids.elements())?]), rows))
}

pub(super) fn lower_embedding_grad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [ids] = shapes(graph, node);
    let out = graph.shape(node.results[0]);
    let (rows, d) = (out[0], out[1]);
    let blocks = d.div_ceil(THREADS);
    let shader = Shader::file(limits, "embedding_grad", THREADS)
        .rejecting()
        .number("n", ids.elements())
        .number("rows", rows)
        .number("d", d)
        .number("blocks", blocks)
        .buffer("ids", DType::I32, At::Operand(0))
        .buffer("dy", dtype(graph, node, 1), At::Operand(1))
        .buffer("y", super::dtype_of_result(graph, node, 0), At::Result(0));
    Ok(rejecting(Launch::of(vec![shader.line(rows * blocks)?]), rows))
}
