//! Matrix products, attention, embedding and cross entropy.

use moebius_ir::ops::AttentionGrad;
use moebius_ir::{DType, Role, Site, TensorType};

use super::{Case, FLOATS, WIDE_AND_NARROW, case};
use crate::verify::tolerance::Class;

fn matmul() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes: [(&[usize], usize, usize, usize, bool); 23] = [
        (&[], 1, 1, 1, true),
        (&[], 5, 3, 7, true),
        (&[], 33, 65, 17, true),
        (&[], 70, 130, 40, true),
        // Rows of a multiple of 16 bytes, which some GPUs copy by themselves.
        (&[], 88, 136, 72, true),
        (&[], 296, 264, 136, true),
        // Few rows and deep sums, which decoding has and kernels treat by themselves.
        (&[], 1, 150, 530, true),
        (&[], 4, 67, 300, true),
        (&[], 8, 34, 270, true),
        (&[], 1, 136, 520, true),
        (&[], 5, 72, 264, true),
        (&[], 12, 40, 264, true),
        (&[], 8, 80, 2136, true),
        // So few columns that few workgroups share very long sums.
        (&[], 2, 16, 16_448, true),
        (&[2], 3, 24, 1032, false),
        // Few columns.
        (&[], 70, 2, 264, true),
        // Few tiles and long sums.
        (&[], 40, 24, 1100, true),
        // Many rows over a short k.
        (&[], 136, 72, 24, true),
        (&[], 130, 68, 40, true),
        (&[2], 20, 11, 257, false),
        (&[3], 9, 20, 11, true),
        (&[3], 9, 20, 11, false),
        (&[2, 2], 4, 6, 5, false),
    ];
    for (outer, m, n, k, shared) in sizes {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let what = if shared { "shared" } else { "batched" };
            let name = format!("{outer:?} {m}x{n}x{k} {what}, transposed {ta} {tb}");
            let class = if k > 1024 { Class::LongSum } else { Class::Sum };
            cases.push(case("matmul", name, class, FLOATS, move |s| {
                let with = |tail: [usize; 2]| [outer, &tail].concat();
                let x = s.float(with(if ta { [k, m] } else { [m, k] }), |x| x)?;
                let w = if tb { [n, k] } else { [k, n] };
                let w = s.float(if shared { w.to_vec() } else { with(w) }, |x| x)?;
                let bias = match (ta, tb) {
                    (false, false) => Some(s.float([n], |x| x)?),
                    (false, true) => Some(s.float_as(DType::F32, [n], |x| x)?),
                    (true, _) => None,
                };
                let y = s.graph.matmul_with(x, w, bias, ta, tb)?;
                s.out(y)
            }));
        }
    }
    cases
}

/// One factor of 16 bits, the other and the result f32; the second of two cases has them the other way round.
fn mixed() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes: [(&[usize], usize, usize, usize); 10] = [
        (&[], 1, 40, 264),
        (&[], 70, 2, 264),
        (&[], 33, 65, 17),
        (&[], 72, 136, 520),
        (&[], 64, 88, 520),
        (&[2], 20, 70, 33),
        // Long and narrow either way, as a router's products are.
        (&[], 200, 24, 168),
        (&[], 100, 40, 520),
        (&[], 40, 136, 552),
        (&[], 136, 72, 48),
    ];
    for (outer, m, n, k) in sizes {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            for wide in [0, 1] {
                let name = format!("{outer:?} {m}x{n}x{k}, factor {wide} f32, transposed {ta} {tb}");
                cases.push(case("matmul", name, Class::Sum, &[DType::Bf16, DType::F16], move |s| {
                    let with = |tail: [usize; 2]| [outer, &tail].concat();
                    let dtype = |i| if i == wide { DType::F32 } else { s.dtype };
                    let dtypes = [dtype(0), dtype(1)];
                    let x = s.float_as(dtypes[0], with(if ta { [k, m] } else { [m, k] }), |x| x)?;
                    let w = s.float_as(dtypes[1], with(if tb { [n, k] } else { [k, n] }), |x| x)?;
                    let bias = if ta { None } else { Some(s.float_as(DType::F32, [n], |x| x)?) };
                    let y = s.graph.matmul_with(x, w, bias, ta, tb)?;
                    s.out(y)
                }));
            }
        }
    }
    cases
}

/// Infinities, of which products of parts of numbers would make NaN.
fn infinities() -> Vec<Case> {
    let both = |name: &str, dtypes, wide: bool, [m, n, k]: [usize; 3]| {
        case("matmul", name.to_owned(), Class::Sum, dtypes, move |s| {
            let at = |i: usize| match i % 97 {
                3 => f64::INFINITY,
                50 => f64::NEG_INFINITY,
                _ => 1.0 + (i % 7) as f64 / 4.0,
            };
            // A row has one of them at most, and nothing is 0, so that no sum is NaN in the reference.
            let rows = (0..m * k).map(|i| if i % k == 5 { at(i / k) } else { at(0) + (i % 5) as f64 }).collect();
            let dtype = s.dtype;
            let x = s.input(Role::Feed, TensorType::new(dtype, [m, k]), rows, false)?;
            let w = s.float_as(if wide { DType::F32 } else { dtype }, [k, n], |x| x.abs() + 0.25)?;
            let y = s.graph.matmul(x, w)?;
            s.aux(y)
        })
    };
    vec![
        both("infinities", WIDE_AND_NARROW, false, [70, 66, 40]),
        both("infinities over a short k", WIDE_AND_NARROW, false, [136, 68, 40]),
        both("infinities, factor 1 f32", &[DType::Bf16, DType::F16], true, [72, 40, 48]),
    ]
}

/// Large enough for the tiles that a GPU uses only where there are many of them.
fn large() -> Vec<Case> {
    [(false, false), (true, true)]
        .map(|(ta, tb)| {
            let name = format!("many large tiles, transposed {ta} {tb}");
            case("matmul", name, Class::Sum, WIDE_AND_NARROW, move |s| {
                let (m, n, k) = (1290, 1300, 40);
                let x = s.float(if ta { [k, m] } else { [m, k] }, |x| x)?;
                let w = s.float(if tb { [n, k] } else { [k, n] }, |x| x)?;
                let y = s.graph.matmul_with(x, w, None, ta, tb)?;
                // Its gradients are products of these shapes too, but long sums that cost more than they show.
                s.aux(y)
            })
        })
        .into()
}

/// Batch, tokens, heads, kv heads, head dim.
const ATTENTIONS: [(usize, usize, usize, usize, usize); 13] = [
    (1, 1, 1, 1, 4),
    (2, 7, 4, 2, 5),
    (1, 67, 2, 2, 16),
    (2, 33, 3, 1, 8),
    (1, 18, 2, 1, 64),
    (3, 2, 1, 1, 1),
    // Widths of which GPUs have kernels of their own; tokens around the rows of their blocks.
    (1, 1, 2, 1, 32),
    (2, 100, 2, 1, 32),
    (1, 17, 2, 2, 64),
    (1, 64, 2, 1, 64),
    (1, 257, 2, 1, 64),
    (2, 17, 1, 1, 128),
    (1, 100, 2, 1, 128),
];

fn attention() -> Vec<Case> {
    let mut cases = Vec::new();
    for (b, t, h, g, d) in ATTENTIONS {
        // The reference takes its time where there are many pairs.
        let dtypes = if t > 200 { WIDE_AND_NARROW } else { FLOATS };
        for causal in [true, false] {
            let scale = 1.0 / (d as f32).sqrt();
            let name = format!("batch {b}, {t} tokens, heads {h}/{g} of {d}, causal {causal}");
            cases.push(case("attention", name.clone(), Class::Weighted, dtypes, move |s| {
                let qkv = s.float([b, t, (h + 2 * g) * d], |x| x)?;
                let y = s.graph.attention(qkv, h, g, causal, scale)?;
                s.out(y)?;
                let lse = s.graph.node(s.graph.producer(y)).results[1];
                s.aux(lse)
            }));
            cases.push(case("attention_grad", name, Class::Gradient, dtypes, move |s| {
                let qkv = s.float([b, t, (h + 2 * g) * d], |x| x)?;
                let dout = s.float([b, t, h * d], |x| x)?;
                s.wrt.clear();
                let y = s.graph.attention(qkv, h, g, causal, scale)?;
                let lse = s.graph.node(s.graph.producer(y)).results[1];
                let op = AttentionGrad { heads: h, kv_heads: g, causal, scale };
                let dqkv = s.graph.push(op.into(), &[qkv, y, lse, dout], Site::caller())?[0];
                s.aux(dqkv)
            }));
        }
    }
    for (b, t, room, start, h, g, d) in [
        (1, 1, 1, 0, 1, 1, 4),
        (2, 1, 70, 66, 4, 2, 8),
        (2, 5, 40, 0, 2, 2, 5),
        (1, 6, 20, 14, 3, 1, 16),
        // More keys than one block of a GPU takes, and room behind them.
        (1, 1, 9, 0, 2, 2, 8),
        (2, 1, 400, 300, 4, 2, 24),
        (2, 3, 400, 255, 2, 1, 20),
        (2, 3, 400, 255, 4, 2, 24),
        (1, 1, 700, 640, 2, 1, 64),
        (1, 2, 700, 90, 2, 2, 64),
        (1, 1, 2400, 2300, 2, 1, 64),
    ] {
        let name = format!("batch {b}, {t} tokens from {start} of {room}, heads {h}/{g} of {d}");
        cases.push(case("attention_cached", name, Class::Sum, FLOATS, move |s| {
            let qkv = s.float([b, t, (h + 2 * g) * d], |x| x)?;
            s.wrt.clear();
            let cache = TensorType::new(s.dtype, [b, room, g * d]);
            let (k, v) = (s.normals(cache.elements()), s.normals(cache.elements()));
            let k = s.input(Role::State, cache.clone(), k, false)?;
            let v = s.input(Role::State, cache, v, false)?;
            let start = s.ints([], &[start])?;
            let [y, new_k, new_v] = s.graph.attention_cached(qkv, k, v, start, h, g, 1.0 / (d as f32).sqrt())?;
            s.graph.update(k, new_k)?;
            s.graph.update(v, new_v)?;
            s.aux(y)
        }));
    }
    cases
}

fn embedding() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, v, d, shape, ids) in [
        ("some ids twice, some never", 11, 6, vec![2, 5], vec![0, 3, 3, 10, 0, 7, 3, 1, 0, 10]),
        ("a scalar id", 4, 3, vec![], vec![2]),
        ("one row, one column", 1, 1, vec![3], vec![0, 0, 0]),
        ("no ids", 3, 2, vec![0], vec![]),
        ("wide rows", 5, 133, vec![4], vec![4, 4, 0, 2]),
    ] {
        let ids: Vec<i32> = ids;
        cases.push(case("embedding", what, Class::Exact, FLOATS, {
            let (shape, ids) = (shape.clone(), ids.clone());
            move |s| {
                let table = s.float([v, d], |x| x)?;
                let ids = s.ints(shape.clone(), &ids)?;
                let y = s.graph.embedding(table, ids)?;
                s.out(y)
            }
        }));
        cases.push(case("embedding_grad", what, Class::Sum, FLOATS, move |s| {
            let dy = s.float([&shape[..], &[d]].concat(), |x| x)?;
            s.wrt.clear();
            let ids = s.ints(shape.clone(), &ids)?;
            let y = s.graph.embedding_grad(ids, dy, v)?;
            s.aux(y)
        }));
    }
    cases
}

fn cross_entropy() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, d, v) in [(1, 1, 1), (5, 8, 3), (9, 16, 517), (70, 33, 40), (88, 64, 200), (296, 72, 328)] {
        let name = format!("{n} rows of {d}, {v} classes");
        let targets: Vec<i32> =
            (0..n as i32).map(|i| if i % 4 == 2 { -1 - i } else { (i * 37 + 5) % v as i32 }).collect();
        cases.push(case("linear_cross_entropy", name.clone(), Class::Sum, FLOATS, {
            let targets = targets.clone();
            move |s| {
                let (x, w) = (s.float([n, d], |x| x)?, s.float([v, d], |x| 0.5 * x)?);
                let targets = s.ints([n], &targets)?;
                let loss = s.graph.linear_cross_entropy(x, w, targets)?;
                if v == 1 {
                    // The only class is certain: the gradient is 0 but for the rounding of lse.
                    s.wrt.clear();
                }
                s.out(loss)?;
                let lse = s.graph.node(s.graph.producer(loss)).results[1];
                s.aux(lse)
            }
        }));
        if v == 1 {
            continue;
        }
        cases.push(case("linear_cross_entropy_grad", name, Class::Gradient, FLOATS, move |s| {
            let (x, w) = (s.float([n, d], |x| x)?, s.float([v, d], |x| 0.5 * x)?);
            let dloss = s.float_as(DType::F32, [n], |x| x)?;
            s.wrt.clear();
            let targets = s.ints([n], &targets)?;
            let loss = s.graph.linear_cross_entropy(x, w, targets)?;
            let lse = s.graph.node(s.graph.producer(loss)).results[1];
            let grads = s.graph.linear_cross_entropy_grad(x, w, targets, lse, dloss)?;
            grads.into_iter().try_for_each(|v| s.aux(v))
        }));
    }
    cases
}

pub(super) fn cases() -> Vec<Case> {
    [matmul(), mixed(), infinities(), large(), attention(), embedding(), cross_entropy()]
        .into_iter()
        .flatten()
        .collect()
}
