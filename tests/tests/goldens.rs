//! Tensors made by the real DeepSpeed are reproduced: `MOEBIUS_GOLDENS=DIR` runs another set, by default `tests/goldens`.

use std::path::{Path, PathBuf};

use moebius_tests::device::devices;
use moebius_tests::goldens::{Machine, Set, run};

fn own() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

fn directory() -> PathBuf {
    std::env::var_os("MOEBIUS_GOLDENS").map_or_else(own, PathBuf::from)
}

fn set(directory: &Path) -> Set {
    Set::read(directory).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
#[expect(clippy::print_stdout, reason = "the cases that ran are the result")]
fn every_case_agrees_on_every_device() {
    let directory = directory();
    let set = set(&directory);
    for device in devices() {
        let machine = Machine::new(device.name, device.backend);
        let report = run(&set, &machine);
        println!("{} on {}", directory.display(), machine.name);
        report.lines().iter().for_each(|line| println!("  {line}"));
        assert!(!report.agreed.is_empty(), "no case ran");
        assert!(
            report.failed.is_empty(),
            "{} of {} cases fail on {}",
            report.failed.len(),
            report.failed.len() + report.agreed.len(),
            machine.name
        );
    }
}

#[test]
fn one_changed_tensor_fails_its_case_by_name() {
    let directory = own();
    let device = devices().swap_remove(0);
    let machine = Machine::new(device.name, device.backend);
    for (file, case, name) in [
        ("gating", "top2_argmax_cf0.5", "grad_logits"),
        ("layer", "residual_top1_cf1", "grad.wg"),
        ("kd", "kd_0", "grad_student"),
    ] {
        let mut set = set(&directory);
        let tensor = set.file_mut(file).and_then(|t| t.get_mut(&format!("{case}/{name}")));
        let tensor = tensor.unwrap_or_else(|| panic!("{file} has no {case}/{name}"));
        tensor.data[1] += 1e-2;
        let report = run(&set, &machine);
        let [(failed, wrong)] = report.failed.as_slice() else { panic!("wanted one failure: {:?}", report.failed) };
        assert_eq!(*failed, format!("{file}/{case}"));
        // Each way that the case is computed says so.
        let named = wrong.iter().all(|wrong| wrong.starts_with(&format!("{name}: element 1: ")));
        assert!(!wrong.is_empty() && named, "{wrong:?}");
    }
}

#[test]
fn what_cannot_be_compared_fails() {
    let device = devices().swap_remove(0);
    let machine = Machine::new(device.name, device.backend);
    let mut set = set(&own());
    let tensors = set.file_mut("kd").unwrap_or_else(|| panic!("no kd"));
    let taken = tensors.remove("kd_0/grad_student").unwrap_or_else(|| panic!("no tensor"));
    tensors.insert("kd_2/surplus".into(), taken.clone());
    tensors.insert("nobody/tensor".into(), taken);
    let failed = run(&set, &machine).failed;
    let named = |name: &str, part: &str| failed.iter().any(|(n, w)| n == name && w.iter().any(|w| w.contains(part)));
    assert!(named("kd/kd_0", "kd_0/grad_student is missing"), "{failed:?}");
    assert!(named("kd/kd_2", "kd_2/surplus: nothing to compare it with"), "{failed:?}");
    assert!(named("kd/nobody/tensor", "no case in the index owns"), "{failed:?}");
    assert_eq!(failed.len(), 3, "{failed:?}");
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

#[test]
fn in_a_set_elsewhere_a_case_taken_out_and_one_of_an_unknown_kind_fail_by_name() {
    let elsewhere = tempfile::tempdir().unwrap();
    copy(&own(), elsewhere.path());
    let device = devices().swap_remove(0);
    let machine = Machine::new(device.name, device.backend);
    let whole = run(&set(elsewhere.path()), &machine);
    assert!(whole.failed.is_empty() && whole.agreed.len() >= 59, "{:?}", whole.failed);

    let index = elsewhere.path().join("index.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    let gating = json["gating"].as_array_mut().unwrap();
    gating.retain(|case| case["name"] != "top2_argmax_cf0.5");
    json["surprise"] = serde_json::json!([{ "name": "party" }]);
    std::fs::write(&index, json.to_string()).unwrap();
    let report = run(&set(elsewhere.path()), &machine);
    assert_eq!(report.agreed.len() + 1, whole.agreed.len());
    let named = |name: &str, part: &str| {
        report.failed.iter().any(|(n, wrong)| n == name && wrong.iter().any(|w| w.contains(part)))
    };
    assert!(named("surprise/party", "unknown kind of case `surprise`"), "{:?}", report.failed);
    assert!(named("gating/top2_argmax_cf0.5/logits", "no case in the index owns"), "{:?}", report.failed);
    let others = report.failed.iter().filter(|(n, _)| n != "surprise/party" && !n.contains("/top2_argmax_cf0.5/"));
    assert_eq!(others.count(), 0, "{:?}", report.failed);
}
