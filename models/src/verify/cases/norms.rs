//! Reductions, softmax and norms, with their gradients as ops of their own.

use moebius_ir::TensorType;
use moebius_ir::ops::ReduceFn;

use super::{Case, FLOATS, ONE, case};
use crate::verify::tolerance::Class;

fn reduce() -> Vec<Case> {
    let mut cases = Vec::new();
    for f in ReduceFn::ALL {
        for axes in [vec![0], vec![1], vec![2], vec![0, 1], vec![1, 2], vec![0, 1, 2]] {
            cases.push(case("reduce", format!("{f:?} over {axes:?}").to_lowercase(), Class::Sum, FLOATS, move |s| {
                let x = s.float([5, 9, 17], |x| x)?;
                let y = s.graph.reduce(f, x, &axes)?;
                s.out(y)
            }));
        }
        let name = format!("{f:?} of long rows and columns").to_lowercase();
        cases.push(case("reduce", name, Class::Sum, FLOATS, move |s| {
            let (x, one) = (s.float([3, 2050], |x| x + 0.1)?, s.float([1, 1], |x| x)?);
            let tall = s.float([611, 5], |x| x + 0.1)?;
            for (v, axis) in [(x, 0), (x, 1), (one, 0), (tall, 0)] {
                let y = s.graph.reduce(f, v, &[axis])?;
                s.out(y)?;
            }
            Ok(())
        }));
    }
    cases.push(
        case("reduce", "max of ties and nan", Class::Exact, FLOATS, |s| {
            let x = s.float([6, 10], |x| x.round())?;
            let y = s.graph.reduce(ReduceFn::Max, x, &[1])?;
            s.out(y)?;
            let hard = s.fixed(TensorType::new(s.dtype, [2, 2]), vec![f64::NAN, 1.0, 2.0, f64::NEG_INFINITY])?;
            let z = s.graph.reduce(ReduceFn::Max, hard, &[1])?;
            s.aux(z)
        })
        .rough(),
    );
    cases
}

fn softmax() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in [vec![4, 37], vec![2, 3, 1], vec![300], vec![3, 8]] {
        cases.push(case("softmax", format!("{shape:?}"), Class::Sum, FLOATS, {
            let shape = shape.clone();
            move |s| {
                let x = s.float(shape.clone(), |x| 2.0 * x)?;
                let y = s.graph.softmax(x)?;
                s.out(y)
            }
        }));
        cases.push(case("softmax_grad", format!("{shape:?}"), Class::Sum, FLOATS, move |s| {
            let (y, dy) = (s.float(shape.clone(), f64::abs)?, s.float(shape.clone(), |x| x)?);
            s.wrt.clear();
            let dx = s.graph.softmax_grad(y, dy)?;
            s.aux(dx)
        }));
    }
    cases.push(case("softmax", "of large and infinite numbers", Class::Sum, ONE, |s| {
        let hard = vec![1e30, 1e30, 0.0, f64::NEG_INFINITY, 3.0, 2.0, -1e30, -1e30, -1e30];
        let x = s.fixed(TensorType::f32([3, 3]), hard)?;
        let y = s.graph.softmax(x)?;
        s.aux(y)
    }));
    cases
}

fn norms() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in [vec![6, 40], vec![2, 3, 1], vec![7], vec![3, 515], vec![2056]] {
        let d = shape[shape.len() - 1];
        let rows = TensorType::f32(shape[..shape.len() - 1].to_vec());
        let name = format!("{shape:?}");
        // With one column the result is beta whatever x is: nothing to tell by differences of x.
        let rough = d == 1;
        // A root mean square norm of one column has a gradient that rounding does not drown only with a large eps.
        let eps = if d == 1 { 0.5 } else { 1e-5 };
        let f32 = moebius_ir::DType::F32;
        let mut add = |c: Case| cases.push(if rough { c.rough() } else { c });
        add(case("layer_norm", name.clone(), Class::Sum, FLOATS, {
            let shape = shape.clone();
            move |s| {
                let x = s.float(shape.clone(), |x| 2.0 * x + 0.5)?;
                let (gamma, beta) = (s.float_as(f32, [d], |x| x + 1.0)?, s.float_as(f32, [d], |x| x)?);
                let y = s.graph.layer_norm(x, gamma, beta, 1e-5)?;
                s.out(y)?;
                let node = s.graph.producer(y);
                let (mean, rstd) = (s.graph.node(node).results[1], s.graph.node(node).results[2]);
                s.aux(mean)?;
                s.aux(rstd)
            }
        }));
        add(case("layer_norm_grad", name.clone(), Class::Sum, FLOATS, {
            let (shape, rows) = (shape.clone(), rows.clone());
            move |s| {
                let (x, dy) = (s.float(shape.clone(), |x| x)?, s.float(shape.clone(), |x| x)?);
                let gamma = s.float_as(f32, [d], |x| x + 1.0)?;
                let (mean, rstd) = (
                    s.float_as(f32, rows.shape.clone(), |x| 0.1 * x)?,
                    s.float_as(f32, rows.shape.clone(), |x| x.abs() + 0.5)?,
                );
                s.wrt.clear();
                let grads = s.graph.layer_norm_grad(x, gamma, mean, rstd, dy)?;
                grads.into_iter().try_for_each(|v| s.aux(v))
            }
        }));
        add(case("rms_norm", name.clone(), Class::Sum, FLOATS, {
            let shape = shape.clone();
            move |s| {
                let (x, gamma) = (s.float(shape.clone(), |x| 2.0 * x + 0.5)?, s.float_as(f32, [d], |x| x + 1.0)?);
                let y = s.graph.rms_norm(x, gamma, eps)?;
                s.out(y)?;
                let rstd = s.graph.node(s.graph.producer(y)).results[1];
                s.aux(rstd)
            }
        }));
        add(case("rms_norm_grad", name, Class::Sum, FLOATS, move |s| {
            let (x, dy) = (s.float(shape.clone(), |x| x)?, s.float(shape.clone(), |x| x)?);
            let gamma = s.float_as(f32, [d], |x| x + 1.0)?;
            let rstd = s.float_as(f32, rows.shape.clone(), |x| x.abs() + 0.5)?;
            s.wrt.clear();
            let grads = s.graph.rms_norm_grad(x, gamma, rstd, dy)?;
            grads.into_iter().try_for_each(|v| s.aux(v))
        }));
    }
    cases.push(case("layer_norm", "of equal elements", Class::Sum, ONE, |s| {
        let x = s.fixed(TensorType::f32([2, 9]), vec![3.0; 18])?;
        let (gamma, beta) =
            (s.float_as(moebius_ir::DType::F32, [9], |x| x)?, s.float_as(moebius_ir::DType::F32, [9], |x| x)?);
        let y = s.graph.layer_norm(x, gamma, beta, 1e-5)?;
        s.out(y)
    }));
    cases
}

pub(super) fn cases() -> Vec<Case> {
    [reduce(), softmax(), norms()].into_iter().flatten().collect()
}
