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
        assert!(wrong.len() == 1 && wrong[0].starts_with(&format!("{name}: element 1: ")), "{wrong:?}");
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
