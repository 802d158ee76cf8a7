//! From a node to its kernels. This one function is also the support check: a node it gives no launch for is refused.
//!
//! The files beside this one hold the launches, grouped as the kernels are; each decides from the graph and the limits of the device
//! alone, so that what is said here of a machine with a GPU can be tested on one without.

mod elementwise;
mod movement;

use moebius_ir::{DType, Graph, Node, NodeId, Op};

use super::launch::Launch;
use super::limits::Limits;

/// A launch, or what the Vulkan backend wants instead of the node.
type Lowered = Result<Launch, String>;

/// The dtype of an operand.
fn dtype(graph: &Graph, node: &Node, i: usize) -> DType {
    graph.ty(node.operands[i]).dtype
}

/// The dtype of a result.
fn dtype_of_result(graph: &Graph, node: &Node, i: usize) -> DType {
    graph.ty(node.results[i]).dtype
}

/// The launch of a node on a device with such limits.
///
/// # Errors
/// What the backend wants instead.
pub(crate) fn lower(graph: &Graph, id: NodeId, limits: Limits) -> Lowered {
    let node = graph.node(id);
    for &value in node.operands.iter().chain(&node.results) {
        let ty = graph.ty(value);
        if ty.bytes() > limits.range {
            return Err(format!("tensors of at most {} bytes, not {ty}", limits.range));
        }
    }
    let launch = match &node.op {
        // Nothing to run: these are places in memory, settled by the plan.
        Op::Input(_) | Op::Constant(_) | Op::Reshape(_) | Op::After(_) => Ok(Launch::default()),

        Op::Random(op) => movement::lower_random(graph, node, op, limits),
        Op::Transpose(_) | Op::Broadcast(_) | Op::Slice(_) | Op::Pad(_) | Op::Concat(_) => {
            movement::lower_movement(graph, node, limits)
        }

        Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select(_) | Op::Cast(_) => {
            Err("elementwise work in fused form, as the fusion pass leaves it".into())
        }
        Op::Elementwise(op) => elementwise::lower_elementwise(graph, node, op, limits),
        Op::Reduce(_)
        | Op::Softmax(_)
        | Op::SoftmaxGrad(_)
        | Op::LayerNorm(_)
        | Op::LayerNormGrad(_)
        | Op::RmsNorm(_)
        | Op::RmsNormGrad(_)
        | Op::Matmul(_)
        | Op::Attention(_)
        | Op::AttentionGrad(_)
        | Op::AttentionCached(_)
        | Op::Embedding(_)
        | Op::EmbeddingGrad(_)
        | Op::LinearCrossEntropy(_)
        | Op::LinearCrossEntropyGrad(_)
        | Op::LinearDistillation(_)
        | Op::LinearDistillationGrad(_)
        | Op::LinearDistillationCached(_)
        | Op::LinearDistillationCachedGrad(_)
        | Op::Route(_)
        | Op::RouteGrad(_)
        | Op::Assign(_)
        | Op::Dispatch(_)
        | Op::Combine(_)
        | Op::GateGrad(_)
        | Op::SegmentSum(_)
        | Op::ExpertMatmul(_)
        | Op::ExpertMatmulWgrad(_)
        | Op::GlobalNorm(_)
        | Op::Adamw(_) => Err("an op that the Vulkan backend has".into()),
    };
    launch.map(Launch::trimmed)
}
