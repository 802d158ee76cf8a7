//! One step of AdamW on a tensor whose moments are kept in fewer bits than they are computed in ([`moebius_ir::moments`]).

use half::bf16;
use moebius_ir::moments;

use crate::cpu::element::{Element, simd};

use super::adamw::{AdamW, Rates};
use super::par::{Shared, TASK, tasks};
use super::random;

/// Elements whose random words are made at a time, on the stack.
const TILE: usize = 256;

/// [`super::adamw::adamw`] with moments in bf16: the same step in f32, after which both are rounded stochastically by the random
/// numbers of `stream` and the step.
///
/// Panics when the sizes disagree.
pub fn adamw_bf16<G: Element, R: Element>(
    param: &mut [f32],
    grad: &[G],
    [m, v]: [&mut [bf16]; 2],
    rounded: &mut [R],
    step: &AdamW,
    stream: u32,
) {
    let len = param.len();
    assert!(grad.len() == len && m.len() == len && v.len() == len);
    assert!(rounded.is_empty() || rounded.len() == len);
    let keeps = !rounded.is_empty();
    let Some(rates) = Rates::of(step) else { return };
    let number = step.step;
    let (param, m, v, rounded) = (Shared::new(param), Shared::new(m), Shared::new(v), Shared::new(rounded));
    tasks(len.div_ceil(TASK), len, |task| {
        let (from, count) = (task * TASK, TASK.min(len - task * TASK));
        // SAFETY: tasks have disjoint elements.
        let (param, m, v) = unsafe { (param.part(from, count), m.part(from, count), v.part(from, count)) };
        // SAFETY: as above; without a copy the part is empty.
        let rounded = unsafe { rounded.part(if keeps { from } else { 0 }, if keeps { count } else { 0 }) };
        let grad = &grad[from..from + count];
        simd(
            #[inline(always)]
            || {
                let mut words = [0; TILE];
                for at in (0..count).step_by(TILE) {
                    let words = &mut words[..TILE.min(count - at)];
                    random::moment_words(stream, number, (from + at) as u64, words);
                    for (i, &word) in (at..).zip(&*words) {
                        let now = [m[i], v[i]].map(Element::to_f32);
                        let (p, [new_m, new_v]) = rates.moved(param[i], grad[i].to_f32(), now);
                        param[i] = p;
                        m[i] = bf16::from_bits(moments::bf16_bits(new_m, word));
                        v[i] = bf16::from_bits(moments::bf16_bits(new_v, word >> 16));
                    }
                }
                for (r, p) in rounded.iter_mut().zip(&*param) {
                    *r = R::from_f32(*p);
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, assert_close, bits, same_on_any_thread_count};
    use super::*;

    const STEP: AdamW =
        AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, grad_scale: 0.5, step: 1 };

    #[test]
    fn a_step_in_bf16_is_that_of_f64_and_rounds_to_a_neighbour() {
        let mut rng = Rng(31);
        for n in [0, 1, 3, 100, 40_001] {
            let (start, grad) = (rng.values(n, 1.0), rng.values(n, 3.0));
            let mut m: Vec<bf16> = rng.values(n, 0.1).into_iter().map(bf16::from_f32).collect();
            let mut v: Vec<bf16> = rng.values(n, 0.1).into_iter().map(|x| bf16::from_f32(x.abs())).collect();
            let (old_m, old_v) = (m.clone(), v.clone());
            let (mut param, mut rounded) = (start.clone(), vec![bf16::ZERO; n]);
            adamw_bf16(&mut param, &grad, [&mut m, &mut v], &mut rounded, &AdamW { step: 7, ..STEP }, 3);
            assert!(rounded.iter().zip(&param).all(|(r, p)| *r == bf16::from_f32(*p)));
            let mut want = Vec::new();
            for i in 0..n {
                let g = f64::from(grad[i]) * 0.5;
                let (b1, b2) = (f64::from(STEP.beta1), f64::from(STEP.beta2));
                let new_m = b1 * old_m[i].to_f64() + (1.0 - b1) * g;
                let new_v = b2 * old_v[i].to_f64() + (1.0 - b2) * g * g;
                for (stored, exact) in [(m[i], new_m), (v[i], new_v)] {
                    // One spacing, and what f32 adds.
                    let spacing = 2f64.powi(exact.abs().log2().floor() as i32 - 7);
                    assert!((stored.to_f64() - exact).abs() < 1.001 * spacing, "{i}: {stored} for {exact}");
                }
                let (mh, vh) = (new_m / (1.0 - b1.powi(7)), new_v / (1.0 - b2.powi(7)));
                want.push(f64::from(start[i]) * (1.0 - 0.01 * 0.1) - 0.01 * mh / (vh.sqrt() + 1e-8));
            }
            assert_close(&param, &want, 1e-6);
        }
    }

    /// The second moment under constant gradients, of which one step moves it by less than half a spacing.
    fn after_constant_gradients(steps: u32, grad: &[f32], mut step: impl FnMut(u32, &mut [f32])) -> Vec<f64> {
        let mut v = vec![0.0; grad.len()];
        (1..=steps).for_each(|number| step(number, &mut v));
        let grown = 1.0 - f64::from(STEP.beta2).powi(steps as i32);
        v.iter().zip(grad).map(|(&v, &g)| f64::from(v) / (f64::from(0.5 * g).powi(2) * grown)).collect()
    }

    #[test]
    fn moments_in_bf16_do_not_drift() {
        let n = 4096;
        let grad: Vec<f32> = Rng(32).values(n, 1.0).into_iter().map(|g| g + 1.5).collect();
        let (mut param, mut m, mut v) = (vec![0.0; n], vec![bf16::ZERO; n], vec![bf16::ZERO; n]);
        let parts = after_constant_gradients(1000, &grad, |number, seen| {
            let step = AdamW { step: number, ..STEP };
            adamw_bf16(&mut param, &grad, [&mut m, &mut v], &mut [0.0_f32; 0], &step, 5);
            seen.iter_mut().zip(&v).for_each(|(s, v)| *s = v.to_f32());
        });
        let mean = parts.iter().sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.01, "the mean of v is {mean} of what it should be");
        // Rounded to nearest, v stays where a step no longer moves it: far below.
        let nearest = after_constant_gradients(1000, &grad, |_, v| {
            for (v, g) in v.iter_mut().zip(&grad) {
                *v = bf16::from_f32(STEP.beta2 * *v + (1.0 - STEP.beta2) * (0.5 * g * 0.5 * g)).to_f32();
            }
        });
        assert!(nearest.iter().all(|&part| part < 0.6));
        let mean = m.iter().zip(&grad).map(|(m, g)| m.to_f64() / f64::from(0.5 * g)).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.01, "the mean of m is {mean} of what it should be");
    }

    #[test]
    fn bits_depend_on_stream_and_step_alone() {
        let mut rng = Rng(33);
        let n = 50_003;
        let (param, grad) = (rng.values(n, 1.0), rng.values(n, 1.0));
        let run = |stream: u32, step: u32| {
            same_on_any_thread_count(|| {
                let (mut p, mut m, mut v) = (param.clone(), vec![bf16::ONE; n], vec![bf16::ONE; n]);
                adamw_bf16(&mut p, &grad, [&mut m, &mut v], &mut [0.0_f32; 0], &AdamW { step, ..STEP }, stream);
                (bits(&p), m, v)
            })
        };
        let one = run(1, 1);
        assert!(one == run(1, 1));
        let (other_stream, other_step) = (run(2, 1), run(1, 2));
        assert!(one.0 == other_stream.0 && one.1 != other_stream.1 && one.2 != other_stream.2);
        assert!(one.1 != other_step.1 && one.2 != other_step.2);
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing() {
        for step in
            [AdamW { grad_scale: f32::NAN, ..STEP }, AdamW { lr: f32::INFINITY, ..STEP }, AdamW { step: 0, ..STEP }]
        {
            let (mut p, mut m, mut v, mut r) = ([1.0_f32], [bf16::ONE], [bf16::ONE], [bf16::ZERO]);
            adamw_bf16(&mut p, &[1.0_f32], [&mut m, &mut v], &mut r, &step, 0);
            assert_eq!((p, m, v, r), ([1.0], [bf16::ONE], [bf16::ONE], [bf16::ZERO]));
        }
    }
}
