//! From a node to its kernels. This one function is also the support check: a node it gives no launch for is refused.
//!
//! The files beside this one hold the launches, grouped as the kernels are; each decides from the graph and the kind of GPU
//! alone, so that what is said here of a machine with a GPU can be tested on one without.

mod attention;
mod chosen;
mod classifier;
mod combined;
mod early;
mod elementwise;
mod embedding;
mod few_rows;
mod gemm;
mod hopper;
mod joined;
mod lead;
mod movement;
mod narrow;
mod norm;
mod optimizer;
mod reduce;
mod route;
mod short;
mod sparse;
mod split;
mod twin;
mod wgmma;

use moebius_ir::{DType, Graph, Node, NodeId, Op};

use super::chip::Chip;
use super::launch::{Joint, Launch};
use super::source::{Header, Source};
use crate::joined::{self as shared, Beside};
use crate::lowering::shapes;

/// A launch, or what the CUDA backend wants instead of the node.
type Lowered = Result<Launch, String>;

/// The kernels' name of a float type.
fn float(dtype: DType) -> Result<&'static str, String> {
    match dtype {
        DType::F32 => Ok("float"),
        DType::Bf16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        DType::I32 | DType::U32 | DType::Bool => Err(format!("a float, not {dtype}")),
    }
}

/// A file of kernels for one float type.
fn typed(file: &'static str, headers: &'static [Header], body: &'static str, dtype: DType) -> Result<Source, String> {
    Ok(Source::new(file, headers, body).define("T", float(dtype)?))
}

/// A size that kernels count in 32 bits.
fn int(n: usize, what: &str) -> Result<i32, String> {
    i32::try_from(n).map_err(|_| format!("{what} of at most {}, not {n}", i32::MAX))
}

/// The dtype of an operand.
fn dtype(graph: &Graph, node: &Node, i: usize) -> DType {
    graph.ty(node.operands[i]).dtype
}

/// Elements of a row that a lane has at a time: 16 bytes where rows of `d` begin at multiples of that, else one.
fn per_lane(dtype: DType, d: usize) -> usize {
    let whole = 16 / dtype.bytes();
    if d.is_multiple_of(whole) { whole } else { 1 }
}

/// The node that is to be joined onto a node on such a GPU: one that the node's kernels can do, or a product whose kernels can do the
/// node.
pub(crate) fn joined(graph: &Graph, id: NodeId, chip: Chip) -> Option<NodeId> {
    if let Some(dispatch) = chosen(graph, id, chip) {
        return Some(dispatch);
    }
    if let Some(product) = shared::led(graph, id) {
        let beside = Beside { before: Some(id), behind: follower(graph, product, chip), ..Beside::default() };
        let apart = beside.behind.is_none_or(|chain| shared::apart(graph, id, chain));
        let does = || lower(graph, product, beside, chip).is_ok_and(|l| l.before != Joint::None);
        return Some(product).filter(|_| apart && does());
    }
    follower(graph, id, chip).or_else(|| {
        if matches!(graph.node(id).op, Op::Softmax(_)) {
            let experts = graph.nodes_with_ids().filter(|(_, node)| matches!(node.op, Op::ExpertMatmul(_)));
            let mut beside = experts.map(|(product, _)| beside_experts(graph, product, chip));
            return beside.find(|beside| beside.weighed == Some(id))?.combined;
        }
        let product = shared::ended(graph, id).or_else(|| shared::twinned(graph, id))?;
        let Beside { behind, twin, weighed, combined, .. } = beside_experts(graph, product, chip);
        let ends = weighed.or(combined);
        // What follows the last of the nodes in front of it; the twin's own chain is told above.
        if behind.unwrap_or(product) == id { twin.or(ends) } else { ends.filter(|_| twin == Some(id)) }
    })
}

/// The dispatch behind an assign, if a product can do both, and the route before them.
fn chosen(graph: &Graph, assign: NodeId, chip: Chip) -> Option<NodeId> {
    let node = graph.node(assign);
    let index = *node.operands.first().filter(|_| matches!(node.op, Op::Assign(_)))?;
    let route = graph.producer(shared::base(graph, index));
    let [assign, dispatch, product] = shared::chosen(graph, route)?;
    let around = beside_experts(graph, product, chip);
    let beside = Beside { before: Some(dispatch), route: Some(route), assigned: Some(assign), ..around };
    lower(graph, product, beside, chip).is_ok_and(|l| l.before != Joint::None).then_some(dispatch)
}

/// What the kernels of a product of experts can do on such a GPU of the nodes beside it, but for one before it.
fn beside_experts(graph: &Graph, product: NodeId, chip: Chip) -> Beside {
    let mut beside = Beside { behind: follower(graph, product, chip), ..Beside::default() };
    let does = |beside: Beside, of: fn(&Launch) -> Joint| {
        lower(graph, product, beside, chip).is_ok_and(|l| of(&l) != Joint::None)
    };
    if let Some(twin) = shared::twin(graph, product) {
        let with = Beside { twin: Some(twin), behind_twin: follower(graph, twin, chip), ..beside };
        beside = if does(with, |l| l.twin) { with } else { beside };
    }
    if let Some(combine) = shared::combined(graph, product, beside) {
        let with = Beside { combined: Some(combine), behind_combined: follower(graph, combine, chip), ..beside };
        beside = if does(with, |l| l.combined) { with } else { beside };
        let weighed = shared::weighed(graph, combine).filter(|_| beside.combined.is_some());
        let with = Beside { weighed, ..beside };
        beside = if does(with, |l| l.combined) { with } else { beside };
    }
    beside
}

/// The node behind that a node's kernels can do on such a GPU.
fn follower(graph: &Graph, id: NodeId, chip: Chip) -> Option<NodeId> {
    let does = |behind: &NodeId| {
        let beside = Beside { behind: Some(*behind), ..Beside::default() };
        lower(graph, id, beside, chip).is_ok_and(|l| l.behind != Joint::None)
    };
    shared::follower(graph, id).filter(does)
}

/// The launch of a node on such a GPU, with the work of the nodes beside it that its kernels can do.
///
/// # Errors
/// What the backend wants instead.
pub(crate) fn lower(graph: &Graph, id: NodeId, beside: Beside, chip: Chip) -> Lowered {
    let node = graph.node(id);
    let launch = match &node.op {
        // Nothing to run: these are places in memory, settled by the plan.
        Op::Input(_) | Op::Constant(_) | Op::Reshape(_) | Op::After(_) => Ok(Launch::default()),

        Op::Random(op) => movement::lower_random(graph, node, op),
        Op::Transpose(_) | Op::Broadcast(_) | Op::Slice(_) | Op::Pad(_) | Op::Concat(_) => {
            movement::lower_movement(graph, node)
        }

        Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select(_) | Op::Cast(_) => {
            Err("elementwise work in fused form, as the fusion pass leaves it".into())
        }
        Op::Elementwise(op) => elementwise::lower_elementwise(graph, node, op),

        Op::Reduce(op) => reduce::lower_reduce(graph, node, op),
        Op::Softmax(_) => norm::lower_softmax(graph, node),
        Op::SoftmaxGrad(_) => norm::lower_softmax_grad(graph, node),
        Op::LayerNorm(op) => norm::lower_layer_norm(graph, node, op.eps),
        Op::LayerNormGrad(_) => norm::lower_layer_norm_grad(graph, node),
        Op::RmsNorm(op) => norm::lower_rms_norm(graph, node, op.eps),
        Op::RmsNormGrad(_) => norm::lower_rms_norm_grad(graph, node),

        Op::Matmul(op) => gemm::lower_matmul(graph, id, op, beside, chip),
        Op::Attention(op) => attention::lower_attention(graph, node, op, chip),
        Op::AttentionGrad(op) => attention::lower_attention_grad(graph, node, op, chip),
        Op::AttentionCached(op) => attention::lower_attention_cached(graph, node, op, chip),
        Op::Embedding(_) => embedding::lower_embedding(graph, node),
        Op::EmbeddingGrad(_) => embedding::lower_embedding_grad(graph, node),
        Op::LinearCrossEntropy(_) => classifier::lower_linear_cross_entropy(graph, node, chip),
        Op::LinearCrossEntropyGrad(_) => classifier::lower_linear_cross_entropy_grad(graph, node, chip),
        Op::LinearDistillation(op) => classifier::lower_linear_distillation(graph, node, op.temperature),
        Op::LinearDistillationGrad(op) => classifier::lower_linear_distillation_grad(graph, node, op.temperature, chip),
        Op::LinearDistillationCached(op) => classifier::lower_linear_distillation_cached(graph, node, op.temperature),
        Op::LinearDistillationCachedGrad(op) => {
            classifier::lower_linear_distillation_cached_grad(graph, node, op.temperature, chip)
        }

        Op::Route(op) => route::lower_route(graph, node, op, beside),
        Op::RouteGrad(op) => route::lower_route_grad(graph, node, op),
        Op::Assign(op) => route::lower_assign(graph, node, op),
        Op::Dispatch(_) => sparse::lower_dispatch(graph, node),
        Op::Combine(op) => sparse::lower_combine(graph, node, *op, beside),
        Op::GateGrad(_) => sparse::lower_gate_grad(graph, node),
        Op::SegmentSum(_) => sparse::lower_segment_sum(graph, node),
        Op::ExpertMatmul(op) => gemm::lower_expert_matmul(graph, id, op, beside, chip),
        Op::ExpertMatmulWgrad(_) => gemm::lower_expert_matmul_wgrad(graph, node, beside, chip),

        Op::GlobalNorm(_) => optimizer::lower_global_norm(graph, node),
        Op::Adamw(op) => optimizer::lower_adamw(graph, node, op),
    };
    launch?.checked()
}
