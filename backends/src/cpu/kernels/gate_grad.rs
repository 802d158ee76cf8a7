//! The cotangent of the gates of combine (and, with the operands swapped, of dispatch).

use crate::cpu::element::{Element, simd};

use super::par::{Shared, dot, row_tasks};

/// `d_gate[t, j] = <rows[choice_slot[t, j]], dy[t]>` in f32; 0 for a choice without a slot.
///
/// - `rows` [S, d], `dy` [n, d], `choice_slot` [n, k] of slots or -1
/// - `d_gate` [n, k] is written
///
/// Panics when the sizes disagree, k is 0 or a slot is outside S.
pub fn gate_grad<T: Element>(rows: &[T], dy: &[T], choice_slot: &[i32], k: usize, d: usize, d_gate: &mut [f32]) {
    assert!(k > 0 && d_gate.len() == choice_slot.len());
    let n = choice_slot.len() / k;
    assert!(choice_slot.len() == n * k && dy.len() == n * d);
    let out = Shared::new(d_gate);
    row_tasks(n, k * d, |from, to| {
        // SAFETY: tasks have disjoint tokens.
        let out = unsafe { out.part(from * k, (to - from) * k) };
        simd(
            #[inline(always)]
            || {
                for (c, (out, &slot)) in out.iter_mut().zip(&choice_slot[from * k..to * k]).enumerate() {
                    let t = from + c / k;
                    *out = match usize::try_from(slot) {
                        Ok(slot) => dot(&rows[slot * d..(slot + 1) * d], &dy[t * d..(t + 1) * d]),
                        Err(_) => 0.0,
                    };
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

    #[test]
    fn against_naive_loops() {
        let mut rng = Rng(14);
        for (n, k, s, d) in [(1, 1, 1, 1), (7, 2, 9, 64), (40, 3, 50, 129), (3, 2, 0, 5), (0, 2, 4, 8), (2, 2, 3, 0)] {
            let slot_of: Vec<i32> = (0..n * k).map(|_| rng.below(s + 1) as i32 - 1).collect();
            let round = |v: Vec<f32>| v.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
            let (rows, dy) = (round(rng.values(s * d, 1.0)), round(rng.values(n * d, 1.0)));
            let want: Vec<f64> = (0..n * k)
                .map(|c| match slot_of[c] {
                    -1 => 0.0,
                    slot => (0..d).map(|i| rows[slot as usize * d + i].to_f64() * dy[c / k * d + i].to_f64()).sum(),
                })
                .collect();
            let mut got = vec![f32::NAN; n * k];
            gate_grad(&rows, &dy, &slot_of, k, d, &mut got);
            assert_close(&got, &want, 1e-5);
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let mut rng = Rng(15);
        let (n, k, s, d) = (700, 2, 900, 70);
        let slot_of: Vec<i32> = (0..n * k).map(|_| rng.below(s) as i32).collect();
        let (rows, dy) = (rng.values(s * d, 2.0), rng.values(n * d, 1.0));
        same_on_any_thread_count(|| {
            let mut got = vec![f32::NAN; n * k];
            gate_grad(&rows, &dy, &slot_of, k, d, &mut got);
            bits(&got)
        });
    }
}
