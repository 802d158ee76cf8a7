//! Every op case on every backend against the reference, values and gradients; and what must hold for the bits.

use std::collections::{BTreeSet, HashMap};

use moebius_ir::reference::Precision;
use moebius_ir::{DType, Op, Tensor, passes};
use moebius_tests::Sketch;
use moebius_tests::cases::{self, Case};
use moebius_tests::device::{self, Live, devices};
use moebius_tests::tolerance::{Class, Tolerance, difference, rms, tolerance};

/// Runs `check` on each case and dtype of a group and reports all failures together.
fn each(group: &str, check: impl Fn(&Case, DType) -> Result<(), String>) {
    let mut failures = Vec::new();
    for case in cases::group(group).unwrap() {
        for &dtype in case.dtypes {
            if let Err(why) = check(&case, dtype) {
                failures.push(format!("{}: {why}", case.title(dtype)));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

/// Compares a backend's result with the reference's, and makes sure that the comparison could have failed.
fn compare(name: &str, got: &Tensor, wanted: &Tensor, tolerance: Tolerance) -> Result<(), String> {
    if rms(wanted) > 0.0 {
        let zeros = Tensor::zeros(wanted.ty.clone());
        if difference(&zeros, wanted, tolerance).is_none() {
            return Err(format!("{name}: the tolerance would let zeros pass"));
        }
    }
    match difference(got, wanted, tolerance) {
        Some(what) => Err(format!("{name}: {what}")),
        None => Ok(()),
    }
}

fn forward(case: &Case, dtype: DType) -> Result<(), String> {
    let sketch = case.sketch(dtype).map_err(|e| e.to_string())?;
    let wanted = device::reference(&sketch.graph, &sketch.inputs, Precision::Rounded);
    // The meaning does not change by the passes, to the bit.
    let optimised = passes::optimise(&sketch.graph).map_err(|e| e.to_string())?;
    let fused = device::reference(&optimised, &sketch.inputs, Precision::Rounded);
    if !device::same_bits(&wanted, &fused) {
        return Err("the passes change the reference's results".into());
    }
    // Feeds for a run in between, so that nothing stale can pass for a result.
    let other = sketch.inputs.clone().into_iter().map(|(name, mut t)| {
        if t.ty.dtype.is_float() {
            t.data.iter_mut().for_each(|v| *v = if v.is_finite() { 0.5 * *v } else { 1.0 });
        }
        (name, t.rounded())
    });
    let other = other.collect();
    let mut first = HashMap::new();
    for device in devices() {
        let fail = |e: moebius_backends::Error| format!("{}: {e}", device.name);
        let mut live = Live::new(device.backend.as_ref(), &sketch.graph).map_err(fail)?;
        let got = live.run(&sketch.inputs).map_err(fail)?;
        for (name, wanted) in &wanted {
            let own = sketch.direct || !wanted.ty.dtype.is_float();
            let tolerance = case.tolerance(if own { wanted.ty.dtype } else { dtype });
            compare(name, &got[name], wanted, tolerance).map_err(|e| format!("{}: {e}", device.name))?;
        }
        live.run(&other).map_err(fail)?;
        let again = live.run(&sketch.inputs).map_err(fail)?;
        if !device::same_bits(&got, &again) {
            return Err(format!("{}: two runs differ", device.name));
        }
        if !device::same_bits(first.entry(device.backend.name()).or_insert_with(|| got.clone()), &got) {
            return Err(format!("{}: other bits than in another variant of the backend", device.name));
        }
    }
    Ok(())
}

fn backward(case: &Case, dtype: DType) -> Result<(), String> {
    let mut sketch = case.sketch(dtype).map_err(|e| e.to_string())?;
    if !sketch.differentiable() {
        return Ok(());
    }
    sketch.differentiate().map_err(|e| e.to_string())?;
    let wanted = device::reference(&sketch.graph, &sketch.inputs, Precision::Rounded);
    let optimised = passes::optimise(&sketch.graph).map_err(|e| e.to_string())?;
    if !device::same_bits(&wanted, &device::reference(&optimised, &sketch.inputs, Precision::Rounded)) {
        return Err("the passes change the reference's gradients".into());
    }
    let mut first = HashMap::new();
    for device in devices() {
        let fail = |e: moebius_backends::Error| format!("{}: {e}", device.name);
        let mut live = Live::new(device.backend.as_ref(), &sketch.graph).map_err(fail)?;
        let got = live.run(&sketch.inputs).map_err(fail)?;
        for (name, wanted) in wanted.iter().filter(|(name, _)| name.starts_with("d.")) {
            compare(name, &got[name], wanted, case.gradient_tolerance(dtype))
                .map_err(|e| format!("{}: {e}", device.name))?;
        }
        if !device::same_bits(first.entry(device.backend.name()).or_insert_with(|| got.clone()), &got) {
            return Err(format!("{}: other bits than in another variant of the backend", device.name));
        }
    }
    Ok(())
}

macro_rules! groups {
    ($($group:ident),*) => {
        mod values {
            $(#[test] fn $group() { super::each(stringify!($group), super::forward); })*
        }
        mod gradients {
            $(#[test] fn $group() { super::each(stringify!($group), super::backward); })*
        }
        const TESTED: &[&str] = &[$(stringify!($group)),*];
    };
}

groups! { elementwise, movement, norms, dense, router, sparse, optimizer }

/// What a kernel rejects is an error of the run, or of reading after it, and is forgotten with that.
#[test]
fn values_that_kernels_reject_are_errors_on_every_device() {
    for device in devices() {
        let mut s = Sketch::new(DType::F32);
        let (table, x) = (s.float([3, 2], |x| x), s.float([2, 4], |x| x));
        let w = s.float([5, 4], |x| x);
        let (ids, targets) = (s.ints([2], &[0, 1]), s.ints([2], &[4, 0]));
        let (ids_name, targets_name) = ("x3", "x4");
        let rows = s.graph.embedding(table.unwrap(), ids.unwrap()).unwrap();
        let loss = s.graph.linear_cross_entropy(x.unwrap(), w.unwrap(), targets.unwrap()).unwrap();
        s.aux(rows).unwrap();
        s.aux(loss).unwrap();
        let mut live = Live::new(device.backend.as_ref(), &s.graph).unwrap();
        let right = live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name));
        for (name, op, value) in
            [(ids_name, "embedding", 3), (ids_name, "embedding", -1), (targets_name, "linear_cross_entropy", 5)]
        {
            let mut inputs = s.inputs.clone();
            inputs.insert(name.into(), Tensor::i32([2], &[0, value]));
            match live.run(&inputs) {
                Err(moebius_backends::Error::Kernel { op: at, found, .. }) => {
                    assert!(at == op && found.contains(&value.to_string()), "{}: {at}: {found}", device.name);
                }
                Err(other) => panic!("{}: {other}", device.name),
                Ok(_) => panic!("{}: {op} takes {value}", device.name),
            }
            let again = live.run(&s.inputs).unwrap_or_else(|e| panic!("{}: {e}", device.name));
            assert!(device::same_bits(&right, &again), "{}: after {op} rejected {value}", device.name);
        }
    }
}

#[test]
fn every_group_and_every_op_is_tested() {
    let groups = cases::groups();
    assert_eq!(groups.iter().map(|(name, _)| *name).collect::<Vec<_>>(), TESTED);
    let covered: BTreeSet<&str> = groups.iter().flat_map(|(_, cases)| cases.iter().map(|c| c.op)).collect();
    let all: BTreeSet<&str> = Op::NAMES.iter().copied().collect();
    assert_eq!(covered, all);
    // Each case does use its op: as it was built, or in the form the passes give it.
    for case in groups.iter().flat_map(|(_, cases)| cases) {
        let graph = case.sketch(case.dtypes[0]).unwrap().graph;
        let optimised = passes::optimise(&graph).unwrap_or_else(|e| panic!("{e}"));
        let uses = |g: &moebius_ir::Graph| g.nodes().iter().any(|n| n.op.name() == case.op);
        assert!(uses(&graph) || uses(&optimised), "{} does not use {}", case.name, case.op);
    }
}

#[test]
fn titles_tell_cases_apart() {
    let groups = cases::groups();
    let mut titles = BTreeSet::new();
    for case in groups.iter().flat_map(|(_, cases)| cases) {
        assert!(titles.insert(case.title(case.dtypes[0])), "{} twice", case.title(case.dtypes[0]));
    }
}

#[test]
fn a_comparison_notices_what_it_should() {
    let ramp = |f: &dyn Fn(f64) -> f64| Tensor::f32([50], (0..50).map(|i| f(f64::from(i) - 20.3)).collect());
    let wanted = ramp(&|x| x);
    for class in [Class::Element, Class::Sum, Class::Gradient] {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let tolerance = tolerance(class, dtype);
            assert_eq!(difference(&wanted, &wanted, tolerance), None);
            for wrong in [ramp(&|x| -x), ramp(&|x| x + 1.0), ramp(&|x| 1.1 * x), ramp(&|_| f64::NAN)] {
                assert!(difference(&wrong, &wanted, tolerance).is_some(), "{class:?} {dtype}");
            }
        }
    }
    let infinite = |v: f64| Tensor::f32([2], vec![1.0, v]);
    for wrong in [1e38, f64::NEG_INFINITY, f64::NAN] {
        for class in [Class::Exact, Class::Element, Class::Sum, Class::Gradient] {
            let tolerance = tolerance(class, DType::F32);
            assert!(difference(&infinite(wrong), &infinite(f64::INFINITY), tolerance).is_some(), "{class:?} {wrong}");
        }
    }
    let narrow = Tensor::f32([49], wanted.data[..49].to_vec());
    assert!(difference(&narrow, &wanted, tolerance(Class::Sum, DType::F32)).is_some());
}
