//! Bugs of `assign`, `dispatch`, `combine` and `gate_grad`.

use moebius_ir::ops::{Assign, Order};
use moebius_ir::{Op, Tensor};

use super::Check::{Golden, Gradients, OneHotForm, Values};
use super::{Bug, Launch};

pub(super) const BUGS: &[Bug] = &[
    Bug {
        name: "capacity off by one",
        what: "an expert keeps one choice less than its capacity",
        seen: "DeepSpeed #5353, #8155",
        op: "assign",
        wrong: |l| {
            let op = assign(l)?;
            let less = Assign { capacity: Some(op.capacity?.checked_sub(1)?), ..op.clone() };
            Some(l.by(&less.into(), &l.operands()))
        },
        noticed_by: &[
            OneHotForm,
            Values("assign", "capacity drops some, tokenmajor, priority false"),
            Golden("gating", "top1_fcfs_cf0.5"),
            Golden("ep", "ep4_standard_top2_cf0.5"),
        ],
    },
    Bug {
        name: "second choices before first",
        what: "last choices fill an expert before first ones",
        seen: "GShard's order the wrong way round",
        op: "assign",
        wrong: |l| {
            let op = assign(l).filter(|op| op.order == Order::ChoiceMajor && op.capacity.is_some())?;
            let index = l.operands()[0];
            if l.operands().len() > 1 {
                return None;
            }
            let k = index.ty.shape.last();
            let later = (0..index.data.len()).map(|c| (c % k) as f64).collect();
            let priority = Tensor::f32(index.ty.shape.clone(), later);
            Some(l.by(&op.clone().into(), &[index, &priority]))
        },
        noticed_by: &[
            OneHotForm,
            Values("assign", "capacity drops some, choicemajor, priority false"),
            Golden("gating", "top2_argmax_cf0.5"),
        ],
    },
    Bug {
        name: "evicted by logits",
        what: "a full expert keeps the tokens of the largest logits, not of the largest probabilities",
        seen: "DeepSpeed #7986",
        op: "assign",
        wrong: |l| {
            // Where the gates decide, as they come from the router.
            let by = *l.node.operands.get(1)?;
            let route = l.graph.nodes().iter().find(|n| n.op.name() == "route" && n.results[0] == by)?;
            let (logits, index) = (l.value(route.operands[0]), l.operands()[0]);
            let (e, k) = (logits.ty.shape.last(), index.ty.shape.last());
            // A choice of nothing has no logit.
            let logit = |(c, &x): (usize, &f64)| if x < 0.0 { 0.0 } else { logits.data[c / k * e + x as usize] };
            let data = index.data.iter().enumerate().map(logit).collect();
            Some(l.with(1, &Tensor::f32(index.ty.shape.clone(), data)))
        },
        noticed_by: &[OneHotForm, Golden("gating", "top2k_probs_cf0.25")],
    },
    Bug {
        name: "padding takes slots",
        what: "a choice of nothing goes to the first expert",
        seen: "transformers #45621; a clamped index",
        op: "assign",
        wrong: |l| {
            let mut index = l.operands()[0].clone();
            index.data.iter_mut().for_each(|x| *x = x.max(0.0));
            Some(l.with(0, &index))
        },
        noticed_by: &[
            Values("assign", "choices of nothing, tokenmajor, priority false"),
            Golden("gating", "top1_used_token"),
        ],
    },
    Bug {
        name: "dropped slot read back",
        what: "a choice without a slot adds the row of slot 0",
        seen: "a clamped index: DeepSpeed #1658, #1762",
        op: "combine",
        wrong: |l| slots_clamped(l, 2),
        noticed_by: &[
            OneHotForm,
            Values("combine", "capacity drops some, gated true"),
            Gradients("dispatch", "capacity drops some, gated true"),
            Golden("layer", "standard_top1_cf0.5"),
        ],
    },
    Bug {
        name: "dropped gate with a gradient",
        what: "the gate of a choice without a slot gets the gradient of slot 0",
        seen: "a clamped index",
        op: "gate_grad",
        wrong: |l| slots_clamped(l, 3),
        noticed_by: &[Values("gate_grad", "capacity drops some"), Golden("layer", "standard_top1_cf0.5")],
    },
    Bug {
        name: "unused slots not written",
        what: "rows of slots that no choice has keep what stood there",
        seen: "NaN times 0: TransformerEngine #3484, #3116",
        op: "dispatch",
        wrong: |l| {
            let unused: Vec<bool> = l.operands()[1].data.iter().map(|&c| c < 0.0).collect();
            Some(rows_left(l, |s| unused[s]))
        },
        noticed_by: &[Values("dispatch", "choices of nothing, gated false")],
    },
    Bug {
        name: "coefficients swapped",
        what: "the coefficient of the experts weights the dense network and the other way round",
        seen: "the two columns of PR-MoE's coefficient",
        op: "combine",
        wrong: |l| {
            let Op::Combine(op) = &l.node.op else { return None };
            let at = op.operands()[2]?;
            let mut coefficient = l.operands()[at].clone();
            coefficient.data.chunks_mut(2).for_each(|pair| pair.swap(0, 1));
            Some(l.with(at, &coefficient))
        },
        noticed_by: &[
            OneHotForm,
            Values("combine", "k = E, with a side, gated true, coefficients true"),
            Values("published_routers", "top1, residual, with capacity"),
        ],
    },
    Bug {
        name: "side branch weighted by the gate",
        what: "the shared expert is multiplied with the first gate of its token",
        seen: "Automodel #2591 the other way round",
        op: "combine",
        wrong: |l| {
            let Op::Combine(op) = &l.node.op else { return None };
            let [gate, side, _] = op.operands();
            let (gate, mut y) = (l.operands()[gate?], l.operands()[side?].clone());
            let (k, d) = (gate.ty.shape.last(), y.ty.shape.last());
            y.data.iter_mut().enumerate().for_each(|(i, y)| *y *= gate.data[i / d * k]);
            Some(l.with(side?, &y))
        },
        noticed_by: &[
            OneHotForm,
            Values("combine", "one token, with a side, gated true, coefficients false"),
            Values("published_routers", "arctic, dropless"),
        ],
    },
    Bug {
        name: "gates applied twice",
        what: "rows are weighted by the square of their gates",
        seen: "a fused epilogue beside a weighted combine",
        op: "combine",
        wrong: |l| {
            let Op::Combine(op) = &l.node.op else { return None };
            let at = op.operands()[0]?;
            let mut gate = l.operands()[at].clone();
            gate.data.iter_mut().for_each(|x| *x *= *x);
            Some(l.with(at, &gate))
        },
        noticed_by: &[OneHotForm, Values("combine", "one expert, gated true"), Golden("layer", "residual_top2_nodrop")],
    },
];

fn assign<'a>(l: &Launch<'a>) -> Option<&'a Assign> {
    if let Op::Assign(op) = &l.node.op { Some(op) } else { None }
}

/// The results with `choice_slot`, operand `i`, clamped to the slots there are.
fn slots_clamped(l: &Launch<'_>, i: usize) -> Option<Vec<Tensor>> {
    if l.operands()[0].data.is_empty() {
        return None;
    }
    let mut slot = l.operands()[i].clone();
    slot.data.iter_mut().for_each(|s| *s = s.max(0.0));
    Some(l.with(i, &slot))
}

/// The results but for some rows of the first, which nobody writes.
pub(super) fn rows_left(l: &Launch<'_>, left: impl Fn(usize) -> bool) -> Vec<Tensor> {
    let mut right = l.right();
    let rows = right[0].ty.shape[0];
    let width = right[0].data.len() / rows.max(1);
    for row in (0..rows).filter(|&r| left(r)) {
        right[0].data[row * width..][..width].fill(l.unwritten);
    }
    right
}
