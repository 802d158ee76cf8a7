//! `fuzz [--target NAME] [--seed S] [--from I] [--count N] [--seconds S]`: gives random and changed inputs to every parser;
//! see `moebius_tests::fuzz`. The numbers of a failure, which are printed, repeat it; so does the last progress line after
//! a crash that no panic handler sees.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use moebius_tests::fuzz::{self, Meter};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The input at work, for the watchdog.
static INPUT: AtomicU64 = AtomicU64::new(0);

/// Ends the program when one input is at work for 600 looks of 0.1 s each. Looks are counted, not time, so that a machine
/// that sleeps in between is no hang.
fn watchdog() {
    let (mut seen, mut looks) = (0, 0);
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let input = INPUT.load(Relaxed);
        (seen, looks) = if input == seen { (seen, looks + 1) } else { (input, 0) };
        if looks == 600 {
            eprintln!("input {input} does not end");
            std::process::exit(1);
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = |name: &str| arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1));
    let number = |name: &str, or: u64| match given(name).map(|text| text.parse()) {
        None => or,
        Some(Ok(number)) => number,
        Some(Err(_)) => {
            eprintln!("{name}: wanted a number");
            std::process::exit(2);
        }
    };
    let (seed, from, count) = (number("--seed", 1), number("--from", 0), number("--count", 2_000_000));
    let seconds = given("--seconds").map(|_| Duration::from_secs(number("--seconds", 0)));
    let targets = match fuzz::targets() {
        Ok(targets) => targets,
        Err(error) => {
            eprintln!("no scratch folder: {error}");
            return ExitCode::from(2);
        }
    };
    std::thread::spawn(watchdog);
    // A panic is caught and told with its input.
    std::panic::set_hook(Box::new(|panic| eprintln!("{}", panic.location().map_or(String::new(), |l| l.to_string()))));
    let mut failures = 0;
    for (place, target) in targets.iter().enumerate() {
        if given("--target").is_some_and(|name| name != target.name) {
            continue;
        }
        let start = Instant::now();
        let until = seconds.map(|s| start + s / targets.len() as u32);
        let watch = |index: u64| {
            INPUT.store(index, Relaxed);
            if index.is_multiple_of(100_000) {
                eprintln!("{} --seed {seed} --from {index}", target.name);
            }
        };
        match fuzz::run((place, target), seed, from..from.saturating_add(count), until, Meter::PEAK, &watch) {
            Ok(r) => println!(
                "{:<12} {:>8} inputs, {:>5.1} % read, {:>7.0} a second, most memory {} KiB, slowest {:?}",
                target.name,
                r.inputs,
                100.0 * r.read as f64 / r.inputs.max(1) as f64,
                r.inputs as f64 / start.elapsed().as_secs_f64(),
                r.most_bytes >> 10,
                r.slowest
            ),
            Err(f) => {
                failures += 1;
                println!(
                    "{}: {}\n  fuzz --target {} --seed {seed} --from {} --count 1",
                    target.name, f.what, target.name, f.index
                );
                println!("{}", String::from_utf8_lossy(&f.input));
            }
        }
    }
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
