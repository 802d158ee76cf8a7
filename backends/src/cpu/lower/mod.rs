//! From a node to a launch. This one function is also the support check: a node it gives no launch for is refused.
//!
//! Every launch captures the sizes it needs, so that nothing is looked up while a plan runs. `args` is what a launch is
//! given; the other files hold the launches, grouped as the ops are.

mod args;
mod classifier;
mod dense;
mod elementwise;
mod movement;
mod norm;
mod optimizer;
mod sparse;

use moebius_ir::{Graph, NodeId, Op};

pub(crate) use args::{Args, Launch};

use crate::lowering::shapes;

/// A launch, or what the CPU backend wants instead of the node.
type Lowered = Result<Launch, String>;

/// Builds a launch for the Rust type of a float dtype.
macro_rules! by_float {
    ($dtype:expr, $T:ident => $launch:expr) => {
        match $dtype {
            moebius_ir::DType::F32 => {
                type $T = f32;
                Ok($launch)
            }
            moebius_ir::DType::Bf16 => {
                type $T = half::bf16;
                Ok($launch)
            }
            moebius_ir::DType::F16 => {
                type $T = half::f16;
                Ok($launch)
            }
            other @ (moebius_ir::DType::I32 | moebius_ir::DType::U32 | moebius_ir::DType::Bool) => {
                Err(format!("a float, not {other}"))
            }
        }
    };
}
use by_float;

/// The launch of a node on `threads` threads; with a chain that is joined onto it, the chain's operands and results follow
/// the node's.
///
/// # Errors
/// What the backend wants instead.
pub(crate) fn lower(graph: &Graph, id: NodeId, chain: Option<NodeId>, threads: usize) -> Lowered {
    let node = graph.node(id);
    let joined = chain.map(|chain| dense::Joined::new(graph, node, chain)).transpose()?;
    match &node.op {
        // Nothing to run: these are places in memory, settled by the plan.
        Op::Input(_) | Op::Constant(_) | Op::Reshape(_) | Op::After(_) => Ok(Launch::new(0, |_| {})),

        Op::Random(op) => movement::lower_random(graph, node, op),
        Op::Transpose(op) => movement::lower_transpose(graph, node, op),
        Op::Broadcast(_) => movement::lower_broadcast(graph, node),
        Op::Slice(op) => movement::lower_slice(graph, node, op),
        Op::Pad(op) => movement::lower_pad(graph, node, op),
        Op::Concat(op) => movement::lower_concat(graph, node, op),

        Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select(_) | Op::Cast(_) => {
            Err("elementwise work in fused form, as the fusion pass leaves it".into())
        }
        Op::Elementwise(op) => elementwise::lower_elementwise(graph, node, op),

        Op::Reduce(op) => norm::lower_reduce(graph, node, op),
        Op::Softmax(_) => norm::lower_softmax(graph, node),
        Op::SoftmaxGrad(_) => norm::lower_softmax_grad(graph, node),
        Op::LayerNorm(op) => norm::lower_layer_norm(graph, node, op.eps),
        Op::LayerNormGrad(_) => norm::lower_layer_norm_grad(graph, node),
        Op::RmsNorm(op) => norm::lower_rms_norm(graph, node, op.eps),
        Op::RmsNormGrad(_) => norm::lower_rms_norm_grad(graph, node),

        Op::Matmul(op) => dense::lower_matmul(graph, node, op, joined, threads),
        Op::Attention(op) => dense::lower_attention(graph, node, op, threads),
        Op::AttentionGrad(op) => dense::lower_attention_grad(graph, node, op, threads),
        Op::AttentionCached(op) => dense::lower_attention_cached(graph, node, op, threads),
        Op::Embedding(_) => dense::lower_embedding(graph, node),
        Op::EmbeddingGrad(_) => dense::lower_embedding_grad(graph, node),
        Op::LinearCrossEntropy(_) => classifier::lower_linear_cross_entropy(graph, node, threads),
        Op::LinearCrossEntropyGrad(_) => classifier::lower_linear_cross_entropy_grad(graph, node, threads),
        Op::LinearDistillation(op) => classifier::lower_linear_distillation(graph, node, op.temperature, threads),
        Op::LinearDistillationGrad(op) => {
            classifier::lower_linear_distillation_grad(graph, node, op.temperature, threads)
        }
        Op::LinearDistillationCached(op) => {
            classifier::lower_linear_distillation_cached(graph, node, op.temperature, threads)
        }
        Op::LinearDistillationCachedGrad(op) => {
            classifier::lower_linear_distillation_cached_grad(graph, node, op.temperature, threads)
        }

        Op::Route(op) => sparse::lower_route(graph, node, op),
        Op::RouteGrad(op) => sparse::lower_route_grad(graph, node, op),
        Op::Assign(op) => sparse::lower_assign(graph, node, op.experts, op.capacity, op.order),
        Op::Dispatch(_) => sparse::lower_dispatch(graph, node),
        Op::Combine(op) => sparse::lower_combine(graph, node, *op),
        Op::GateGrad(_) => sparse::lower_gate_grad(graph, node),
        Op::SegmentSum(_) => sparse::lower_segment_sum(graph, node),
        Op::ExpertMatmul(op) => dense::lower_expert_matmul(graph, node, op, joined, threads),
        Op::ExpertMatmulWgrad(_) => dense::lower_expert_matmul_wgrad(graph, node, threads),

        Op::GlobalNorm(_) => optimizer::lower_global_norm(graph, node),
        Op::Adamw(op) => optimizer::lower_adamw(graph, node, op),
    }
}
