//! A combine that runs in the kernel of the product of experts before it, with the chain behind it: for tokens of one choice each, so that
//! a workgroup has all that an element of the result is made of.

use moebius_ir::ops::Combine;
use moebius_ir::{DType, Graph, NodeId, Op};

use super::joined::Joined;
use super::{dtype, dtype_of_result};
use crate::joined::Beside;
use crate::vulkan::launch::At;
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

pub(super) struct Combined<'a> {
    op: Combine,
    pub(super) tokens: usize,
    slots: usize,
    /// Of the rows, the side and the result.
    dtypes: [DType; 3],
    /// The first of its operands and of its results, which follow those of the nodes before it.
    first: [usize; 2],
    pub(super) joined: Option<Joined<'a>>,
}

impl<'a> Combined<'a> {
    /// The combine beside node `id`, if there is one.
    ///
    /// # Errors
    /// What is wanted instead of one that a kernel of the product cannot do.
    pub(super) fn new(
        graph: &'a Graph,
        id: NodeId,
        beside: Beside,
        limits: Limits,
    ) -> Result<Option<Combined<'a>>, String> {
        let Some(combine) = beside.combined else { return Ok(None) };
        let node = graph.node(combine);
        let Op::Combine(op) = &node.op else { return Ok(None) };
        let [_, slot_choice, choice_slot] = [0, 1, 2].map(|i| graph.ty(node.operands[i]));
        if choice_slot.shape[1] != 1 {
            return Err(format!("tokens of one choice, not {}", choice_slot.shape[1]));
        }
        let rows = dtype(graph, node, 0);
        let side = op.operands()[1].map_or(rows, |i| dtype(graph, node, i));
        let joined = match beside.behind_combined {
            None => None,
            Some(chain) => {
                let first = beside.first(graph, id, chain);
                Some(Joined::new(graph, combine, chain, first, limits).ok_or("another chain behind a combine")?)
            }
        };
        Ok(Some(Combined {
            op: *op,
            tokens: choice_slot.shape[0],
            slots: slot_choice.shape[0],
            dtypes: [rows, side, dtype_of_result(graph, node, 0)],
            first: beside.first(graph, id, combine),
            joined,
        }))
    }

    /// Whether anything but the chain needs the result.
    pub(super) fn kept(&self) -> bool {
        self.joined.as_ref().is_none_or(|joined| joined.kept)
    }

    /// The result.
    pub(super) fn result(&self) -> (DType, At) {
        (self.dtypes[2], At::Result(self.first[1]))
    }

    /// A kernel of `gemm_by_token.wgsl` with what it needs of the combine.
    pub(super) fn add(&self, shader: Shader) -> Shader {
        let [rows, side, _] = self.dtypes;
        let at = |i: Option<usize>| i.map_or(At::Null, |i| At::Operand(self.first[0] + i));
        let [gate_at, side_at, coefficient_at] = self.op.operands().map(at);
        let as_row = match rows {
            DType::Bf16 => "round_bf16(x)",
            DType::F16 => "round_f16(x)",
            DType::F32 | DType::I32 | DType::U32 | DType::Bool => "x",
        };
        shader
            .declare(&format!("fn as_row(x: f32) -> f32 {{ return {as_row}; }}"))
            .number("slots", self.slots)
            .buffer("choice_slot", DType::I32, at(Some(2)))
            .buffer("gate", DType::F32, gate_at)
            .buffer("coefficient", DType::F32, coefficient_at)
            .buffer("side", side, side_at)
    }
}
