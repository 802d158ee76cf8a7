//! How cases are chosen and counted; devices are run by the tests across crates.

use std::collections::BTreeSet;

use super::check::{Finding, Outcome, Pass, Sort};
use super::tolerance::Distance;
use super::*;

fn finding(op: &'static str, pass: Pass, outcome: Outcome, of_allowed: f64) -> Finding {
    let worst = vec![(Sort::F32, Distance { of_allowed, ..Distance::default() })];
    Finding { op, case: "a case".into(), dtype: DType::F32, pass, outcome, worst }
}

#[test]
fn a_case_counts_by_the_worst_of_its_passes() {
    let mut report = Report::new("cpu", String::new(), true, 0);
    let missing = || Outcome::Failed(Fault::Missing { name: "y0".into() });
    let refused = || Outcome::Refused("softmax: wanted f32".into());
    report.add(vec![finding("a", Pass::Forward, Outcome::Passed, 0.5), finding("a", Pass::Backward, missing(), 3.0)]);
    report.add(vec![finding("b", Pass::Forward, refused(), 0.0), finding("b", Pass::Backward, refused(), 0.0)]);
    report.add(vec![finding("b", Pass::Forward, refused(), 0.0)]);
    report.add(vec![finding("b", Pass::Forward, Outcome::Passed, 0.25)]);
    report.add(vec![finding("a", Pass::Forward, Outcome::Passed, 0.75)]);
    assert_eq!(report.counts, Counts { passed: 2, refused: 2, failed: 1 });
    assert!(!report.passed());
    let rows: Vec<_> = report.rows.iter().map(|r| (r.op, r.pass, r.counts.verdict())).collect();
    let wanted = [
        ("a", Pass::Forward, Verdict::Passed),
        ("a", Pass::Backward, Verdict::Failed),
        ("b", Pass::Forward, Verdict::PartlyRefused),
        ("b", Pass::Backward, Verdict::Refused),
    ];
    assert_eq!(rows, wanted);
    assert_eq!(report.rows[0].worst[&Sort::F32].of_allowed, 0.75);
    assert_eq!(report.refused.iter().map(|r| r.cases).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(report.failed_subjects(), ["a"]);
}

#[test]
fn every_name_has_cases_and_a_selection_has_only_its_own() {
    let all = selected(&[]).unwrap();
    let there: BTreeSet<&str> = all.iter().map(|c| c.op).collect();
    assert_eq!(there, names().collect());
    // In the order of the names, so that a table has each once.
    let order: Vec<_> = all.iter().map(|c| names().position(|n| n == c.op).unwrap()).collect();
    assert!(order.is_sorted());
    let some = selected(&["published_routers".into(), "softmax".into()]).unwrap();
    assert_eq!(some.iter().map(|c| c.op).collect::<BTreeSet<_>>(), BTreeSet::from(["published_routers", "softmax"]));
    let families = crate::config::Family::ALL.len();
    assert!(some.iter().filter(|c| c.op == "published_routers").count() >= 2 * families - 1);
}

/// The dtypes that the nodes of an op have in a graph, as built or else as the passes leave it.
fn dtypes(graph: &moebius_ir::Graph, op: &str) -> BTreeSet<DType> {
    let of = |g: &moebius_ir::Graph| -> BTreeSet<DType> {
        let nodes = g.nodes().iter().filter(|n| n.op.name() == op);
        nodes.flat_map(|n| n.operands.iter().chain(&n.results)).map(|&v| g.ty(v).dtype).collect()
    };
    let built = of(graph);
    if built.is_empty() { of(&moebius_ir::passes::optimise(graph).unwrap()) } else { built }
}

/// The dtypes of operands of an op that a gradient goes through in a graph.
fn differentiable(graph: &moebius_ir::Graph, op: &str) -> BTreeSet<DType> {
    let mut found = BTreeSet::new();
    for node in graph.nodes().iter().filter(|n| n.op.name() == op) {
        for &operand in node.operands.iter().filter(|&&v| graph.ty(v).dtype.is_float()) {
            let dtype = graph.ty(operand).dtype;
            let flows = |&result: &moebius_ir::Value| {
                let mut g = graph.clone();
                let sum = g.cast(result, DType::F32).and_then(|wide| g.sum_all(wide)).unwrap();
                moebius_ir::gradients(&mut g, sum, &[operand]).is_ok()
            };
            let floats = || node.results.iter().filter(|&&v| graph.ty(v).dtype.is_float());
            if !found.contains(&dtype) && floats().any(flows) {
                found.insert(dtype);
            }
        }
    }
    found
}

#[test]
fn an_op_is_verified_in_every_dtype_and_direction_that_there_is() {
    let all = selected(&[]).unwrap();
    for op in Op::NAMES.iter().copied() {
        let (mut wanted, mut there) = (BTreeSet::new(), BTreeSet::new());
        for case in all.iter().filter(|c| c.op == op) {
            for &dtype in cases::FLOATS {
                // What the shape rules refuse in this dtype is not there.
                let Ok(sketch) = case.sketch(dtype) else { continue };
                let listed = case.dtypes.contains(&dtype);
                for dtype in dtypes(&sketch.graph, op) {
                    wanted.insert((dtype, Pass::Forward));
                    there.extend(listed.then_some((dtype, Pass::Forward)));
                }
                for dtype in differentiable(&sketch.graph, op) {
                    wanted.insert((dtype, Pass::Backward));
                    there.extend((listed && sketch.differentiable()).then_some((dtype, Pass::Backward)));
                }
            }
        }
        assert!(!wanted.is_empty(), "{op}");
        let missing: Vec<_> = wanted.difference(&there).collect();
        assert!(missing.is_empty(), "{op} is not verified: {missing:?}");
    }
}

#[test]
fn a_key_changes_the_numbers_and_nothing_else() {
    let all = selected(&["matmul".into()]).unwrap();
    let [a, again, b] = [0, 0, 9].map(|key| all[0].keyed(DType::F32, key).unwrap());
    assert_eq!((&a.inputs, &a.graph), (&again.inputs, &again.graph));
    assert_eq!(a.graph, b.graph);
    assert_ne!(a.inputs, b.inputs);
}

#[test]
fn a_choice_on_an_edge_is_not_steady_and_one_off_it_is() {
    for (gap, wanted) in [(1e-5, false), (0.1, true)] {
        let mut s = Sketch::new(DType::F32);
        let x =
            s.input(moebius_ir::Role::Feed, moebius_ir::TensorType::f32([1, 2]), vec![1.0, 1.0 + gap], true).unwrap();
        let [gate, ..] = s.graph.route(x, 1, moebius_ir::ops::Balance::AllChoices).unwrap();
        s.out(gate).unwrap();
        assert_eq!(slope::steady(&mut s, 1e-3).unwrap(), wanted, "{gap}");
    }
}
