//! Sparse experts against their dense equivalents, values and gradients, on the CPU backend; and graphs as text.

use std::collections::HashMap;
use std::sync::OnceLock;

use moebius_backends::cpu::Cpu;
use moebius_ir::ops::{Order, ReduceFn};
use moebius_ir::reference::{Precision, run as reference};
use moebius_ir::{DType, Graph, Result, Role, Tensor, TensorType, Value, gradients};
use moebius_tests::Sketch;
use moebius_tests::device::{self, Live};
use moebius_tests::layers::{self, Moe, MoeResult};
use moebius_tests::tolerance::{Tolerance, difference};
use proptest::prelude::*;

type Results = HashMap<String, Tensor>;

fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(|| device::cpu(2))
}

fn run(s: &Sketch) -> Results {
    let results = Live::new(cpu(), &s.graph).and_then(|mut live| live.run(&s.inputs));
    results.unwrap_or_else(|e| panic!("{e}"))
}

/// Two ways of one computation in f32, each of some dozens of roundings; a router's gradient is a difference of larger terms.
const CLOSE: Tolerance = Tolerance { relative: 1e-4, of_rms: 5e-4, least: 0.0, most: f64::INFINITY };

#[track_caller]
fn assert_close(what: &str, got: &Tensor, wanted: &Tensor) {
    if let Some(difference) = difference(got, wanted, CLOSE) {
        panic!("{what}: {difference}");
    }
}

/// A random layer and how many tokens go through it.
fn layer() -> impl Strategy<Value = (Moe, usize, u32)> {
    let sizes = (1usize..20, 1usize..24, 1usize..7, 0usize..6, 1usize..25);
    (sizes, any::<bool>(), 2u32..1_000_000).prop_map(|((width, hidden, experts, k, tokens), renormalise, seed)| {
        (Moe { width, hidden, experts, k: 1 + k % experts, capacity: None, renormalise }, tokens, seed)
    })
}

/// A sparse layer over an input `x [N,D]`, with everything named; the build closure adds a second way to compute it.
struct Both {
    s: Sketch,
    x: Value,
    dy: Value,
    sparse: MoeResult,
}

impl Both {
    fn new(layer: Moe, tokens: usize, seed: u32) -> Result<Both> {
        let mut s = Sketch::new(DType::F32).seeded(seed);
        let ty = TensorType::f32([tokens, layer.width]);
        let (x, dy) = (s.normals(ty.elements()), s.normals(ty.elements()));
        let x = s.named("x", Role::Feed, ty.clone(), x, true)?;
        let dy = s.named("dy", Role::Feed, ty, dy, false)?;
        let sparse = layers::moe(&mut s, "layer", x, layer)?;
        Ok(Both { s, x, dy, sparse })
    }

    fn parameter(&self, name: &str) -> Value {
        self.s.graph.input_named(&format!("layer.{name}")).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Expert `e`'s part of a parameter `[E,..]`.
    fn of_expert(&mut self, name: &str, e: usize) -> Result<Value> {
        let w = self.parameter(name);
        let shape = self.s.graph.shape(w)[1..].to_vec();
        let part = self.s.graph.slice(w, 0, e, 1)?;
        self.s.graph.reshape(part, shape)
    }

    /// `x` through expert `e` as a dense layer.
    fn expert(&mut self, e: usize) -> Result<Value> {
        let [w1, b1, w2, b2] = ["w1", "b1.bias", "w2", "b2.bias"].map(|n| self.of_expert(n, e));
        let g = &mut self.s.graph;
        let h = g.matmul_with(self.x, w1?, Some(b1?), false, false)?;
        let h = g.gelu(h)?;
        g.matmul_with(h, w2?, Some(b2?), false, false)
    }

    /// Outputs `WAY` and `WAY.d.INPUT` for `loss = <y, dy> + others`.
    fn outputs(&mut self, way: &str, y: Value, others: &[Value]) -> Result<()> {
        let g = &mut self.s.graph;
        g.output(way, y)?;
        let product = g.mul(y, self.dy)?;
        let mut loss = g.sum_all(product)?;
        for &other in others {
            loss = g.add(loss, other)?;
        }
        let wrt: Vec<Value> = self.s.wrt.iter().map(|&(_, v)| v).collect();
        let grads = gradients(g, loss, &wrt)?;
        for ((name, _), grad) in self.s.wrt.iter().zip(grads) {
            g.output(format!("{way}.d.{name}"), grad)?;
        }
        Ok(())
    }

    /// The outputs of the way `dense` are those of the way `sparse`.
    fn assert_equal(&self) {
        let results = run(&self.s);
        let dense: Vec<&String> = results.keys().filter(|n| n.starts_with("dense")).collect();
        assert!(dense.len() > 1);
        for name in dense {
            let other = name.replacen("dense", "sparse", 1);
            assert_close(name, &results[&other], &results[name]);
        }
    }
}

/// The smallest distance of two logits of one token.
fn margin(logits: &Tensor) -> f64 {
    let mut least = f64::INFINITY;
    for row in logits.data.chunks(logits.ty.shape.last()) {
        for (i, a) in row.iter().enumerate() {
            least = row[..i].iter().map(|b| (a - b).abs()).fold(least, f64::min);
        }
    }
    least
}

/// The one-hot masks of GShard (arXiv 2006.16668, algorithm 1) for k choices in plain Rust: `of_choice[j] [N,E]` are the
/// chosen experts, `place[j] [N,E*C]` the place of choice j if it was kept. All first choices come before all second ones.
struct OneHot {
    of_choice: Vec<Vec<f64>>,
    place: Vec<Vec<f64>>,
}

fn one_hot(logits: &Tensor, k: usize, capacity: usize) -> OneHot {
    let (n, e) = (logits.ty.shape[0], logits.ty.shape[1]);
    let mut masks = OneHot { of_choice: vec![vec![0.0; n * e]; k], place: vec![vec![0.0; n * e * capacity]; k] };
    let mut taken = vec![vec![false; e]; n];
    let mut load = vec![0; e];
    for j in 0..k {
        for t in 0..n {
            let row = &logits.data[t * e..(t + 1) * e];
            let free = (0..e).filter(|&x| !taken[t][x]);
            let best = free.max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
            let best = best.unwrap_or_else(|| panic!("more choices than experts"));
            taken[t][best] = true;
            masks.of_choice[j][t * e + best] = 1.0;
            if load[best] < capacity {
                masks.place[j][(t * e + best) * capacity + load[best]] = 1.0;
            }
            load[best] += 1;
        }
    }
    masks
}

/// Adds GShard's form of the layer with masks as feeds, all zero at first.
fn gshard(both: &mut Both, layer: Moe, tokens: usize, capacity: usize) -> Result<(Value, Value, Value)> {
    let Moe { width: d, experts: e, k, renormalise, .. } = layer;
    let slots = e * capacity;
    let feed = |s: &mut Sketch, name: String, shape: [usize; 2]| {
        let ty = TensorType::f32(shape);
        let zeros = vec![0.0; ty.elements()];
        s.named(&name, Role::Feed, ty, zeros, false)
    };
    let mut choices = Vec::new();
    let mut places = Vec::new();
    for j in 0..k {
        choices.push(feed(&mut both.s, format!("choice {j}"), [tokens, e])?);
        places.push(feed(&mut both.s, format!("place {j}"), [tokens, slots])?);
    }
    let [router, w1, b1, w2, b2] = ["router", "w1", "b1.bias", "w2", "b2.bias"].map(|n| both.parameter(n));
    let x = both.x;
    let g = &mut both.s.graph;
    let logits = g.matmul(x, router)?;
    let p = g.softmax(logits)?;
    let mut gates = Vec::new();
    for &choice in &choices {
        let chosen = g.mul(p, choice)?;
        let gate = g.reduce(ReduceFn::Sum, chosen, &[1])?;
        gates.push(g.reshape(gate, [tokens, 1])?);
    }
    if renormalise {
        let all = g.concat(&gates, 1)?;
        let sum = g.reduce(ReduceFn::Sum, all, &[1])?;
        let sum = g.reshape(sum, [tokens, 1])?;
        for gate in &mut gates {
            *gate = g.div(*gate, sum)?;
        }
    }
    // dispatch mask: which slot a token goes to; combine tensor: the same, weighted.
    let (mut mask, mut combine) = (places[0], g.mul(places[0], gates[0])?);
    for j in 1..k {
        let weighted = g.mul(places[j], gates[j])?;
        mask = g.add(mask, places[j])?;
        combine = g.add(combine, weighted)?;
    }
    let rows = g.matmul_with(mask, x, None, true, false)?;
    let rows = g.reshape(rows, [e, capacity, d])?;
    let h = g.matmul(rows, w1)?;
    let b1 = g.reshape(b1, [e, 1, layer.hidden])?;
    let h = g.add(h, b1)?;
    let h = g.gelu(h)?;
    let h = g.matmul(h, w2)?;
    let b2 = g.reshape(b2, [e, 1, d])?;
    let h = g.add(h, b2)?;
    let h = g.reshape(h, [slots, d])?;
    let y = g.matmul(combine, h)?;
    // load_balancing_loss = E sum_e mean(p) mean(mask)/k, z_loss = mean(logsumexp^2), from their definitions.
    let mut chosen = choices[0];
    for &choice in &choices[1..] {
        chosen = g.add(chosen, choice)?;
    }
    let (mean_p, mean_m) = (g.reduce(ReduceFn::Mean, p, &[0])?, g.reduce(ReduceFn::Mean, chosen, &[0])?);
    let product = g.mul(mean_p, mean_m)?;
    let sum = g.sum_all(product)?;
    let balance = g.mul_scalar(sum, e as f64 / k as f64)?;
    let exp = g.exp(logits)?;
    let sum = g.reduce(ReduceFn::Sum, exp, &[1])?;
    let lse = g.ln(sum)?;
    let square = g.square(lse)?;
    Ok((y, balance, g.mean_all(square)?))
}

fn config() -> ProptestConfig {
    moebius_tests::cases_of(concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/properties.txt"))
}

/// The choices of a random graph.
fn words() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(any::<u32>(), 5..80)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn one_expert_is_the_dense_layer((layer, tokens, seed) in layer()) {
        let layer = Moe { experts: 1, k: 1, ..layer };
        let build = || {
            let mut both = Both::new(layer, tokens, seed)?;
            let dense = both.expert(0)?;
            both.outputs("sparse", both.sparse.y, &[])?;
            both.outputs("dense", dense, &[])?;
            Ok::<_, moebius_ir::Error>(both)
        };
        build().unwrap().assert_equal();
    }

    #[test]
    fn all_experts_are_the_dense_mixture((layer, tokens, seed) in layer()) {
        let layer = Moe { k: layer.experts, ..layer };
        let build = || {
            let mut both = Both::new(layer, tokens, seed)?;
            let router = both.parameter("router");
            let logits = both.s.graph.matmul(both.x, router)?;
            let p = both.s.graph.softmax(logits)?;
            let mut sum = None;
            for e in 0..layer.experts {
                let y = both.expert(e)?;
                let g = &mut both.s.graph;
                let weight = g.slice(p, 1, e, 1)?;
                let weighted = g.mul(y, weight)?;
                sum = Some(match sum {
                    None => weighted,
                    Some(sum) => g.add(sum, weighted)?,
                });
            }
            both.outputs("sparse", both.sparse.y, &[])?;
            both.outputs("dense", sum.unwrap_or(both.x), &[])?;
            Ok::<_, moebius_ir::Error>(both)
        };
        build().unwrap().assert_equal();
    }

    #[test]
    fn the_one_hot_form_of_gshard_is_the_index_form((layer, tokens, seed) in layer(), capacity in 1usize..9) {
        let layer = Moe { capacity: Some(capacity), ..layer };
        let build = || {
            let mut both = Both::new(layer, tokens, seed)?;
            let (y, balance, z) = gshard(&mut both, layer, tokens, capacity)?;
            let sparse = both.sparse;
            both.outputs("sparse", sparse.y, &[sparse.load_balancing_loss, sparse.z_loss])?;
            both.outputs("dense", y, &[balance, z])?;
            let g = &mut both.s.graph;
            for (name, v) in [("sparse.balance", sparse.load_balancing_loss), ("sparse.z", sparse.z_loss)] {
                g.output(name, v)?;
            }
            g.output("dense.balance", balance)?;
            g.output("dense.z", z)?;
            Ok::<_, moebius_ir::Error>(both)
        };
        let mut both = build().unwrap();
        let exact = reference(&both.s.graph, &both.s.inputs, Precision::Exact).unwrap();
        let logits = exact.value(both.sparse.logits).clone();
        prop_assume!(margin(&logits) > 1e-4);
        let masks = one_hot(&logits, layer.k, capacity);
        for (j, (choice, place)) in masks.of_choice.into_iter().zip(masks.place).enumerate() {
            both.s.inputs.get_mut(&format!("choice {j}")).unwrap().data = choice;
            both.s.inputs.get_mut(&format!("place {j}")).unwrap().data = place;
        }
        both.assert_equal();
    }

    #[test]
    fn enough_capacity_is_dropless((layer, tokens, seed) in layer(), more in 0usize..3) {
        let results = |capacity| {
            let mut both = Both::new(Moe { capacity, ..layer }, tokens, seed).unwrap();
            let sparse = both.sparse;
            both.outputs("y", sparse.y, &[sparse.load_balancing_loss, sparse.z_loss]).unwrap();
            run(&both.s)
        };
        prop_assert!(device::same_bits(&results(None), &results(Some(tokens + more))));
    }

    #[test]
    fn relabelled_experts_change_nothing_but_the_order_of_their_weights((layer, tokens, seed) in layer(), turn in 1usize..6) {
        // Expert e becomes expert place(e): turned around and reversed, which has every cycle length.
        let e = layer.experts;
        let place = |x: usize| (e - 1 - x + turn) % e;
        let mut both = Both::new(layer, tokens, seed).unwrap();
        let sparse = both.sparse;
        both.outputs("y", sparse.y, &[sparse.load_balancing_loss, sparse.z_loss]).unwrap();
        let exact = reference(&both.s.graph, &both.s.inputs, Precision::Exact).unwrap();
        prop_assume!(margin(exact.value(sparse.logits)) > 1e-4);
        // Along axis 0 for expert parameters, axis 1 for the router's columns.
        let relabel = |name: &str, t: &Tensor| {
            let mut out = t.clone();
            if name.ends_with("router") {
                for (i, v) in t.data.iter().enumerate() {
                    out.data[i / e * e + place(i % e)] = *v;
                }
            } else if name.contains("layer.") {
                let n = t.data.len() / e;
                for x in 0..e {
                    out.data[place(x) * n..][..n].copy_from_slice(&t.data[x * n..][..n]);
                }
            }
            out
        };
        let before = run(&both.s);
        both.s.inputs = both.s.inputs.iter().map(|(n, t)| (n.clone(), relabel(n, t))).collect();
        let after = run(&both.s);
        for (name, tensor) in &before {
            assert_close(name, &after[name], &relabel(name, tensor));
        }
    }

    #[test]
    fn combine_is_the_transpose_of_dispatch((layer, tokens, seed) in layer(), capacity in 0usize..8, gated in any::<bool>()) {
        let mut s = Sketch::new(DType::F32).seeded(seed);
        let mut build = || {
            let (n, k, d) = (tokens, layer.k, layer.width);
            let index: Vec<i32> =
                s.normals(n * k).iter().map(|x| (x.abs() * 3.0) as i32 % (layer.experts as i32 + 1) - 1).collect();
            let index = s.ints([n, k], &index)?;
            // 0 stands for dropless.
            let capacity = (capacity > 0).then_some(capacity);
            let [slot_choice, choice_slot, ..] =
                s.graph.assign(index, None, layer.experts, capacity, Order::TokenMajor)?;
            let slots = s.graph.shape(slot_choice)[0];
            let (x, y) = (s.float([n, d], |x| x)?, s.float([slots, d], |x| x)?);
            let gate = if gated { Some(s.float([n, k], |x| x)?) } else { None };
            let rows = s.graph.dispatch(x, slot_choice, choice_slot, gate)?;
            let tokens = s.graph.combine(y, slot_choice, choice_slot, gate)?;
            s.aux(rows)?;
            s.aux(tokens)?;
            Ok::<_, moebius_ir::Error>((x, y))
        };
        let (x, y) = build().unwrap();
        let named = |v: Value| s.graph.input_of(v).map(|i| s.inputs[&i.name].clone()).unwrap();
        let results = run(&s);
        let dot = |a: &Tensor, b: &Tensor| -> (f64, f64) {
            assert_eq!(a.ty, b.ty);
            let terms = a.data.iter().zip(&b.data).map(|(a, b)| a * b);
            (terms.clone().sum(), terms.map(|t| t * t).sum::<f64>().sqrt())
        };
        let ((left, size), (right, _)) = (dot(&results["y0"], &named(y)), dot(&named(x), &results["y1"]));
        prop_assert!((left - right).abs() <= 1e-6 * size + 1e-12, "{left} {right}");
    }

    #[test]
    fn a_residual_of_nothing_leaves_the_dense_layer_alone((layer, tokens, seed) in layer(), capacity in 1usize..9) {
        let layer = Moe { capacity: Some(capacity), ..layer };
        let mut s = Sketch::new(DType::F32).seeded(seed);
        let mut build = || {
            let x = s.float([tokens, layer.width], |x| x)?;
            let given = (0..2 * tokens).map(|i| (i % 2) as f64).collect();
            let coefficient = s.fixed(TensorType::f32([tokens, 2]), given)?;
            let result = layers::residual_moe(&mut s, "layer", x, layer, Some(coefficient))?;
            s.out(result.y)?;
            s.differentiate()?;
            let [w1, b1, w2, b2] =
                ["w1", "b1.bias", "w2", "b2.bias"].map(|n| s.graph.input_named(&format!("layer.dense.{n}")).unwrap());
            let g = &mut s.graph;
            let h = g.matmul_with(x, w1, Some(b1), false, false)?;
            let h = g.gelu(h)?;
            let y = g.matmul_with(h, w2, Some(b2), false, false)?;
            g.output("alone", y)
        };
        build().unwrap();
        let results = run(&s);
        prop_assert_eq!(&results["y0"], &results["alone"]);
        for (name, tensor) in results.iter().filter(|(n, _)| n.starts_with("d.layer.moe")) {
            prop_assert!(tensor.data.iter().all(|&v| v == 0.0), "{} is not zero", name);
        }
        prop_assert!(results["d.layer.dense.w2"].data.iter().any(|&v| v != 0.0));
    }

    #[test]
    fn a_tokens_result_does_not_depend_on_its_batch((layer, tokens, seed) in layer(), wide in 0usize..2, narrow in 0usize..2) {
        // Kernels differ by size: also layers of some hundred columns.
        let (scale, dtype) = ([1, 17][wide], [DType::F32, DType::Bf16][narrow]);
        let Moe { width, hidden, k, .. } = layer;
        let layer = Moe { k: k.min(2), width: width * scale, hidden: hidden * scale, ..layer };
        let (d, n) = (layer.width, tokens);
        let through = |rows: &[f64]| {
            let mut s = Sketch::new(dtype).seeded(seed);
            let mut build = || {
                let x = s.named("x", Role::Feed, TensorType::new(dtype, [rows.len() / d, d]), rows.to_vec(), false)?;
                let y = layers::moe(&mut s, "layer", x, layer)?.y;
                s.aux(y)
            };
            build().unwrap();
            run(&s).remove("y0").unwrap().data
        };
        let x = Sketch::new(dtype).seeded(seed + 1).normals(n * d);
        let bits = |v: &[f64]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let wanted = through(&x);
        for t in [0, n / 2, n - 1] {
            let at = t * d..(t + 1) * d;
            prop_assert_eq!(bits(&through(&x[at.clone()])), bits(&wanted[at]), "token {} of {} alone", t, n);
        }
        let shuffled: Vec<f64> = x.chunks(d).rev().flatten().copied().collect();
        let back: Vec<f64> = through(&shuffled).chunks(d).rev().flatten().copied().collect();
        prop_assert_eq!(bits(&back), bits(&wanted), "shuffled");
        let more = [x.clone(), Sketch::new(dtype).seeded(seed + 2).normals(37 * d)].concat();
        prop_assert_eq!(bits(&through(&more)[..n * d]), bits(&wanted), "in a larger batch");
    }

    #[test]
    fn text_is_read_back_as_the_graph_it_was((layer, tokens, seed) in layer(), words in words()) {
        let mut both = Both::new(layer, tokens, seed).unwrap();
        let sparse = both.sparse;
        both.outputs("y", sparse.y, &[sparse.load_balancing_loss, sparse.z_loss]).unwrap();
        let random = random_graph(&words).graph;
        for graph in [both.s.graph, random] {
            for graph in [moebius_ir::passes::optimise(&graph).unwrap(), graph] {
                let text = graph.to_text();
                let back = Graph::from_text(&text).unwrap();
                // A constant NaN is equal to nothing, itself included.
                prop_assert!(back == graph || text.contains("\"nan\""), "another graph for\n{}", text);
                prop_assert_eq!(back.to_text(), text);
            }
        }
    }

    #[test]
    fn recomputation_changes_no_bit(words in words(), borders in prop::collection::vec(any::<u32>(), 1..6)) {
        let mut s = random_graph(&words);
        let values: Vec<Value> = s.graph.values().collect();
        let borders: Vec<Value> = borders.into_iter().map(|b| values[b as usize % values.len()]).collect();
        prop_assume!(with_gradients(&mut s) > 0);
        let late = moebius_ir::passes::recompute(&s.graph, &borders).unwrap();
        let optimised = moebius_ir::passes::optimise(&late).unwrap();
        let before = device::reference(&s.graph, &s.inputs, Precision::Rounded);
        for graph in [&late, &optimised] {
            prop_assert!(device::same_bits(&before, &device::reference(graph, &s.inputs, Precision::Rounded)));
        }
        let once = run(&s);
        s.graph = late;
        prop_assert!(device::same_bits(&once, &run(&s)));
    }

    #[test]
    fn the_passes_keep_the_meaning_of_elementwise_graphs(words in words()) {
        let s = random_graph(&words);
        let optimised = moebius_ir::passes::optimise(&s.graph).unwrap();
        let before = device::reference(&s.graph, &s.inputs, Precision::Rounded);
        let after = device::reference(&optimised, &s.inputs, Precision::Rounded);
        prop_assert!(device::same_bits(&before, &after));
        // The passes have come to an end, and a backend takes what they leave.
        let again = moebius_ir::passes::fold_constants(&optimised).unwrap();
        prop_assert_eq!(again.to_text(), optimised.to_text());
        let one = Live::new(&device::cpu(1), &s.graph).and_then(|mut l| l.run(&s.inputs)).unwrap();
        prop_assert!(device::same_bits(&one, &run(&s)));
    }
}

/// `s` with the gradients of each of its float outputs that has one, as further outputs.
fn with_gradients(s: &mut Sketch) -> usize {
    let float = |g: &Graph, v: Value| g.ty(v).dtype.is_float();
    let outputs: Vec<Value> = s.graph.outputs().iter().map(|(_, v)| *v).filter(|v| float(&s.graph, *v)).collect();
    let inputs: Vec<Value> = s.graph.inputs().iter().map(|(_, v)| *v).filter(|v| float(&s.graph, *v)).collect();
    let mut differentiated = 0;
    for output in outputs {
        let mut g = s.graph.clone();
        let wide = g.cast(output, DType::F32).unwrap();
        let loss = g.sum_all(wide).unwrap();
        // Some functions have no gradient.
        let Ok(gradients) = gradients(&mut g, loss, &inputs) else { continue };
        s.graph = g;
        gradients.into_iter().for_each(|v| s.aux(v).unwrap());
        differentiated += 1;
    }
    differentiated
}

/// A graph of elementwise ops, reductions and reshapes that the words choose; every value that nothing uses is an output.
fn random_graph(words: &[u32]) -> Sketch {
    use moebius_ir::ops::{BinaryFn, CompareFn, UnaryFn};
    let mut s = Sketch::new(DType::F32);
    let mut values: Vec<Value> = Vec::new();
    for (shape, dtype) in [(&[3, 4][..], DType::F32), (&[4], DType::F32), (&[3, 1], DType::Bf16), (&[], DType::F16)] {
        values.push(s.float_as(dtype, shape, |x| x).unwrap());
    }
    values.push(s.ints([3, 4], &[0, 1, -2, 3, 4, 5, 1 << 30, 7, -8, 9, 10, 11]).unwrap());
    values.push(s.graph.scalar(0.5).unwrap());
    values.push(s.graph.splat(TensorType::f32([4]), 1.0).unwrap());
    let mut used = vec![false; 10_000];
    for &word in words {
        let pick = |by: u32| values[(word / by) as usize % values.len()];
        let (a, b, c) = (pick(16), pick(1 << 12), pick(1 << 20));
        let which = (word >> 4) as usize;
        let g = &mut s.graph;
        // What the shape rules refuse is left out: a refusal does not change the graph.
        let made = match word % 8 {
            0 | 1 => g.unary(UnaryFn::ALL[which % UnaryFn::ALL.len()], a),
            2 | 3 => g.binary(BinaryFn::ALL[which % BinaryFn::ALL.len()], a, b),
            4 => g.compare(CompareFn::ALL[which % CompareFn::ALL.len()], a, b),
            5 => g.select(a, b, c),
            6 => g.cast(a, DType::ALL[which % DType::ALL.len()]),
            _ if which.is_multiple_of(3) => g.broadcast(a, [2, 3, 4]),
            _ if which % 3 == 1 => g.reduce(ReduceFn::ALL[which / 3 % 3], a, &[0]),
            _ => g.reshape(a, [12]),
        };
        if let Ok(value) = made {
            [a, b, c].into_iter().for_each(|v| used[v.index()] = true);
            used[value.index()] = false;
            values.push(value);
        }
    }
    values.retain(|v| !used[v.index()]);
    values.sort_unstable();
    values.dedup();
    values.into_iter().for_each(|v| s.aux(v).unwrap());
    s
}
