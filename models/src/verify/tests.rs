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
