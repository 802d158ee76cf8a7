//! Gradients against differences, in f64, by the exact reference; and what cannot be differentiated says so.

use std::collections::BTreeSet;

use moebius_ir::ops::{AttentionGrad, Balance, BinaryFn, Order, Router};
use moebius_ir::reference::{Precision, run};
use moebius_ir::{DType, Error, Graph, Op, Site, TensorType, Value, gradients};
use moebius_tests::layers::{self, Moe};
use moebius_tests::{Sketch, cases, slope};

/// Checks the gradient of the sketch's loss by a central difference along one direction.
fn check(title: &str, mut sketch: Sketch) -> Result<(), String> {
    let loss = sketch.differentiate().map_err(|e| format!("{title}: {e}"))?;
    slope(title, &mut sketch, loss)
}

fn slope(title: &str, sketch: &mut Sketch, loss: Value) -> Result<(), String> {
    let found = slope::slope(sketch, loss).map_err(|e| format!("{title}: {e}"))?;
    if found.agrees() { Ok(()) } else { Err(format!("{title}: {found:?}")) }
}

fn group(name: &str) {
    let mut failures = Vec::new();
    let mut checked = 0;
    for case in cases::group(name).unwrap() {
        // In f64 the dtypes are names, but a cast rounds in none of them: one narrow one is enough.
        for &dtype in case.dtypes.iter().filter(|d| **d != DType::F16) {
            let sketch = case.sketch(dtype).unwrap();
            if case.smooth && sketch.differentiable() {
                checked += 1;
                failures.extend(check(&case.title(dtype), sketch).err());
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    assert!(checked > 0, "nothing to check in {name}");
}

macro_rules! groups {
    ($($group:ident),*) => { $(#[test] fn $group() { group(stringify!($group)); })* };
}

groups! { elementwise, movement, norms, dense, chains, distillation, router, sparse, optimizer }

/// A check that accepted any gradient would accept this one.
#[test]
fn a_wrong_gradient_is_noticed() {
    let mut s = Sketch::new(DType::F32);
    let build = |s: &mut Sketch| {
        let x = s.float([4], |x| x)?;
        let y = s.graph.square(x)?;
        s.out(y)?;
        let loss = s.loss()?;
        let [right] = gradients(&mut s.graph, loss, &[x])?[..] else { unreachable!("one input, one gradient") };
        let wrong = s.graph.mul_scalar(right, 1.0001)?;
        s.graph.output("d.x0", wrong)?;
        Ok::<_, Error>(loss)
    };
    let loss = build(&mut s).unwrap();
    assert!(slope("wrong", &mut s, loss).is_err());
}

const LAYER: Moe = Moe { width: 6, hidden: 8, experts: 5, k: 2, capacity: None, renormalise: true };

/// The smallest distance between two logits of a token: a small step cannot change an order.
fn assert_margin(s: &Sketch, logits: Value) {
    let run = run(&s.graph, &s.inputs, Precision::Exact).unwrap();
    let logits = run.value(logits);
    for row in logits.data.chunks(logits.ty.shape.last()) {
        for (i, a) in row.iter().enumerate() {
            assert!(row[..i].iter().all(|b| (a - b).abs() > 2e-4), "choose another seed: {row:?}");
        }
    }
}

fn moe_sketch(layer: Moe, residual: bool) -> Sketch {
    let mut s = Sketch::new(DType::F32).seeded(40);
    let build = |s: &mut Sketch| {
        let x = s.float([9, layer.width], |x| x)?;
        let result = if residual {
            layers::residual_moe(s, "layer", x, layer, None)?
        } else {
            layers::moe(s, "layer", x, layer)?
        };
        s.out(result.y)?;
        s.out(result.load_balancing_loss)?;
        s.out(result.z_loss)?;
        Ok::<_, Error>(result.logits)
    };
    let logits = build(&mut s).unwrap();
    assert_margin(&s, logits);
    s
}

#[test]
fn moe_layers() {
    for (what, layer) in [
        ("top-2", LAYER),
        ("top-1", Moe { k: 1, renormalise: false, ..LAYER }),
        ("k = E", Moe { k: 5, ..LAYER }),
        ("one expert", Moe { k: 1, experts: 1, ..LAYER }),
        ("with capacity", Moe { capacity: Some(2), ..LAYER }),
    ] {
        check(what, moe_sketch(layer, false)).unwrap();
        check(&format!("residual, {what}"), moe_sketch(layer, true)).unwrap();
    }
}

#[test]
fn attention_block() {
    let mut s = Sketch::new(DType::F32);
    let x = s.float([2, 7, 8], |x| x).unwrap();
    let y = layers::attention_block(&mut s, "attention", x, 4, 2).unwrap();
    s.out(y).unwrap();
    check("attention block", s).unwrap();
}

#[test]
fn cross_entropy_head_and_a_whole_model() {
    let mut s = Sketch::new(DType::F32);
    let build = |s: &mut Sketch| {
        let (x, w) = (s.float([6, 8], |x| x)?, s.float([11, 8], |x| x)?);
        let gamma = s.float([8], |x| x + 1.0)?;
        let targets = s.ints([6], &[0, 3, -1, 10, 3, 7])?;
        let h = s.graph.rms_norm(x, gamma, 1e-5)?;
        let losses = s.graph.linear_cross_entropy(h, w, targets)?;
        let loss = s.graph.mean_all(losses)?;
        s.out(loss)
    };
    build(&mut s).unwrap();
    check("linear cross entropy head", s).unwrap();

    let mut s = Sketch::new(DType::F32).seeded(3);
    let loss = layers::transformer(&mut s, 2, 5, 13, Moe { width: 8, ..LAYER }).unwrap();
    s.out(loss).unwrap();
    check("transformer", s).unwrap();
}

/// A use of an op through which no gradient goes, its float result, and the input the gradient is asked for.
type Refusing = fn(&mut Sketch) -> moebius_ir::Result<(Value, Value)>;

fn refusing() -> Vec<(&'static str, Refusing)> {
    fn slots(s: &mut Sketch) -> moebius_ir::Result<Value> {
        let index = s.ints([4, 1], &[0, 1, 1, 0])?;
        Ok(s.graph.assign(index, None, 2, None, Order::TokenMajor)?[2])
    }
    vec![
        ("binary", |s| {
            let (x, d) = (s.float([3], |x| x)?, s.float([3], |x| x)?);
            Ok((s.graph.binary(BinaryFn::SiluGrad, x, d)?, x))
        }),
        ("softmax_grad", |s| {
            let (y, d) = (s.float([3], |x| x)?, s.float([3], |x| x)?);
            Ok((s.graph.softmax_grad(y, d)?, y))
        }),
        ("layer_norm", |s| {
            let (x, gamma, beta) = (s.float([2, 3], |x| x)?, s.float([3], |x| x)?, s.float([3], |x| x)?);
            let y = s.graph.layer_norm(x, gamma, beta, 1e-5)?;
            Ok((s.graph.node(s.graph.producer(y)).results[1], x))
        }),
        ("layer_norm_grad", |s| {
            let (x, gamma, m) = (s.float([2, 3], |x| x)?, s.float([3], |x| x)?, s.float([2], |x| x)?);
            Ok((s.graph.layer_norm_grad(x, gamma, m, m, x)?[0], x))
        }),
        ("rms_norm", |s| {
            let (x, gamma) = (s.float([2, 3], |x| x)?, s.float([3], |x| x)?);
            let y = s.graph.rms_norm(x, gamma, 1e-5)?;
            Ok((s.graph.node(s.graph.producer(y)).results[1], x))
        }),
        ("rms_norm_grad", |s| {
            let (x, gamma, r) = (s.float([2, 3], |x| x)?, s.float([3], |x| x)?, s.float([2], |x| x)?);
            Ok((s.graph.rms_norm_grad(x, gamma, r, x)?[1], gamma))
        }),
        ("attention", |s| {
            let qkv = s.float([1, 3, 6], |x| x)?;
            let y = s.graph.attention(qkv, 1, 1, true, 1.0)?;
            Ok((s.graph.node(s.graph.producer(y)).results[1], qkv))
        }),
        ("attention_grad", |s| {
            let (qkv, out, lse) = (s.float([1, 3, 6], |x| x)?, s.float([1, 3, 2], |x| x)?, s.float([1, 1, 3], |x| x)?);
            let op = AttentionGrad { heads: 1, kv_heads: 1, causal: true, scale: 1.0 };
            Ok((s.graph.push(op.into(), &[qkv, out, lse, out], Site::caller())?[0], qkv))
        }),
        ("attention_cached", |s| {
            let (qkv, k, v) = (s.float([1, 1, 6], |x| x)?, s.float([1, 3, 2], |x| x)?, s.float([1, 3, 2], |x| x)?);
            let start = s.ints([], &[0])?;
            Ok((s.graph.attention_cached(qkv, k, v, start, 1, 1, 1.0)?[0], qkv))
        }),
        ("embedding_grad", |s| {
            let (ids, dy) = (s.ints([2], &[0, 1])?, s.float([2, 3], |x| x)?);
            Ok((s.graph.embedding_grad(ids, dy, 4)?, dy))
        }),
        ("linear_cross_entropy", |s| {
            let (x, w, t) = (s.float([2, 3], |x| x)?, s.float([4, 3], |x| x)?, s.ints([2], &[0, 1])?);
            let y = s.graph.linear_cross_entropy(x, w, t)?;
            Ok((s.graph.node(s.graph.producer(y)).results[1], x))
        }),
        ("linear_cross_entropy_grad", |s| {
            let (x, w, t) = (s.float([2, 3], |x| x)?, s.float([4, 3], |x| x)?, s.ints([2], &[0, 1])?);
            let r = s.float([2], |x| x)?;
            Ok((s.graph.linear_cross_entropy_grad(x, w, t, r, r)?[0], x))
        }),
        ("linear_distillation", |s| {
            let (x, w, t) = (s.float([2, 3], |x| x)?, s.float([4, 3], |x| x)?, s.ints([2], &[0, 1])?);
            let teacher = s.float([2, 3], |x| x)?;
            Ok((s.graph.linear_distillation([x, w], t, [teacher, w], 1.0)?[1], teacher))
        }),
        ("linear_distillation_grad", |s| {
            let (x, w, t) = (s.float([2, 3], |x| x)?, s.float([4, 3], |x| x)?, s.ints([2], &[0, 1])?);
            let r = s.float([2], |x| x)?;
            Ok((s.graph.linear_distillation_grad([x, w], t, [x, w], [r; 3], [r; 2], 1.0)?[0], x))
        }),
        ("linear_distillation_cached", |s| {
            let (x, w, t) = (s.float([2, 3], |x| x)?, s.float([4, 3], |x| x)?, s.ints([2], &[0, 1])?);
            let (ids, p, tail) = (s.ints([2, 1], &[0, 3])?, s.float([2, 1], |x| x)?, s.float([2], |x| x)?);
            Ok((s.graph.linear_distillation_cached([x, w], t, [ids, p, tail], 1.0)?[1], p))
        }),
        ("linear_distillation_cached_grad", |s| {
            let (x, w, t) = (s.float([2, 3], |x| x)?, s.float([4, 3], |x| x)?, s.ints([2], &[0, 1])?);
            let (ids, p, r) = (s.ints([2, 1], &[0, 3])?, s.float([2, 1], |x| x)?, s.float([2], |x| x)?);
            Ok((s.graph.linear_distillation_cached_grad([x, w], t, [ids, p, r], [r; 3], [r; 2], 1.0)?[0], x))
        }),
        ("route_grad", |s| {
            let (x, d, zero) = (s.float([2, 3], |x| x)?, s.float([2, 1], |x| x)?, s.float([], |x| x)?);
            let index = s.ints([2, 1], &[0, 2])?;
            Ok((s.graph.route_grad(x, index, d, zero, zero, &Router::softmax(1, Balance::FirstChoice))?, x))
        }),
        ("segment_sum", |s| {
            let offsets = slots(s)?;
            let rows = s.float([4, 3], |x| x)?;
            Ok((s.graph.segment_sum(rows, offsets)?, rows))
        }),
        ("adamw", |s| {
            let (p, one) = (s.float([3], |x| x)?, s.float([], |x| x)?);
            let grad = s.graph.square(p)?;
            let rule = moebius_ir::ops::Adamw {
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                rounded: false,
                moments: moebius_ir::Moments::F32,
                stream: 0,
            };
            let (m, v) = (s.float([3], |x| x)?, s.float([3], |x| x)?);
            Ok((s.graph.adamw(rule, p, grad, m, v, one, one, one)?[0], p))
        }),
    ]
}

#[test]
fn what_has_no_gradient_says_so_and_a_severed_path_is_an_error() {
    for (op, build) in refusing() {
        let mut s = Sketch::new(DType::F32);
        let attempt = |s: &mut Sketch| {
            let (y, x) = build(s)?;
            let loss = s.graph.sum_all(y)?;
            gradients(&mut s.graph, loss, &[x])
        };
        match attempt(&mut s) {
            Err(Error::NotDifferentiable { op: named, site, .. }) => {
                assert_eq!(named, op);
                assert!(site.file.ends_with("gradcheck.rs"), "{op}: {site}");
            }
            other => panic!("{op}: {other:?}"),
        }
        // The same op off the path is no obstacle.
        let mut s = Sketch::new(DType::F32);
        let beside = |s: &mut Sketch| {
            let (y, _) = build(s)?;
            s.aux(y)?;
            let x = s.float([2], |x| x)?;
            let square = s.graph.square(x)?;
            let loss = s.graph.sum_all(square)?;
            gradients(&mut s.graph, loss, &[x])
        };
        beside(&mut s).unwrap_or_else(|e| panic!("{op}: {e}"));
    }
    // A chain made by the fusion pass can no longer be differentiated.
    let mut g = Graph::new();
    let x = g.feed("x", TensorType::f32([3])).unwrap();
    let y = g.exp(x).unwrap();
    let loss = g.sum_all(y).unwrap();
    g.output("loss", loss).unwrap();
    let mut fused = moebius_ir::passes::optimise(&g).unwrap();
    let (loss, x) = (fused.output_named("loss").unwrap(), fused.input_named("x").unwrap());
    let refused = gradients(&mut fused, loss, &[x]).unwrap_err();
    assert!(matches!(refused, Error::NotDifferentiable { op: "elementwise", .. }), "{refused}");
}

/// Every op is checked by differences, or refuses, or has no float operand to be differentiated by.
#[test]
fn no_op_is_left_out() {
    let mut seen: BTreeSet<&str> = refusing().into_iter().map(|(op, _)| op).collect();
    for case in cases::groups().into_iter().flat_map(|(_, cases)| cases) {
        if case.smooth && case.sketch(case.dtypes[0]).unwrap().differentiable() {
            seen.insert(case.op);
        }
    }
    let left: Vec<&str> = Op::NAMES.iter().copied().filter(|op| !seen.contains(op)).collect();
    assert_eq!(left, ["constant", "random", "compare", "assign"]);
}

#[test]
fn constant_choices_have_the_gradient_zero() {
    // Through a compare, an integer cast and an assign no cotangent comes: zeros, not an error, as they are piecewise constant.
    let mut s = Sketch::new(DType::F32);
    let build = |s: &mut Sketch| {
        let x = s.float([4], |x| x)?;
        let g = &mut s.graph;
        let zero = g.scalar(0.0)?;
        let mask = g.compare(moebius_ir::ops::CompareFn::Gt, x, zero)?;
        let mask = g.cast(mask, DType::F32)?;
        let loss = g.sum_all(mask)?;
        let grads = gradients(g, loss, &[x])?;
        Ok::<_, Error>(grads[0])
    };
    let d = build(&mut s).unwrap();
    let run = run(&s.graph, &s.inputs, Precision::Exact).unwrap();
    assert_eq!(run.value(d).data, [0.0; 4]);
}

#[test]
fn gradients_refuse_what_is_no_scalar_or_no_float() {
    let mut g = Graph::new();
    let x = g.feed("x", TensorType::f32([3])).unwrap();
    let ids = g.feed("ids", TensorType::i32([3])).unwrap();
    assert!(matches!(gradients(&mut g, x, &[x]), Err(Error::Gradients { .. })));
    let loss = g.sum_all(x).unwrap();
    assert!(matches!(gradients(&mut g, loss, &[ids]), Err(Error::Gradients { .. })));
    let other = g.feed("other", TensorType::f32([2])).unwrap();
    let zeros = gradients(&mut g, loss, &[other]).unwrap();
    assert_eq!(g.shape(zeros[0]), [2]);
}
