//! The global norm and the optimizer step.

use moebius_ir::ops::{Adamw, AdamwState};
use moebius_ir::{DType, Moments, Result, Role, TensorType};

use super::{Case, FLOATS, case};
use crate::verify::sketch::Sketch;
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
        for moments in Moments::ALL {
            for (shape, copy) in
                [(vec![37, 9], None), (vec![], None), (vec![37, 9], Some(DType::Bf16)), (vec![3], Some(DType::F16))]
            {
                let copied = copy.map_or(String::new(), |dtype| format!(", with a copy in {dtype}"));
                let kept = if moments == Moments::F32 { String::new() } else { format!(", moments in {moments}") };
                let rule = Adamw {
                    beta1: 0.9,
                    beta2: 0.95,
                    eps: 1e-8,
                    weight_decay: decay,
                    rounded: false,
                    moments,
                    stream: 9,
                };
                let name = format!("{what}, {shape:?}{copied}{kept}");
                cases.push(case("adamw", name, Class::Sum, FLOATS, move |s| {
                    adamw(s, rule.clone(), &shape, copy, [lr, step, scale])
                }));
            }
        }
    }
    cases
}

/// A step on a tensor of this shape, with a copy of the parameter in `copy`.
fn adamw(s: &mut Sketch, rule: Adamw, shape: &[usize], copy: Option<DType>, scalars: [f64; 3]) -> Result<()> {
    let ty = TensorType::f32(shape);
    let n = ty.elements();
    let (p, m) = (s.normals(n), s.normals(n).into_iter().map(|x| 0.1 * x).collect());
    let v = s.normals(n).into_iter().map(|x| 0.01 * x * x + 1e-4).collect();
    let moment = rule.moments.ty(&ty.shape);
    let rounded =
        copy.map(|dtype| s.input(Role::State, TensorType::new(dtype, shape), p.clone(), false)).transpose()?;
    let param = s.input(Role::Parameter, ty, p, false)?;
    let m = s.input(Role::State, moment.clone(), m, false)?;
    let v = s.input(Role::State, moment, v, false)?;
    let grad = s.float(shape, |x| x)?;
    s.wrt.clear();
    let [lr, step, scale] = scalars.map(|x| s.fixed(TensorType::f32([]), vec![x]));
    let old = AdamwState { param, m, v, rounded };
    let new = s.graph.adamw_of(rule, old, grad, [lr?, step?, scale?])?;
    let kept = old.rounded.zip(new.rounded);
    [(param, new.param), (m, new.m), (v, new.v)]
        .into_iter()
        .chain(kept)
        .try_for_each(|(old, new)| s.graph.update(old, new))
}
