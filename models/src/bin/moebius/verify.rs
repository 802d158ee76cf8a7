//! `moebius verify`: whether this machine computes what the ops mean, as a table or as JSON.

use std::io::IsTerminal;

use console::style;
use indicatif::{ProgressBar, ProgressStyle};
use moebius::Engine;
use moebius_models::verify::{Options, Pass, Report, Row, Sort, Verdict, verify};

use crate::cli::VerifyArgs;
use crate::failure::Failure;

/// Failures that are told one by one; the JSON has them all.
const TOLD: usize = 12;

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let engine = Engine::open(&args.device)?;
    let options = Options { only: args.op.clone(), seed: args.seed };
    let bar = std::io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template("{pos}/{len} cases  {wide_msg}");
        ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    });
    let report = verify(&engine, &options, &mut |at| {
        if let Some(bar) = &bar {
            bar.set_length(at.total as u64);
            bar.set_position(at.done as u64);
            bar.set_message(at.op);
        }
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if args.json {
        println!("{}", report.to_json());
    } else {
        print(&report, &rerun(args, &report));
    }
    ending(&report)
}

/// How the program ends.
fn ending(report: &Report) -> Result<(), Failure> {
    if report.passed() { Ok(()) } else { Err(Failure::Unverified) }
}

/// The command that repeats just what failed.
fn rerun(args: &VerifyArgs, report: &Report) -> String {
    let mut command = String::from("moebius verify");
    for name in report.failed_subjects() {
        command += &format!(" --op {name}");
    }
    if args.device != "auto" {
        command += &format!(" --device {}", args.device);
    }
    if args.seed != 0 {
        command += &format!(" --seed {}", args.seed);
    }
    command
}

fn print(report: &Report, rerun: &str) {
    let checks = if report.memory_checks { "with and without memory checks" } else { "no memory checks" };
    println!("{} ({}), {checks}, seed {}", report.device, report.description, report.seed);
    println!("Against the reference in f64; the worst errors, in units in the last place (ulp)");
    println!("of each dtype and relative (of f32 where there is f32):");
    println!();
    println!("{HEAD}");
    let mut last = "";
    for row in &report.rows {
        let verdict = match row.counts.verdict() {
            Verdict::Passed => style("passed").green(),
            Verdict::PartlyRefused => style("partly").yellow(),
            Verdict::Refused => style("refused").yellow(),
            Verdict::Failed => style("FAILED").red().bold(),
        };
        println!("{}  {verdict}", line(row, row.op != last));
        last = row.op;
    }
    if !report.failures.is_empty() {
        println!();
        report.failures.iter().take(TOLD).for_each(|f| {
            println!("{} {} / {} / {}, {}:", style("FAILED").red().bold(), f.op, f.case, f.dtype, f.pass.name());
            println!("  {}", f.fault);
        });
        if let Some(more) = report.failures.len().checked_sub(TOLD).filter(|&more| more > 0) {
            println!("and {more} more; --json lists them all");
        }
    }
    if !report.refused.is_empty() {
        println!();
        for r in &report.refused {
            println!("refused: {} / {}, {}, {} cases: {}", r.op, r.dtype, r.pass.name(), r.cases, r.reason);
        }
    }
    println!();
    println!("{}", summary(report));
    if !report.failures.is_empty() {
        println!("To run just what failed:\n  {rerun}");
    }
}

const HEAD: &str = "op                         cases    f32   bf16    f16  int  relative  verdict";

/// Columns of names in [`HEAD`].
const NAME: usize = 25;

/// A row without its verdict, as wide as [`HEAD`].
fn line(row: &Row, first: bool) -> String {
    let name = match (first, row.pass) {
        (true, Pass::Forward) => row.op.to_owned(),
        (true, Pass::Backward | Pass::Slope) => format!("{}, {}", row.op, row.pass.name()),
        (false, _) => format!("  {}", row.pass.name()),
    };
    let cell = |sort: Sort| match row.worst.get(&sort) {
        Some(d) if row.pass != Pass::Slope => number(d.ulp),
        Some(_) | None => "-".into(),
    };
    let [f32, bf16, f16, int] = Sort::ALL.map(cell);
    let relative = match row.worst.get(&Sort::F32) {
        Some(d) => Some(d.relative),
        None => row.worst.values().map(|d| d.relative).reduce(f64::max),
    };
    let relative = relative.map_or("-".into(), |r| if r == 0.0 { "0".into() } else { format!("{r:.1e}") });
    let cases = row.counts.cases();
    let numbers = format!("{cases:>6} {f32:>6} {bf16:>6} {f16:>6} {int:>4} {relative:>9}");
    // A name that leaves no room for the numbers has a line of its own.
    if name.len() > NAME { format!("{name}\n{:NAME$} {numbers}", "") } else { format!("{name:NAME$} {numbers}") }
}

/// At most six characters.
fn number(ulp: f64) -> String {
    if ulp == 0.0 {
        "0".into()
    } else if !ulp.is_finite() {
        "inf".into()
    } else if ulp < 0.005 {
        "<.01".into()
    } else if ulp < 99.995 {
        format!("{ulp:.2}")
    } else if ulp < 99_999.5 {
        format!("{ulp:.0}")
    } else {
        format!("{ulp:.0e}")
    }
}

/// The last line: what ran and how it ended.
fn summary(report: &Report) -> String {
    let (ops, layers) = report.subjects();
    let counted = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let mut parts = Vec::new();
    if !ops.is_empty() {
        parts.push(counted(ops.len(), "op"));
    }
    if !layers.is_empty() {
        parts.push(counted(layers.len(), "kind") + " of layers");
    }
    let c = report.counts;
    parts.push(counted(c.cases(), "case"));
    let verdict = match c.verdict() {
        Verdict::Passed => "all passed".into(),
        Verdict::PartlyRefused => format!("{} passed, {} refused", c.passed, c.refused),
        Verdict::Refused => "all refused: nothing was verified".into(),
        Verdict::Failed if c.refused == 0 => format!("{} FAILED, {} passed", c.failed, c.passed),
        Verdict::Failed => format!("{} FAILED, {} passed, {} refused", c.failed, c.passed, c.refused),
    };
    format!("{}: {verdict} on {} ({:.1} s)", parts.join(", "), report.device, report.seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use moebius::ir::DType;
    use moebius_models::verify::tolerance::Distance;
    use moebius_models::verify::{Counts, Failure as Failed, Fault};

    fn report(failed: usize, refused: usize) -> Report {
        let counts = Counts { passed: 3, refused, failed };
        let d = |ulp| Distance { ulp, relative: ulp * 1e-7, ..Distance::default() };
        let worst = BTreeMap::from([(Sort::F32, d(1234.5)), (Sort::Bf16, d(0.5)), (Sort::F16, d(f64::INFINITY))]);
        let row = |pass| Row {
            op: "linear_cross_entropy_grad",
            pass,
            counts,
            by_dtype: BTreeMap::new(),
            worst: worst.clone(),
        };
        let failure = Failed {
            op: "softmax",
            case: "[4, 37]".into(),
            dtype: DType::F32,
            pass: Pass::Forward,
            fault: Fault::Missing { name: "y0".into() },
        };
        Report {
            device: "cpu",
            description: "2 threads".into(),
            memory_checks: true,
            seed: 7,
            rows: vec![row(Pass::Forward), row(Pass::Backward), row(Pass::Slope)],
            failures: if failed > 0 { vec![failure] } else { Vec::new() },
            refused: Vec::new(),
            counts,
            seconds: 1.25,
        }
    }

    #[test]
    fn the_table_fits_80_columns() {
        for name in moebius_models::verify::names() {
            for (first, row) in [true, false, false].into_iter().zip(&mut report(1, 0).rows) {
                row.op = name;
                let row = line(row, first);
                let lines: Vec<&str> = row.lines().collect();
                assert!(lines[0].starts_with(if first { name } else { "  " }), "{row}");
                let last = lines[lines.len() - 1];
                assert_eq!(last.len() + "  verdict".len(), HEAD.len(), "{row}");
                assert!(last.len() + "  refused".len() <= 80 && lines[0].len() <= 80 && lines.len() <= 2, "{row}");
            }
        }
        assert!(HEAD.len() <= 80);
        for ulp in [0.0, 0.001, 0.5, 99.994, 99.996, 99_999.0, 99_999.9, 1e30, 1e300, f64::INFINITY, f64::NAN] {
            assert!(number(ulp).len() <= 6, "{}", number(ulp));
        }
    }

    #[test]
    fn a_failure_ends_with_code_1_and_says_how_to_repeat_it() {
        let failed = report(2, 1);
        assert_eq!(ending(&failed).map_err(|f| f.code()), Err(1));
        assert!(summary(&failed).contains("2 FAILED, 3 passed, 1 refused on cpu"), "{}", summary(&failed));
        let args = VerifyArgs { device: "cpu".into(), op: Vec::new(), seed: 7, json: false };
        assert_eq!(rerun(&args, &failed), "moebius verify --op softmax --device cpu --seed 7");
        assert!(ending(&report(0, 0)).is_ok() && ending(&report(0, 4)).is_ok());
        assert!(summary(&report(0, 0)).contains("1 op, 3 cases: all passed on cpu (1.2 s)"));
        // Where nothing passed, nothing was verified.
        let mut refused = report(0, 4);
        refused.counts.passed = 0;
        assert!(ending(&refused).is_err());
    }
}
