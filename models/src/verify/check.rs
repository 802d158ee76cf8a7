//! One case in one dtype on one device: values, gradients, and for whole layers the gradient against a difference.

use std::cell::OnceCell;
use std::collections::HashMap;

use moebius::Engine;
use moebius_ir::reference::Precision;
use moebius_ir::{DType, Graph};

use super::cases::{Case, Edges};
use super::device::{Values, expected, run, same};
use super::sketch::{Inputs, Sketch};
use super::slope::{STEP, Slope, slope, steady};
use super::tolerance::{Class, Distance, difference, distance, of_roundings, rms, ulp};

/// Draws of a layer's inputs until one keeps clear of every edge. Most succeed at the first, a decoder in bf16 one in some dozen.
const DRAWS: u32 = 256;

/// Other draws that a result which seems to be wrong is measured by.
const OTHERS: u32 = 4;

/// An error of so many times what is allowed is wrong by any measure.
const MOST_EXCUSED: f64 = 1000.0;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// The outputs and updated states of the graph, with the reference.
    Forward,
    /// The gradients, with the reference.
    Backward,
    /// The gradient of the reference, in f64, with a difference of its loss. No device takes part.
    Slope,
}

impl Pass {
    /// The pass in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::Slope => "gradient check",
        }
    }
}

/// The sort of numbers that were compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sort {
    /// With the spacing of f32.
    F32,
    /// With the spacing of bf16.
    Bf16,
    /// With the spacing of f16.
    F16,
    /// Integers and bools, exactly; the unit is 1.
    Whole,
}

impl Sort {
    /// Every sort.
    pub const ALL: [Sort; 4] = [Sort::F32, Sort::Bf16, Sort::F16, Sort::Whole];

    /// That of a dtype.
    pub const fn of(dtype: DType) -> Sort {
        match dtype {
            DType::F32 => Sort::F32,
            DType::Bf16 => Sort::Bf16,
            DType::F16 => Sort::F16,
            DType::I32 | DType::U32 | DType::Bool => Sort::Whole,
        }
    }

    /// The sort in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Sort::F32 => "f32",
            Sort::Bf16 => "bf16",
            Sort::F16 => "f16",
            Sort::Whole => "int",
        }
    }
}

/// Why a pass of a case failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The case is no legal graph or has no gradient: a bug of the case.
    #[error("the case cannot be built: {0}")]
    Case(#[from] moebius_ir::Error),
    /// The device ended with an error.
    #[error("the device failed: {0}")]
    Device(#[from] moebius::Error),
    /// A result that is too far from the reference.
    #[error("{name}: {what}, {times:.3} times what is allowed")]
    Differs {
        /// The output, the gradient `d.NAME` or the state `state.NAME`.
        name: String,
        /// The worst element: what it is and what it should be.
        what: String,
        /// Its error in parts of the tolerance.
        times: f64,
    },
    /// A result that is missing.
    #[error("{name}: wanted a result of this name, found none")]
    Missing {
        /// Its name.
        name: String,
    },
    /// Results that depend on what was in memory before.
    #[error("{name}: other bits with memory checks than without")]
    Unchecked {
        /// The first such result.
        name: String,
    },
    /// A gradient that is not the derivative.
    #[error("the gradient along a direction is {:e}, the difference of the loss {:e}", .0.gradient, .0.difference)]
    Slope(Slope),
    /// No inputs were found that keep clear of every edge.
    #[error("wanted inputs whose choices no rounding changes, found none in {draws} draws")]
    Unsteady {
        /// Number of draws.
        draws: u32,
    },
}

/// How a pass of a case ended.
#[derive(Debug)]
pub enum Outcome {
    /// Everything is close enough.
    Passed,
    /// The device cannot run it, for this reason.
    Refused(String),
    /// Something is wrong.
    Failed(Fault),
}

/// One pass of one case in one dtype.
#[derive(Debug)]
pub struct Finding {
    /// The op or layer.
    pub op: &'static str,
    /// The case's name.
    pub case: String,
    /// What the case's open floats are.
    pub dtype: DType,
    /// What was compared.
    pub pass: Pass,
    /// How it ended.
    pub outcome: Outcome,
    /// The worst distance of each sort that was compared.
    pub worst: Vec<(Sort, Distance)>,
}

/// A device as it is verified: as it is used, and with memory checks where it has them.
pub(super) struct Machine {
    pub(super) plain: Engine,
    pub(super) checked: Option<Engine>,
}

impl Machine {
    pub(super) fn new(engine: &Engine) -> Machine {
        Machine { plain: engine.clone(), checked: engine.checked().ok() }
    }

    /// The results, which are the same bits with and without memory checks.
    fn run(&self, graph: &Graph, inputs: &Inputs) -> Result<Values, Fault> {
        let values = run(&self.plain, graph, inputs)?;
        if let Some(checked) = &self.checked {
            let other = run(checked, graph, inputs)?;
            let differs = |name: &&String| other.get(*name).is_none_or(|o| !same(&values[*name], o));
            if let Some(name) = values.keys().filter(differs).min() {
                return Err(Fault::Unchecked { name: name.clone() });
            }
        }
        Ok(values)
    }
}

/// What makes up a finding but its outcome.
struct Subject<'a> {
    case: &'a Case,
    dtype: DType,
    seed: u32,
    /// What [`Subject::usual_size`] found, for all results: made for the first that seems to be wrong.
    usual: OnceCell<HashMap<String, f64>>,
}

impl Subject<'_> {
    fn finding(&self, pass: Pass, outcome: Outcome, worst: Vec<(Sort, Distance)>) -> Finding {
        Finding { op: self.case.op, case: self.case.name.clone(), dtype: self.dtype, pass, outcome, worst }
    }

    fn failed(&self, pass: Pass, fault: impl Into<Fault>) -> Finding {
        let fault = fault.into();
        let refusal = match &fault {
            Fault::Device(error) => error.refusals().first(),
            Fault::Case(_)
            | Fault::Differs { .. }
            | Fault::Missing { .. }
            | Fault::Unchecked { .. }
            | Fault::Slope(_)
            | Fault::Unsteady { .. } => None,
        };
        let outcome = match refusal {
            Some(refusal) => Outcome::Refused(format!("{}: wanted {}", refusal.op, refusal.wanted)),
            None => Outcome::Failed(fault),
        };
        self.finding(pass, outcome, Vec::new())
    }

    /// The root mean square of a result over some other draws of the inputs. A sum of a few terms may happen to be near zero; it
    /// is then as inexact as others of its kind are.
    fn usual_size(&self, name: &str) -> Result<f64, Fault> {
        if self.usual.get().is_none() {
            let mut sums: HashMap<String, f64> = HashMap::new();
            for other in 1..=OTHERS {
                let Drawn { sketch, .. } =
                    draw(self.case, self.dtype, self.seed.wrapping_add(other.wrapping_mul(0x51ed_270b)))?;
                for (name, value) in expected(&sketch.graph, &sketch.inputs, Precision::Rounded)? {
                    *sums.entry(name).or_default() += rms(&value).powi(2);
                }
            }
            // Nothing else can have set it.
            let _ = self.usual.set(sums);
        }
        let sum = self.usual.get().and_then(|sums| sums.get(name)).copied().unwrap_or(0.0);
        Ok((sum / f64::from(OTHERS)).sqrt())
    }

    /// The results of these names against the reference's.
    fn compare(&self, pass: Pass, direct: bool, got: &Values, wanted: &Wanted, names: &[String]) -> Finding {
        let mut worst: Vec<(Sort, Distance)> = Vec::new();
        let mut fault: Option<(f64, Fault)> = None;
        for name in names {
            let exact = wanted.exact.as_ref().and_then(|values| values.get(name));
            let Some(wanted) = wanted.rounded.get(name) else { continue };
            let missing = || Fault::Missing { name: name.clone() };
            let Some(got) = got.get(name).filter(|got| got.ty == wanted.ty) else {
                fault = Some((f64::INFINITY, missing()));
                continue;
            };
            // An integer is held to its own dtype, and a value next to the inputs to its own too.
            let own = (direct && pass == Pass::Forward) || !wanted.ty.dtype.is_float();
            let dtype = if own { wanted.ty.dtype } else { self.dtype };
            let mut tolerance = match pass {
                Pass::Forward => self.case.tolerance(dtype),
                Pass::Backward | Pass::Slope => self.case.gradient_tolerance(dtype),
            };
            if let Some(exact) = exact.filter(|_| dtype.is_float()) {
                tolerance = of_roundings(exact, wanted, dtype);
            }
            let mut found = distance(got, wanted, tolerance, dtype);
            if (1.0..MOST_EXCUSED).contains(&found.of_allowed) {
                match self.usual_size(name) {
                    Ok(usual) => tolerance = tolerance.of_terms(usual.max(tolerance.least)),
                    Err(why) => return self.failed(pass, why),
                }
                found = distance(got, wanted, tolerance, dtype);
            }
            let sort = Sort::of(dtype);
            match worst.iter_mut().find(|(s, _)| *s == sort) {
                Some((_, d)) => *d = d.max(found),
                None => worst.push((sort, found)),
            }
            let times = found.of_allowed;
            if times > fault.as_ref().map_or(1.0, |(times, _)| *times)
                && let Some(what) = difference(got, wanted, tolerance)
            {
                fault = Some((times, Fault::Differs { name: name.clone(), what, times }));
            }
        }
        let outcome = fault.map_or(Outcome::Passed, |(_, fault)| Outcome::Failed(fault));
        self.finding(pass, outcome, worst)
    }
}

/// What a device should give.
struct Wanted {
    /// By the reference, each value rounded to its dtype.
    rounded: Values,
    /// Without roundings, for a layer in a half-width dtype, whose tolerance is a matter of how much they do.
    exact: Option<Values>,
}

impl Wanted {
    fn new(case: &Case, dtype: DType, sketch: &Sketch) -> Result<Wanted, Fault> {
        let by = |precision| expected(&sketch.graph, &sketch.inputs, precision);
        let whole = case.class == Class::Layer && dtype != DType::F32;
        Ok(Wanted { rounded: by(Precision::Rounded)?, exact: if whole { Some(by(Precision::Exact)?) } else { None } })
    }
}

/// The sketch of a case with the graph before its gradients and, where there is something to differentiate, the loss.
struct Drawn {
    forward: Graph,
    sketch: Sketch,
    loss: Option<moebius_ir::Value>,
}

fn draw(case: &Case, dtype: DType, seed: u32) -> Result<Drawn, Fault> {
    // Ten times the step of the gradient check, and far above the roundings of f32.
    let near = 10.0 * STEP;
    let step = match case.edges {
        Edges::Kept => None,
        Edges::Drawn => Some(near),
        Edges::DrawnFarOff => Some(near.max(ulp(dtype))),
    };
    for attempt in 0..DRAWS {
        // Far from the keys that other seeds begin with.
        let key = seed.wrapping_add(attempt.wrapping_mul(0x9e37_79b9));
        let mut sketch = case.keyed(dtype, key)?;
        let forward = sketch.graph.clone();
        if let Some(step) = step
            && !steady(&mut sketch, step)?
        {
            continue;
        }
        let loss = if sketch.differentiable() { Some(sketch.differentiate()?) } else { None };
        return Ok(Drawn { forward, sketch, loss });
    }
    Err(Fault::Unsteady { draws: DRAWS })
}

/// The graphs of a case, as far as they can be built, whatever their inputs.
pub(super) fn graphs(case: &Case, dtype: DType, seed: u32) -> Vec<Graph> {
    let Ok(mut sketch) = case.keyed(dtype, seed) else { return Vec::new() };
    let forward = sketch.graph.clone();
    if !sketch.differentiable() || sketch.differentiate().is_err() {
        return vec![forward];
    }
    vec![forward, sketch.graph]
}

/// Every pass of a case in a dtype.
pub(super) fn check(case: &Case, dtype: DType, seed: u32, machine: &Machine) -> Vec<Finding> {
    let subject = Subject { case, dtype, seed, usual: OnceCell::new() };
    let drawn = draw(case, dtype, seed).and_then(|drawn| {
        let wanted = Wanted::new(case, dtype, &drawn.sketch)?;
        Ok((drawn, wanted))
    });
    let (Drawn { forward, mut sketch, loss }, wanted) = match drawn {
        Ok(drawn) => drawn,
        Err(fault) => return vec![subject.failed(Pass::Forward, fault)],
    };
    let outputs: Vec<String> = forward.outputs().iter().map(|(name, _)| name.clone()).collect();
    let mut names: Vec<String> = wanted.rounded.keys().filter(|n| n.starts_with("state.")).cloned().collect();
    names.sort();
    names.splice(0..0, outputs);
    let of = |pass, graph: &Graph, names: &[String]| match machine.run(graph, &sketch.inputs) {
        Ok(got) => subject.compare(pass, sketch.direct, &got, &wanted, names),
        Err(fault) => subject.failed(pass, fault),
    };
    let mut findings = vec![of(Pass::Forward, &forward, &names)];
    if let Some(loss) = loss {
        let gradients: Vec<String> = sketch.wrt.iter().map(|(name, _)| format!("d.{name}")).collect();
        findings.push(of(Pass::Backward, &sketch.graph, &gradients));
        if case.class == Class::Layer {
            findings.push(check_slope(&subject, &mut sketch, loss));
        }
    }
    findings
}

fn check_slope(subject: &Subject<'_>, sketch: &mut Sketch, loss: moebius_ir::Value) -> Finding {
    let found = match slope(sketch, loss) {
        Ok(found) => found,
        Err(error) => return subject.failed(Pass::Slope, error),
    };
    let error = found.error();
    let distance = Distance { relative: error, of_allowed: error / 1e-6, ..Distance::default() };
    let outcome = if found.agrees() { Outcome::Passed } else { Outcome::Failed(Fault::Slope(found)) };
    subject.finding(Pass::Slope, outcome, vec![(Sort::of(subject.dtype), distance)])
}
