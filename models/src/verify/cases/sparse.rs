//! The router and the sparse-expert ops, each over the same list of ways to route.

use moebius_ir::ops::{Balance, Order, Router};
use moebius_ir::{DType, Result, TensorType, Value};

use super::{Case, FLOATS, ONE, WIDE_AND_NARROW, case};
use crate::verify::sketch::Sketch;
use crate::verify::tolerance::Class;

/// A way for tokens to choose experts.
#[derive(Clone, Debug)]
pub struct Routing {
    /// What is special about it.
    pub name: &'static str,
    /// Tokens N.
    pub tokens: usize,
    /// Choices of each token.
    pub k: usize,
    /// Experts E.
    pub experts: usize,
    /// Most slots of one expert.
    pub capacity: Option<usize>,
    /// The choices, `[N,k]` row-major; -1 chooses nothing.
    pub expert_index: Vec<i32>,
}

/// The edges of routing.
pub fn routings() -> Vec<Routing> {
    let routing = |name, tokens: usize, k, experts, capacity, choose: &dyn Fn(usize, usize) -> usize| {
        let expert_index = (0..tokens * k).map(|c| choose(c / k, c % k) as i32).collect();
        Routing { name, tokens, k, experts, capacity, expert_index }
    };
    // Distinct experts for one token, spread unevenly.
    let spread = |e: usize| move |t: usize, j: usize| (t * t + 3 * t / 2 + j) % e;
    let mut unused = routing("choices of nothing", 9, 2, 4, None, &spread(4));
    (0..18).step_by(5).for_each(|c| unused.expert_index[c] = -1);
    vec![
        routing("top-1, dropless", 21, 1, 4, None, &spread(4)),
        routing("top-2, dropless, no multiple of a tile", 67, 2, 5, None, &spread(5)),
        routing("an empty expert", 10, 2, 5, None, &|t, j| [0, 1, 3, 4][(t + j) % 4]),
        routing("one expert", 6, 1, 1, None, &|_, _| 0),
        routing("all tokens to one expert", 19, 1, 3, None, &|_, _| 1),
        routing("all tokens to one expert, overflowing", 19, 1, 3, Some(4), &|_, _| 2),
        routing("k = E", 7, 3, 3, None, &|t, j| (t + j) % 3),
        routing("one token", 1, 2, 4, None, &|_, j| 3 - j),
        routing("capacity drops some", 23, 2, 4, Some(7), &spread(4)),
        routing("capacity above need", 5, 1, 2, Some(9), &spread(2)),
        routing("capacity 0", 4, 1, 2, Some(0), &spread(2)),
        routing("more experts than tokens", 3, 2, 17, Some(1), &|t, j| t * 5 + j),
        unused,
    ]
}

/// slot_choice, choice_slot and offsets of a routing.
pub(super) fn assigned(s: &mut Sketch, r: &Routing) -> Result<[Value; 3]> {
    let index = s.ints([r.tokens, r.k], &r.expert_index)?;
    let [slot_choice, choice_slot, offsets, _] =
        s.graph.assign(index, None, r.experts, r.capacity, Order::ChoiceMajor)?;
    Ok([slot_choice, choice_slot, offsets])
}

/// Logits whose probabilities differ by enough that no rounding and no small step changes a choice.
pub(super) fn clear_logits(s: &mut Sketch, n: usize, e: usize) -> Result<Value> {
    let noise = s.normals(n * e);
    let data = (0..n * e)
        .map(|i| 0.5 + 0.6 * ((i % e * 5 + i / e * 3) % e) as f64 / (e as f64).sqrt() + 0.02 * noise[i])
        .collect();
    let ty = TensorType::f32([n, e]);
    s.input(moebius_ir::Role::Feed, ty, data, true)
}

/// The gradient of a score is the difference of its gate's cotangent, weighted, and of that of all gates together: numbers of about
/// this size, of which little may be left.
pub(super) const GATE_TERMS: f64 = 0.25;

fn route() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, n, e, k) in [
        ("top-1", 12, 6, 1),
        ("top-2, no multiple of a tile", 67, 9, 2),
        ("one expert", 5, 1, 1),
        ("k = E", 6, 4, 4),
        ("one token", 1, 8, 3),
        ("many experts", 7, 130, 8),
    ] {
        for balance in [Balance::FirstChoice, Balance::AllChoices] {
            let name = format!("{what}, {balance:?}").to_lowercase();
            // The permuted logits need an odd stride that E does not divide: 5 does for all E here but 130.
            let e = if e == 130 { 131 } else { e };
            let route = case("route", name.clone(), Class::Sum, ONE, move |s| {
                let logits = clear_logits(s, n, e)?;
                let [gate, index, balance_loss, z_loss, counts, _] = s.graph.route(logits, k, balance)?;
                [gate, balance_loss, z_loss].into_iter().try_for_each(|v| s.out(v))?;
                s.aux(index)?;
                s.aux(counts)
            });
            cases.push(route.of_terms(0.0, GATE_TERMS));
            let grad = case("route_grad", name, Class::Sum, ONE, move |s| {
                let logits = clear_logits(s, n, e)?;
                let choices: Vec<i32> = (0..n * k).map(|c| ((c / k * 2 + c % k) % e) as i32).collect();
                let index = s.ints([n, k], &choices)?;
                let d_gate = s.float([n, k], |x| x)?;
                let (d_balance, d_z) = (s.float([], |x| x)?, s.float([], |x| x)?);
                s.wrt.clear();
                let d = s.graph.route_grad(logits, index, d_gate, d_balance, d_z, &Router::softmax(k, balance))?;
                s.aux(d)
            });
            cases.push(grad.of_terms(GATE_TERMS, 0.0));
        }
    }
    cases.push(
        case("route", "ties go to the lowest index", Class::Sum, ONE, |s| {
            let logits = vec![0.0; 6].into_iter().chain([1.0, 2.0, 2.0, 1.0, 2.0, 1.0]).collect();
            let logits = s.input(moebius_ir::Role::Feed, TensorType::f32([2, 6]), logits, true)?;
            let [gate, index, _, _, counts, _] = s.graph.route(logits, 4, Balance::AllChoices)?;
            s.out(gate)?;
            s.aux(index)?;
            s.aux(counts)
        })
        .rough(),
    );
    cases.push(case("route", "large logits, and rows that are not finite", Class::Sum, ONE, |s| {
        let (inf, nan) = (f64::INFINITY, f64::NAN);
        let logits =
            vec![1e4, -1e4, 0.0, -inf, 2.0, 1.0, nan, 1.0, 2.0, 1.0, nan, 0.0, inf, 0.0, 1.0, -inf, -inf, -inf];
        let logits = s.fixed(TensorType::f32([6, 3]), logits)?;
        let [gate, index, _, _, counts, _] = s.graph.route(logits, 2, Balance::FirstChoice)?;
        [gate, index, counts].into_iter().try_for_each(|v| s.aux(v))
    }));
    cases
}

/// So many choices that they are counted in parts, and in more than a few turns.
fn crowds() -> Vec<Routing> {
    let crowd = |name, tokens: usize, k, experts: usize, capacity| {
        // Some choose nothing, and some experts are chosen more often than others.
        let choose =
            |c: usize| if c % 11 == 5 { -1 } else { ((c * c / 7 + c) % (experts + experts / 3) % experts) as i32 };
        Routing { name, tokens, k, experts, capacity, expert_index: (0..tokens * k).map(choose).collect() }
    };
    vec![
        crowd("a crowd", 300, 2, 40, None),
        crowd("a crowd that overflows", 300, 2, 40, Some(14)),
        crowd("a crowd of first choices that overflows", 600, 1, 9, Some(60)),
        crowd("more choices than parts", 33_000, 1, 300, None),
    ]
}

fn assign() -> Vec<Case> {
    let mut cases = Vec::new();
    for r in routings().into_iter().chain(crowds()) {
        for order in [Order::TokenMajor, Order::ChoiceMajor] {
            for prioritised in [false, true] {
                if prioritised && r.capacity.is_none() {
                    continue;
                }
                let r = r.clone();
                let name = format!("{}, {order:?}, priority {prioritised}", r.name).to_lowercase();
                cases.push(case("assign", name, Class::Exact, ONE, move |s| {
                    let index = s.ints([r.tokens, r.k], &r.expert_index)?;
                    // Rounded, so that there are equal priorities too.
                    let priorities: Vec<f64> =
                        s.normals(r.tokens * r.k).into_iter().map(|x| (2.0 * x).round()).collect();
                    let priority =
                        if prioritised { Some(s.fixed(TensorType::f32([r.tokens, r.k]), priorities)?) } else { None };
                    let results = s.graph.assign(index, priority, r.experts, r.capacity, order)?;
                    results.into_iter().try_for_each(|v| s.aux(v))
                }));
            }
        }
    }
    cases.push(case("assign", "nan priorities come last", Class::Exact, ONE, |s| {
        let index = s.ints([4, 1], &[0, 0, 0, 0])?;
        let priority = s.fixed(TensorType::f32([4, 1]), vec![f64::NAN, -1.0, f64::NEG_INFINITY, f64::INFINITY])?;
        let results = s.graph.assign(index, Some(priority), 1, Some(2), Order::TokenMajor)?;
        results.into_iter().try_for_each(|v| s.aux(v))
    }));
    cases
}

fn movement(r: &Routing) -> Vec<Case> {
    let width = 19;
    // Rows of 24 are moved in whole parts by GPUs.
    let with = |op: &'static str, gated: bool, width: usize| {
        let r = r.clone();
        let wide = if width == 24 { "rows of 24, " } else { "" };
        case(op, format!("{}, {wide}gated {gated}", r.name), Class::Sum, FLOATS, move |s| {
            let [slot_choice, choice_slot, _] = assigned(s, &r)?;
            let slots = s.graph.shape(slot_choice)[0];
            let rows = if op == "dispatch" { r.tokens } else { slots };
            let x = s.float([rows, width], |x| x)?;
            let gate = if gated { Some(s.float_as(DType::F32, [r.tokens, r.k], |x| x)?) } else { None };
            let y = match op {
                "dispatch" => s.graph.dispatch(x, slot_choice, choice_slot, gate)?,
                _combine => s.graph.combine(x, slot_choice, choice_slot, gate)?,
            };
            s.out(y)
        })
    };
    let gate_grad = {
        let r = r.clone();
        case("gate_grad", r.name, Class::Sum, FLOATS, move |s| {
            let [slot_choice, choice_slot, _] = assigned(s, &r)?;
            let slots = s.graph.shape(slot_choice)[0];
            let (rows, y) = (s.float([slots, width], |x| x)?, s.float([r.tokens, width], |x| x)?);
            let d = s.graph.gate_grad(rows, y, slot_choice, choice_slot)?;
            s.out(d)
        })
    };
    let beside = |gated: bool, weighted: bool, width: usize| {
        let r = r.clone();
        let wide = if width == 24 { "rows of 24, " } else { "" };
        let name = format!("{}, {wide}with a side, gated {gated}, coefficients {weighted}", r.name);
        case("combine", name, Class::Sum, FLOATS, move |s| {
            let [slot_choice, choice_slot, _] = assigned(s, &r)?;
            let slots = s.graph.shape(slot_choice)[0];
            let (rows, side) = (s.float([slots, width], |x| x)?, s.float([r.tokens, width], |x| x)?);
            let gate = if gated { Some(s.float_as(DType::F32, [r.tokens, r.k], |x| x)?) } else { None };
            let coefficient = if weighted { Some(s.float_as(DType::F32, [r.tokens, 2], |x| x)?) } else { None };
            let y = s.graph.combine_with(rows, slot_choice, choice_slot, gate, Some(side), coefficient)?;
            s.out(y)
        })
    };
    let mut cases: Vec<Case> = [(false, 19), (true, 19), (true, 24)]
        .into_iter()
        .flat_map(|(g, w)| [with("dispatch", g, w), with("combine", g, w)])
        .collect();
    cases.extend([(false, false), (true, false), (false, true), (true, true)].map(|(g, c)| beside(g, c, width)));
    cases.push(beside(true, true, 24));
    cases.push(gate_grad);
    cases
}

fn products(r: &Routing) -> Vec<Case> {
    let (k, n) = (13, 21);
    let mut cases = Vec::new();
    for transpose in [false, true] {
        for bias in ["no bias", "bias", "f32 bias"] {
            let r = r.clone();
            let name = format!("{}, transposed {transpose}, {bias}", r.name);
            cases.push(case("expert_matmul", name, Class::Sum, FLOATS, move |s| {
                let [slot_choice, _, offsets] = assigned(s, &r)?;
                let slots = s.graph.shape(slot_choice)[0];
                let rows = s.float([slots, k], |x| x)?;
                let w = s.float([r.experts, if transpose { n } else { k }, if transpose { k } else { n }], |x| x)?;
                let bias = match bias {
                    "no bias" => None,
                    "bias" => Some(s.float([r.experts, n], |x| x)?),
                    _f32 => Some(s.float_as(DType::F32, [r.experts, n], |x| x)?),
                };
                let y = s.graph.expert_matmul(rows, w, offsets, bias, transpose)?;
                s.out(y)
            }));
        }
    }
    let owned = r.clone();
    cases.push(case("expert_matmul_wgrad", r.name, Class::Sum, FLOATS, move |s| {
        let [slot_choice, _, offsets] = assigned(s, &owned)?;
        let slots = s.graph.shape(slot_choice)[0];
        let (a, b) = (s.float([slots, k], |x| x)?, s.float([slots, n], |x| x)?);
        let y = s.graph.expert_matmul_wgrad(a, b, offsets)?;
        s.out(y)
    }));
    let owned = r.clone();
    cases.push(case("segment_sum", r.name, Class::Sum, FLOATS, move |s| {
        let [slot_choice, _, offsets] = assigned(s, &owned)?;
        let slots = s.graph.shape(slot_choice)[0];
        let rows = s.float([slots, n], |x| x)?;
        s.wrt.clear();
        let y = s.graph.segment_sum(rows, offsets)?;
        s.aux(y)
    }));
    cases
}

/// Segments of more rows, and more columns, than a warp of a GPU takes at a time.
fn long_segments() -> Case {
    case("segment_sum", "long segments", Class::Sum, FLOATS, |s| {
        let choices: Vec<i32> = (0..210).map(|t| if t < 130 { 0 } else { 2 }).collect();
        let r = Routing { name: "", tokens: 210, k: 1, experts: 3, capacity: None, expert_index: choices };
        let [_, _, offsets] = assigned(s, &r)?;
        let rows = s.float([210, 45], |x| x)?;
        s.wrt.clear();
        let y = s.graph.segment_sum(rows, offsets)?;
        s.aux(y)
    })
}

/// A product large enough for several tiles and panels.
fn large() -> Case {
    case("expert_matmul", "several tiles an expert", Class::Sum, FLOATS, |s| {
        let (experts, k, n) = (3, 70, 150);
        let choices: Vec<i32> = (0..210).map(|t| if t < 130 { 0 } else { 2 }).collect();
        let r = Routing { name: "", tokens: 210, k: 1, experts, capacity: None, expert_index: choices };
        let [_, _, offsets] = assigned(s, &r)?;
        let (rows, w) = (s.float([210, k], |x| x)?, s.float([experts, k, n], |x| x)?);
        let y = s.graph.expert_matmul(rows, w, offsets, None, false)?;
        s.out(y)
    })
}

/// Few slots and long rows, as decoding has: an idle expert, unused slots, and more rows of one expert than a kernel takes at once.
fn few() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, expert_index) in [
        ("one slot", vec![2]),
        ("five slots, one unused", vec![0, 0, 3, -1, 0]),
        ("sixteen slots", [vec![1; 11], vec![3, 3, 0, 3, -1]].concat()),
    ] {
        let r = Routing { name, tokens: expert_index.len(), k: 1, experts: 4, capacity: None, expert_index };
        for (k, n, transpose) in [(264, 72, false), (520, 40, true)] {
            let r = r.clone();
            cases.push(case("expert_matmul", format!("{name}, {k}x{n}"), Class::Sum, FLOATS, move |s| {
                let [_, _, offsets] = assigned(s, &r)?;
                let rows = s.float([r.tokens, k], |x| x)?;
                let w = s.float([r.experts, if transpose { n } else { k }, if transpose { k } else { n }], |x| x)?;
                let bias = s.float([r.experts, n], |x| x)?;
                let y = s.graph.expert_matmul(rows, w, offsets, Some(bias), transpose)?;
                s.out(y)
            }));
        }
    }
    cases
}

/// Rows of a multiple of 16 bytes, which some GPUs copy by themselves: segments of one tile and of several, an idle expert, and
/// unused slots.
fn aligned() -> Vec<Case> {
    let mut cases = Vec::new();
    for (tokens, k, n) in [(83, 72, 136), (700, 64, 264)] {
        for transpose in [false, true] {
            let expert_index =
                (0..tokens as i32).map(|t| if t % 13 == 5 { -1 } else { [0, 3, 3, 4, 3][t as usize % 5] }).collect();
            let r = Routing { name: "", tokens, k: 1, experts: 6, capacity: None, expert_index };
            let name = format!("{tokens} slots, {k}x{n}, transposed {transpose}");
            cases.push(case("expert_matmul", name, Class::Sum, FLOATS, move |s| {
                let [_, _, offsets] = assigned(s, &r)?;
                let rows = s.float([tokens, k], |x| x)?;
                let w = s.float([r.experts, if transpose { n } else { k }, if transpose { k } else { n }], |x| x)?;
                let bias = s.float([r.experts, n], |x| x)?;
                let y = s.graph.expert_matmul(rows, w, offsets, Some(bias), transpose)?;
                s.out(y)
            }));
        }
    }
    cases
}

/// Segments of many large tiles, as a GPU cuts them, with an idle expert and unused slots.
fn larger() -> Vec<Case> {
    let (experts, k, n) = (4, 21, 800);
    let routing = |tokens: usize| {
        let expert_index = (0..tokens).map(|t| [0, 2, 3, -1][t * t / 7 % 4]).collect();
        Routing { name: "many large tiles", tokens, k: 1, experts, capacity: None, expert_index }
    };
    let (forward, backward) = (routing(2400), routing(80));
    let mut cases = vec![
        case("expert_matmul", "many large tiles", Class::Sum, WIDE_AND_NARROW, move |s| {
            let [_, _, offsets] = assigned(s, &forward)?;
            let (rows, w) = (s.float([2400, k], |x| x)?, s.float([experts, n, k], |x| x)?);
            let y = s.graph.expert_matmul(rows, w, offsets, None, true)?;
            s.aux(y)
        }),
        case("expert_matmul_wgrad", "many large tiles", Class::Sum, WIDE_AND_NARROW, move |s| {
            let [_, _, offsets] = assigned(s, &backward)?;
            let (a, b) = (s.float([80, 540], |x| x)?, s.float([80, 620], |x| x)?);
            let y = s.graph.expert_matmul_wgrad(a, b, offsets)?;
            s.aux(y)
        }),
    ];
    // Of numbers whose squares f32 holds, and of smaller and larger ones.
    for scale in [1.0, 1e-14, 1e-25, 1e18] {
        let backward = routing(80);
        let name = format!("many large tiles and their norm, of numbers about {scale:e}");
        cases.push(case("expert_matmul_wgrad", name, Class::Sum, WIDE_AND_NARROW, move |s| {
            let [_, _, offsets] = assigned(s, &backward)?;
            let (a, b) = (s.float([80, 544], |x| x * scale)?, s.float([80, 624], |x| x)?);
            let y = s.graph.expert_matmul_wgrad(a, b, offsets)?;
            let norm = s.graph.global_norm(&[y])?;
            s.aux(y)?;
            s.aux(norm)
        }));
    }
    cases
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = route();
    cases.extend(assign());
    for r in routings() {
        cases.extend(movement(&r));
        cases.extend(products(&r));
    }
    cases.extend(aligned());
    cases.extend([large(), long_segments()]);
    cases.extend(few());
    cases.extend(larger());
    cases
}
