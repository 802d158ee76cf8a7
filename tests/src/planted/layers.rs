//! Bugs of whole layers: an op is given another value of its graph than it should.

use moebius_ir::ops::Route;
use moebius_ir::{Node, Op, Tensor, Value};

use super::Check::{Golden, OneHotForm, Values};
use super::{Bug, Launch};

pub(super) const BUGS: &[Bug] = &[
    Bug {
        name: "jitter reaches the experts",
        what: "the experts get the jittered tokens that are meant for the router alone",
        seen: "transformers #33969",
        op: "dispatch",
        wrong: |l| {
            if l.is_backward() {
                return None;
            }
            // What the router's product is of.
            let logits = l.graph.nodes().iter().find(|n| n.op.name() == "route")?.operands[0];
            let of_router = l.value(producer(l, logits).operands[0]);
            Some(l.with(0, &Tensor { ty: l.operands()[0].ty.clone(), ..of_router.clone() }))
        },
        noticed_by: &[
            OneHotForm,
            Golden("layer", "residual_top1_jitter"),
            Values("published_routers", "switch, dropless"),
        ],
    },
    Bug {
        name: "renormalised before dropping",
        what: "gates are divided by the sum of all choices of a token, also of those that were dropped",
        seen: "two conventions: DeepSpeed's topkgating divides after dropping",
        op: "elementwise",
        wrong: |l| {
            // The mask of kept choices comes from the slot of each.
            let slots = l.node.operands.iter().position(|&v| is_choice_slot(l, v))?;
            let all = Tensor::zeros(l.operands()[slots].ty.clone());
            Some(l.with(slots, &all))
        },
        noticed_by: &[
            OneHotForm,
            Golden("gating", "top2_argmax_cf0.5"),
            Golden("gating", "top3k_probs_cf0.75"),
            Golden("layer", "standard_top3_cf0.5"),
            Values("published_routers", "deepspeed-topk, with capacity"),
        ],
    },
    Bug {
        name: "balance loss after dropping",
        what: "the load-balancing loss counts only the choices that found a slot",
        seen: "transformers #28255; DeepSpeed counts before dropping",
        op: "route",
        wrong: balance_after_dropping,
        noticed_by: &[
            OneHotForm,
            Golden("gating", "top2_argmax_cf0.5"),
            Golden("gating", "top2k_probs_cf0.25"),
            Values("moe_layer", "top-2 with capacity"),
        ],
    },
];

fn producer<'a>(l: &Launch<'a>, value: Value) -> &'a Node {
    l.graph.node(l.graph.producer(value))
}

/// Whether the value is the slot of each choice, as `assign` gave it.
fn is_choice_slot(l: &Launch<'_>, value: Value) -> bool {
    let node = producer(l, value);
    node.op.name() == "assign" && node.results[1] == value
}

fn balance_after_dropping(l: &Launch<'_>) -> Option<Vec<Tensor>> {
    let Op::Route(route) = &l.node.op else { return None };
    let mut right = l.right();
    // The choices go straight to an assign that looks at no other order than theirs or the gates'.
    let index = l.node.results[1];
    let assign = l.graph.nodes().iter().find(|n| n.op.name() == "assign" && n.operands[0] == index)?;
    let mut operands = vec![right[1].clone()];
    match assign.operands.get(1) {
        Some(priority) if *priority == l.node.results[0] => operands.push(right[0].clone()),
        Some(_) => return None,
        None => {}
    }
    let types: Vec<_> = assign.results.iter().map(|&r| l.graph.ty(r).clone()).collect();
    let slot = assign.op.reference(&operands.iter().collect::<Vec<_>>(), &types).swap_remove(1);
    let mut kept = right[1].clone();
    for (x, slot) in kept.data.iter_mut().zip(&slot.data) {
        if *slot < 0.0 {
            *x = -1.0;
        }
    }
    let op = Route { router: route.router, selection_bias: false, noise: None, used: false, choices: true };
    right[2] = l.by(&op.into(), &[l.operands()[0], &kept]).swap_remove(2);
    Some(right)
}
