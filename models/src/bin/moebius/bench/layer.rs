//! `moebius bench layer`: one sparse layer with random weights, forward and with its gradients, against what the same machine
//! reaches on a plain matrix product and on a plain copy.

use std::time::Instant;

use moebius::ir::ops::{Balance, Distribution, Order, ReduceFn};
use moebius::ir::passes::{Kept, kept_for_backward};
use moebius::ir::{DType, Graph, TensorType, Value, gradients};
use moebius::{Engine, Program, Session};
use moebius_models::config::Recompute;
use moebius_models::timed::median;
use serde_json::{Value as Json, json};

use crate::cli::{BenchArgs, BenchKind, Routing};
use crate::failure::Failure;
use crate::text;

/// A layer that others are measured on too.
struct Case {
    name: &'static str,
    tokens: usize,
    width: usize,
    hidden: usize,
    experts: usize,
    k: usize,
    /// Two products in and their SwiGLU instead of one and GELU.
    gated: bool,
}

const fn case(name: &'static str, tokens: usize, [width, hidden]: [usize; 2], experts: usize, k: usize) -> Case {
    Case { name, tokens, width, hidden, experts, k, gated: false }
}

const CASES: [Case; 10] = [
    case("A", 16_384, [2048, 8192], 64, 1),
    case("A2", 16_384, [2048, 8192], 128, 1),
    case("B", 16_384, [1024, 4096], 32, 1),
    case("C", 8192, [2048, 8192], 64, 2),
    Case { gated: true, ..case("D", 16_384, [2048, 1024], 64, 8) },
    case("E1", 1, [2048, 8192], 64, 1),
    case("E8", 8, [2048, 8192], 64, 1),
    case("E64", 64, [2048, 8192], 64, 1),
    case("E256", 256, [2048, 8192], 64, 1),
    // Small enough for any machine.
    case("small", 512, [128, 256], 8, 2),
];

/// Numbers that are drawn together, in f32: a device may have no room for all weights so, nor let a kernel see them.
const MOST_DRAWN: usize = 1 << 28;

/// Runs that are timed together, at least, and for how many seconds: reading a result back, which ends them, is then not what is timed.
const RUNS: usize = 8;
const ROUND_SECONDS: f64 = 0.01;
/// How often.
const ROUNDS: usize = 11;

impl Case {
    /// Weight matrices of an expert.
    fn matrices(&self) -> f64 {
        if self.gated { 3.0 } else { 2.0 }
    }

    /// Useful arithmetic of a forward pass.
    fn flops(&self) -> f64 {
        2.0 * self.matrices() * (self.tokens * self.k * self.width * self.hidden) as f64
    }

    /// Bytes of the weights of so many experts, and of one tensor of tokens.
    fn bytes(&self, experts: usize, element: f64) -> (f64, f64) {
        let weights = self.matrices() * (experts * self.width * self.hidden) as f64 * element;
        (weights, (self.tokens * self.width) as f64 * element)
    }
}

/// Fills the states of a layer with random numbers, on the device: `(name, type, standard deviation)`. Column 0 of `x` is 1 and
/// column 0 of the router its prior, which is that of Zipf's law where the routing is skewed.
fn fill(session: &mut Session, case: &Case, dtype: DType, routing: Routing) -> Result<(), Failure> {
    let (t, d, h, e) = (case.tokens, case.width, case.hidden, case.experts);
    let mut g = Graph::new();
    let key = g.constant(TensorType::new(DType::U32, [2]), vec![7.0, 11.0])?;
    let mut stream = 0;
    let mut normal = |g: &mut Graph, shape: &[usize], size: f64| {
        stream += 1;
        let drawn = g.random(Distribution::Normal, shape, stream, key)?;
        g.mul_scalar(drawn, size)
    };
    let one = g.splat(TensorType::f32([t, 1]), 1.0)?;
    let rest = normal(&mut g, &[t, d - 1], 1.0)?;
    let x = g.concat(&[one, rest], 1)?;
    // Experts in an order that has nothing to do with their load.
    let prior = |i: usize| if routing == Routing::Skew { -0.65 * ((i * 37 % e + 1) as f64).ln() } else { 0.0 };
    let prior = g.constant(TensorType::f32([e, 1]), (0..e).map(prior).collect())?;
    let rest = normal(&mut g, &[e, d - 1], 1.28 / (d as f64).sqrt())?;
    let router = g.concat(&[prior, rest], 1)?;
    let mut all = vec![("x", x, dtype), ("router", router, DType::F32)];
    let dy = normal(&mut g, &[t, d], 1.0)?;
    all.push(("dy", dy, dtype));
    for (name, shape) in [("up", [e, d, h]), ("gate", [e, d, h]), ("down", [e, h, d])] {
        if name != "gate" || case.gated {
            let of_expert = shape[1] * shape[2];
            let together = (MOST_DRAWN / of_expert).max(1);
            let pieces: Vec<Value> = (0..e)
                .step_by(together)
                .map(|first| {
                    let experts = together.min(e - first);
                    let drawn = normal(&mut g, &[experts, shape[1], shape[2]], 1.0 / (shape[1] as f64).sqrt())?;
                    g.cast(drawn, dtype)
                })
                .collect::<Result<_, _>>()?;
            let whole = if pieces.len() == 1 { pieces[0] } else { g.concat(&pieces, 0)? };
            all.push((name, whole, dtype));
        }
    }
    for (name, value, dtype) in all {
        let narrow = g.cast(value, dtype)?;
        let ty = g.ty(narrow).clone();
        let state = g.state(name, ty)?;
        g.update(state, narrow)?;
    }
    let mut program = session.compile(&g)?;
    Ok(session.run(&mut program)?)
}

/// What is measured of a layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Passes {
    Forward,
    /// With all gradients for the cotangent `dy`.
    Both,
    /// The same, computing again what is cheap.
    Light,
}

/// The passes with gradients that the command line asks for.
fn both(args: &BenchArgs) -> Result<Passes, Failure> {
    match args.recompute {
        None | Some(Recompute::Nothing) => Ok(Passes::Both),
        Some(Recompute::Light) => Ok(Passes::Light),
        Some(Recompute::Blocks) => {
            let why = "bench layer: wanted --recompute light, found true: one layer has no blocks to compute again";
            Err(Failure::Usage(why.into()))
        }
    }
}

/// One layer.
fn layer(case: &Case, dtype: DType, passes: Passes) -> Result<Graph, Failure> {
    let (t, d, h, e) = (case.tokens, case.width, case.hidden, case.experts);
    let mut g = Graph::new();
    let x = g.state("x", TensorType::new(dtype, [t, d]))?;
    let router = g.state("router", TensorType::f32([e, d]))?;
    let weight = |g: &mut Graph, name: &str, shape: [usize; 3]| g.state(name, TensorType::new(dtype, shape));
    let (up, down) = (weight(&mut g, "up", [e, d, h])?, weight(&mut g, "down", [e, h, d])?);
    let wide = g.cast(x, DType::F32)?;
    let logits = g.matmul_with(wide, router, None, false, true)?;
    let [gates, index, ..] = g.route(logits, case.k, Balance::AllChoices)?;
    let gates = if case.k > 1 {
        let sum = g.reduce(ReduceFn::Sum, gates, &[1])?;
        let sum = g.reshape(sum, [t, 1])?;
        g.div(gates, sum)?
    } else {
        gates
    };
    let [slot_choice, choice_slot, offsets, _dropped] = g.assign(index, None, e, None, Order::ChoiceMajor)?;
    let rows = g.dispatch(x, slot_choice, choice_slot, None)?;
    let mut inner = g.expert_matmul(rows, up, offsets, None, false)?;
    let mut wrt: Vec<(&str, Value)> = vec![("x", x), ("router", router), ("up", up), ("down", down)];
    if case.gated {
        let gate = weight(&mut g, "gate", [e, d, h])?;
        wrt.push(("gate", gate));
        let open = g.expert_matmul(rows, gate, offsets, None, false)?;
        let sigmoid = g.sigmoid(open)?;
        let open = g.mul(open, sigmoid)?;
        inner = g.mul(inner, open)?;
    } else {
        inner = g.gelu(inner)?;
    }
    let rows = g.expert_matmul(inner, down, offsets, None, false)?;
    let y = g.combine(rows, slot_choice, choice_slot, Some(gates))?;
    g.output("y", y)?;
    g.output("offsets", offsets)?;
    if passes != Passes::Forward {
        let dy = g.state("dy", TensorType::new(dtype, [t, d]))?;
        // The sum is no output, so that only its gradient, which is dy, is computed.
        let product = g.mul(y, dy)?;
        let product = g.cast(product, DType::F32)?;
        let loss = g.sum_all(product)?;
        let values: Vec<Value> = wrt.iter().map(|w| w.1).collect();
        for ((name, _), grad) in wrt.iter().zip(gradients(&mut g, loss, &values)?) {
            g.output(format!("d.{name}"), grad)?;
        }
    }
    let recompute = if passes == Passes::Light { moebius::Recompute::Light } else { moebius::Recompute::Nothing };
    Ok(recompute.apply(g)?)
}

/// What the forward pass of an optimised graph keeps for the backward pass, with the tokens: they are a state here only because
/// they are drawn on the device.
fn kept(graph: &Graph, case: &Case, dtype: DType) -> Kept {
    let kept = kept_for_backward(graph);
    Kept { bytes: kept.bytes + (case.tokens * case.width * dtype.bytes()) as u64, ..kept }
}

/// Seconds of one run: the median over rounds of some runs, which the host waits for at the end of each round.
fn time(session: &mut Session, program: &mut Program, wait: &str) -> Result<f64, Failure> {
    let mut round = |runs: usize| -> Result<f64, Failure> {
        let begun = Instant::now();
        session.run_times(program, runs)?;
        program.output_bytes(wait)?;
        Ok(begun.elapsed().as_secs_f64() / runs as f64)
    };
    super::warm_up(|_| round(RUNS))?;
    let runs = RUNS.max((ROUND_SECONDS / round(RUNS)?) as usize);
    let times = (0..ROUNDS).map(|_| round(runs)).collect::<Result<Vec<f64>, Failure>>()?;
    Ok(median(times))
}

/// What the device reaches on its own: FLOP/s of a square product, and bytes read and written per second of a large copy.
fn limits(engine: &Engine, dtype: DType) -> Result<(f64, f64), Failure> {
    let (n, elements) = if engine.name() == "cpu" { (1024, 1 << 24) } else { (8192, 1 << 30) };
    let mut session = engine.session();
    let mut g = Graph::new();
    let key = g.constant(TensorType::new(DType::U32, [2]), vec![3.0, 5.0])?;
    let a = g.random(Distribution::Normal, [n, n], 1, key)?;
    let a = g.cast(a, dtype)?;
    let state = g.state("a", TensorType::new(dtype, [n, n]))?;
    g.update(state, a)?;
    let mut filled = session.compile(&g)?;
    session.run(&mut filled)?;
    let flag = |g: &mut Graph| {
        let zero = g.scalar(0.0)?;
        let zero = g.add_scalar(zero, 1.0)?;
        g.output("done", zero)
    };
    let mut g = Graph::new();
    let a = g.state("a", TensorType::new(dtype, [n, n]))?;
    let product = g.matmul(a, a)?;
    g.output("product", product)?;
    flag(&mut g)?;
    let mut program = session.compile(&g)?;
    let flops = 2.0 * (n as f64).powi(3) / time(&mut session, &mut program, "done")?;
    drop(program);
    let mut session = engine.session();
    let mut g = Graph::new();
    let from = g.state("from", TensorType::new(dtype, [elements]))?;
    let moved = g.add_scalar(from, 1.0)?;
    g.output("to", moved)?;
    flag(&mut g)?;
    let mut program = session.compile(&g)?;
    let bytes = 2.0 * (elements * dtype.bytes()) as f64 / time(&mut session, &mut program, "done")?;
    Ok((flops, bytes))
}

/// The case of the command line, which takes these names alone.
fn case_of(args: &BenchArgs) -> &'static Case {
    CASES.iter().find(|c| c.name == args.case).unwrap_or(&CASES[CASES.len() - 1])
}

/// Prints by which rule each product of the layer gets its kernel.
pub(crate) fn explain(args: &BenchArgs) -> Result<(), Failure> {
    if args.what != BenchKind::Layer {
        return Err(Failure::Usage("--explain explains a layer: moebius bench layer --explain --device cuda".into()));
    }
    let case = case_of(args);
    // Decoding has no gradients.
    let both = both(args)?;
    let passes = if case.name.starts_with('E') { &[Passes::Forward][..] } else { &[Passes::Forward, both] };
    let mut explained = Vec::with_capacity(passes.len());
    for &passes in passes {
        let (of, lines) = Engine::explain(&args.device, &layer(case, DType::Bf16, passes)?)?;
        explained.push((of, if passes == Passes::Forward { "forward" } else { "forward and backward" }, lines));
    }
    if args.json {
        let object =
            |(of, what, lines): &(String, &str, Vec<String>)| json!({"of": of, "what": what, "products": lines});
        println!("{}", Json::from(explained.iter().map(object).collect::<Vec<_>>()));
        return Ok(());
    }
    for (of, what, lines) in explained {
        println!("layer {}, {what}, on {of}; rows x columns x elements of k:", case.name);
        lines.iter().for_each(|line| println!("  {line}"));
    }
    Ok(())
}

pub(crate) fn measure(args: &BenchArgs, engine: &Engine) -> Result<Json, Failure> {
    let (case, passes) = (case_of(args), both(args)?);
    let dtype = if engine.name() == "cpu" { DType::F32 } else { DType::Bf16 };
    let (flop_rate, byte_rate) = limits(engine, dtype)?;
    let mut session = engine.session();
    fill(&mut session, case, dtype, args.routing)?;
    let mut forward = session.compile(&layer(case, dtype, Passes::Forward)?)?;
    let forward_s = time(&mut session, &mut forward, "offsets")?;
    let offsets: Vec<i32> = forward.output("offsets")?;
    let counts: Vec<i32> = offsets.windows(2).map(|w| w[1] - w[0]).collect();
    let arena = forward.plan().arena_bytes();
    drop(forward);
    let hit = counts.iter().filter(|&&c| c > 0).count();
    let busiest = counts.iter().max().map_or(0.0, |&c| f64::from(c));
    let (weights, tokens) = case.bytes(hit, dtype.bytes() as f64);
    let floor = |times: f64, bytes: f64| (times * case.flops() / flop_rate).max(bytes / byte_rate);
    let floor_forward = floor(1.0, weights + 2.0 * tokens);
    let mut result = json!({
        "bench": "layer",
        "case": case.name,
        "routing": if args.routing == Routing::Skew { "skew" } else { "uniform" },
        "dtype": dtype.to_string(),
        "limit_tflops": flop_rate / 1e12,
        "limit_gb_per_s": byte_rate / 1e9,
        "experts_hit": hit,
        "busiest_over_mean": busiest * case.experts as f64 / (case.tokens * case.k) as f64,
        "forward_ms": forward_s * 1e3,
        "forward_tflops": case.flops() / forward_s / 1e12,
        "forward_gb_per_s": (weights + 2.0 * tokens) / forward_s / 1e9,
        "forward_floor_ms": floor_forward * 1e3,
        "forward_of_floor": floor_forward / forward_s,
        "forward_arena_bytes": arena,
    });
    // Decoding has no gradients.
    if !case.name.starts_with('E') {
        let mut both = session.compile(&layer(case, dtype, passes)?)?;
        let seconds = time(&mut session, &mut both, "offsets")?;
        let floor_both = floor(3.0, 3.0 * weights + 5.0 * tokens);
        let Json::Object(map) = &mut result else { unreachable!("an object") };
        map.insert("both_ms".into(), (seconds * 1e3).into());
        map.insert("both_tflops".into(), (3.0 * case.flops() / seconds / 1e12).into());
        map.insert("both_floor_ms".into(), (floor_both * 1e3).into());
        map.insert("both_of_floor".into(), (floor_both / seconds).into());
        map.insert("both_arena_bytes".into(), both.plan().arena_bytes().into());
        let kept = kept(both.plan().graph(), case, dtype);
        map.insert("recompute".into(), json!(args.recompute.unwrap_or_default()));
        map.insert("kept_bytes".into(), kept.bytes.into());
        map.insert("kept_index_bytes".into(), kept.index_bytes.into());
        if args.profile {
            super::print_profile(&session.profile(&mut both, 3)?);
        }
    }
    Ok(result)
}

/// The result in words.
pub(crate) fn print(result: &Json) {
    let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
    println!(
        "layer {}, {} routing, {}: {} experts with tokens, the busiest {:.2} times the mean",
        result["case"].as_str().unwrap_or_default(),
        result["routing"].as_str().unwrap_or_default(),
        result["dtype"].as_str().unwrap_or_default(),
        number("experts_hit"),
        number("busiest_over_mean")
    );
    println!(
        "this machine: {:.1} TFLOP/s on a square product, {} of memory read and written per second",
        number("limit_tflops"),
        text::bytes(number("limit_gb_per_s") * 1e9)
    );
    for (what, key) in [("forward", "forward"), ("forward and backward", "both")] {
        let ms = number(&format!("{key}_ms"));
        if ms.is_nan() {
            continue;
        }
        println!(
            "{what:<21} {ms:>9.3} ms  {:>7.1} TFLOP/s  floor {:.3} ms ({:.0} %)",
            number(&format!("{key}_tflops")),
            number(&format!("{key}_floor_ms")),
            100.0 * number(&format!("{key}_of_floor"))
        );
    }
    if result["kept_bytes"].is_u64() {
        println!(
            "kept from the forward pass for the backward pass: {}, and {} of indices",
            text::bytes(number("kept_bytes")),
            text::bytes(number("kept_index_bytes"))
        );
    }
}

#[cfg(test)]
mod tests {
    use moebius::ir::passes::optimise;

    use super::*;

    /// What the inputs and the first products of the experts take (SonicMoE, arXiv 2512.14080).
    fn bound(case: &Case) -> u64 {
        let Case { tokens: t, width: h, hidden: i, k, .. } = *case;
        let products = if case.gated { 2 } else { 1 };
        (2 * t * (h + products * k * i)) as u64
    }

    fn kept_of(case: &Case, passes: Passes) -> Kept {
        kept(&optimise(&layer(case, DType::Bf16, passes).unwrap()).unwrap(), case, DType::Bf16)
    }

    #[test]
    fn a_light_layer_keeps_its_tokens_and_the_first_products_alone() {
        for case in CASES.iter().filter(|case| !case.name.starts_with('E')) {
            let (bound, kept) = (bound(case), kept_of(case, Passes::Light));
            assert!(kept.bytes <= bound, "{}: {} of {bound}", case.name, kept.bytes);
            let of_choices = (4 * case.tokens * case.k) as u64;
            assert!(kept.index_bytes <= 4 * of_choices + 4096, "{}: {} of indices", case.name, kept.index_bytes);
        }
    }

    #[test]
    fn case_d_keeps_neither_dispatched_rows_nor_outputs() {
        let [case] = CASES.iter().filter(|case| case.name == "D").collect::<Vec<_>>()[..] else { unreachable!() };
        let (plain, light) = (kept_of(case, Passes::Both), kept_of(case, Passes::Light));
        assert_eq!(light.bytes, bound(case));
        // Without, the dispatched rows and the outputs are kept, but no first products: with a cotangent that does not depend on
        // the output, the activation and its gradient are one chain.
        let rows = 2 * case.tokens * case.k * case.width;
        assert!(plain.bytes >= 2 * rows as u64, "{plain:?}");
    }
}
