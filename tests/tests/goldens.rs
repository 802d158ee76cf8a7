//! Tensors made by the real DeepSpeed are reproduced: `MOEBIUS_GOLDENS=DIR` runs another set, by default `tests/goldens` and
//! `tests/goldens_more`.

use std::io::Write;
use std::path::{Path, PathBuf};

use moebius_tests::device::devices;
use moebius_tests::goldens::{Machine, Set, run};

fn own() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

/// Layers in bf16, and ranks that drop nothing and agree on one capacity.
fn more() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens_more")
}

fn directories() -> Vec<PathBuf> {
    std::env::var_os("MOEBIUS_GOLDENS").map_or_else(|| vec![own(), more()], |other| vec![other.into()])
}

fn set(directory: &Path) -> Set {
    Set::read(directory).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn every_case_agrees_on_every_device() {
    let sets: Vec<(PathBuf, Set)> = directories().into_iter().map(|d| (d.clone(), set(&d))).collect();
    let mut failed = Vec::new();
    for (device, (directory, set)) in devices().iter().flat_map(|d| sets.iter().map(move |s| (d, s))) {
        let machine = Machine::new(device.name, device.backend.clone());
        let report = run(set, &machine);
        let place = format!("{} on {}", directory.display(), machine.name);
        let lines: String = report.lines().iter().map(|line| format!("  {line}\n")).collect();
        // Which cases ran is the result, so it is written past the runner, which shows nothing of a test that passes.
        std::io::stdout().write_all(format!("{place}\n{lines}").as_bytes()).unwrap();
        assert!(!report.agreed.is_empty() || !report.failed.is_empty(), "{place}: no case");
        let all = report.failed.len() + report.agreed.len();
        failed.extend(
            (!report.failed.is_empty()).then(|| format!("{} of {all} cases of {place} fail", report.failed.len())),
        );
    }
    assert!(failed.is_empty(), "{}", failed.join("; "));
}

#[test]
fn one_changed_tensor_fails_its_case_by_name() {
    let device = devices().swap_remove(0);
    let machine = Machine::new(device.name, device.backend);
    // The change is more than the tolerance, which is that of bf16 in the last cases and nothing for a capacity.
    for (directory, file, case, name, change) in [
        (own(), "gating", "top2_argmax_cf0.5", "grad_logits", 1e-2),
        (own(), "layer", "residual_top1_cf1", "grad.wg", 1e-2),
        (own(), "kd", "kd_0", "grad_student", 1e-2),
        (more(), "layer", "bf16_residual_top2_nodrop", "grad.wg", 0.2),
        (more(), "layer", "bf16_standard_top3_cf0.5", "capacity", 1.0),
        // What DeepSpeed's roundings excuse is 2e-6 here.
        (more(), "layer", "residual_top3_eval_cf0.25_lone17", "grad.wg", 5e-6),
    ] {
        let mut set = set(&directory);
        let tensor = set.file_mut(file).and_then(|t| t.get_mut(&format!("{case}/{name}")));
        let tensor = tensor.unwrap_or_else(|| panic!("{file} has no {case}/{name}"));
        let element = 1.min(tensor.data.len() - 1);
        tensor.data[element] += change;
        let report = run(&set, &machine);
        let [(failed, wrong)] = report.failed.as_slice() else { panic!("wanted one failure: {:?}", report.failed) };
        assert_eq!(*failed, format!("{file}/{case}"));
        // Each way that the case is computed says so.
        let named = wrong.iter().all(|wrong| wrong.starts_with(&format!("{name}: element {element}: ")));
        assert!(!wrong.is_empty() && named, "{wrong:?}");
    }
}

#[test]
fn a_layer_of_f32_is_compared_in_bf16_too() {
    let device = devices().swap_remove(0);
    let machine = Machine::new(device.name, device.backend);
    let mut set = set(&own());
    let tensor = set.file_mut("layer").and_then(|t| t.get_mut("standard_top3_cf0.5/out"));
    tensor.unwrap_or_else(|| panic!("no result")).data[0] += 0.2;
    let report = run(&set, &machine);
    let failed: Vec<&str> = report.failed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(failed, ["layer/standard_top3_cf0.5", "layer/standard_top3_cf0.5 in bf16"]);
    // Rounded tokens of this case go to other experts; it is compared with the routes of the others.
    let replayed: Vec<&str> = report
        .agreed
        .iter()
        .filter(|a| a.notes.iter().any(|n| n.contains("replayed")))
        .map(|a| a.name.as_str())
        .collect();
    assert_eq!(replayed, ["layer/residual_top2_nodrop in bf16"]);
}

#[test]
fn ranks_that_drop_nothing_have_the_capacity_of_the_fullest() {
    let device = devices().swap_remove(0);
    let machine = Machine::new(device.name, device.backend);
    let mut set = set(&more());
    let tensors = set.file_mut("ep").unwrap_or_else(|| panic!("no ep"));
    let counts: Vec<f64> =
        (0..4).map(|r| fullest(&tensors[&format!("ep4_standard_top2_nodrop/rank{r}/exp_counts")])).collect();
    let most = counts.iter().copied().fold(0.0, f64::max);
    assert!(counts.iter().any(|&c| c < most), "ranks of unequal load: {counts:?}");
    // A rank that kept its own would have this one.
    let own = tensors.get_mut("ep4_standard_top2_nodrop/rank0/capacity").unwrap_or_else(|| panic!("no capacity"));
    assert_eq!(own.data, [most]);
    own.data[0] = counts[0];
    let failed = run(&set, &machine).failed;
    let names: Vec<&str> = failed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["ep/ep4_standard_top2_nodrop", "ep/ep4_standard_top2_nodrop in bf16"]);
    assert!(failed.iter().all(|(_, wrong)| wrong.iter().any(|w| w.starts_with("rank0/capacity: "))), "{failed:?}");
}

#[test]
fn what_roundings_excuse_is_told_and_little_else_is_excused() {
    let device = devices().swap_remove(0);
    let machine = Machine::new(device.name, device.backend);
    let report = run(&set(&more()), &machine);
    let excused = |name: &str| {
        let case =
            report.agreed.iter().find(|a| a.name == name).unwrap_or_else(|| panic!("{name}: {:?}", report.failed));
        let notes = case.notes.iter().filter(|n| n.contains("where roundings alone move it"));
        notes.map(|n| n.split(' ').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(excused("layer/residual_top3_eval_cf0.25_lone17"), ["grad.wg"]);
    assert_eq!(excused("layer/residual_top3_eval_cf0.25_lone5"), ["grad.coefficient.bias"]);
    assert_eq!(excused("layer/bf16_residual_top2_cancels8"), ["grad.coefficient.bias"]);
    assert_eq!(report.agreed.iter().filter(|a| !excused(&a.name).is_empty()).count(), 4, "{:?}", report.lines());
}

fn fullest(counts: &moebius_ir::Tensor) -> f64 {
    counts.data.iter().copied().fold(0.0, f64::max)
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
