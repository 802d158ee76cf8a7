//! The declarative router: every score with every way to choose, forward and backward.

use moebius_ir::ops::{Balance, GroupScore, Groups, NoiseUse, RouteInputs, Router, Score};
use moebius_ir::{DType, Result, Role, TensorType, Value};

use super::sparse::{GATE_TERMS, clear_logits};
use super::{Case, ONE, case};
use crate::verify::sketch::Sketch;
use crate::verify::tolerance::Class;

const SCORES: [Score; 6] = [
    Score::Softmax,
    Score::Sigmoid,
    Score::SqrtSoftplus,
    Score::Identity,
    Score::SparseMixer { jitter_eps: 0.2 },
    Score::SparseMixer { jitter_eps: 0.0 },
];

/// What a case adds to the logits.
#[derive(Clone, Copy, Debug, Default)]
struct With {
    bias: bool,
    noise: Option<NoiseUse>,
    used: bool,
    choices: bool,
    groups: Option<Groups>,
}

impl With {
    fn inputs(self, s: &mut Sketch, n: usize, e: usize, k: usize) -> Result<RouteInputs> {
        let mut inputs = RouteInputs::default();
        if self.bias {
            // Low enough that the selection values are negative, so that a group masked with 0 would win.
            let bias = s.normals(e).into_iter().map(|x| 0.4 * x - 3.0).collect();
            inputs.selection_bias = Some(s.fixed(TensorType::f32([e]), bias)?);
        }
        if let Some(of) = self.noise {
            let noise = s.normals(n * e);
            inputs.noise = Some((s.fixed(TensorType::f32([n, e]), noise)?, of));
        }
        if self.used {
            let used = (0..n).map(|t| f64::from(u8::from(t % 3 != 1))).collect();
            inputs.used = Some(s.fixed(TensorType::new(DType::Bool, [n]), used)?);
        }
        if self.choices {
            inputs.choices = Some(given(s, n, e, k)?);
        }
        Ok(inputs)
    }
}

/// Choices with some that go nowhere.
fn given(s: &mut Sketch, n: usize, e: usize, k: usize) -> Result<Value> {
    let choice = |c: usize| if c % 7 == 3 { -1 } else { ((c / k * 2 + c % k) % e) as i32 };
    s.ints([n, k], &(0..n * k).map(choice).collect::<Vec<_>>())
}

fn route(s: &mut Sketch, logits: Value, router: &Router, inputs: RouteInputs) -> Result<()> {
    let [gate, index, balance, z, counts, entropy] = s.graph.route_with(logits, router, inputs)?;
    [gate, balance, z].into_iter().try_for_each(|v| s.out(v))?;
    [index, counts, entropy].into_iter().try_for_each(|v| s.aux(v))
}

fn ways() -> Vec<(&'static str, usize, usize, usize, With)> {
    let groups = |count, keep, by| With { groups: Some(Groups { count, keep, by }), ..With::default() };
    let noise = |of| With { noise: Some(of), ..With::default() };
    vec![
        ("plain", 37, 12, 3, With::default()),
        ("one expert", 5, 1, 1, With::default()),
        ("k = e", 6, 4, 4, With::default()),
        ("many experts", 4, 128, 8, With { bias: true, ..groups(8, 4, GroupScore::Top2Sum) }),
        ("bias", 13, 12, 3, With { bias: true, ..With::default() }),
        ("noise for all choices", 13, 12, 3, noise(NoiseUse::AllChoices)),
        ("noise for later choices", 13, 12, 3, noise(NoiseUse::LaterChoices)),
        ("noise for later choices of one", 13, 12, 1, noise(NoiseUse::LaterChoices)),
        ("used tokens", 13, 12, 2, With { used: true, ..With::default() }),
        ("given choices", 13, 12, 3, With { choices: true, ..With::default() }),
        ("groups by maximum", 13, 12, 3, groups(4, 2, GroupScore::Max)),
        ("negative groups by two", 13, 12, 3, With { bias: true, ..groups(4, 1, GroupScore::Top2Sum) }),
        ("all together", 13, 12, 4, With { bias: true, used: true, ..groups(3, 2, GroupScore::Top2Sum) }),
        (
            "groups and later noise",
            13,
            12,
            4,
            With { bias: true, noise: Some(NoiseUse::LaterChoices), ..groups(3, 1, GroupScore::Max) },
        ),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for score in SCORES {
        for (what, n, e, k, with) in ways() {
            let balance = if k == 2 { Balance::FirstChoice } else { Balance::AllChoices };
            let router = Router { k, score, groups: with.groups, balance };
            let route = case("route", format!("{score:?}, {what}").to_lowercase(), Class::Sum, ONE, move |s| {
                let logits = clear_logits(s, n, e)?;
                let inputs = with.inputs(s, n, e, k)?;
                route(s, logits, &router, inputs)
            });
            cases.push(route.of_terms(0.0, GATE_TERMS));
        }
        for balance in [Balance::FirstChoice, Balance::AllChoices] {
            let router = Router { balance, score, ..Router::softmax(3, balance) };
            let name = format!("{score:?}, {balance:?}").to_lowercase();
            let grad = case("route_grad", name, Class::Sum, ONE, move |s| {
                let (n, e) = (37, 9);
                let logits = s.float([n, e], |x| 2.0 * x)?;
                let index = given(s, n, e, 3)?;
                let (d_gate, d_balance, d_z) = (s.float([n, 3], |x| x)?, s.float([], |x| x)?, s.float([], |x| x)?);
                s.wrt.clear();
                let d = s.graph.route_grad(logits, index, d_gate, d_balance, d_z, &router)?;
                s.aux(d)
            });
            cases.push(grad.of_terms(GATE_TERMS, 0.0));
        }
        cases.extend(edges(score));
        cases.extend(crowd(score));
    }
    cases
}

/// So many tokens that they are taken in turns and their statistics added up in parts.
fn crowd(score: Score) -> [Case; 2] {
    let (n, e, k) = (2200, 20, 2);
    let named = |what: &str| format!("{score:?}, {what}").to_lowercase();
    let router = Router { score, ..Router::softmax(k, Balance::FirstChoice) };
    let forward = case("route", named("a crowd"), Class::Sum, ONE, move |s| {
        // Whatever is rounded, no choice changes.
        let logit = |i: usize| 0.25 * ((i % e * 7 + i / e * 3) % e) as f64 - 2.0 + 1e-3 * (i / e % 64) as f64;
        let logits = s.fixed(TensorType::f32([n, e]), (0..n * e).map(logit).collect())?;
        let results = s.graph.route_with(logits, &router, RouteInputs::default())?;
        results.into_iter().try_for_each(|v| s.aux(v))
    });
    let backward = case("route_grad", named("a crowd"), Class::Sum, ONE, move |s| {
        let logits = s.float([n, e], |x| 2.0 * x)?;
        let index = given(s, n, e, k)?;
        let (d_gate, d_balance, d_z) = (s.float([n, k], |x| x)?, s.float([], |x| x)?, s.float([], |x| x)?);
        s.wrt.clear();
        let d = s.graph.route_grad(logits, index, d_gate, d_balance, d_z, &router)?;
        s.aux(d)
    });
    [forward, backward.of_terms(GATE_TERMS, 0.0)]
}

/// Where values are equal or not finite, which no difference quotient tells.
fn edges(score: Score) -> Vec<Case> {
    let named = |what: &str| format!("{score:?}, {what}").to_lowercase();
    let ties = case("route", named("ties go to the lowest index"), Class::Sum, ONE, move |s| {
        let logits = vec![0.0; 6].into_iter().chain([1.0, 2.0, 2.0, 1.0, 2.0, 1.0]).collect();
        let logits = s.input(Role::Feed, TensorType::f32([2, 6]), logits, true)?;
        let groups = Some(Groups { count: 3, keep: 2, by: GroupScore::Max });
        let router = Router { score, groups, ..Router::softmax(4, Balance::AllChoices) };
        route(s, logits, &router, RouteInputs::default())
    });
    let rows = case("route", named("large logits, and rows that are not finite"), Class::Sum, ONE, move |s| {
        let (inf, nan) = (f64::INFINITY, f64::NAN);
        let logits = [
            [80.0, -60.0, 0.0],
            [-inf, 2.0, 1.0],
            [nan, 1.0, 2.0],
            [1.0, nan, 0.0],
            [inf, 0.0, 1.0],
            [-inf, -inf, -inf],
            [-inf, 3.0, -inf],
            [-2e3, -3e3, -2e3],
        ];
        let logits = s.fixed(TensorType::f32([8, 3]), logits.concat())?;
        let bias = s.fixed(TensorType::f32([3]), vec![0.0, 1.0, 0.5])?;
        let router = Router { score, ..Router::softmax(2, Balance::FirstChoice) };
        for selection_bias in [None, Some(bias)] {
            let inputs = RouteInputs { selection_bias, ..RouteInputs::default() };
            let results = s.graph.route_with(logits, &router, inputs)?;
            results.into_iter().try_for_each(|v| s.aux(v))?;
        }
        Ok(())
    });
    vec![ties.rough().of_terms(0.0, GATE_TERMS), rows]
}
