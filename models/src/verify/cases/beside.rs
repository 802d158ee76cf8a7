//! What a backend may compute together where there are few rows: norms and dispatches right before a matrix product, a route and the
//! assign of its choices, a combine and the chain behind it; with what else reads them, and sizes at which they are apart.

use moebius_ir::ops::{Balance, Order, UnaryFn};
use moebius_ir::{DType, Result, Role, TensorType, Value};

use super::sparse::{GATE_TERMS, clear_logits};
use super::{Case, FLOATS, ONE, case};
use crate::verify::sketch::Sketch;
use crate::verify::tolerance::Class;

/// What there is beside a norm and a product.
const KINDS: [&str; 5] =
    ["nothing else", "an activation", "the norm's operand added", "the norm is read too", "a router of f32 first"];

/// A weight, which is a parameter: kernels may read it before the kernel before them has ended.
fn weight(s: &mut Sketch, dtype: DType, shape: &[usize], map: impl Fn(f64) -> f64) -> Result<Value> {
    let ty = TensorType::new(dtype, shape.to_vec());
    let data = s.normals(ty.elements()).into_iter().map(map).collect();
    s.input(Role::Parameter, ty, data, true)
}

/// A norm of m rows of k elements, and a product with n columns.
#[derive(Clone, Copy)]
struct Led {
    m: usize,
    k: usize,
    n: usize,
    transposed: bool,
    layer_norm: bool,
    kind: &'static str,
}

impl Led {
    fn build(self, s: &mut Sketch) -> Result<()> {
        let Led { m, k, n, transposed, layer_norm, kind } = self;
        let small = move |x: f64| x / (k as f64).sqrt();
        let x = s.float([m, k], |x| 2.0 * x + 0.5)?;
        let gamma = weight(s, DType::F32, &[k], |x| 1.0 + x / 4.0)?;
        let normal = if layer_norm {
            let beta = weight(s, DType::F32, &[k], |x| x / 4.0)?;
            s.graph.layer_norm(x, gamma, beta, 1e-5)?
        } else {
            s.graph.rms_norm(x, gamma, 1e-5)?
        };
        let logits = if kind == "a router of f32 first" {
            let router = weight(s, DType::F32, &[5, k], small)?;
            let wide = s.graph.cast(normal, DType::F32)?;
            Some(s.graph.matmul_with(wide, router, None, false, true)?)
        } else {
            None
        };
        let dtype = s.dtype;
        let w = weight(s, dtype, &if transposed { [n, k] } else { [k, n] }, small)?;
        let bias = if n.is_multiple_of(2) { Some(weight(s, dtype, &[n], |x| x)?) } else { None };
        let mut y = s.graph.matmul_with(normal, w, bias, false, transposed)?;
        if kind == "an activation" {
            y = s.graph.unary(UnaryFn::GeluTanh, y)?;
        }
        if kind == "the norm's operand added" && n == k {
            y = s.graph.add(x, y)?;
        }
        if kind == "the norm is read too" {
            let twice = s.graph.mul_scalar(normal, 2.0)?;
            s.out(twice)?;
            let node = s.graph.producer(normal);
            let statistics = s.graph.node(node).results[1..].to_vec();
            statistics.into_iter().try_for_each(|v| s.aux(v))?;
        }
        logits.into_iter().try_for_each(|logits| s.out(logits))?;
        s.out(y)
    }
}

fn norms() -> Vec<Case> {
    let mut cases = Vec::new();
    // One piece of a row and two, rows that are no multiple of 16 bytes, a k that is cut up, rows that are too many or too long.
    for (at, (m, k, n, transposed)) in [
        (1, 1024, 136, false),
        (1, 264, 264, false),
        (2, 520, 72, true),
        (3, 33, 33, false),
        (8, 72, 72, false),
        (8, 40, 17, true),
        (5, 136, 136, true),
        (9, 264, 40, false),
        (4, 2056, 40, false),
    ]
    .into_iter()
    .enumerate()
    {
        for step in 0..2 {
            let kind = KINDS[(2 * at + 3 * step) % KINDS.len()];
            let led = Led { m, k, n, transposed, layer_norm: (at + step) % 2 == 0, kind };
            let op = if led.layer_norm { "layer_norm" } else { "rms_norm" };
            let title = format!("{m}x{k}, then a product {m}x{n}x{k}, transposed {transposed}: {kind}");
            cases.push(case(op, title, Class::Layer, FLOATS, move |s| led.build(s)));
        }
    }
    cases
}

/// Few tokens and the way they choose experts.
#[derive(Clone, Copy)]
struct Few {
    tokens: usize,
    k: usize,
    experts: usize,
    capacity: Option<usize>,
    order: Order,
    /// Whether larger gates are kept first.
    by_gate: bool,
}

const FEW: [Few; 8] = [
    few(1, 1, 32),
    few(1, 2, 64),
    few(8, 1, 5),
    few(4, 2, 3),
    few(1, 8, 131),
    few(33, 2, 4),
    few(8, 1, 2),
    few(7, 2, 3),
];

const fn few(tokens: usize, k: usize, experts: usize) -> Few {
    // The last two have experts that are full, by their order or by their gates.
    let capacity = if tokens * k == 8 && experts == 2 || tokens == 7 { Some(3) } else { None };
    let order = if tokens == 7 { Order::ChoiceMajor } else { Order::TokenMajor };
    Few { tokens, k, experts, capacity, order, by_gate: experts == 2 }
}

/// A route and the slots of its choices.
fn routes() -> Vec<Case> {
    let made = |few: Few| {
        let Few { tokens, k, experts, capacity, order, by_gate } = few;
        let title =
            format!("{tokens} tokens, {k} of {experts} experts, then assign, capacity {capacity:?}, by gate {by_gate}");
        let route = case("route", title, Class::Sum, ONE, move |s| {
            let logits = clear_logits(s, tokens, experts)?;
            let [gate, index, balance, z, counts, entropy] = s.graph.route(logits, k, Balance::AllChoices)?;
            let priority = if by_gate { Some(gate) } else { None };
            let slots = s.graph.assign(index, priority, experts, capacity, order)?;
            [gate, balance, z].into_iter().try_for_each(|v| s.out(v))?;
            [index, counts, entropy].into_iter().chain(slots).try_for_each(|v| s.aux(v))
        });
        route.of_terms(0.0, GATE_TERMS)
    };
    FEW.into_iter().map(made).collect()
}

/// A sparse layer of few tokens: its first product reads tokens through their slots.
fn layers() -> Vec<Case> {
    let mut cases = Vec::new();
    for (at, few) in FEW.into_iter().enumerate() {
        let Few { tokens, k, experts, capacity, order, by_gate } = few;
        // Rows that are a multiple of 16 bytes and others; a k that is cut up.
        let (d, hidden) = [(264, 72), (33, 40), (520, 24)][at % 3];
        for gated in [false, true] {
            let title = format!(
                "{tokens} tokens of {d}, {k} of {experts} experts, capacity {capacity:?}, by gate {by_gate}, gates before {gated}"
            );
            cases.push(case("expert_matmul", title, Class::Layer, FLOATS, move |s| {
                let small = move |x: f64| x / (d as f64).sqrt();
                let x = s.float([tokens, d], |x| x)?;
                let logits = clear_logits(s, tokens, experts)?;
                let [gate, index, ..] = s.graph.route(logits, k, Balance::AllChoices)?;
                let priority = if by_gate { Some(gate) } else { None };
                let [slot_choice, choice_slot, offsets, _] =
                    s.graph.assign(index, priority, experts, capacity, order)?;
                let [before, behind] = if gated { [Some(gate), None] } else { [None, Some(gate)] };
                let rows = s.graph.dispatch(x, slot_choice, choice_slot, before)?;
                let dtype = s.dtype;
                let up = weight(s, dtype, &[experts, d, hidden], small)?;
                let bias = weight(s, dtype, &[experts, hidden], |x| x)?;
                let down = weight(s, dtype, &[experts, d, hidden], |x| x / 8.0)?;
                let h = s.graph.expert_matmul(rows, up, offsets, Some(bias), false)?;
                let h = s.graph.unary(UnaryFn::GeluTanh, h)?;
                let rows = s.graph.expert_matmul(h, down, offsets, None, true)?;
                let (side, coefficient) = if gated {
                    let side = s.float([tokens, d], |x| x)?;
                    (Some(side), Some(s.float_as(DType::F32, [tokens, 2], |x| x / 2.0)?))
                } else {
                    (None, None)
                };
                let y = s.graph.combine_with(rows, slot_choice, choice_slot, behind, side, coefficient)?;
                let y = s.graph.add(x, y)?;
                s.out(y)
            }));
        }
    }
    cases
}

/// All of this file.
pub(super) fn cases() -> Vec<Case> {
    [norms(), routes(), layers()].into_iter().flatten().collect()
}
