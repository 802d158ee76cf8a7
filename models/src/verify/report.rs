//! What a verification found, as rows that people and programs read.

use std::collections::BTreeMap;

use moebius_ir::{DType, Op};
use serde_json::{Value, json};

use super::check::{Fault, Finding, Outcome, Pass, Sort};
use super::tolerance::Distance;

/// How the cases of a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every case is close enough.
    Passed,
    /// The device refuses some cases; the others passed.
    PartlyRefused,
    /// The device refuses all cases.
    Refused,
    /// At least one case is wrong.
    Failed,
}

impl Verdict {
    /// The verdict in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Passed => "passed",
            Verdict::PartlyRefused => "partly refused",
            Verdict::Refused => "refused",
            Verdict::Failed => "FAILED",
        }
    }
}

/// Cases by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Close enough.
    pub passed: usize,
    /// Refused by the device.
    pub refused: usize,
    /// Wrong.
    pub failed: usize,
}

impl Counts {
    fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Refused(_) => self.refused += 1,
            Outcome::Failed(_) => self.failed += 1,
        }
    }

    /// All of them.
    pub fn cases(&self) -> usize {
        self.passed + self.refused + self.failed
    }

    /// The verdict on all of them together.
    pub fn verdict(&self) -> Verdict {
        match self {
            Counts { failed: 1.., .. } => Verdict::Failed,
            Counts { refused: 0, .. } => Verdict::Passed,
            Counts { passed: 0, .. } => Verdict::Refused,
            Counts { .. } => Verdict::PartlyRefused,
        }
    }
}

/// One pass of one op or layer, all cases and dtypes together.
#[derive(Clone, Debug)]
pub struct Row {
    /// The op or layer.
    pub op: &'static str,
    /// What was compared.
    pub pass: Pass,
    /// How the cases ended.
    pub counts: Counts,
    /// The same by the dtype of the cases' open floats; cases that leave none open count as f32.
    pub by_dtype: BTreeMap<DType, Counts>,
    /// The worst distance of each sort of numbers.
    pub worst: BTreeMap<Sort, Distance>,
}

/// A case that failed.
#[derive(Debug)]
pub struct Failure {
    /// The op or layer.
    pub op: &'static str,
    /// The case's name.
    pub case: String,
    /// What its open floats were.
    pub dtype: DType,
    /// What was compared.
    pub pass: Pass,
    /// What is wrong.
    pub fault: Fault,
}

/// Cases that the device refuses for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedCases {
    /// The op or layer.
    pub op: &'static str,
    /// What the open floats were.
    pub dtype: DType,
    /// What was compared.
    pub pass: Pass,
    /// The op refused, and what the device would need instead.
    pub reason: String,
    /// How many cases.
    pub cases: usize,
}

/// Everything a verification found.
#[derive(Debug)]
pub struct Report {
    /// Name of the device.
    pub device: &'static str,
    /// The device in words.
    pub description: String,
    /// Whether it was run with memory checks too.
    pub memory_checks: bool,
    /// Seed of the inputs.
    pub seed: u32,
    /// One for each op or layer and pass, in the order they ran.
    pub rows: Vec<Row>,
    /// Each case that failed, in the order they ran.
    pub failures: Vec<Failure>,
    /// What the device refuses.
    pub refused: Vec<RefusedCases>,
    /// Cases in all their dtypes, by the worst of their passes.
    pub counts: Counts,
    /// Wall-clock seconds.
    pub seconds: f64,
}

impl Report {
    /// Nothing found yet.
    pub(super) fn new(device: &'static str, description: String, memory_checks: bool, seed: u32) -> Report {
        Report {
            device,
            description,
            memory_checks,
            seed,
            rows: Vec::new(),
            failures: Vec::new(),
            refused: Vec::new(),
            counts: Counts::default(),
            seconds: 0.0,
        }
    }

    /// Takes in all passes of one case in one dtype.
    pub(super) fn add(&mut self, findings: Vec<Finding>) {
        let rank = |outcome: &Outcome| match outcome {
            Outcome::Passed => 0,
            Outcome::Refused(_) => 1,
            Outcome::Failed(_) => 2,
        };
        if let Some(worst) = findings.iter().map(|f| &f.outcome).max_by_key(|outcome| rank(outcome)) {
            self.counts.add(worst);
        }
        for Finding { op, case, dtype, pass, outcome, worst } in findings {
            let row = self.row(op, pass);
            row.counts.add(&outcome);
            row.by_dtype.entry(dtype).or_default().add(&outcome);
            for (sort, distance) in worst {
                let known = row.worst.entry(sort).or_default();
                *known = known.max(distance);
            }
            match outcome {
                Outcome::Passed => {}
                Outcome::Refused(reason) => self.refuse(RefusedCases { op, dtype, pass, reason, cases: 1 }),
                Outcome::Failed(fault) => self.failures.push(Failure { op, case, dtype, pass, fault }),
            }
        }
    }

    fn row(&mut self, op: &'static str, pass: Pass) -> &mut Row {
        let at = self.rows.iter().position(|r| (r.op, r.pass) == (op, pass)).unwrap_or_else(|| {
            // Beside the op's other passes.
            let beside = self.rows.iter().rposition(|r| r.op == op).map_or(self.rows.len(), |last| last + 1);
            let (counts, by_dtype, worst) = (Counts::default(), BTreeMap::new(), BTreeMap::new());
            self.rows.insert(beside, Row { op, pass, counts, by_dtype, worst });
            beside
        });
        &mut self.rows[at]
    }

    fn refuse(&mut self, new: RefusedCases) {
        let same =
            |r: &&mut RefusedCases| (r.op, r.dtype, r.pass) == (new.op, new.dtype, new.pass) && r.reason == new.reason;
        match self.refused.iter_mut().find(same) {
            Some(known) => known.cases += 1,
            None => self.refused.push(new),
        }
    }

    /// Whether the device was found to be right: something passed and nothing failed. What it refuses is not held against it.
    pub fn passed(&self) -> bool {
        self.counts.failed == 0 && self.counts.passed > 0
    }

    /// The ops and the layers among the rows, in order.
    pub fn subjects(&self) -> (Vec<&'static str>, Vec<&'static str>) {
        let mut all: Vec<&'static str> = self.rows.iter().map(|r| r.op).collect();
        all.dedup();
        all.into_iter().partition(|name| Op::NAMES.contains(name))
    }

    /// The ops and layers with a failure, in order.
    pub fn failed_subjects(&self) -> Vec<&'static str> {
        let mut names: Vec<&'static str> = self.failures.iter().map(|f| f.op).collect();
        names.dedup();
        names
    }

    /// The report as one JSON object. An error that is not finite, as that of a NaN where a number should be, is null.
    pub fn to_json(&self) -> Value {
        let (ops, layers) = self.subjects();
        json!({
            "device": self.device,
            "description": self.description,
            "memory_checks": self.memory_checks,
            "seed": self.seed,
            "passed": self.passed(),
            "ops": ops.len(),
            "layers": layers.len(),
            "cases": self.counts.cases(),
            "cases_passed": self.counts.passed,
            "cases_refused": self.counts.refused,
            "cases_failed": self.counts.failed,
            "seconds": self.seconds,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "failures": self.failures.iter().map(failure).collect::<Vec<_>>(),
            "refused": self.refused.iter().map(refused).collect::<Vec<_>>(),
        })
    }
}

fn row(row: &Row) -> Value {
    let counts = |c: &Counts| json!({ "passed": c.passed, "refused": c.refused, "failed": c.failed });
    let distance = |(sort, d): (&Sort, &Distance)| {
        // A gradient check has no unit in the last place.
        let ulp = (row.pass != Pass::Slope).then_some(d.ulp);
        (sort.name().to_owned(), json!({ "ulp": ulp, "relative": d.relative, "of_allowed": d.of_allowed }))
    };
    json!({
        "op": row.op,
        "pass": row.pass.name(),
        "verdict": row.counts.verdict().name().to_lowercase(),
        "cases": row.counts.cases(),
        "by_dtype": row.by_dtype.iter().map(|(d, c)| (d.name().to_owned(), counts(c))).collect::<serde_json::Map<_, _>>(),
        "worst": row.worst.iter().map(distance).collect::<serde_json::Map<_, _>>(),
    })
}

fn failure(f: &Failure) -> Value {
    json!({
        "op": f.op, "case": f.case, "dtype": f.dtype.name(), "pass": f.pass.name(), "what": f.fault.to_string(),
    })
}

fn refused(r: &RefusedCases) -> Value {
    json!({ "op": r.op, "dtype": r.dtype.name(), "pass": r.pass.name(), "reason": r.reason, "cases": r.cases })
}
