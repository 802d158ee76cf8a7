//! What makes the rows of a product in its kernel: the norm or the dispatch right before it. lead.cuh has the
//! kernel's side of it.

use moebius_ir::{DType, Graph, NodeId, Op};

use super::{dtype, int, per_lane};
use crate::cuda::launch::{Arg, Joint};
use crate::cuda::source::Source;
use crate::joined::{Beside, is_kept};

/// Threads that have a row of a norm, as in norm.cuh.
const THREADS: usize = 128;
/// The most pieces of a row that a thread has: it holds those of the weights too.
const MOST_PIECES: usize = 2;
/// Bytes of shared memory for the rows, beside what the product needs.
const MOST_BYTES: usize = 16 * 1024;

/// How the kernel makes rows.
enum Making {
    /// A norm, under its name in lead.cuh: elements of a row, how many a thread has at a time, and how often.
    Norm { name: &'static str, width: usize, per_lane: usize, pieces: usize },
    /// A dispatch.
    Dispatch,
    /// A dispatch of the one token there is, whose expert the kernel chooses.
    Token,
}

/// A norm or a dispatch before a product.
pub(super) struct Lead {
    making: Making,
    dtype: DType,
    /// Where the kernel's own rows are: of a dispatch the tokens'.
    pub(super) rows: Arg,
    /// The arguments for `LEAD_PARAMETERS`.
    args: Vec<Arg>,
    /// Whether something else reads its results.
    kept: bool,
}

impl Lead {
    /// The node before the product `id`, if its kernel can do it.
    ///
    /// # Errors
    /// Of sizes that kernels cannot count.
    pub(super) fn new(graph: &Graph, id: NodeId, beside: Beside) -> Result<Option<Lead>, String> {
        let Some(before) = beside.before else { return Ok(None) };
        let (node, [operands, results]) = (graph.node(before), beside.first(graph, id, before));
        let (operand, dtype) = (|i| Arg::Operand(operands + i), dtype(graph, node, 0));
        if matches!(node.op, Op::Dispatch(_)) && beside.route.is_some() {
            return Ok(Some(Lead { making: Making::Token, dtype, rows: operand(0), args: vec![], kept: false }));
        }
        if matches!(node.op, Op::Dispatch(_)) {
            let choice_slot = graph.ty(node.operands[2]);
            let gate = if node.operands.len() > 3 { operand(3) } else { Arg::Null };
            let choices = Arg::I32(int(choice_slot.elements(), "choices")?);
            let args = vec![operand(1), gate, choices, Arg::I32(int(choice_slot.shape[1], "choices")?)];
            return Ok(Some(Lead { making: Making::Dispatch, dtype, rows: operand(0), args, kept: false }));
        }
        let (name, eps) = if let Op::LayerNorm(op) = &node.op {
            ("LAYER_NORM", op.eps)
        } else if let Op::RmsNorm(op) = &node.op {
            ("RMS_NORM", op.eps)
        } else {
            return Ok(None);
        };
        let shape = &graph.ty(node.operands[0]).shape;
        let width = shape.last();
        let per_lane = per_lane(dtype, width);
        let pieces = width.div_ceil(THREADS * per_lane).max(1);
        if pieces > MOST_PIECES || shape.rows().next_power_of_two() * width * dtype.bytes() > MOST_BYTES {
            return Ok(None);
        }
        let kept = node.results.iter().any(|&v| is_kept(graph, v, id));
        let has_mean = node.results.len() > 2;
        let result = |i| if kept { Arg::Result(results + i) } else { Arg::Null };
        let beta = if has_mean { operand(2) } else { Arg::Null };
        let [mean, rstd] = if has_mean { [result(1), result(2)] } else { [Arg::Null, result(1)] };
        let args = vec![operand(0), operand(1), beta, Arg::F32(eps), result(0), mean, rstd];
        let making = Making::Norm { name, width, per_lane, pieces };
        Ok(Some(Lead { making, dtype, rows: Arg::Operand(0), args, kept }))
    }

    /// Whether it is for products of `rows` rows of `width` elements of this type, where a block has at most `most` rows.
    pub(super) fn fits(&self, rows: usize, width: usize, dtype: DType, most: usize) -> bool {
        let of_block = match self.making {
            // Every block would make all rows.
            Making::Norm { width: own, .. } => own == width && rows <= most,
            Making::Dispatch | Making::Token => true,
        };
        of_block && self.dtype == dtype
    }

    /// Whether it is a norm.
    pub(super) fn is_norm(&self) -> bool {
        matches!(self.making, Making::Norm { .. })
    }
}

/// A file of products whose rows are made by a node before them or by none.
pub(super) fn source(lead: Option<&Lead>, source: Source) -> Source {
    match lead.map(|lead| &lead.making) {
        None | Some(Making::Token) => source.define("LEAD", "NOTHING"),
        Some(Making::Dispatch) => source.define("LEAD", "DISPATCH"),
        Some(Making::Norm { name, width, per_lane, pieces }) => {
            source.define("LEAD", name).define("WIDTH", width).define("PER_LANE", per_lane).define("PIECES", pieces)
        }
    }
}

/// The arguments of `LEAD_PARAMETERS`.
pub(super) fn args(lead: Option<&Lead>) -> Vec<Arg> {
    lead.map_or_else(Vec::new, |lead| lead.args.clone())
}

/// What a launch whose kernel takes it does of it.
pub(super) fn joint(lead: Option<&Lead>) -> Joint {
    match lead {
        None => Joint::None,
        Some(Lead { kept: true, .. }) => Joint::Stored,
        Some(Lead { kept: false, .. }) => Joint::Unstored,
    }
}
