//! Kernels whose lanes exchange values, run by the interpreter, against plain loops in f64; and against the same kernels on a device whose
//! lanes exchange through memory.

use moebius_ir::ops::{Balance, Order};
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
        let mut groups: Vec<[u32; 3]> =
            (0..all[2]).flat_map(|z| (0..all[1]).flat_map(move |y| (0..all[0]).map(move |x| [x, y, z]))).collect();
        if backwards {
            groups.reverse();
        }
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

fn of_i32(results: &[f32]) -> Vec<f64> {
    results.iter().map(|x| f64::from(x.to_bits() as i32)).collect()
}

/// Few tokens are routed and given slots by the workgroup of the product of their logits that is the last to end, whichever that is: with
/// the bits of kernels of their own.
#[test]
fn tokens_are_routed_behind_their_logits() {
    for (n, experts, k) in [(2, 64, 1), (3, 40, 2), (8, 6, 3), (1, 64, 2)] {
        let width = 264;
        let feeds = [feed(DType::F32, &[n, width], 1), feed(DType::F32, &[experts, width], 2)];
        let logits = |g: &mut Graph, x: &[Value]| g.matmul_with(x[0], x[1], None, false, true);
        let assigned = |g: &mut Graph, index| g.assign(index, None, experts, None, Order::TokenMajor);
        for limits in [CARD, APART] {
            let alone = run(&feeds, limits, false, |g, x| Ok(vec![logits(g, x)?])).swap_remove(0);
            let of_logits = [(TensorType::f32([n, experts]), alone.clone(), None)];
            let routed = run(&of_logits, limits, false, |g, x| Ok(g.route(x[0], k, Balance::AllChoices)?.to_vec()));
            let index = of_i32(&routed[1]).iter().map(|&e| e as f32).collect();
            let of_index = [(TensorType::new(DType::I32, [n, k]), index, None)];
            let slots = run(&of_index, limits, false, |g, x| Ok(assigned(g, x[0])?.to_vec()));
            let wanted: Vec<Vec<f32>> = [vec![alone], routed, slots].concat();
            for backwards in [false, true] {
                let found = run(&feeds, limits, backwards, |g, x| {
                    let logits = logits(g, x)?;
                    let [_, index, ..] = g.route(logits, k, Balance::AllChoices)?;
                    Ok(assigned(g, index)?.to_vec())
                });
                let bits = |results: &[Vec<f32>]| -> Vec<Vec<u32>> {
                    results.iter().map(|r| r.iter().map(|x| x.to_bits()).collect()).collect()
                };
                assert_eq!(bits(&found), bits(&wanted), "{n} tokens, {experts} experts, {k} choices");
            }
        }
    }
}

/// The expert of one token is chosen in every workgroup of its product, of equal ones the lowest; what routing and assigning leave is there
/// too.
#[test]
fn the_choice_of_one_token_is_made_in_its_product() {
    let (experts, k, n) = (40, 264, 72);
    for dtype in [DType::Bf16, DType::F32] {
        let feeds = [feed(DType::F32, &[1, experts], 3), feed(dtype, &[1, k], 1), feed(dtype, &[experts, k, n], 2)];
        let best = (0..experts).rev().max_by(|&a, &b| feeds[0].1[a].total_cmp(&feeds[0].1[b])).unwrap();
        let column = |c: usize| (0..k).map(move |i| (i, (best * k + i) * n + c));
        let of = |(i, w): (usize, usize)| f64::from(feeds[1].1[i]) * f64::from(feeds[2].1[w]);
        let wanted: Vec<f64> = (0..n).map(|c| column(c).map(of).sum()).collect();
        for (limits, backwards) in [(CARD, false), (CARD, true), (APART, false)] {
            let found = run(&feeds, limits, backwards, |g, x| {
                let [_, index, ..] = g.route(x[0], 1, Balance::AllChoices)?;
                let [slot_choice, choice_slot, offsets, _] = g.assign(index, None, experts, None, Order::TokenMajor)?;
                let rows = g.dispatch(x[1], slot_choice, choice_slot, None)?;
                Ok(vec![g.expert_matmul(rows, x[2], offsets, None, false)?])
            });
            close(&found[0], &wanted, if dtype == DType::Bf16 { 8e-3 } else { 1e-4 });
            // The dispatched row is nowhere; then what the route leaves, and the assign.
            let [routed, assigned] = [&found[2..8], &found[8..]];
            let alone = run(&feeds[..1], limits, false, |g, x| Ok(g.route(x[0], 1, Balance::AllChoices)?.to_vec()));
            for (result, alone) in routed.iter().zip(&alone) {
                assert!(result.iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits()), "{result:?}, not {alone:?}");
            }
            assert_eq!(of_i32(&routed[1]), [best as f64]);
            let [slot_choice, choice_slot, offsets, dropped] = [0, 1, 2, 3].map(|i| of_i32(&assigned[i]));
            assert_eq!([slot_choice, choice_slot, dropped], [[0.0]; 3].map(Vec::from));
            let begins: Vec<f64> = (0..=experts).map(|e| if e > best { 1.0 } else { 0.0 }).collect();
            assert_eq!(offsets, begins);
        }
    }
}

/// The rows of tokens with one choice each are combined where they are made: tokens that were dropped have the side alone.
#[test]
fn rows_are_combined_in_their_product() {
    let (tokens, experts, k, n) = (3, 4, 264, 72);
    let ints = |shape: &[usize], data: &[f32]| (TensorType::new(DType::I32, shape.to_vec()), data.to_vec(), None);
    for dtype in [DType::Bf16, DType::F32] {
        // Token 0 is in slot 1, of expert 2, and token 2 in slot 0, of expert 1; slot 2 is nobody's.
        let feeds = [
            feed(dtype, &[3, k], 1),
            feed(dtype, &[experts, k, n], 2),
            ints(&[experts + 1], &[0.0, 0.0, 1.0, 2.0, 2.0]),
            ints(&[3], &[2.0, 0.0, -1.0]),
            ints(&[tokens, 1], &[1.0, -1.0, 0.0]),
            feed(DType::F32, &[tokens, 1], 3),
            feed(dtype, &[tokens, n], 4),
            feed(DType::F32, &[tokens, 2], 5),
        ];
        let value = |of: usize, at: usize| f64::from(feeds[of].1[at]);
        let row = |slot: usize, e: usize, c: usize| {
            (0..k).map(|i| value(0, slot * k + i) * value(1, (e * k + i) * n + c)).sum::<f64>()
        };
        let wanted = (0..tokens * n).map(|at| {
            let (t, c) = (at / n, at % n);
            let made = [Some((1, 2)), None, Some((0, 1))][t].map_or(0.0, |(slot, e)| row(slot, e, c));
            let y = value(7, 2 * t) * value(5, t) * made + value(7, 2 * t + 1) * value(6, at);
            y + y
        });
        let wanted: Vec<f64> = wanted.collect();
        for (limits, backwards) in [(CARD, false), (CARD, true), (APART, false)] {
            let found = run(&feeds, limits, backwards, |g, x| {
                let rows = g.expert_matmul(x[0], x[1], x[2], None, false)?;
                let y = g.combine_with(rows, x[3], x[4], Some(x[5]), Some(x[6]), Some(x[7]))?;
                Ok(vec![g.add(y, y)?])
            });
            // The product's rows, then the combine's, are nowhere.
            close(&found[2], &wanted, if dtype == DType::Bf16 { 2e-2 } else { 1e-4 });
        }
    }
}

/// Where one product is all that an expert does, its kernel finds the slot's expert and combines, and the route is done before it.
#[test]
fn one_product_of_one_token_is_combined_behind_its_route() {
    let (experts, k, n) = (6, 64, 40);
    let mut graph = Graph::new();
    let g = &mut graph;
    let logits = g.feed("logits", TensorType::f32([1, experts])).unwrap();
    let (x, w) =
        (g.feed("x", TensorType::f32([1, k])).unwrap(), g.feed("w", TensorType::f32([experts, k, n])).unwrap());
    let [gate, index, ..] = g.route(logits, 1, Balance::AllChoices).unwrap();
    let [slot_choice, choice_slot, offsets, _] = g.assign(index, None, experts, None, Order::TokenMajor).unwrap();
    let rows = g.dispatch(x, slot_choice, choice_slot, None).unwrap();
    let rows = g.expert_matmul(rows, w, offsets, None, false).unwrap();
    let y = g.combine(rows, slot_choice, choice_slot, Some(gate)).unwrap();
    g.output("y", y).unwrap();
    for limits in [CARD, APART] {
        let plan = planned(passes::optimise(&graph).unwrap(), limits, Fences::Off).unwrap();
        let made = launches(plan.graph(), |id| Beside::of(&plan, id), limits).unwrap();
        let kernels: Vec<Action> = made.into_iter().flat_map(|l| l.actions).collect();
        // The route with the assign, and the product with the dispatch before it and the combine behind it.
        assert_eq!(kernels.len(), 2);
        for kernel in kernels {
            let Action::Kernel(kernel) = kernel else { panic!("no kernel") };
            spirv::compile(&kernel.source.text, None, true).unwrap();
        }
    }
}
