//! The suites notice known bugs: each is planted alone and every check named with it fails, while without it each passes.

use std::collections::BTreeSet;

use moebius_tests::planted::{CUTS, bugs, gradient_check};

#[test]
fn every_planted_bug_fails_the_checks_named_with_it() {
    let mut wrong = Vec::new();
    for bug in bugs() {
        assert!(!bug.noticed_by.is_empty(), "{}: no check", bug.name);
        for &check in bug.noticed_by {
            if check.run(Some(bug)).is_ok() {
                wrong.push(format!("{check:?} passes with the bug {:?}: {}", bug.name, bug.what));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(bugs().count() >= 20);
}

#[test]
fn without_a_bug_the_same_checks_pass() {
    let mut done = BTreeSet::new();
    let mut wrong = Vec::new();
    for check in bugs().flat_map(|bug| bug.noticed_by.iter().copied()) {
        if done.insert(format!("{check:?}"))
            && let Err(why) = check.run(None)
        {
            wrong.push(format!("{check:?} fails without a bug: {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_wrong_gradient_fails_the_check_by_differences() {
    for cut in CUTS {
        let (op, case) = cut.noticed_by;
        assert_eq!(gradient_check(op, case, None), Ok(()), "{}: {op} / {case} without it", cut.name);
        assert!(gradient_check(op, case, Some(cut)).is_err(), "{}: {op} / {case} passes: {}", cut.name, cut.what);
    }
}

#[test]
fn bugs_have_names_of_their_own() {
    let mut names = BTreeSet::new();
    for name in bugs().map(|b| b.name).chain(CUTS.iter().map(|c| c.name)) {
        assert!(names.insert(name), "{name} twice");
    }
}
