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
            for (shape, copy) in [
                (vec![37, 9], None),
                (vec![], None),
                (vec![37, 9], Some(DType::Bf16)),
                (vec![3], Some(DType::F16)),
                // More than one block of a GPU's threads.
                (vec![4361], None),
            ] {
                let copied = copy.map_or(String::new(), |dtype| format!(", with a copy in {dtype}"));
                let kept = if moments == Moments::F32 { String::new() } else { format!(", moments in {moments}") };
                // Which code a number becomes must not depend on how sums are rounded: with halves and short gradients they are not.
                let [beta1, beta2] = if moments == Moments::Eight { [0.5; 2] } else { [0.9, 0.95] };
                let rule = Adamw { beta1, beta2, eps: 1e-8, weight_decay: decay, rounded: false, moments, stream: 9 };
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
    let p = s.normals(n);
    let is_coded = rule.moments == Moments::Eight;
    // From the start, and from codes of all sizes.
    let code = |x: f64| if scalars[1] == 1.0 { 0.0 } else { f64::from((x.abs() * 1e12) as u64 as u32) };
    let moment = rule.moments.ty(&ty.shape);
    let (m, v) = (s.normals(moment.elements()), s.normals(moment.elements()));
    let m = m.into_iter().map(|x| if is_coded { code(x) } else { 0.1 * x }).collect();
    let v = v.into_iter().map(|x| if is_coded { code(x) } else { 0.01 * x * x + 1e-4 }).collect();
    let scales = rule.moments.scales(&ty.shape).map(|ty| {
        let scale = |x: f64| if scalars[1] == 1.0 { 0.0 } else { x.abs() + 0.1 };
        let data = s.normals(ty.elements()).into_iter().map(scale).enumerate();
        let data = data.map(|(i, x)| if i % 2 == 0 { x / 16_129.0 } else { x }).collect();
        s.input(Role::State, ty, data, false)
    });
    let rounded = copy.map(|dtype| s.input(Role::State, TensorType::new(dtype, shape), p.clone(), false));
    let (scales, rounded) = (scales.transpose()?, rounded.transpose()?);
    let param = s.input(Role::Parameter, ty, p, false)?;
    let m = s.input(Role::State, moment.clone(), m, false)?;
    let v = s.input(Role::State, moment, v, false)?;
    let grad = s.float(shape, |x| if is_coded { (64.0 * x).round().clamp(-128.0, 128.0) / 64.0 } else { x })?;
    s.wrt.clear();
    let [lr, step, scale] = scalars.map(|x| s.fixed(TensorType::f32([]), vec![x]));
    let old = AdamwState { param, m, v, scales, rounded };
    let new = s.graph.adamw_of(rule, old, grad, [lr?, step?, scale?])?;
    let (scales, copies) = (scales.zip(new.scales), rounded.zip(new.rounded));
    let all = [Some((param, new.param)), Some((m, new.m)), Some((v, new.v)), scales, copies];
    all.into_iter().flatten().try_for_each(|(old, new)| s.graph.update(old, new))
}
