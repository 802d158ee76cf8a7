//! `moebius_models::verify`: a right device passes, a planted fault is found where it is, and what a device refuses is neither.

use std::sync::Arc;

use moebius::{Engine, Refusal};
use moebius_backends::{Backend, Error, Executable, Result, Store};
use moebius_ir::{DType, Graph, Op, Plan};
use moebius_models::verify::{self, Fault as Found, Options, Pass, Report, Sort, Verdict, VerifyError, verify};
use moebius_tests::device;
use moebius_tests::faulty::{Fault, Faulty};

fn run(backend: impl Backend + 'static, only: &[&str], seed: u32) -> Report {
    let engine = Engine::with_backend(Arc::new(backend));
    let options = Options { only: only.iter().map(|o| (*o).to_owned()).collect(), seed };
    let (mut calls, mut last) = (0, None);
    let report = verify(&engine, &options, &mut |at| {
        calls += 1;
        assert!(at.done <= at.total && last.is_none_or(|l| l <= at.done), "{at:?}");
        last = Some(at.done);
    });
    let report = report.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((calls, last), (report.counts.cases() + 1, Some(report.counts.cases())));
    report
}

fn faulty(op: &'static str, dtype: Option<DType>, factor: f64, only: &[&str]) -> Report {
    let fault = Fault { op, dtype, factor, unchecked_only: false };
    run(Faulty::new(Arc::new(device::cpu(1).with_checks(false)), fault), only, 0)
}

fn verdict(report: &Report, op: &str, pass: Pass) -> Option<Verdict> {
    report.rows.iter().find(|r| r.op == op && r.pass == pass).map(|r| r.counts.verdict())
}

#[test]
fn the_cpu_is_right() {
    let report = run(device::cpu(2).with_checks(false), &[], 0);
    let failures: Vec<String> =
        report.failures.iter().map(|f| format!("{} / {} / {}: {}", f.op, f.case, f.dtype, f.fault)).collect();
    assert!(report.passed() && failures.is_empty(), "{}", failures.join("\n"));
    assert!(report.refused.is_empty() && report.memory_checks);
    let (ops, layers) = report.subjects();
    assert_eq!(ops, Op::NAMES);
    assert_eq!(layers, verify::cases::LAYERS);
    // Every float dtype of every op that has them, and the router's gradient in whole layers.
    for name in ["matmul", "expert_matmul", "combine", "softmax", "adamw", "moe_layer", "residual_moe_layer"] {
        let row = report.rows.iter().find(|r| r.op == name && r.pass == Pass::Forward).unwrap();
        assert_eq!(row.by_dtype.keys().copied().collect::<Vec<_>>(), verify::cases::FLOATS, "{name}");
    }
    for name in ["matmul", "route", "dispatch", "expert_matmul", "published_routers", "decoder"] {
        let row = report.rows.iter().find(|r| r.op == name && r.pass == Pass::Backward).unwrap();
        // An error of zero everywhere would be one that is not measured.
        assert!(row.worst[&Sort::F32].ulp > 0.0, "{name}");
    }
    for name in verify::cases::LAYERS {
        assert_eq!(verdict(&report, name, Pass::Slope), Some(Verdict::Passed), "{name}");
    }
}

#[test]
fn other_inputs_pass_too() {
    let report = run(device::cpu(2), &["route", "moe_layer", "decoder"], 77);
    assert!(report.passed(), "{:?}", report.failures);
    let other = run(device::cpu(2), &["route", "moe_layer", "decoder"], 78);
    let errors = |r: &Report| r.rows.iter().map(|r| r.worst[&Sort::F32]).collect::<Vec<_>>();
    assert!(other.passed() && errors(&report) != errors(&other));
}

#[test]
fn a_fault_in_any_op_is_found() {
    // What reaches a backend only in other forms: fused, or as an update of a stored tensor.
    let left = ["unary", "binary", "compare", "select", "cast", "adamw"];
    for op in Op::NAMES.iter().copied().filter(|op| !left.contains(op)) {
        let report = faulty(op, None, 1.05, &[op]);
        assert!(!report.passed(), "{op}");
        assert_eq!(verdict(&report, op, Pass::Forward), Some(Verdict::Failed), "{op}");
        assert_eq!(report.failed_subjects(), [op]);
        assert_eq!(report.to_json()["passed"], false, "{op}");
        assert_eq!(report.to_json()["rows"][0]["verdict"], "failed", "{op}");
    }
    for op in ["unary", "binary", "compare", "select", "cast"] {
        let report = faulty("elementwise", None, 1.05, &[op]);
        assert_eq!(verdict(&report, op, Pass::Forward), Some(Verdict::Failed), "{op}");
    }
}

#[test]
fn a_small_fault_is_found_in_its_dtype_only() {
    for (dtype, factor, sort) in
        [(DType::F32, 1.0 + 1e-5, Sort::F32), (DType::Bf16, 1.03, Sort::Bf16), (DType::F16, 1.004, Sort::F16)]
    {
        for op in ["softmax", "layer_norm", "attention", "expert_matmul_wgrad"] {
            let report = faulty(op, Some(dtype), factor, &[op, "transpose"]);
            assert_eq!(report.failed_subjects(), [op], "{op} in {dtype}");
            // The other outputs of norms and attention, which are f32 in any case, fail with f32.
            let wrong = report.failures.iter().find(|f| f.dtype != dtype && dtype != DType::F32);
            assert!(wrong.is_none(), "{wrong:?}");
            let row = report.rows.iter().find(|r| r.op == op && r.pass == Pass::Forward).unwrap();
            assert!(row.worst[&sort].of_allowed > 1.0 && row.worst[&sort].relative >= 0.5 * (factor - 1.0), "{row:?}");
            assert_eq!(verdict(&report, "transpose", Pass::Forward), Some(Verdict::Passed));
        }
    }
}

#[test]
fn a_fault_in_a_gradient_or_a_layer_is_found() {
    let report = faulty("softmax_grad", None, 1.01, &["softmax"]);
    assert_eq!(verdict(&report, "softmax", Pass::Forward), Some(Verdict::Passed));
    assert_eq!(verdict(&report, "softmax", Pass::Backward), Some(Verdict::Failed));
    let report = faulty("combine", Some(DType::F32), 1.001, &["moe_layer", "published_routers"]);
    assert_eq!(report.failed_subjects(), ["moe_layer", "published_routers"]);
    // The check of the gradient against a difference asks no device.
    assert_eq!(verdict(&report, "moe_layer", Pass::Slope), Some(Verdict::Passed));
}

#[test]
fn a_whole_layer_in_half_width_excuses_little_more_than_its_roundings() {
    for (dtype, factor) in [(DType::Bf16, 1.05), (DType::F16, 1.006)] {
        for (op, pass) in [("combine", Pass::Forward), ("expert_matmul_wgrad", Pass::Backward)] {
            let report = faulty(op, Some(dtype), factor, &["moe_layer"]);
            assert_eq!(verdict(&report, "moe_layer", pass), Some(Verdict::Failed), "{op} in {dtype}");
            // Every case with such a result, not the odd one.
            let cases = report.failures.iter().filter(|f| f.dtype == dtype).map(|f| &f.case);
            let cases: std::collections::BTreeSet<_> = cases.collect();
            assert!(cases.len() >= 7 && report.failures.iter().all(|f| f.dtype == dtype), "{op}: {cases:?}");
        }
    }
}

#[test]
fn results_that_depend_on_what_was_in_memory_are_found() {
    let fault = Fault { op: "softmax", dtype: None, factor: 1.0 + 1e-7, unchecked_only: true };
    let report = run(Faulty::new(Arc::new(device::cpu(1).with_checks(false)), fault), &["softmax"], 0);
    assert!(!report.passed());
    assert!(report.failures.iter().all(|f| matches!(&f.fault, Found::Unchecked { name } if name == "y0")));
}

/// A CPU that cannot do anything with one dtype, or with any.
struct Refusing {
    inner: Arc<dyn Backend>,
    dtype: Option<DType>,
}

impl Backend for Refusing {
    fn name(&self) -> &'static str {
        "refusing"
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn plan(&self, graph: Graph) -> Result<Plan> {
        let mut refusals = Vec::new();
        for node in graph.nodes() {
            let results = node.results.iter().map(|&v| graph.ty(v).dtype);
            if results.into_iter().any(|d| self.dtype.is_none_or(|refused| refused == d)) {
                let (op, wanted) = (node.op.name(), "another dtype".to_owned());
                refusals.push(Refusal { op, operands: Vec::new(), wanted, site: node.site.clone() });
            }
        }
        match refusals.is_empty() {
            true => self.inner.plan(graph),
            false => Err(Error::Unsupported { backend: self.name(), refusals }),
        }
    }

    fn compile(&self, plan: Plan) -> Result<Arc<dyn Executable>> {
        self.inner.compile(plan)
    }

    fn free_memory(&self) -> Option<u64> {
        self.inner.free_memory()
    }

    fn take_notes(&self) -> Vec<String> {
        self.inner.take_notes()
    }

    fn new_store(&self) -> Box<dyn Store> {
        self.inner.new_store()
    }

    fn checked(&self) -> Option<Arc<dyn Backend>> {
        None
    }
}

#[test]
fn what_is_refused_is_no_failure_and_has_not_passed() {
    let refusing = |dtype| Refusing { inner: Arc::new(device::cpu(2)), dtype };
    let report = run(refusing(Some(DType::Bf16)), &["softmax", "transpose"], 0);
    assert!(report.passed() && !report.memory_checks);
    assert_eq!(verdict(&report, "softmax", Pass::Forward), Some(Verdict::PartlyRefused));
    for row in &report.rows {
        let bf16 = row.by_dtype[&DType::Bf16];
        assert!(bf16.passed == 0 && bf16.refused > 0 && !row.worst.contains_key(&Sort::Bf16), "{row:?}");
        assert!(row.by_dtype[&DType::F32].refused == 0 && row.by_dtype[&DType::F32].passed > 0, "{row:?}");
    }
    assert_eq!(report.counts.passed + report.counts.refused, report.counts.cases());
    let told = report.refused.iter().map(|r| r.cases).sum::<usize>();
    assert!(told > 0 && report.refused.iter().all(|r| r.dtype == DType::Bf16 && r.reason.ends_with("another dtype")));
    assert_eq!(report.to_json()["cases_refused"], report.counts.refused);

    // A device that can do nothing has not been verified.
    let report = run(refusing(None), &["softmax"], 0);
    assert!(!report.passed());
    assert_eq!(verdict(&report, "softmax", Pass::Forward), Some(Verdict::Refused));
}

#[test]
fn a_name_that_is_not_there_is_refused_with_the_nearest() {
    let options = Options { only: vec!["sofmax".into()], seed: 0 };
    let refused = verify(&Engine::with_backend(Arc::new(device::cpu(1))), &options, &mut |_| {});
    let Err(VerifyError::Unknown { name, nearest, known }) = refused else { panic!("{refused:?}") };
    assert_eq!((name.as_str(), nearest[0].as_str()), ("sofmax", "softmax"));
    assert_eq!(known.len(), Op::NAMES.len() + verify::cases::LAYERS.len());
}
