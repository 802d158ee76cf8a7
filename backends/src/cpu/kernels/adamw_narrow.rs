//! One step of AdamW on a tensor whose moments are kept in fewer bits than they are computed in ([`moebius_ir::moments`]).

use half::bf16;
use moebius_ir::moments::{self, eight, eight::BLOCK};

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
    let Some(rates) = Rates::of(step) else { return };
    let number = step.step;
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

/// [`super::adamw::adamw`] with moments in 8 bits: the same step in f32 on what the codes mean, after which both moments are
/// rounded stochastically to codes by the random numbers of `stream` and the step.
///
/// With n elements, `m` and `v` are [n / 4], rounded up, of four codes each, `scales` is [n / 256, 2], rounded up
/// ([`moebius_ir::Moments`]).
///
/// Panics when the sizes disagree.
pub fn adamw_8bit<G: Element, R: Element>(
    param: &mut [f32],
    grad: &[G],
    ([m, v], scales): ([&mut [u32]; 2], &mut [f32]),
    rounded: &mut [R],
    step: &AdamW,
    stream: u32,
) {
    let len = param.len();
    assert!(grad.len() == len && m.len() == len.div_ceil(4) && v.len() == len.div_ceil(4));
    assert!(scales.len() == 2 * len.div_ceil(BLOCK) && (rounded.is_empty() || rounded.len() == len));
    let Some(rates) = Rates::of(step) else { return };
    let number = step.step;
    let (param, rounded) = (Shared::new(param), Shared::new(rounded));
    let (m, v, scales) = (Shared::new(m), Shared::new(v), Shared::new(scales));
    tasks(len.div_ceil(TASK), len, |task| {
        let (from, count) = (task * TASK, TASK.min(len - task * TASK));
        let (words, blocks) = (count.div_ceil(4), count.div_ceil(BLOCK));
        // SAFETY: tasks have disjoint elements, which begin with a block.
        let (param, m, v) = unsafe { (param.part(from, count), m.part(from / 4, words), v.part(from / 4, words)) };
        // SAFETY: as above.
        let rounded = unsafe { rounded.part_if_any(from, count) };
        // SAFETY: as above.
        let scales = unsafe { scales.part(2 * (from / BLOCK), 2 * blocks) };
        let grad = &grad[from..from + count];
        simd(
            #[inline(always)]
            || {
                for (block, scales) in scales.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    let (at, to) = (block * BLOCK, count.min((block + 1) * BLOCK));
                    let codes = [&mut m[at / 4..to.div_ceil(4)], &mut v[at / 4..to.div_ceil(4)]];
                    let place = ((from + at) as u64, stream, number);
                    block_step(&rates, &mut param[at..to], &grad[at..to], (codes, scales), place);
                }
                for (r, p) in rounded.iter_mut().zip(&*param) {
                    *r = R::from_f32(*p);
                }
            },
        );
    });
}

/// The step of one block, whose first element, stream and step are `place`.
#[inline(always)]
fn block_step<G: Element>(
    rates: &Rates,
    param: &mut [f32],
    grad: &[G],
    (codes, scales): ([&mut [u32]; 2], &mut [f32; 2]),
    (first, stream, step): (u64, u32, u32),
) {
    let count = param.len();
    let mut bytes = [[0u8; BLOCK]; 2];
    for (bytes, codes) in bytes.iter_mut().zip(&codes) {
        for (bytes, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(&**codes) {
            *bytes = word.to_le_bytes();
        }
    }
    let (mut ms, mut vs) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    for i in 0..count {
        let now = [eight::m_of(bytes[0][i], scales[0]), eight::v_of(bytes[1][i], scales[1])];
        (param[i], [ms[i], vs[i]]) = rates.moved(param[i], grad[i].to_f32(), now);
    }
    // The bits of numbers that are not negative rise with them.
    let largest = |x: &[f32; BLOCK]| x.iter().fold(0, |most, x| x.abs().to_bits().max(most));
    *scales = [eight::scale_of_m(largest(&ms)), eight::scale_of_v(largest(&vs))];
    let inverse = scales.map(eight::inverse);
    let mut words = [0; BLOCK];
    random::moment_words(stream, step, first, &mut words);
    for i in 0..BLOCK {
        bytes[0][i] = eight::code_of_m(ms[i], inverse[0], words[i]);
        bytes[1][i] = eight::code_of_v(vs[i], inverse[1], moments::for_second(words[i]));
    }
    for (bytes, codes) in bytes.iter().zip(codes) {
        for (bytes, word) in bytes.as_chunks::<4>().0.iter().zip(codes) {
            *word = u32::from_le_bytes(*bytes);
        }
    }
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

    /// Moments in 8 bits as their codes and scales.
    #[derive(Clone, Debug, PartialEq)]
    struct Coded {
        m: Vec<u32>,
        v: Vec<u32>,
        scales: Vec<f32>,
    }

    impl Coded {
        fn zeros(n: usize) -> Coded {
            Coded { m: vec![0; n.div_ceil(4)], v: vec![0; n.div_ceil(4)], scales: vec![0.0; 2 * n.div_ceil(BLOCK)] }
        }

        /// One step on `param`, whose elements begin with a block.
        fn step(&mut self, param: &mut [f32], grad: &[f32], step: &AdamW, stream: u32) {
            let (moments, none) = (([&mut self.m[..], &mut self.v[..]], &mut self.scales[..]), &mut [0.0_f32; 0]);
            adamw_8bit(param, grad, moments, none, step, stream);
        }

        /// What the codes of element `i` mean, in f64.
        fn of(&self, i: usize) -> [f64; 2] {
            let code = |codes: &[u32]| f64::from(codes[i / 4] >> (8 * (i % 4)) & 255);
            let [m, v] = [code(&self.m), code(&self.v)];
            let j = if m < 128.0 { m } else { m - 256.0 };
            let scale = |which: usize| f64::from(self.scales[2 * (i / BLOCK) + which]);
            [j * j.abs() * scale(0), ((v + 1.0) / 256.0).powi(4) * scale(1)]
        }
    }

    #[test]
    fn a_step_in_8_bits_is_that_of_f64_within_the_stated_bounds() {
        let mut rng = Rng(34);
        for n in [0, 1, 255, 256, 257, 1023, 40_001] {
            let mut coded = Coded::zeros(n);
            let mut param = rng.values(n, 1.0);
            for step in 1..=3 {
                let (before, start, grad) = (coded.clone(), param.clone(), rng.values(n, 3.0));
                coded.step(&mut param, &grad, &AdamW { step, ..STEP }, 3);
                let (b1, b2) = (f64::from(STEP.beta1), f64::from(STEP.beta2));
                let mut new = Vec::new();
                for (i, g) in grad.iter().enumerate() {
                    let (g, [m, v]) = (f64::from(*g) * 0.5, before.of(i));
                    new.push([b1 * m + (1.0 - b1) * g, b2 * v + (1.0 - b2) * g * g]);
                }
                let t = step as i32;
                let moved = |(p, [m, v]): (&f32, &[f64; 2])| {
                    let (m, v) = (m / (1.0 - b1.powi(t)), v / (1.0 - b2.powi(t)));
                    f64::from(*p) * (1.0 - 0.01 * 0.1) - 0.01 * m / (v.sqrt() + 1e-8)
                };
                assert_close(&param, &start.iter().zip(&new).map(moved).collect::<Vec<_>>(), 2e-6);
                for (i, &[m, v]) in new.iter().enumerate() {
                    let of_block = &new[i / BLOCK * BLOCK..n.min((i / BLOCK + 1) * BLOCK)];
                    let largest = |which: usize| of_block.iter().fold(0.0f64, |most, x| most.max(x[which].abs()));
                    let [part_m, part_v] = [m.abs() / largest(0), v / largest(1)];
                    let [got_m, got_v] = coded.of(i);
                    let near_m = (2.0 * part_m.sqrt() / 127.0 + 1.0 / 16_129.0) * largest(0);
                    assert!((got_m - m).abs() < 1.001 * near_m, "{i}: {got_m} for {m}");
                    // From the level below to the one above, or up to the lowest one.
                    let t = (256.0 * part_v.powf(0.25)).floor().max(1.0);
                    let near_v = if part_v < 256f64.powi(-4) {
                        256f64.powi(-4)
                    } else {
                        part_v * (1.0 + 1.0 / t).powi(4) - part_v
                    };
                    assert!((got_v - v).abs() < 1.001 * near_v * largest(1), "{i}: {got_v} for {v}");
                }
            }
            // Bytes beyond the last element stay 0, in both.
            let rest = (n % 4 > 0).then(|| [coded.m[n / 4], coded.v[n / 4]].map(|word| word >> (8 * (n % 4))));
            assert!(rest.is_none_or(|rest| rest == [0, 0]), "{n}");
        }
    }

    #[test]
    fn moments_in_8_bits_do_not_drift() {
        let n = 4096;
        // Over two decades, of either sign.
        let grad: Vec<f32> =
            Rng(35).values(n, 1.0).into_iter().map(|x| x.signum() * 10f32.powf(2.0 * x.abs())).collect();
        let (mut param, mut coded) = (vec![0.0; n], Coded::zeros(n));
        let parts = after_constant_gradients(1000, &grad, |number, seen| {
            coded.step(&mut param, &grad, &AdamW { step: number, ..STEP }, 5);
            seen.iter_mut().enumerate().for_each(|(i, seen)| *seen = coded.of(i)[1] as f32);
        });
        let mean = parts.iter().sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.01, "the mean of v is {mean} of what it should be");
        let mean = (0..n).map(|i| coded.of(i)[0] / f64::from(0.5 * grad[i])).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.01, "the mean of m is {mean} of what it should be");
    }

    #[test]
    fn blocks_do_not_touch_each_other() {
        let mut rng = Rng(36);
        let (start, grad) = (rng.values(1000, 1.0), rng.values(1000, 1.0));
        let (mut param, mut coded) = (start.clone(), Coded::zeros(1000));
        (1..=3).for_each(|step| coded.step(&mut param, &grad, &AdamW { step, ..STEP }, 8));
        let mut huge = grad.clone();
        huge[300] = 1e6;
        let (mut other_param, mut other) = (start, Coded::zeros(1000));
        (1..=3).for_each(|step| other.step(&mut other_param, &huge, &AdamW { step, ..STEP }, 8));
        let same = |block: usize| {
            (block * BLOCK..1000.min((block + 1) * BLOCK))
                .all(|i| coded.of(i) == other.of(i) && (param[i] == other_param[i] || i == 300))
        };
        assert_eq!([0, 1, 2, 3].map(same), [true, false, true, true]);
    }

    #[test]
    fn bits_in_8_bits_do_not_depend_on_threads() {
        let mut rng = Rng(37);
        let n = 50_003;
        let (param, grad) = (rng.values(n, 1.0), rng.values(n, 1.0));
        let run = |stream: u32| {
            same_on_any_thread_count(|| {
                let (mut p, mut coded) = (param.clone(), Coded::zeros(n));
                (1..=2).for_each(|step| coded.step(&mut p, &grad, &AdamW { step, ..STEP }, stream));
                (bits(&p), coded)
            })
        };
        let (one, other) = (run(1), run(2));
        assert!(one == run(1) && one.1.m != other.1.m && one.1.v != other.1.v);
        assert!(one.1.scales.iter().all(|s| *s > 0.0));
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
            let coded = Coded { m: vec![77], v: vec![5], scales: vec![1.0, 2.0] };
            let mut after = coded.clone();
            after.step(&mut p, &[1.0], &step, 0);
            assert_eq!((p, after), ([1.0], coded));
        }
    }
}
