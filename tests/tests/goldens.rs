//! Tensors made by the real DeepSpeed are reproduced: `MOEBIUS_GOLDENS=DIR` runs another set, by default `tests/goldens`.

use std::path::{Path, PathBuf};

use moebius_tests::device::devices;
use moebius_tests::goldens::{Machine, Report, run};

fn directory() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
    std::env::var_os("MOEBIUS_GOLDENS").map_or(own, PathBuf::from)
}

fn machine() -> Machine {
    let device = devices().swap_remove(0);
    Machine::new(device.name, device.backend)
}

fn report(directory: &Path, machine: &Machine) -> Report {
    run(directory, machine).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
#[expect(clippy::print_stdout, reason = "the cases that ran are the result")]
fn every_case_agrees_on_every_device() {
    let directory = directory();
    for device in devices() {
        let machine = Machine::new(device.name, device.backend);
        let report = report(&directory, &machine);
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
