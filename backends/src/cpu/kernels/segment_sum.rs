//! Sums over each expert's segment, as the gradient of a per-expert bias needs them.

use crate::cpu::element::{Element, simd};

use super::par::{Shared, tasks};

/// Columns of one task: wide enough for whole cache lines, narrow enough that few experts still spread.
const COLUMNS: usize = 128;
/// Rows added in f32 before they join the total, which bounds the growth of rounding errors.
const ROWS: usize = 64;

/// `out[x]` = sum of `rows[s]` over s in `offsets[x]..offsets[x + 1]`, in f32; zeros for an empty expert.
///
/// - `rows` [S, width], `offsets` [e + 1], not decreasing and within S
/// - `out` [e, width] is written
///
/// Panics when the sizes disagree or a segment is outside S.
pub fn segment_sum<T: Element, O: Element>(rows: &[T], offsets: &[i32], width: usize, out: &mut [O]) {
    let e = offsets.len() - 1;
    assert!(out.len() == e * width);
    let blocks = width.div_ceil(COLUMNS);
    let out = Shared::new(out);
    let used = (offsets[e] - offsets[0]) as usize;
    tasks(e * blocks, (used + e) * width, |task| {
        let (expert, column) = (task / blocks, task % blocks * COLUMNS);
        let columns = COLUMNS.min(width - column);
        // SAFETY: each task has its own expert and columns.
        let out = unsafe { out.part(expert * width + column, columns) };
        simd(
            #[inline(always)]
            || {
                let mut total = [0.0_f32; COLUMNS];
                let (mut from, to) = (offsets[expert] as usize, offsets[expert + 1] as usize);
                while from < to {
                    let mut sum = [0.0_f32; COLUMNS];
                    let end = to.min(from + ROWS);
                    for s in from..end {
                        let row = &rows[s * width + column..s * width + column + columns];
                        if let Ok(row) = <&[T; COLUMNS]>::try_from(row) {
                            for i in 0..COLUMNS {
                                sum[i] += row[i].to_f32();
                            }
                        } else {
                            for (s, v) in sum.iter_mut().zip(row) {
                                *s += v.to_f32();
                            }
                        }
                    }
                    for (t, s) in total.iter_mut().zip(&sum) {
                        *t += s;
                    }
                    from = end;
                }
                for (o, &t) in out.iter_mut().zip(&total) {
                    *o = O::from_f32(t);
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
        let mut rng = Rng(16);
        for (offsets, width) in
            [(vec![0, 1], 1), (vec![0, 0, 5, 5, 9], 130), (vec![0, 300, 300], 64), (vec![0, 0], 5), (vec![0, 4], 0)]
        {
            let s = *offsets.last().unwrap() as usize + 3;
            let rows = rng.values(s * width, 1.0);
            let e = offsets.len() - 1;
            let mut want = vec![0.0; e * width];
            for x in 0..e {
                for s in offsets[x] as usize..offsets[x + 1] as usize {
                    for i in 0..width {
                        want[x * width + i] += f64::from(rows[s * width + i]);
                    }
                }
            }
            let mut got = vec![f32::NAN; e * width];
            segment_sum(&rows, &offsets, width, &mut got);
            assert_close(&got, &want, 1e-5);
            let mut got = vec![bf16::NAN; e * width];
            segment_sum(&rows, &offsets, width, &mut got);
            let got: Vec<f32> = got.iter().map(|v| v.to_f32()).collect();
            assert_close(&got, &want, 1.0 / 128.0);
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let rows = Rng(17).values(1000 * 200, 1.0);
        same_on_any_thread_count(|| {
            let mut got = vec![f32::NAN; 3 * 200];
            segment_sum(&rows, &[0, 10, 900, 1000], 200, &mut got);
            bits(&got)
        });
    }
}
