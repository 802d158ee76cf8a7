//! Bugs of the expert products.

use moebius_ir::Tensor;

use super::Check::{Golden, Gradients, OneHotForm, Values};
use super::slots::rows_left;
use super::{Bug, Launch};

pub(super) const BUGS: &[Bug] = &[
    Bug {
        name: "unwritten gradient of an idle expert",
        what: "the gradient of the weights of an expert without tokens keeps what stood there",
        seen: "grouped_gemm #36, torchtitan #1237, pytorch #154557, #174314",
        op: "expert_matmul_wgrad",
        wrong: |l| Some(idle_left(l, 2)),
        noticed_by: &[
            OneHotForm,
            Values("expert_matmul_wgrad", "an empty expert"),
            Gradients("expert_matmul", "an empty expert, transposed false, no bias"),
            Gradients("moe_layer", "more experts than tokens"),
        ],
    },
    Bug {
        name: "unwritten bias gradient of an idle expert",
        what: "the gradient of the bias of an expert without tokens keeps what stood there",
        seen: "the same, for the bias",
        op: "segment_sum",
        wrong: |l| Some(idle_left(l, 1)),
        noticed_by: &[
            OneHotForm,
            Values("segment_sum", "an empty expert"),
            Gradients("expert_matmul", "an empty expert, transposed true, bias"),
        ],
    },
    Bug {
        name: "slots after the last segment not written",
        what: "rows of unused slots keep what stood there",
        seen: "transformers #48205, torchtitan #1166: padding rows",
        op: "expert_matmul",
        wrong: |l| {
            let used = l.operands()[2].data.last().copied()? as usize;
            Some(rows_left(l, |s| s >= used))
        },
        noticed_by: &[Values("expert_matmul", "choices of nothing, transposed false, no bias")],
    },
    Bug {
        name: "segment shifted by an idle expert",
        what: "experts without tokens are skipped, and the weights of the later ones move up",
        seen: "a list of busy experts used as a list of all",
        op: "expert_matmul",
        wrong: |l| {
            let offsets = l.operands()[2];
            let mut ends: Vec<f64> = offsets.data.clone();
            ends.dedup();
            ends.resize(offsets.data.len(), *ends.last()?);
            Some(l.with(2, &Tensor::new(offsets.ty.clone(), ends)))
        },
        noticed_by: &[
            OneHotForm,
            Values("expert_matmul", "an empty expert, transposed false, bias"),
            Values("moe_layer", "more experts than tokens"),
        ],
    },
    Bug {
        name: "matrices of experts not transposed",
        what: "the gradient of the rows is a product with the weights and not with their transpose",
        seen: "gpt-oss and its exchanged layouts: torchtitan #2258",
        op: "expert_matmul",
        wrong: |l| {
            let w = l.operands()[1];
            let (k, n) = (w.ty.shape[1], w.ty.shape[2]);
            if !l.is_backward() {
                return None;
            }
            // The same numbers, read row by row as if they were the other way round.
            let mut turned = w.clone();
            for (e, matrix) in w.data.chunks(k * n).enumerate() {
                for (i, v) in matrix.iter().enumerate() {
                    turned.data[e * k * n + i % n * k + i / n] = *v;
                }
            }
            Some(l.with(1, &turned))
        },
        noticed_by: &[
            OneHotForm,
            Gradients("expert_matmul", "top-1, dropless, transposed false, no bias"),
            Golden("layer", "standard_top3_cf0.5"),
        ],
    },
];

/// The results but for the part of experts without slots, by the offsets in operand `i`.
fn idle_left(l: &Launch<'_>, i: usize) -> Vec<Tensor> {
    let offsets = &l.operands()[i].data;
    rows_left(l, |e| offsets[e] == offsets[e + 1])
}
