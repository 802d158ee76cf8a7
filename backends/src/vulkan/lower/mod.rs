//! From a node to its kernels. This one function is also the support check: a node it gives no launch for is refused.
//!
//! The files beside this one hold the launches, grouped as the kernels are; each decides from the graph and the limits of the device
//! alone, so that what is said here of a machine with a GPU can be tested on one without.

mod attention;
mod classifier;
mod combined;
mod cooperative;
mod elementwise;
mod embedding;
mod few_rows;
mod gemm;
mod joined;
mod lead;
mod movement;
mod narrow;
mod norm;
mod optimizer;
mod parts;
mod reduce;
mod routed;
mod router;
mod sparse;

use moebius_ir::{DType, Graph, Node, NodeId, Op};

use super::launch::Launch;
use super::limits::Limits;
use crate::joined::{self as shared, Beside};

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

/// What a node's kernels do beside its own work.
struct Around<'a> {
    lead: Option<lead::Lead>,
    joined: Option<joined::Joined<'a>>,
    routed: Option<routed::Routed<'a>>,
    combined: Option<combined::Combined<'a>>,
}

/// The node that is to be joined onto a node on a device with such limits: one that the node's kernels can do, or a product whose kernel
/// can do the node.
pub(crate) fn joined(graph: &Graph, id: NodeId, limits: Limits) -> Option<NodeId> {
    if let Some(dispatch) = chosen(graph, id, limits) {
        return Some(dispatch);
    }
    if let Some(product) = shared::led(graph, id) {
        let beside = Beside { before: Some(id), ..behind(graph, product, limits) };
        let apart = beside.behind.is_none_or(|chain| shared::apart(graph, id, chain));
        let does = || lower(graph, product, beside, limits).is_ok_and(|l| l.lead.is_some());
        return Some(product).filter(|_| apart && does());
    }
    let next = behind(graph, id, limits);
    next.behind.or(next.combined)
}

/// The dispatch behind an assign, if a product can do both, and the route before them.
fn chosen(graph: &Graph, assign: NodeId, limits: Limits) -> Option<NodeId> {
    let node = graph.node(assign);
    let route =
        graph.producer(shared::base(graph, *node.operands.first().filter(|_| matches!(node.op, Op::Assign(_)))?));
    chooses(graph, route, limits)
}

/// The dispatch behind the assign behind a route, if a product can do all three.
fn chooses(graph: &Graph, route: NodeId, limits: Limits) -> Option<NodeId> {
    let [assign, dispatch, product] = shared::chosen(graph, route)?;
    let with = behind(graph, product, limits);
    let beside = Beside { before: Some(dispatch), route: Some(route), assigned: Some(assign), ..with };
    lower(graph, product, beside, limits).is_ok_and(|l| l.lead.is_some()).then_some(dispatch)
}

/// What a node's kernels can do of the nodes behind it.
fn behind(graph: &Graph, id: NodeId, limits: Limits) -> Beside {
    let does = |beside: Beside| lower(graph, id, beside, limits).is_ok();
    if let Some(route) = shared::routed(graph, id).filter(|&route| chooses(graph, route, limits).is_none()) {
        let assigned = behind(graph, route, limits).behind;
        let beside = Beside { behind: Some(route), assigned, ..Beside::default() };
        if does(beside) {
            return beside;
        }
    }
    let follows = |next: &NodeId| {
        let beside = Beside { behind: Some(*next), ..Beside::default() };
        let first = beside.first(graph, id, *next);
        let chain = || joined::Joined::new(graph, id, *next, first, limits).is_some();
        if matches!(graph.node(*next).op, Op::Assign(_)) { does(beside) } else { chain() }
    };
    let beside = Beside { behind: shared::follower(graph, id).filter(follows), ..Beside::default() };
    let Some(combine) = shared::combined(graph, id, beside) else { return beside };
    let with = Beside { combined: Some(combine), behind_combined: behind(graph, combine, limits).behind, ..beside };
    if does(with) { with } else { beside }
}

/// The launch of a node on a device with such limits, with the work of the nodes beside it, whose operands and results follow the node's.
///
/// # Errors
/// What the backend wants instead.
pub(crate) fn lower(graph: &Graph, id: NodeId, beside: Beside, limits: Limits) -> Lowered {
    let node = graph.node(id);
    let chain = |chain| joined::Joined::new(graph, id, chain, beside.first(graph, id, chain), limits);
    let around = Around {
        lead: lead::Lead::new(graph, id, beside),
        joined: beside.behind.and_then(chain),
        routed: routed::Routed::new(graph, id, beside),
        combined: combined::Combined::new(graph, id, beside, limits)?,
    };
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
        Op::Reduce(op) => reduce::lower_reduce(graph, node, op, limits),
        Op::Softmax(_) => norm::lower_softmax(graph, node, limits),
        Op::SoftmaxGrad(_) => norm::lower_softmax_grad(graph, node, limits),
        Op::LayerNorm(op) => norm::lower_layer_norm(graph, node, op.eps, limits),
        Op::LayerNormGrad(_) => norm::lower_layer_norm_grad(graph, node, limits),
        Op::RmsNorm(op) => norm::lower_rms_norm(graph, node, op.eps, limits),
        Op::RmsNormGrad(_) => norm::lower_rms_norm_grad(graph, node, limits),

        Op::Matmul(op) => gemm::lower_matmul(graph, node, op, &around, limits),
        Op::Attention(op) => attention::lower_attention(graph, node, op, limits),
        Op::AttentionGrad(op) => attention::lower_attention_grad(graph, node, op, limits),
        Op::AttentionCached(op) => attention::lower_attention_cached(graph, node, op, limits),
        Op::Embedding(_) => embedding::lower_embedding(graph, node, limits),
        Op::EmbeddingGrad(_) => embedding::lower_embedding_grad(graph, node, limits),
        Op::LinearCrossEntropy(_) => classifier::lower_linear_cross_entropy(graph, node, limits),
        Op::LinearCrossEntropyGrad(_) => classifier::lower_linear_cross_entropy_grad(graph, node, limits),
        Op::LinearDistillation(op) => classifier::lower_linear_distillation(graph, node, op.temperature, limits),
        Op::LinearDistillationGrad(op) => {
            classifier::lower_linear_distillation_grad(graph, node, op.temperature, limits)
        }
        Op::LinearDistillationCached(op) => {
            classifier::lower_linear_distillation_cached(graph, node, op.temperature, limits)
        }
        Op::LinearDistillationCachedGrad(op) => {
            classifier::lower_linear_distillation_cached_grad(graph, node, op.temperature, limits)
        }

        Op::Route(op) => {
            let with_assign = around.routed.as_ref().filter(|_| beside.behind.is_some());
            router::lower_route(graph, node, op, with_assign, limits)
        }
        Op::RouteGrad(op) => router::lower_route_grad(graph, node, op, limits),
        Op::Assign(op) => router::lower_assign(graph, node, op, limits),
        Op::Dispatch(_) => sparse::lower_dispatch(graph, node, limits),
        Op::Combine(op) => sparse::lower_combine(graph, node, *op, around.joined.as_ref(), limits),
        Op::GateGrad(_) => sparse::lower_gate_grad(graph, node, limits),
        Op::SegmentSum(_) => sparse::lower_segment_sum(graph, node, limits),
        Op::ExpertMatmul(op) => gemm::lower_expert_matmul(graph, node, op, &around, limits),
        Op::ExpertMatmulWgrad(_) => gemm::lower_expert_matmul_wgrad(graph, node, limits),

        Op::GlobalNorm(_) => optimizer::lower_global_norm(graph, node, limits),
        Op::Adamw(op) => optimizer::lower_adamw(graph, node, op, limits),
    };
    let stored = around.joined.as_ref().is_none_or(|j| j.kept) && around.combined.is_none();
    launch.map(|launch| Launch { stored, ..launch.trimmed() })
}
