//! Sum, mean and maximum over one axis.

use crate::cpu::element::{Element, simd};

use super::par::{LANES, Shared, TASK, greatest, larger, sum, tasks};

/// What to compute over the axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// The sum; 0 over nothing.
    Sum,
    /// The sum divided by n; NaN over nothing.
    Mean,
    /// The maximum, NaN when any element is; -inf over nothing.
    Max,
}

/// Elements (inner = 1) or rows of one partial result, whatever the thread count.
const CHUNK: usize = 1024;
/// Elements or rows added in f32 before they join the chunk's total.
const RUN: usize = 64;
/// Columns reduced at a time when inner > 1.
const COLUMNS: usize = 128;

/// The scratch [`reduce`] needs, in f32 elements.
pub fn reduce_workspace(outer: usize, n: usize, inner: usize) -> usize {
    let chunks = n.div_ceil(CHUNK);
    if chunks > 1 { outer * chunks * inner } else { 0 }
}

/// Reduces `x` [outer, n, inner] over n into `out` [outer, inner], in f32, rounded once.
///
/// Sums run over fixed chunks of the axis whose partial sums are added in order. `workspace` has [`reduce_workspace`]
/// elements. Panics when the sizes disagree.
pub fn reduce<T: Element, O: Element>(
    x: &[T],
    outer: usize,
    n: usize,
    inner: usize,
    reduction: Reduction,
    out: &mut [O],
    workspace: &mut [f32],
) {
    assert!(x.len() == outer * n * inner && out.len() == outer * inner);
    let chunks = n.div_ceil(CHUNK);
    let max = match reduction {
        Reduction::Sum | Reduction::Mean => false,
        Reduction::Max => true,
    };
    let scale = match reduction {
        Reduction::Sum | Reduction::Max => 1.0,
        Reduction::Mean => 1.0 / n as f32,
    };
    if chunks > 1 {
        let partial = &mut workspace[..outer * chunks * inner];
        partials(x, outer, n, inner, max, 1.0, partial);
        partials(partial, outer, chunks, inner, max, scale, out);
    } else {
        partials(x, outer, n, inner, max, scale, out);
    }
}

/// Reduces each chunk of the axis: `out` [outer, chunks, inner], where the axis is one chunk when `out` has no room
/// for more.
fn partials<T: Element, O: Element>(
    x: &[T],
    outer: usize,
    n: usize,
    inner: usize,
    max: bool,
    scale: f32,
    out: &mut [O],
) {
    if out.is_empty() {
        return;
    }
    let chunks = out.len() / (outer * inner);
    let chunk = if chunks == 1 { n } else { CHUNK };
    let groups = outer * chunks;
    let out = Shared::new(out);
    if inner == 1 {
        let step = (TASK / chunk.max(1)).max(1);
        tasks(groups.div_ceil(step), x.len(), |task| {
            let (first, last) = (task * step, groups.min((task + 1) * step));
            // SAFETY: tasks have disjoint outputs.
            let out = unsafe { out.part(first, last - first) };
            simd(
                #[inline(always)]
                || {
                    for (g, out) in (first..last).zip(out) {
                        let from = g / chunks * n + g % chunks * chunk;
                        let x = &x[from..from + chunk.min(n - g % chunks * chunk)];
                        *out = O::from_f32(scale * if max { greatest(x) } else { total(x) });
                    }
                },
            );
        });
        return;
    }
    let blocks = inner.div_ceil(COLUMNS);
    tasks(groups * blocks, x.len(), |task| {
        let (g, column) = (task / blocks, task % blocks * COLUMNS);
        let (width, rows) = (COLUMNS.min(inner - column), chunk.min(n - g % chunks * chunk));
        let from = (g / chunks * n + g % chunks * chunk) * inner + column;
        // SAFETY: tasks have disjoint outputs.
        let out = unsafe { out.part(g * inner + column, width) };
        simd(
            #[inline(always)]
            || columns(x, from, inner, rows, max, scale, out),
        );
    });
}

/// Reduces `rows` rows of `x`, `stride` apart from `from` on, column by column.
#[inline(always)]
fn columns<T: Element, O: Element>(
    x: &[T],
    from: usize,
    stride: usize,
    rows: usize,
    max: bool,
    scale: f32,
    out: &mut [O],
) {
    let width = out.len();
    let mut result = [if max { f32::NEG_INFINITY } else { 0.0 }; COLUMNS];
    for first in (0..rows).step_by(RUN) {
        let mut run = [0.0_f32; COLUMNS];
        for r in first..rows.min(first + RUN) {
            let row = &x[from + r * stride..from + r * stride + width];
            if max {
                result.iter_mut().zip(row).for_each(|(m, v)| *m = larger(*m, v.to_f32()));
            } else if let Ok(row) = <&[T; COLUMNS]>::try_from(row) {
                for i in 0..COLUMNS {
                    run[i] += row[i].to_f32();
                }
            } else {
                run.iter_mut().zip(row).for_each(|(s, v)| *s += v.to_f32());
            }
        }
        if !max {
            result.iter_mut().zip(&run).for_each(|(t, s)| *t += s);
        }
    }
    for (o, &r) in out.iter_mut().zip(&result) {
        *o = O::from_f32(scale * r);
    }
}

/// The sum in runs of [`RUN`] times [`LANES`], whose results are added in order.
#[inline(always)]
fn total<T: Element>(x: &[T]) -> f32 {
    let mut total = 0.0;
    for run in x.chunks(RUN * LANES) {
        total += sum(run);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, assert_close, bits, same_on_any_thread_count};
    use super::*;
    use half::bf16;

    fn run<T: Element>(x: &[T], (outer, n, inner): (usize, usize, usize), reduction: Reduction) -> Vec<f32> {
        let mut out = vec![f32::NAN; outer * inner];
        let mut workspace = vec![f32::NAN; reduce_workspace(outer, n, inner)];
        reduce(x, outer, n, inner, reduction, &mut out, &mut workspace);
        out
    }

    #[test]
    fn against_naive_loops() {
        let mut rng = Rng(30);
        let shapes = [(1, 1, 1), (3, 70, 1), (1, 100_003, 1), (40, 5, 1), (2, 3, 200), (1, 2500, 130), (4, 1, 9)];
        for (outer, n, inner) in shapes.into_iter().chain([(0, 4, 3), (2, 0, 3), (2, 0, 1), (2, 3, 0), (5, 1025, 3)]) {
            let x = rng.values(outer * n * inner, 1.0);
            let low: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
            for reduction in [Reduction::Sum, Reduction::Mean, Reduction::Max] {
                let mut want = vec![];
                for o in 0..outer {
                    for i in 0..inner {
                        let column = (0..n).map(|r| f64::from(x[(o * n + r) * inner + i]));
                        want.push(match reduction {
                            Reduction::Sum => column.sum::<f64>(),
                            Reduction::Mean => column.sum::<f64>() / n as f64,
                            Reduction::Max => column.fold(f64::NEG_INFINITY, f64::max),
                        });
                    }
                }
                let (got, low) = (run(&x, (outer, n, inner), reduction), run(&low, (outer, n, inner), reduction));
                if n == 0 {
                    let same = |g: f32, w: f64| f64::from(g) == w || (g.is_nan() && w.is_nan());
                    assert!(got.iter().zip(want).all(|(&g, w)| same(g, w)));
                    continue;
                }
                assert_close(&got, &want, 1e-5);
                assert_close(&low, &want, 0.004 * (n as f64).sqrt());
            }
        }
    }

    #[test]
    fn long_sums_stay_exact_where_they_can() {
        // One running f32 sum would stop growing at 2^24.
        let n = (1 << 24) + 4096;
        assert_eq!(run(&vec![1.0_f32; n], (1, n, 1), Reduction::Sum), [n as f32]);
    }

    #[test]
    fn a_nan_wins_the_maximum() {
        for n in [3, 40, 3000] {
            for inner in [1, 5] {
                let mut x = vec![1.0_f32; n * inner];
                x[(n / 2) * inner] = f32::NAN;
                let got = run(&x, (1, n, inner), Reduction::Max);
                assert!(got[0].is_nan() && got[1..].iter().all(|&v| v == 1.0));
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let x = Rng(31).values(300 * 1100, 1.0);
        same_on_any_thread_count(|| {
            let shapes = [(1, 330_000, 1), (1, 1100, 300), (1100, 300, 1), (10, 1100, 30)];
            shapes.map(|shape| bits(&run(&x, shape, Reduction::Sum)))
        });
    }
}
