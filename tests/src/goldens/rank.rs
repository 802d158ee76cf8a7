//! One rank's tokens through a layer of the models, forward and backward, as one program of the engine.

use std::collections::HashMap;

use moebius_ir::{DType, Tensor, TensorType, gradients};
use moebius_models::config::{ComputeDtype, ModelConfig};
use moebius_models::gpt::Pass;
use moebius_models::gpt::router;

use super::compare::{Case, Roundings};
use super::machine::{Machine, Sheet, output};
use super::moe::{Names, Part, inner_width, layer};
use super::rounding;
use super::routes::Routes;
use super::rules::{Capacity, Function, Given, model};
use super::set::{Fields, Problem, Set};
use crate::families::oracle;

/// Where the weights of a layer are among the tensors of `layer`, and their gradients after `grad.`.
const NAMES: Names<'static> = Names {
    router: "wg",
    expert: "experts.{}.",
    mlp: "mlp.",
    coefficient: "coefficient.",
    network: ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"],
};

/// In what a case is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Run {
    /// In the dtype of the set, which the weights are rounded to.
    AsStored,
    /// A case of f32 with tokens and products in bf16 and sums, weights and the router in f32, as users train with
    /// `compute_dtype = "bf16"`.
    InBf16,
    /// A case of f32 in f32, but from the tokens and weights that [`Run::InBf16`] is given: what rounding these alone does.
    OfBf16,
}

impl Run {
    /// The dtype that results are computed in, and how far they may be from those of DeepSpeed, relative to the largest
    /// magnitude of a tensor.
    pub(super) fn dtype(self, fields: &Fields<'_>) -> Result<(DType, f64), Problem> {
        match (self, fields.text("dtype")?) {
            (Run::InBf16, _) | (Run::AsStored, "bf16") => Ok((DType::Bf16, 2e-2)),
            (Run::AsStored, "f32") | (Run::OfBf16, _) => Ok((DType::F32, 2e-5)),
            (Run::AsStored, other) => {
                Err(Problem::Field { field: "dtype".into(), wanted: "f32 or bf16", found: other.into() })
            }
        }
    }
}

/// What came out for one rank.
pub(super) struct Results {
    /// Results and gradients by the names of the case.
    pub(super) values: HashMap<String, Vec<f64>>,
    /// In [`Run::InBf16`] how far rounding the inputs alone moves each value: [`Run::OfBf16`] less the case as it is stored.
    moved: Option<HashMap<String, Vec<f64>>>,
    roundings: HashMap<String, f64>,
    /// Where the tokens went.
    pub(super) routes: Routes,
    /// Slots of an expert, or without dropping the choices of the fullest one (spec 1.1, 1.2): before ranks agree on one.
    pub(super) capacity: usize,
    /// Where the rules send them, from logits in f64; of no meaning for forced routes.
    by_rules: oracle::Routes,
}

impl Results {
    /// How far roundings move the value of this name ([`rounding::moves`]).
    pub(super) fn roundings(&self, name: &str) -> Roundings<'_> {
        let inputs = self.moved.as_ref().and_then(|moved| moved.get(name)).map(Vec::as_slice);
        Roundings { inputs, values: self.roundings.get(name).copied().unwrap_or_default() }
    }

    /// A difference between the routes and those of the rules. Numbers so close that f32 may order them otherwise decide nothing.
    fn against_rules(&self) -> Option<String> {
        let rules = Routes {
            expert: self.by_rules.expert.iter().flatten().map(|&e| e as f64).collect(),
            kept: self.by_rules.place.iter().flatten().map(Option::is_some).collect(),
        };
        let differing = self.routes.differing(&rules);
        (self.by_rules.clear && differing > 0).then(|| format!("{differing} choices go elsewhere than by the rules"))
    }
}

/// The random numbers that fields name: tensors of the case, after `prefix`.
fn given(case: &Case<'_>, prefix: &str, fields: &Fields<'_>, sheet: &mut Sheet) -> Result<Given, Problem> {
    let function = Function::of_layer(fields.count("k")?);
    let mut given = |name: &str, wanted: bool| match (wanted, case.optional(&format!("{prefix}{name}"))) {
        (true, Some(tensor)) => Ok(Some(sheet.input(name, tensor.clone())?)),
        (true, None) => Err(Problem::Tensor { tensor: format!("{prefix}{name}") }),
        (false, _) => Ok(None),
    };
    // First come, first served is what happens without random numbers; sets of several ranks do not store that ramp.
    let rts = match fields.has("rts").then(|| fields.text("rts")).transpose()? {
        Some("fcfs") if case.optional(&format!("{prefix}rts_uniform")).is_none() => None,
        Some(_) => given("rts_uniform", function.draws_places())?,
        None => None,
    };
    // The noise of the second choice stays on in evaluation, jitter does not (spec 1.0).
    let gumbel = given("gumbel", fields.flag("sampling")? && function == Function::Top2)?;
    let jitter = given("jitter", fields.flag("jitter")? && fields.flag("train")?)?;
    Ok(Given { jitter, rts, gumbel, used: None })
}

/// A weight of the case, or of all cases.
fn weight(set: &Set, name: &str) -> Result<Tensor, Problem> {
    let name = format!("common/{name}");
    set.file("layer").and_then(|t| t.get(&name)).cloned().ok_or(Problem::Tensor { tensor: name })
}

/// The routes by the rules, in f64 from the inputs of the sheet.
fn by_rules(sheet: &Sheet, config: &ModelConfig, capacity: Option<usize>, experts: usize) -> oracle::Routes {
    let input = |name: &str| sheet.inputs.iter().find(|(n, _)| n == name).map(|(_, t)| t.data.as_slice());
    let x = input("x").unwrap_or_default();
    let jitter = input("jitter");
    let router = input("layers.0.moe.router.weight").unwrap_or_default();
    let width = config.width;
    let mut logits = Vec::new();
    for (t, row) in x.chunks(width).enumerate() {
        let of_router = |i: usize| row[i] * jitter.map_or(1.0, |j| j[t * width + i]);
        logits.extend(router.chunks(width).map(|w| (0..width).map(|i| w[i] * of_router(i)).sum::<f64>()));
    }
    oracle::route(&oracle::Given {
        routing: config.routing(),
        k: config.top_k(),
        capacity,
        logits: &logits,
        experts,
        selection_bias: None,
        choice: input("gumbel"),
        priority: input("rts_uniform"),
        chosen: None,
    })
}

/// The graph of a rank with its results and gradients as outputs.
struct Built {
    sheet: Sheet,
    config: ModelConfig,
    capacity: Option<usize>,
    parts: Vec<Part>,
}

/// Outputs of [`Built::sheet`] that have the names of the case.
const TOLD: [&str; 4] = ["out", "l_aux", "exp_counts", "loss"];

/// The graph of a rank; `forced` are routes instead of the router's own.
fn build(
    case: &Case<'_>,
    prefix: &str,
    fields: &Fields<'_>,
    experts: usize,
    (run, forced): (Run, Option<&Routes>),
) -> Result<Built, Problem> {
    let (dtype, _) = run.dtype(fields)?;
    let x = case.tensor(&format!("{prefix}x"))?;
    let weights = case.tensor(&format!("{prefix}R"))?;
    let (tokens, width) = (x.ty.shape.rows(), x.ty.shape.last());
    if weights.ty.elements() != tokens * width {
        let (wanted, found) = (x.ty.to_string(), weights.ty.to_string());
        return Err(Problem::Size { what: format!("{prefix}R"), wanted, found });
    }
    let mut sheet = Sheet::default();
    let narrow = if run == Run::OfBf16 { DType::Bf16 } else { dtype };
    let x = Tensor::new(TensorType::new(narrow, [tokens, width]), x.data.clone()).rounded();
    let x = sheet.input("x", Tensor::new(TensorType::new(dtype, [tokens, width]), x.data))?;
    let weights = sheet.input("R", Tensor::new(TensorType::f32([tokens, width]), weights.data.clone()))?;
    let set = case.set();
    let (residual, training) = (fields.flag("residual")?, fields.flag("train")?);
    let given = given(case, prefix, fields, &mut sheet)?;
    let capacity = Capacity {
        training: fields.number("cf")?,
        evaluation: fields.number("eval_cf")?,
        least: fields.count("min_cap")?,
    };
    let capacity = fields.flag("drop")?.then_some(capacity);
    let function = Function::of_layer(fields.count("k")?);
    let mut config = model(function, &[experts], residual, capacity, given)?;
    config.width = width;
    config.ffn = Some(inner_width(&weight(set, "experts.0.fc1.bias")?));
    config.dtype = if dtype == DType::Bf16 { ComputeDtype::Bf16 } else { ComputeDtype::F32 };
    let capacity = router::capacity(&config, training, tokens, experts);
    let mut pass = Pass { training, noise: given.noise(), ..Pass::default() };
    if let Some(routes) = forced {
        let (choices, kept) = routes.forced(&mut sheet, &mut config, tokens, experts)?;
        (pass.choices, pass.noise.priority) = (Some(choices), kept);
    }
    let rounded = |name: &str| {
        let mut tensor = weight(set, name)?;
        // The models round the weights of products themselves and leave those that weight experts and branches in f32.
        let wide = name == NAMES.router || name.starts_with(NAMES.coefficient);
        match run {
            Run::InBf16 => return Ok(tensor),
            Run::OfBf16 if wide => return Ok(tensor),
            Run::AsStored | Run::OfBf16 => tensor.ty.dtype = narrow,
        }
        Ok(tensor.rounded())
    };
    let made = layer(&mut sheet, &config, 0, x, &pass, NAMES, &rounded)?;

    let g = &mut sheet.graph;
    let y = made.y;
    let wide = g.cast(y, DType::F32)?;
    let weighted = g.mul(wide, weights)?;
    let sum = g.sum_all(weighted)?;
    let aux = g.mul_scalar(made.statistics.load_balancing_loss, set.aux_weight)?;
    let loss = g.add(sum, aux)?;
    let mut wrt = vec![x];
    wrt.extend(made.parts.iter().map(|part| part.value));
    let grads = gradients(g, loss, &wrt)?;
    let told = [y, made.statistics.load_balancing_loss, made.statistics.counts, loss];
    for (name, value) in TOLD.into_iter().zip(told) {
        sheet.output(name, value)?;
    }
    sheet.output("expert_index", made.statistics.expert_index)?;
    sheet.output("choice_slot", made.choice_slot)?;
    for (i, grad) in grads.iter().enumerate() {
        sheet.output(&format!("gradient {i}"), *grad)?;
    }
    Ok(Built { sheet, config, capacity, parts: made.parts })
}

impl Built {
    /// What there is for each output of the sheet, under the names of the case.
    fn named(&self, outputs: &HashMap<String, Vec<f64>>) -> Result<HashMap<String, Vec<f64>>, Problem> {
        let mut named = HashMap::new();
        for name in TOLD {
            named.insert(name.to_owned(), output(outputs, name)?.to_vec());
        }
        named.insert("grad_x".into(), output(outputs, "gradient 0")?.to_vec());
        for (i, part) in self.parts.iter().enumerate() {
            let of_all = output(outputs, &format!("gradient {}", i + 1))?;
            named.extend(part.split(of_all).into_iter().map(|(name, part)| (format!("grad.{name}"), part)));
        }
        Ok(named)
    }
}

/// Results and gradients of a rank.
fn compute(
    case: &Case<'_>,
    prefix: &str,
    fields: &Fields<'_>,
    experts: usize,
    machine: &Machine,
    (run, forced): (Run, Option<&Routes>),
) -> Result<Results, Problem> {
    let built = build(case, prefix, fields, experts, (run, forced))?;
    let got = machine.run(&built.sheet)?;
    let values = built.named(&got)?;
    let routes = Routes::taken(&got)?;
    let fullest = values["exp_counts"].iter().fold(0.0f64, |most, &count| most.max(count)) as usize;
    let by_rules = by_rules(&built.sheet, &built.config, built.capacity, experts);
    let capacity = built.capacity.unwrap_or(fullest);
    Ok(Results { values, moved: None, roundings: HashMap::new(), routes, capacity, by_rules })
}

/// Results and gradients of the rank whose tensors begin with `prefix`, with `experts` in all.
///
/// Tokens that are rounded to bf16 may be sent elsewhere than those of f32, and then nothing about them can be compared. So
/// the routes of a run in bf16 are compared with the rules for the rounded tokens; where they are not those of the same
/// case in f32, whose counts and results are DeepSpeed's own, these are forced on the layer, and the case is given a note.
pub(super) fn rank(
    case: &mut Case<'_>,
    prefix: &str,
    fields: &Fields<'_>,
    experts: usize,
    machine: &Machine,
    run: Run,
) -> Result<Results, Problem> {
    let mut results = compute(case, prefix, fields, experts, machine, (run, None))?;
    if let Some(wrong) = results.against_rules() {
        case.wrong(format!("{prefix}routes: {wrong}"));
    }
    // With these routes given: a token that goes elsewhere is no matter of rounding.
    let roundings = |case: &Case<'_>, routes: &Routes| {
        let given = build(case, prefix, fields, experts, (run, Some(routes)))?;
        let moves = given.named(&rounding::moves(&given.sheet)?)?;
        Ok::<_, Problem>(moves.into_iter().map(|(name, m)| (name, m.into_iter().fold(0.0, f64::max))).collect())
    };
    if run != Run::InBf16 {
        results.roundings = roundings(case, &results.routes)?;
        return Ok(results);
    }
    let stored = compute(case, prefix, fields, experts, machine, (Run::AsStored, None))?;
    let forced = |case: &mut Case<'_>, run| {
        let results = compute(case, prefix, fields, experts, machine, (run, Some(&stored.routes)))?;
        let left = results.routes.differing(&stored.routes);
        case.same(&format!("{prefix}choices that differ from the routes forced"), &left, &0);
        Ok::<_, Problem>(results)
    };
    let differing = results.routes.differing(&stored.routes);
    if differing > 0 {
        let all = stored.routes.expert.len();
        case.note(format!("{prefix}routes of f32 replayed, as {differing} of {all} choices differ for tokens in bf16"));
        results = forced(case, run)?;
    }
    results.roundings = roundings(case, &results.routes)?;
    let mut moved = forced(case, Run::OfBf16)?.values;
    for (name, values) in &mut moved {
        values.iter_mut().zip(&stored.values[name]).for_each(|(rounded, stored)| *rounded -= stored);
    }
    results.moved = Some(moved);
    Ok(results)
}
