//! Slot rows back to tokens: a gather-sum in fixed order.

use crate::cpu::element::{Element, simd};

use super::par::{Shared, row_tasks};

/// Columns summed at a time, in registers and f32 whatever the storage type.
const COLUMNS: usize = 64;

/// The branch of all tokens: `rows` [n, d], and the coefficients of the gate sum and of it [n, 2] (None: 1 and 1).
#[derive(Clone, Copy)]
pub struct Side<'a, T> {
    /// Its rows.
    pub rows: &'a [T],
    /// The pair of each token.
    pub coefficient: Option<&'a [f32]>,
}

/// `y[t] = sum_j gate[t, j] rows[choice_slot[t, j]]`, in the order of j, in f32; a choice without a slot adds nothing. With a
/// [`Side`], its first coefficient times that plus its second times the side's row.
///
/// - `rows` [S, d], `choice_slot` [n, k] of slots or -1, `gate` [n, k] (None: 1)
/// - `y` [n, d] is written
///
/// Panics when the sizes disagree, k is 0 or a slot is outside S.
pub fn combine<T: Element>(
    rows: &[T],
    choice_slot: &[i32],
    k: usize,
    d: usize,
    gate: Option<&[f32]>,
    side: Option<Side<'_, T>>,
    y: &mut [T],
) {
    assert!(k > 0 && gate.is_none_or(|g| g.len() == choice_slot.len()));
    let n = choice_slot.len() / k;
    assert!(choice_slot.len() == n * k && y.len() == n * d);
    assert!(side.is_none_or(|s| s.rows.len() == n * d && s.coefficient.is_none_or(|c| c.len() == 2 * n)));
    let out = Shared::new(y);
    row_tasks(n, k * d, |from, to| {
        // SAFETY: tasks have disjoint tokens.
        let out = unsafe { out.part(from * d, (to - from) * d) };
        simd(
            #[inline(always)]
            || {
                for t in from..to {
                    let y = &mut out[(t - from) * d..(t - from + 1) * d];
                    for (block, y) in y.chunks_mut(COLUMNS).enumerate() {
                        let mut sum = [0.0_f32; COLUMNS];
                        let width = y.len();
                        for c in t * k..(t + 1) * k {
                            let Ok(slot) = usize::try_from(choice_slot[c]) else { continue };
                            let at = slot * d + block * COLUMNS;
                            add(&mut sum, &rows[at..at + width], gate.map_or(1.0, |g| g[c]));
                        }
                        if let Some(Side { rows, coefficient }) = side {
                            let (a, b) = coefficient.map_or((1.0, 1.0), |c| (c[2 * t], c[2 * t + 1]));
                            let at = t * d + block * COLUMNS;
                            for (s, v) in sum.iter_mut().zip(&rows[at..at + width]) {
                                *s = a * *s + b * v.to_f32();
                            }
                        }
                        for (y, &s) in y.iter_mut().zip(&sum) {
                            *y = T::from_f32(s);
                        }
                    }
                }
            },
        );
    });
}

/// sum += g row, with the full width apart so that it compiles to straight vector code.
#[inline(always)]
fn add<T: Element>(sum: &mut [f32; COLUMNS], row: &[T], g: f32) {
    if let Ok(row) = <&[T; COLUMNS]>::try_from(row) {
        for i in 0..COLUMNS {
            sum[i] += g * row[i].to_f32();
        }
    } else {
        for (s, v) in sum.iter_mut().zip(row) {
            *s += g * v.to_f32();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, assert_close, bits, same_on_any_thread_count};
    use super::*;
    use half::f16;

    #[test]
    fn against_naive_loops() {
        let mut rng = Rng(12);
        for (n, k, s, d) in [(1, 1, 1, 1), (7, 2, 9, 64), (40, 3, 50, 129), (3, 2, 0, 5), (0, 2, 4, 8), (2, 2, 3, 0)] {
            let slot_of: Vec<i32> = (0..n * k).map(|_| rng.below(s + 1) as i32 - 1).collect();
            let (rows, gate) = (rng.values(s * d, 2.0), rng.values(n * k, 1.0));
            for gated in [false, true] {
                let mut want = vec![0.0; n * d];
                for c in (0..n * k).filter(|&c| slot_of[c] >= 0) {
                    for i in 0..d {
                        let g = if gated { f64::from(gate[c]) } else { 1.0 };
                        want[c / k * d + i] += g * f64::from(rows[slot_of[c] as usize * d + i]);
                    }
                }
                let gate = gated.then_some(&gate[..]);
                let mut y = vec![f32::NAN; n * d];
                combine(&rows, &slot_of, k, d, gate, None, &mut y);
                assert_close(&y, &want, 1e-6);
                let low: Vec<f16> = rows.iter().map(|&v| f16::from_f32(v)).collect();
                let mut y = vec![f16::NAN; n * d];
                combine(&low, &slot_of, k, d, gate, None, &mut y);
                let y: Vec<f32> = y.iter().map(|v| v.to_f32()).collect();
                assert_close(&y, &want, 1.0 / 256.0);
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let mut rng = Rng(13);
        let (n, k, s, d) = (700, 2, 900, 70);
        let slot_of: Vec<i32> = (0..n * k).map(|_| rng.below(s) as i32).collect();
        let (rows, gate) = (rng.values(s * d, 2.0), rng.values(n * k, 1.0));
        same_on_any_thread_count(|| {
            let mut y = vec![f32::NAN; n * d];
            combine(&rows, &slot_of, k, d, Some(&gate), None, &mut y);
            bits(&y)
        });
    }
}
