//! The global norm and the optimizer step.

use moebius_ir::ops::Adamw;
use moebius_ir::{DType, Role, TensorType};

use super::{Case, FLOATS, case};
use crate::verify::tolerance::Class;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("global_norm", "of tensors of several dtypes", Class::Sum, FLOATS, |s| {
            let (a, b) = (s.float([5, 70], |x| x)?, s.float_as(DType::F32, [3], |x| 2.0 * x)?);
            let c = s.float([], |x| x)?;
            let norm = s.graph.global_norm(&[a, b, c])?;
            s.out(norm)
        }),
        case("global_norm", "of many elements", Class::Sum, FLOATS, |s| {
            let a = s.float([20_001], |x| x)?;
            let norm = s.graph.global_norm(&[a])?;
            s.out(norm)
        }),
        case("global_norm", "of zeros", Class::Sum, FLOATS, |s| {
            let a = s.float([4], |_| 0.0)?;
            let norm = s.graph.global_norm(&[a])?;
            s.out(norm)
        })
        .rough(),
        case("global_norm", "of a nan", Class::Sum, FLOATS, |s| {
            let a = s.fixed(TensorType::new(s.dtype, [3]), vec![1.0, f64::NAN, f64::INFINITY])?;
            let norm = s.graph.global_norm(&[a])?;
            s.aux(norm)
        }),
    ];
    for (what, lr, step, scale, decay) in [
        ("the first step", 1e-2, 1.0, 1.0, 0.1),
        ("a late step with clipping", 3e-3, 1000.0, 0.25, 0.0),
        ("a learning rate of 0", 0.0, 7.0, 1.0, 0.1),
        ("a gradient scale that is not finite", 1e-2, 3.0, f64::NAN, 0.1),
        ("a learning rate that is not finite", f64::INFINITY, 3.0, 1.0, 0.1),
        ("step 0", 1e-2, 0.0, 1.0, 0.1),
    ] {
        for (shape, copy) in
            [(vec![37, 9], None), (vec![], None), (vec![37, 9], Some(DType::Bf16)), (vec![3], Some(DType::F16))]
        {
            let copied = copy.map_or(String::new(), |dtype| format!(", with a copy in {dtype}"));
            cases.push(case("adamw", format!("{what}, {shape:?}{copied}"), Class::Sum, FLOATS, move |s| {
                let ty = TensorType::f32(shape.clone());
                let n = ty.elements();
                let (p, m) = (s.normals(n), s.normals(n).into_iter().map(|x| 0.1 * x).collect());
                let v = s.normals(n).into_iter().map(|x| 0.01 * x * x + 1e-4).collect();
                let copy =
                    copy.map(|dtype| s.input(Role::State, TensorType::new(dtype, shape.clone()), p.clone(), false));
                let p = s.input(Role::Parameter, ty.clone(), p, false)?;
                let m = s.input(Role::State, ty.clone(), m, false)?;
                let v = s.input(Role::State, ty, v, false)?;
                let grad = s.float(shape.clone(), |x| x)?;
                s.wrt.clear();
                let [lr, step, scale] = [lr, step, scale].map(|x| s.fixed(TensorType::f32([]), vec![x]));
                let rule = Adamw { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: decay, rounded: false };
                let (lr, step, scale) = (lr?, step?, scale?);
                let [new_p, new_m, new_v] = match copy {
                    None => s.graph.adamw(rule, p, grad, m, v, lr, step, scale)?,
                    Some(copy) => {
                        let copy = copy?;
                        let [p, m, v, new] = s.graph.adamw_rounded(rule, p, grad, m, v, lr, step, scale, copy)?;
                        s.graph.update(copy, new)?;
                        [p, m, v]
                    }
                };
                s.graph.update(p, new_p)?;
                s.graph.update(m, new_m)?;
                s.graph.update(v, new_v)
            }));
        }
    }
    cases
}
