//! Comparison with tensors that the real DeepSpeed made.
//!
//! A set is a directory: `index.json` lists cases of the kinds `gating`, `layer` and `ep`, `index_kd.json` those of `kd`,
//! `pyramid` and `lr`; the tensors of a kind lie in `KIND.safetensors` under `CASE/TENSOR`. `ckpt/` is a checkpoint with
//! `ckpt_io.safetensors` as a pair of input and output. Each part may be absent, but not all. Sizes, options and the number
//! of cases come from the set. Cases of `layer` and `ep` in f32 are compared a second time with the layer computing in bf16; their
//! names end in ` in bf16`. A case that is not understood, lacks a tensor or has one that nothing is compared with, fails.
//!
//! A tensor may be as far from DeepSpeed's as the table of tolerances says, or as twice the roundings of its dtype move it where
//! that is more ([`rounding`]): each of the two has its own. The report says where that was needed.
//!
//! Everything is computed by programs of [`moebius::Engine`] on one device.

mod checkpoint;
mod compare;
mod gating;
mod kd;
mod layer;
mod lists;
mod machine;
mod moe;
mod rank;
mod rounding;
mod routes;
mod rules;
mod set;
mod torch;

use serde_json::Value as Json;

pub use compare::Case;
pub use machine::Machine;
use rank::Run;
pub use set::{Fields, Problem, Set};

/// A case that agrees.
#[derive(Debug)]
pub struct Agreed {
    /// `KIND/CASE`.
    pub name: String,
    /// The largest error relative to the size of its tensor.
    pub error: f64,
    /// What should be known of how it was compared.
    pub notes: Vec<String>,
}

/// What became of the cases of a set, each named `KIND/CASE`.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases that agree.
    pub agreed: Vec<Agreed>,
    /// Cases that do not, or that could not be run, with all that is wrong.
    pub failed: Vec<(String, Vec<String>)>,
}

impl Report {
    fn add(&mut self, name: String, case: Case<'_>, result: Result<(), Problem>) {
        let (error, notes) = (case.worst(), case.notes().to_vec());
        match result.map(|()| case.finish()) {
            Ok(wrong) if wrong.is_empty() => self.agreed.push(Agreed { name, error, notes }),
            Ok(mut wrong) => {
                wrong.extend(notes);
                self.failed.push((name, wrong));
            }
            Err(problem) => self.fail(name, &problem),
        }
    }

    fn fail(&mut self, name: String, problem: &Problem) {
        self.failed.push((name, vec![problem.to_string()]));
    }

    /// One line for each case.
    pub fn lines(&self) -> Vec<String> {
        let agreed = self.agreed.iter().map(|a| {
            let notes: String = a.notes.iter().map(|note| format!("; {note}")).collect();
            format!("agrees  {}, error {:.1e}{notes}", a.name, a.error)
        });
        let failed = self.failed.iter().map(|(name, wrong)| format!("FAILS   {name}: {}", wrong.join("; ")));
        agreed.chain(failed).collect()
    }
}

/// Runs every case of the set on `machine`.
pub fn run(set: &Set, machine: &Machine) -> Report {
    let mut report = Report::default();
    for (kind, list) in set.kinds() {
        let Json::Array(cases) = list else {
            report.fail(kind.clone(), &Problem::NotAList { kind: kind.clone() });
            continue;
        };
        for (number, fields) in cases.iter().enumerate() {
            let fields = Fields::new(fields);
            let name = fields.text("name").map_or_else(|_| number.to_string(), str::to_owned);
            let mut case = Case::new(set, kind, &name);
            let result = match kind.as_str() {
                "gating" => gating::check(&mut case, &fields, machine),
                "layer" => layer::check(&mut case, &fields, machine, Run::AsStored),
                "ep" => layer::check_ranks(&mut case, &fields, machine, Run::AsStored),
                "kd" => kd::check(&mut case, &fields, machine),
                "pyramid" => lists::check_pyramid(&mut case, &fields),
                "lr" => lists::check_learning_rate(&mut case, &fields),
                _unknown => Err(Problem::UnknownKind { kind: kind.clone() }),
            };
            report.add(format!("{kind}/{name}"), case, result);
            let check = match kind.as_str() {
                "layer" => layer::check,
                "ep" => layer::check_ranks,
                _others => continue,
            };
            if fields.text("dtype").is_ok_and(|dtype| dtype == "f32") {
                let mut case = Case::new(set, kind, &name);
                let result = check(&mut case, &fields, machine, Run::InBf16);
                report.add(format!("{kind}/{name} in bf16"), case, result);
            }
        }
    }
    for stray in set.strays() {
        report.fail(stray.clone(), &Problem::Stray { tensor: stray });
    }
    if set.has_checkpoint() {
        let mut case = Case::new(set, "ckpt_io", "");
        let result = checkpoint::check(&mut case, set.directory(), machine);
        report.add("ckpt".into(), case, result);
    }
    report
}
