//! Distillation from a whole teacher and from what is kept of one.

use moebius_ir::{DType, Result, TensorType, Value};

use super::{Case, FLOATS, case};
use crate::verify::sketch::Sketch;
use crate::verify::tolerance::Class;

/// Rows, their width, the teacher's, classes, kept tokens, temperature.
const SIZES: [(usize, usize, usize, usize, usize, f32); 6] = [
    (1, 1, 1, 2, 1, 1.0),
    (5, 8, 3, 3, 3, 2.0),
    (9, 16, 24, 517, 40, 1.0),
    (70, 33, 20, 40, 7, 0.5),
    // All tokens are kept, and there is no tail.
    (66, 12, 5, 70, 70, 1.0),
    (3, 10, 12, 300, 1, 3.0),
];

fn targets(n: usize, v: usize) -> Vec<i32> {
    (0..n as i32).map(|i| if i % 4 == 2 { -1 - i } else { (i * 37 + 5) % v as i32 }).collect()
}

/// The student, `[x, w]` and its targets.
fn student(s: &mut Sketch, n: usize, d: usize, v: usize) -> Result<([Value; 2], Value)> {
    let (x, w) = (s.float([n, d], |x| x)?, s.float([v, d], |x| 0.5 * x)?);
    Ok(([x, w], s.ints([n], &targets(n, v))?))
}

/// A whole teacher.
fn teacher(s: &mut Sketch, n: usize, width: usize, v: usize) -> Result<[Value; 2]> {
    let (x, w) = (TensorType::new(s.dtype, [n, width]), TensorType::new(s.dtype, [v, width]));
    let values = [s.normals(x.elements()), s.normals(w.elements())];
    let [x_values, w_values] = values;
    Ok([s.fixed(x, x_values)?, s.fixed(w, w_values)?])
}

/// What is kept of a teacher: `k` tokens that are spread over all, in no order, and nothing of a tail where these are all.
fn kept(s: &mut Sketch, n: usize, v: usize, k: usize) -> Result<[Value; 3]> {
    // A step without a common divisor with v meets every token once.
    let step = (v / 3..)
        .find(|&step| step > 0 && (1..=step).all(|d| d == 1 || !step.is_multiple_of(d) || !v.is_multiple_of(d)));
    let step = step.unwrap_or(1);
    let id = |row: usize, i: usize| ((row * 7 + i * step) % v) as i32;
    let ids: Vec<i32> = (0..n * k).map(|at| id(at / k, at % k)).collect();
    let logits = s.normals(n * (k + 1));
    let (mut log_p, mut tail) = (Vec::new(), Vec::new());
    for row in logits.chunks(k + 1) {
        let others = if k == v { f64::NEG_INFINITY } else { row[k] };
        let all = (row[..k].iter().map(|l| l.exp()).sum::<f64>() + others.exp()).ln();
        log_p.extend(row[..k].iter().map(|l| l - all));
        tail.push(others - all);
    }
    let ids = s.ints([n, k], &ids)?;
    Ok([ids, s.fixed(TensorType::f32([n, k]), log_p)?, s.fixed(TensorType::f32([n]), tail)?])
}

/// `[lse, soft_lse, other_lse]` of the op whose loss this is.
fn lse(s: &Sketch, loss: Value) -> [Value; 3] {
    let results = &s.graph.node(s.graph.producer(loss)).results;
    [results[2], results[3], results[4]]
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, d, width, v, k, t) in SIZES {
        let name = format!("{n} rows of {d}, teacher of {width}, {v} classes, temperature {t}");
        // What is left where the logarithms of both cancel is as inexact as they, and grows with the temperature.
        let terms = f64::from(t * t) * 2.0;
        let whole = case("linear_distillation", name.clone(), Class::Sum, FLOATS, move |s| {
            let (own, targets) = student(s, n, d, v)?;
            let of = teacher(s, n, width, v)?;
            let [loss, kd] = s.graph.linear_distillation(own, targets, of, t)?;
            s.out(loss)?;
            s.out(kd)?;
            lse(s, loss).into_iter().try_for_each(|v| s.aux(v))
        });
        cases.push(whole.of_terms(terms, 0.0));
        cases.push(case("linear_distillation_grad", name, Class::Gradient, FLOATS, move |s| {
            let (own, targets) = student(s, n, d, v)?;
            let of = teacher(s, n, width, v)?;
            let cotangents = [s.float_as(DType::F32, [n], |x| x)?, s.float_as(DType::F32, [n], |x| x)?];
            s.wrt.clear();
            let [loss, _] = s.graph.linear_distillation(own, targets, of, t)?;
            let lse = lse(s, loss);
            let grads = s.graph.linear_distillation_grad(own, targets, of, lse, cotangents, t)?;
            grads.into_iter().try_for_each(|v| s.aux(v))
        }));
        let name = format!("{n} rows of {d}, {k} of {v} classes kept, temperature {t}");
        let part = case("linear_distillation_cached", name.clone(), Class::Sum, FLOATS, move |s| {
            let (own, targets) = student(s, n, d, v)?;
            let of = kept(s, n, v, k)?;
            let [loss, kd] = s.graph.linear_distillation_cached(own, targets, of, t)?;
            s.out(loss)?;
            s.out(kd)?;
            lse(s, loss).into_iter().try_for_each(|v| s.aux(v))
        });
        cases.push(part.of_terms(terms, 0.0));
        cases.push(case("linear_distillation_cached_grad", name, Class::Gradient, FLOATS, move |s| {
            let (own, targets) = student(s, n, d, v)?;
            let of = kept(s, n, v, k)?;
            let cotangents = [s.float_as(DType::F32, [n], |x| x)?, s.float_as(DType::F32, [n], |x| x)?];
            s.wrt.clear();
            let [loss, _] = s.graph.linear_distillation_cached(own, targets, of, t)?;
            let lse = lse(s, loss);
            let grads = s.graph.linear_distillation_cached_grad(own, targets, of, lse, cotangents, t)?;
            grads.into_iter().try_for_each(|v| s.aux(v))
        }));
    }
    cases
}
