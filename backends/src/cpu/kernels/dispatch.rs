//! Token rows to slot order.

use crate::cpu::element::{Element, simd};

use super::par::{Shared, row_tasks};

/// `rows[s] = gate[c] x[c / k]` with `c = slot_choice[s]`; zeros for an unused slot.
///
/// - `x` [n, d], `slot_choice` `[S]` of flat choices t k + j or -1, `gate` [n, k] (None: 1, an exact copy)
/// - `rows` [S, d] is written
///
/// The product is taken in f32 and rounded once. Panics when the sizes disagree or a choice is outside n k.
pub fn dispatch<T: Element>(x: &[T], slot_choice: &[i32], k: usize, d: usize, gate: Option<&[f32]>, rows: &mut [T]) {
    assert!(rows.len() == slot_choice.len() * d);
    let out = Shared::new(rows);
    row_tasks(slot_choice.len(), d, |from, to| {
        // SAFETY: tasks have disjoint slots.
        let out = unsafe { out.part(from * d, (to - from) * d) };
        simd(
            #[inline(always)]
            || {
                for (s, &choice) in slot_choice[from..to].iter().enumerate() {
                    let row = &mut out[s * d..(s + 1) * d];
                    let Ok(choice) = usize::try_from(choice) else {
                        row.fill(T::zeroed());
                        continue;
                    };
                    let token = &x[choice / k * d..(choice / k + 1) * d];
                    match gate {
                        None => row.copy_from_slice(token),
                        Some(gate) => {
                            let g = gate[choice];
                            for (o, &v) in row.iter_mut().zip(token) {
                                *o = T::from_f32(g * v.to_f32());
                            }
                        }
                    }
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::super::assign::{AssignOrder, assign, assign_slots, assign_workspace};
    use super::super::combine::combine;
    use super::super::par::tests::{Rng, assert_close, bits, same_on_any_thread_count};
    use super::*;
    use half::bf16;

    /// A random assignment of `n` tokens: (slot_choice, choice_slot).
    pub(crate) fn random_slots(rng: &mut Rng, n: usize, k: usize, e: usize, capacity: usize) -> (Vec<i32>, Vec<i32>) {
        let index: Vec<i32> = (0..n * k).map(|_| rng.below(e + 1) as i32 - 1).collect();
        let capacity = Some(capacity);
        let (mut slots, mut slot_of) = (vec![0; assign_slots(n, k, e, capacity)], vec![0; n * k]);
        let (mut offsets, mut workspace) = (vec![0; e + 1], vec![0; assign_workspace(n, k, e, false)]);
        let order = AssignOrder::TokenMajor;
        assign(&index, n, k, e, order, None, capacity, &mut slots, &mut slot_of, &mut offsets, &mut workspace);
        (slots, slot_of)
    }

    #[test]
    fn against_naive_loops() {
        let mut rng = Rng(9);
        for (n, k, e, capacity, d) in
            [(1, 1, 1, 1, 1), (5, 2, 3, 2, 7), (300, 2, 8, 60, 65), (4, 4, 4, 0, 3), (3, 1, 2, 9, 0)]
        {
            let (slots, _) = random_slots(&mut rng, n, k, e, capacity);
            let (x, gate) = (rng.values(n * d, 2.0), rng.values(n * k, 1.0));
            for gated in [false, true] {
                let mut want = vec![0.0; slots.len() * d];
                for (s, &c) in slots.iter().enumerate().filter(|(_, c)| **c >= 0) {
                    for i in 0..d {
                        let g = if gated { f64::from(gate[c as usize]) } else { 1.0 };
                        want[s * d + i] = g * f64::from(x[c as usize / k * d + i]);
                    }
                }
                let mut rows = vec![f32::NAN; slots.len() * d];
                dispatch(&x, &slots, k, d, gated.then_some(&gate[..]), &mut rows);
                assert_close(&rows, &want, 1e-6);
                let low: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
                let mut rows = vec![bf16::NAN; slots.len() * d];
                dispatch(&low, &slots, k, d, gated.then_some(&gate[..]), &mut rows);
                let rows: Vec<f32> = rows.iter().map(|v| v.to_f32()).collect();
                assert_close(&rows, &want, 1.0 / 64.0);
            }
        }
    }

    /// <dispatch(x, g), y> = <x, combine(y, g)>: each is the other's transpose.
    #[test]
    fn combine_is_the_transpose() {
        let mut rng = Rng(10);
        let (n, k, d) = (120, 3, 33);
        let (slots, slot_of) = random_slots(&mut rng, n, k, 7, 40);
        let (x, gate, y) = (rng.values(n * d, 1.0), rng.values(n * k, 1.0), rng.values(slots.len() * d, 1.0));
        for gate in [None, Some(&gate[..])] {
            let (mut rows, mut back) = (vec![f32::NAN; slots.len() * d], vec![f32::NAN; n * d]);
            dispatch(&x, &slots, k, d, gate, &mut rows);
            combine(&y, &slot_of, k, d, gate, None, &mut back);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            let (left, right) = (dot(&rows, &y), dot(&x, &back));
            assert!((left - right).abs() < 1e-4, "{left} and {right}");
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let mut rng = Rng(11);
        let (n, k, d) = (500, 2, 100);
        let (slots, _) = random_slots(&mut rng, n, k, 5, 150);
        let (x, gate) = (rng.values(n * d, 1.0), rng.values(n * k, 1.0));
        same_on_any_thread_count(|| {
            let mut rows = vec![f32::NAN; slots.len() * d];
            dispatch(&x, &slots, k, d, Some(&gate), &mut rows);
            bits(&rows)
        });
    }
}
