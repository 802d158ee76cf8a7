//! One step of AdamW (Loshchilov and Hutter 2019, algorithm 2, with the schedule folded into the rate as in PyTorch).

use crate::cpu::element::{Element, simd};

use super::par::{Shared, TASK, tasks};

/// The scalars of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// The learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay: the parameter is first multiplied by 1 - lr weight_decay.
    pub weight_decay: f32,
    /// Multiplied onto the gradient (clipping, loss scale).
    pub grad_scale: f32,
    /// The number of this step, from 1.
    pub step: u32,
}

/// What a step takes from its scalars.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    scale: f32,
    keep: f32,
    rate: f32,
    root: f32,
    beta: [f32; 2],
    gain: [f32; 2],
    eps: f32,
}

impl Rates {
    /// `None` for a step that changes nothing.
    pub(super) fn of(step: &AdamW) -> Option<Rates> {
        let AdamW { lr, beta1, beta2, eps, weight_decay, grad_scale, step } = *step;
        if !grad_scale.is_finite() || !lr.is_finite() || step == 0 {
            return None;
        }
        let t = f64::from(step);
        Some(Rates {
            scale: grad_scale,
            keep: (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32,
            rate: (f64::from(lr) / (1.0 - f64::from(beta1).powf(t))) as f32,
            root: (1.0 / (1.0 - f64::from(beta2).powf(t)).sqrt()) as f32,
            beta: [beta1, beta2],
            gain: [1.0 - beta1, 1.0 - beta2],
            eps,
        })
    }

    /// Parameter and moments of one element after the step.
    #[inline(always)]
    pub(super) fn moved(&self, param: f32, grad: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let g = grad * self.scale;
        let m = self.beta[0] * m + self.gain[0] * g;
        let v = self.beta[1] * v + self.gain[1] * (g * g);
        let denominator = v.sqrt() * self.root + self.eps;
        (self.keep * param - self.rate * (m / denominator), [m, v])
    }
}

/// Updates one tensor in place. With g = grad_scale grad and t = step:
/// p -= lr weight_decay p; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
/// p -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
///
/// `rounded`, if it is not empty, becomes the new `param` rounded.
///
/// All tensors have the same number of elements; arithmetic is f32, a `param` of another type is rounded once.
/// When `grad_scale` or `lr` is not finite (or `step` is 0) nothing changes: a step whose gradient norm overflowed is
/// skipped.
/// Panics when the sizes disagree.
pub fn adamw<T: Element, G: Element, R: Element>(
    param: &mut [T],
    grad: &[G],
    [m, v]: [&mut [f32]; 2],
    rounded: &mut [R],
    step: &AdamW,
) {
    let len = param.len();
    assert!(grad.len() == len && m.len() == len && v.len() == len);
    assert!(rounded.is_empty() || rounded.len() == len);
    let Some(rates) = Rates::of(step) else { return };
    let (param, m, v, rounded) = (Shared::new(param), Shared::new(m), Shared::new(v), Shared::new(rounded));
    tasks(len.div_ceil(TASK), len, |task| {
        let (from, count) = (task * TASK, TASK.min(len - task * TASK));
        // SAFETY: tasks have disjoint elements.
        let (param, m, v) = unsafe { (param.part(from, count), m.part(from, count), v.part(from, count)) };
        // SAFETY: as above.
        let rounded = unsafe { rounded.part_if_any(from, count) };
        let grad = &grad[from..from + count];
        simd(
            #[inline(always)]
            || {
                for i in 0..count {
                    let (p, moments) = rates.moved(param[i].to_f32(), grad[i].to_f32(), [m[i], v[i]]);
                    param[i] = T::from_f32(p);
                    [m[i], v[i]] = moments;
                }
                for (r, p) in rounded.iter_mut().zip(&*param) {
                    *r = R::from_f32(p.to_f32());
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, assert_close, bits, same_on_any_thread_count};
    use super::*;
    use half::bf16;

    const STEP: AdamW =
        AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, grad_scale: 0.5, step: 1 };

    #[test]
    fn three_steps_against_f64() {
        let mut rng = Rng(22);
        for n in [0, 1, 100, 40_000] {
            let mut param = rng.values(n, 1.0);
            let mut low: Vec<bf16> = param.iter().map(|&p| bf16::from_f32(p)).collect();
            let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
            let (mut low_m, mut low_v) = (m.clone(), v.clone());
            let mut want: Vec<[f64; 3]> = param.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
            for step in 1..=3 {
                let grad = rng.values(n, 3.0);
                let mut rounded = vec![bf16::ZERO; n];
                adamw(&mut param, &grad, [&mut m, &mut v], &mut rounded, &AdamW { step, ..STEP });
                assert!(rounded.iter().zip(&param).all(|(r, p)| *r == bf16::from_f32(*p)));
                adamw(&mut low, &grad, [&mut low_m, &mut low_v], &mut [0.0_f32; 0], &AdamW { step, ..STEP });
                for ([p, m, v], g) in want.iter_mut().zip(grad) {
                    let g = f64::from(g) * 0.5;
                    *p -= 0.01 * 0.1 * *p;
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.95 * *v + 0.05 * g * g;
                    let (mh, vh) = (*m / (1.0 - 0.9f64.powi(step as i32)), *v / (1.0 - 0.95f64.powi(step as i32)));
                    *p -= 0.01 * mh / (vh.sqrt() + 1e-8);
                }
            }
            let column = |c: usize| want.iter().map(|w| w[c]).collect::<Vec<_>>();
            assert_close(&param, &column(0), 1e-6);
            assert_close(&m, &column(1), 1e-6);
            assert_close(&v, &column(2), 1e-6);
            assert_close(&low.iter().map(|p| p.to_f32()).collect::<Vec<_>>(), &column(0), 0.02);
        }
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for step in [AdamW { grad_scale: bad, ..STEP }, AdamW { lr: bad, ..STEP }, AdamW { step: 0, ..STEP }] {
                let (mut p, mut m, mut v, mut r) = ([1.0_f32], [0.25], [0.5], [bf16::ONE]);
                adamw(&mut p, &[1.0_f32], [&mut m, &mut v], &mut r, &step);
                assert_eq!((p, m, v, r), ([1.0], [0.25], [0.5], [bf16::ONE]));
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let mut rng = Rng(23);
        let n = 50_000;
        let (param, grad) = (rng.values(n, 1.0), rng.values(n, 1.0));
        same_on_any_thread_count(|| {
            let (mut p, mut m, mut v) = (param.clone(), vec![0.1; n], vec![0.1; n]);
            adamw(&mut p, &grad, [&mut m, &mut v], &mut [0.0_f32; 0], &STEP);
            (bits(&p), bits(&m), bits(&v))
        });
    }
}
