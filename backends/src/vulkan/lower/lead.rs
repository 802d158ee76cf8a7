//! What makes the rows of a product of few rows in its kernel: the norm or the dispatch right before it, with the bits of its own kernel.

use moebius_ir::{DType, Graph, NodeId, Op};

use super::few_rows::Few;
use super::{dtype, norm};
use crate::joined::{Beside, is_kept};
use crate::vulkan::launch::At;
use crate::vulkan::shader::Shader;

/// Bytes of a workgroup's memory for the rows of a norm, which are f32 there.
const MOST_BYTES: usize = 16 << 10;

/// How the kernel makes rows.
enum Making {
    /// A norm of rows of so many elements.
    Norm { layer: bool, width: usize, eps: f32 },
    /// A dispatch: the choices of all tokens, and of each.
    Dispatch { choices: [usize; 2], gate: bool },
    /// A dispatch of one token, whose only choice the kernel makes itself.
    Token,
}

/// A norm or a dispatch before a product.
pub(super) struct Lead {
    making: Making,
    /// Of the operands.
    dtypes: Vec<DType>,
    /// The first of its operands and of its results, which follow those of the product and of the chain behind it.
    first: [usize; 2],
    /// Whether something else reads its results.
    pub(super) kept: bool,
}

impl Lead {
    /// The node before the product `id`, if there is one.
    pub(super) fn new(graph: &Graph, id: NodeId, beside: Beside) -> Option<Lead> {
        let before = beside.before?;
        let (node, first) = (graph.node(before), beside.first(graph, id, before));
        let dtypes: Vec<DType> = (0..node.operands.len()).map(|i| dtype(graph, node, i)).collect();
        let width = || graph.ty(node.operands[0]).shape.last();
        let making = if let Op::LayerNorm(op) = &node.op {
            Making::Norm { layer: true, width: width(), eps: op.eps }
        } else if let Op::RmsNorm(op) = &node.op {
            Making::Norm { layer: false, width: width(), eps: op.eps }
        } else if let (Op::Dispatch(_), Some(_)) = (&node.op, beside.route) {
            Making::Token
        } else if let Op::Dispatch(_) = node.op {
            let shape = &graph.ty(node.operands[2]).shape;
            Making::Dispatch { choices: [shape.elements(), shape[1]], gate: node.operands.len() > 3 }
        } else {
            return None;
        };
        let kept = node.results.iter().any(|&v| is_kept(graph, v, id));
        Some(Lead { making, dtypes, first, kept })
    }

    /// Whether a kernel for products of so many rows, as many as it has at once, can do it; they are read as `dtype`.
    pub(super) fn fits(&self, few: &Few, [rows, k]: [usize; 2], dtype: DType) -> bool {
        let makes = match self.making {
            Making::Norm { width, .. } => {
                width == k && rows == few.rows && norm::by_eight(width) && 4 * rows * width <= MOST_BYTES
            }
            Making::Dispatch { .. } | Making::Token => few.rows == 1,
        };
        makes && few.takes_lead() && self.dtypes[0] == dtype
    }

    /// Where the kernel's own rows are: nowhere, or of a dispatch the tokens'.
    pub(super) fn rows(&self) -> At {
        match self.making {
            Making::Norm { .. } => At::Null,
            Making::Dispatch { .. } | Making::Token => At::Operand(self.first[0]),
        }
    }

    /// The kernel with `prepare(group, thread)`, which makes what it has of the rows, and `left_eight(r, k)`, eight of one of them.
    fn add(&self, shader: Shader) -> Shader {
        let (dtype, operand) = (self.dtypes[0], |i| At::Operand(self.first[0] + i));
        let as_stored = match dtype {
            DType::Bf16 => "eight_of_bf16(bf16_of_eight(v))",
            DType::F16 => "eight_of_f16(f16_of_eight(v))",
            DType::F32 | DType::I32 | DType::U32 | DType::Bool => "v",
        };
        let shader = shader.declare(&format!("fn as_stored(v: Eight) -> Eight {{ return {as_stored}; }}"));
        match self.making {
            Making::Token => shader.with("lead_token"),
            Making::Dispatch { choices: [all, each], gate } => {
                let gate = if gate { (self.dtypes[3], operand(3)) } else { (DType::F32, At::Null) };
                let shader = shader.with("lead_dispatch").number("choices", all).number("choices_each", each);
                shader.buffer("slot_choice", DType::I32, operand(1)).buffer("dispatch_gate", gate.0, gate.1)
            }
            Making::Norm { layer, width, eps } => {
                let result = |i| if self.kept { At::Result(self.first[1] + i) } else { At::Null };
                let shader = norm::row(shader.with("lead_norm"), layer, width).float("eps", eps);
                let shader = shader.by_eight("x", dtype, operand(0)).by_eight("gamma", self.dtypes[1], operand(1));
                let shader = if layer { shader.by_eight("beta", self.dtypes[2], operand(2)) } else { shader };
                let [mean, rstd] = if layer { [result(1), result(2)] } else { [At::Null, result(1)] };
                let shader = shader.by_eight("y", dtype, result(0));
                shader.buffer("mean", DType::F32, mean).buffer("rstd", DType::F32, rstd)
            }
        }
    }
}

/// A kernel of products of few rows, which are made by a node before it or by none.
pub(super) fn led(shader: Shader, lead: Option<&Lead>) -> Shader {
    match lead {
        None => shader.with("lead_none"),
        Some(lead) => lead.add(shader),
    }
}
