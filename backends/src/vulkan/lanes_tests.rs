//! Kernels whose lanes exchange values, run by the interpreter, against plain loops in f64; and against the same kernels on a device whose
//! lanes exchange through memory.

use moebius_ir::ops::Balance;
use moebius_ir::{DType, Fences, Graph, TensorType, Value, passes};

use super::cooperative_tests::{bytes, floats, numbers};
use super::interpreter;
use super::launch::{Action, At, Number};
use super::limits::Limits;
use super::{Beside, launches, planned, spirv};

/// A card of which there is none here.
const CARD: Limits = Limits {
    halves: true,
    shared: 48 << 10,
    range: 1 << 32,
    threads: 1024,
    subgroup: 32,
    shuffles: true,
    ..Limits::LEAST
};
/// The same without exchange between lanes, and with small workgroups.
const APART: Limits = Limits { threads: 256, shuffles: false, ..CARD };

/// An input: its type, its values, and the result that is stored over it, if there is one.
type Feed = (TensorType, Vec<f32>, Option<usize>);

fn feed(dtype: DType, shape: &[usize], seed: usize) -> Feed {
    (TensorType::new(dtype, shape.to_vec()), numbers(shape.iter().product(), seed), None)
}

/// The results of the one launch of a graph on such a device: of its node, and of those whose work it does too.
fn run(
    feeds: &[Feed],
    limits: Limits,
    backwards: bool,
    build: impl Fn(&mut Graph, &[Value]) -> moebius_ir::Result<Vec<Value>>,
) -> Vec<Vec<f32>> {
    let mut graph = Graph::new();
    let input = |(i, (ty, _, over)): (usize, &Feed)| {
        let name = format!("x{i}");
        if over.is_some() { graph.state(name, ty.clone()).unwrap() } else { graph.feed(name, ty.clone()).unwrap() }
    };
    let values: Vec<Value> = feeds.iter().enumerate().map(input).collect();
    let results = build(&mut graph, &values).unwrap();
    graph.output("y", results[0]).unwrap();
    for (value, (_, _, over)) in values.iter().zip(feeds) {
        over.iter().for_each(|&result| graph.update(*value, results[result]).unwrap());
    }
    let plan = planned(passes::optimise(&graph).unwrap(), limits, Fences::Off).unwrap();
    let all = launches(plan.graph(), |id| Beside::of(&plan, id), limits).unwrap();
    let graph = plan.graph();
    let (id, launch) = graph.nodes_with_ids().map(|(id, _)| id).zip(all).find(|(_, l)| !l.actions.is_empty()).unwrap();
    let beside = Beside::of(&plan, id).unwrap();
    let nodes = || [id].into_iter().chain(beside.nodes()).map(|id| graph.node(id));
    let types: Vec<TensorType> = nodes().flat_map(|n| &n.results).map(|&v| graph.ty(v).clone()).collect();
    let operands: Vec<Value> = nodes().flat_map(|n| &n.operands).copied().collect();
    let fed = |i: usize| {
        let name = &graph.input_of(operands[i]).expect("an operand that is made by another kernel").name;
        &feeds[name[1..].parse::<usize>().unwrap()]
    };
    let old = |result: usize| feeds.iter().find(|(_, _, over)| *over == Some(result));
    let fresh = |(i, ty): (usize, &TensorType)| match old(i) {
        Some((ty, data, _)) => bytes(ty.dtype, data),
        None => vec![0xff; ty.bytes()],
    };
    let mut made: Vec<Vec<u8>> = types.iter().enumerate().map(fresh).collect();
    for action in launch.actions {
        let Action::Kernel(kernel) = action else { panic!("no kernel") };
        let words = spirv::compile(&kernel.source.text, kernel.source.cooperative, true).unwrap();
        let content = |at: &At| match *at {
            At::Operand(i) => bytes(fed(i).0.dtype, &fed(i).1),
            At::Result(i) => made[i].clone(),
            At::Fault | At::Arrivals => vec![0; 8],
            At::Scratch { .. } | At::Null => panic!("{at:?}"),
        };
        let mut buffers: Vec<Vec<u8>> = kernel.buffers.iter().map(content).collect();
        let word = |number: &Number| match *number {
            Number::Word(word) => word.to_le_bytes(),
            Number::Step => [0; 4],
        };
        let numbers: Vec<u8> = kernel.numbers.iter().flat_map(word).collect();
        let all = kernel.groups.map(|n| n as u32);
        let groups: Vec<[u32; 3]> =
            (0..all[2]).flat_map(|z| (0..all[1]).flat_map(move |y| (0..all[0]).map(move |x| [x, y, z]))).collect();
        interpreter::run(&words, &mut buffers, &numbers, &groups, all, backwards).unwrap_or_else(|e| panic!("{e}"));
        for (at, bytes) in kernel.buffers.iter().zip(buffers) {
            match *at {
                At::Result(i) => made[i] = bytes,
                At::Fault => assert_eq!(bytes, [0; 8], "a value was rejected"),
                At::Arrivals => assert_eq!(bytes, [0; 8], "workgroups stay counted"),
                At::Operand(_) | At::Scratch { .. } | At::Null => {}
            }
        }
    }
    types.iter().zip(made).map(|(ty, bytes)| floats(ty.dtype, &bytes)).collect()
}

fn close(found: &[f32], wanted: &[f64], digits: f64) {
    assert_eq!(found.len(), wanted.len());
    for (i, (&found, &wanted)) in found.iter().zip(wanted).enumerate() {
        let near = (f64::from(found) - wanted).abs() <= digits * wanted.abs().max(1.0);
        assert!(near, "element {i} is {found}, wanted {wanted}");
    }
}

/// Few rows, of which a workgroup has up to 1024 threads, and columns that fill no workgroup.
#[test]
fn products_of_few_rows_are_right() {
    for (m, k, n, transpose) in [
        (1, 2048, 40, false),
        (2, 1032, 64, false),
        (3, 96, 8, false),
        (8, 72, 48, false),
        (1, 2056, 12, true),
        (2, 520, 20, true),
        (5, 256, 6, true),
    ] {
        let shape = if transpose { [n, k] } else { [k, n] };
        let feeds = [feed(DType::Bf16, &[m, k], 1), feed(DType::Bf16, &shape, 2), feed(DType::Bf16, &[n], 3)];
        let of_b = |l: usize, j: usize| f64::from(feeds[1].1[if transpose { j * k + l } else { l * n + j }]);
        let element = |at: usize| {
            let (i, j) = (at / n, at % n);
            (0..k).map(|l| f64::from(feeds[0].1[i * k + l]) * of_b(l, j)).sum::<f64>() + f64::from(feeds[2].1[j])
        };
        let wanted: Vec<f64> = (0..m * n).map(element).collect();
        for (limits, backwards) in [(CARD, false), (CARD, true), (APART, false)] {
            let of = |g: &mut Graph, x: &[Value]| Ok(vec![g.matmul_with(x[0], x[1], Some(x[2]), false, transpose)?]);
            close(&run(&feeds, limits, backwards, of)[0], &wanted, 8e-3);
        }
    }
}

/// A head of one token over a cache: fewer keys than are read at once, more of them, none; heads that share keys; lanes without columns.
#[test]
fn attention_of_one_token_is_right() {
    for (batch, room, start, heads, kv_heads, d) in [(1, 130, 129, 1, 1, 64), (2, 20, 9, 2, 1, 24), (1, 9, 0, 1, 1, 8)]
    {
        let (wide, width) = ((heads + 2 * kv_heads) * d, kv_heads * d);
        let cache = |seed, result| {
            let (ty, mut data, _) = feed(DType::Bf16, &[batch, room, width], seed);
            // What is behind the newest is no number.
            let behind = |at: usize| at / width % room > start;
            (0..data.len()).filter(|&at| behind(at)).for_each(|at| data[at] = f32::NAN);
            (ty, data, Some(result))
        };
        let feeds = [
            feed(DType::Bf16, &[batch, 1, wide], 1),
            cache(2, 1),
            cache(3, 2),
            (TensorType::new(DType::I32, Vec::<usize>::new()), vec![start as f32], None),
        ];
        let scale = 1.0 / (d as f32).sqrt();
        let qkv = |b: usize, at: usize| f64::from(feeds[0].1[b * wide + at]);
        let kept = |cache: usize, b: usize, key: usize, column: usize| {
            let new = qkv(b, heads * d + (cache - 1) * width + column);
            if key == start { new } else { f64::from(feeds[cache].1[(b * room + key) * width + column]) }
        };
        let mut wanted = Vec::new();
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let first = h / (heads / kv_heads) * d;
            let score = |key: usize| {
                let dot: f64 = (0..d).map(|c| qkv(b, h * d + c) * kept(1, b, key, first + c)).sum();
                (dot * f64::from(scale)).exp()
            };
            let weights: Vec<f64> = (0..=start).map(score).collect();
            let all: f64 = weights.iter().sum();
            let mixed = |c: usize| (0..=start).map(|key| weights[key] * kept(2, b, key, first + c)).sum::<f64>() / all;
            wanted.extend((0..d).map(mixed));
        }
        for (limits, backwards) in [(CARD, false), (CARD, true), (APART, false)] {
            let found = run(&feeds, limits, backwards, |g, x| {
                Ok(g.attention_cached(x[0], x[1], x[2], x[3], heads, kv_heads, scale)?.to_vec())
            });
            close(&found[0], &wanted, 8e-3);
            for (cache, b) in [1, 2].into_iter().flat_map(|cache| (0..batch).map(move |b| (cache, b))) {
                let row = &found[cache][(b * room + start) * width..][..width];
                let new: Vec<f64> = (0..width).map(|c| kept(cache, b, start, c)).collect();
                close(row, &new, 0.0);
            }
        }
    }
}

/// Sums and maxima over workgroups of one subgroup and of several.
#[test]
fn norms_and_softmax_are_right() {
    for d in [64, 512, 1048] {
        let feeds = [feed(DType::F32, &[2, d], 1), feed(DType::F32, &[d], 2), feed(DType::F32, &[d], 3)];
        let rows: Vec<Vec<f64>> = feeds[0].1.chunks(d).map(|r| r.iter().map(|&x| f64::from(x)).collect()).collect();
        let normed = |row: &Vec<f64>| -> Vec<f64> {
            let mean = row.iter().sum::<f64>() / d as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            let of = |c: usize| (row[c] - mean) / (variance + 1e-5).sqrt() * f64::from(feeds[1].1[c]);
            (0..d).map(|c| of(c) + f64::from(feeds[2].1[c])).collect()
        };
        let softmax = |row: &Vec<f64>| -> Vec<f64> {
            let all: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x.exp() / all).collect()
        };
        for limits in [CARD, APART] {
            let found = run(&feeds, limits, false, |g, x| Ok(vec![g.layer_norm(x[0], x[1], x[2], 1e-5)?]));
            close(&found[0], &rows.iter().flat_map(normed).collect::<Vec<_>>(), 1e-5);
            let found = run(&feeds[..1], limits, false, |g, x| Ok(vec![g.softmax(x[0])?]));
            close(&found[0], &rows.iter().flat_map(softmax).collect::<Vec<_>>(), 1e-5);
        }
    }
}

/// A norm before a product, whose kernel makes the rows: the results are those of the rows in memory, bit for bit.
#[test]
fn rows_that_are_made_for_a_product_are_right() {
    let (m, k, n) = (2, 1040, 40);
    for (dtype, layer) in [(DType::Bf16, true), (DType::F32, false)] {
        let feeds =
            [feed(dtype, &[m, k], 1), feed(DType::F32, &[k], 2), feed(DType::F32, &[k], 3), feed(dtype, &[k, n], 4)];
        let normed = |g: &mut Graph, x: &[Value]| {
            if layer { g.layer_norm(x[0], x[1], x[2], 1e-5) } else { g.rms_norm(x[0], x[1], 1e-5) }
        };
        for limits in [CARD, APART] {
            let both = run(&feeds, limits, false, |g, x| {
                let y = normed(g, x)?;
                Ok(vec![g.matmul(y, x[3])?])
            });
            let rows = run(&feeds[..3], limits, false, |g, x| Ok(vec![normed(g, x)?])).swap_remove(0);
            let feeds = [(feeds[0].0.clone(), rows, None), feeds[3].clone()];
            let apart = run(&feeds, limits, false, |g, x| Ok(vec![g.matmul(x[0], x[1])?]));
            assert_eq!(both[0], apart[0], "{dtype} {layer}");
        }
    }
}

/// A router's tokens, whose lanes find ties among the experts: the choices are the same however lanes exchange, the rest is as near.
#[test]
fn routes_are_the_same() {
    for (n, experts, k) in [(1, 32, 1), (5, 40, 2), (3, 6, 3)] {
        let feeds = [feed(DType::F32, &[n, experts], 1)];
        let of = |g: &mut Graph, x: &[Value]| Ok(g.route(x[0], k, Balance::AllChoices)?.to_vec());
        let [lanes, apart] = [CARD, APART].map(|limits| run(&feeds, limits, false, of));
        assert_eq!(lanes[1], apart[1], "{experts} experts");
        for (lanes, apart) in lanes.iter().zip(apart) {
            close(lanes, &apart.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), 1e-6);
        }
        for (t, row) in feeds[0].1.chunks(experts).enumerate() {
            // The largest first, of equal ones the lowest.
            let mut best: Vec<usize> = (0..experts).collect();
            best.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
            let chosen: Vec<usize> = lanes[1][t * k..][..k].iter().map(|&e| e.to_bits() as usize).collect();
            assert_eq!(chosen, best[..k], "token {t} of {experts} experts");
        }
    }
}

#[test]
fn zz_print() {
    let mut graph = Graph::new();
    let g = &mut graph;
    let (d, h, e) = (2048, 8192, 64);
    let x = g.state("x", TensorType::new(DType::Bf16, [1, d])).unwrap();
    let router = g.state("router", TensorType::new(DType::F32, [e, d])).unwrap();
    let up = g.state("up", TensorType::new(DType::Bf16, [e, d, h])).unwrap();
    let down = g.state("down", TensorType::new(DType::Bf16, [e, h, d])).unwrap();
    let wide = g.cast(x, DType::F32).unwrap();
    let logits = g.matmul_with(wide, router, None, false, true).unwrap();
    let [gates, index, ..] = g.route(logits, 1, Balance::AllChoices).unwrap();
    let [sc, cs, offsets, _] = g.assign(index, None, e, None, moebius_ir::ops::Order::TokenMajor).unwrap();
    let rows = g.dispatch(x, sc, cs, None).unwrap();
    let inner = g.expert_matmul(rows, up, offsets, None, false).unwrap();
    let inner = g.gelu(inner).unwrap();
    let rows = g.expert_matmul(inner, down, offsets, None, false).unwrap();
    let y = g.combine(rows, sc, cs, Some(gates)).unwrap();
    g.output("y", y).unwrap();
    let plan = planned(passes::optimise(&graph).unwrap(), Limits { range: usize::MAX, ..CARD }, Fences::Off).unwrap();
    let all = launches(plan.graph(), |id| Beside::of(&plan, id), Limits { range: usize::MAX, ..CARD }).unwrap();
    let mut list = String::new();
    for ((id, node), l) in plan.graph().nodes_with_ids().zip(&all) {
        let Some(beside) = Beside::of(&plan, id) else { continue };
        let g = plan.graph();
        let nodes = || [id].into_iter().chain(beside.nodes()).map(|id| g.node(id));
        let ops: Vec<Value> = nodes().flat_map(|n| &n.operands).copied().collect();
        let res: Vec<Value> = nodes().flat_map(|n| &n.results).copied().collect();
        for a in &l.actions { if let Action::Kernel(k) = a {
            let file = format!("{}_{}.wgsl", id.index(), k.source.title);
            std::fs::write(format!("/tmp/dump/{file}"), &k.source.text).unwrap();
            let at = |a: &At| { let v = |v: Value| format!("v{}:{}", g.alias_base(v).index(), g.ty(v).bytes());
                match *a { At::Operand(i) => v(ops[i]), At::Result(i) => v(res[i]), At::Arrivals => "arrivals:4".into(), At::Fault => "fault:8".into(), At::Scratch { at, bytes } => format!("s{}_{at}:{bytes}", id.index()), At::Null => "null:4".into() } };
            let n: Vec<String> = k.numbers.iter().map(|n| if let Number::Word(w) = n { w.to_string() } else { "1".into() }).collect();
            list += &format!("{file} {} {} {} | {} | {}\n", k.groups[0], k.groups[1], k.groups[2], n.join(" "), k.buffers.iter().map(at).collect::<Vec<_>>().join(" "));
            println!("{} {:?}", node.op.name(), beside);
        } }
    }
    std::fs::write("/tmp/dump/list", list).unwrap();
}
