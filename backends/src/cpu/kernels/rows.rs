//! What the kernels over rows share: sharing rows out over threads, and sums along a row in a fixed order.

use crate::cpu::crew;
use crate::cpu::element::Element;

/// Elements a block of rows should have: enough that handing it to another thread pays.
const BLOCK_ELEMENTS: usize = 1 << 14;
/// Running sums along a row, and running maxima: enough registers to hide the latency of an addition.
const SUMS: usize = 32;
/// Terms of a sum that are computed before they are added: four for each running sum.
const TERMS: usize = 4 * SUMS;

/// Calls `block(first, count)` for consecutive blocks of the `rows` rows of `width` elements, in parallel where it pays.
pub(super) fn for_blocks(rows: usize, width: usize, block: impl Fn(usize, usize) + Sync) {
    let height = (BLOCK_ELEMENTS / width.max(1)).max(1);
    for_blocks_of(height, rows, width, block);
}

/// [`for_blocks`] with blocks of `height` rows.
pub(super) fn for_blocks_of(height: usize, rows: usize, width: usize, block: impl Fn(usize, usize) + Sync) {
    let blocks = rows.div_ceil(height);
    let call = |i: usize| block(i * height, height.min(rows - i * height));
    let workers = if rows * width < 2 * BLOCK_ELEMENTS { 1 } else { crew::threads() };
    crew::share(workers, blocks, |_, i| call(i));
}

/// Rows in a block of a sum over `rows` rows: it depends on `rows` only and leaves at most 64 blocks, so that the partial
/// sums take little room and their order does not depend on the threads.
pub(super) const fn partial_height(rows: usize) -> usize {
    let height = rows.div_ceil(64);
    if height < 16 { 16 } else { height }
}

/// Adds up the partial sums [blocks, `stride`] of each column, in the order of the blocks.
#[inline(always)]
pub(super) fn add_partials<T: Element>(
    partials: &mut [f32],
    blocks: usize,
    stride: usize,
    offset: usize,
    to: &mut [T],
) {
    let width = to.len();
    if blocks == 0 {
        to.fill(T::from_f32(0.0));
        return;
    }
    let (total, rest) = partials[offset..].split_at_mut(stride - offset);
    for block in 1..blocks {
        let from = &rest[(block - 1) * stride + offset..][..width];
        for (total, from) in total.iter_mut().zip(from) {
            *total += from;
        }
    }
    for (to, total) in to.iter_mut().zip(total) {
        *to = T::from_f32(*total);
    }
}

/// The sum of `term(a[i], b[i], c[i])` in f32: pairwise within blocks of 128 down to 32 running sums, which are added up
/// pairwise at the end. The slices have one length.
#[inline(always)]
pub(super) fn sum_over<A: Element, B: Element, C: Element>(
    a: &[A],
    b: &[B],
    c: &[C],
    term: impl Fn(f32, f32, f32) -> f32,
) -> f32 {
    let n = a.len();
    let (b, c) = (&b[..n], &c[..n]);
    let mut sums = [0.0f32; SUMS];
    let whole = n / TERMS * TERMS;
    for from in (0..whole).step_by(TERMS) {
        // Terms of a fixed number stay in registers.
        let (a, b, c) = (&a[from..][..TERMS], &b[from..][..TERMS], &c[from..][..TERMS]);
        let terms: [f32; TERMS] = std::array::from_fn(|x| term(a[x].to_f32(), b[x].to_f32(), c[x].to_f32()));
        for x in 0..SUMS {
            let halves = |x: usize| terms[x] + terms[x + TERMS / 2];
            sums[x] += halves(x) + halves(x + SUMS);
        }
    }
    if whole < n {
        // The terms are written down first: the compiler vectorises this loop, but not one that adds to an array.
        let (mut terms, count) = ([0.0f32; TERMS], n - whole);
        let (a, b, c) = (&a[whole..], &b[whole..], &c[whole..]);
        for x in 0..count {
            terms[x] = term(a[x].to_f32(), b[x].to_f32(), c[x].to_f32());
        }
        // A short rest has zeros above its terms, which need no adding up.
        add_halves(&mut terms[..count.next_power_of_two().max(SUMS)], SUMS);
        for x in 0..SUMS {
            sums[x] += terms[x];
        }
    }
    add_halves(&mut sums, 1);
    sums[0]
}

/// Adds the upper half of `values` to the lower one until `left` are left.
#[inline(always)]
fn add_halves(values: &mut [f32], left: usize) {
    let mut width = values.len() / 2;
    while width >= left {
        let (low, high) = values.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(&high[..width]) {
            *low += high;
        }
        width /= 2;
    }
}

/// The largest element, -inf if there is none; NaN are passed over.
#[inline(always)]
pub(super) fn max_over<T: Element>(row: &[T]) -> f32 {
    let larger = |max: f32, x: f32| if x > max { x } else { max };
    let mut maxima = [f32::NEG_INFINITY; SUMS];
    let (parts, rest) = row.as_chunks::<SUMS>();
    for part in parts {
        for x in 0..SUMS {
            maxima[x] = larger(maxima[x], part[x].to_f32());
        }
    }
    for (max, x) in maxima.iter_mut().zip(rest) {
        *max = larger(*max, x.to_f32());
    }
    maxima.into_iter().fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Runs `f` with a crew of `threads` threads.
    pub(crate) fn with_threads<R>(threads: usize, f: impl FnOnce() -> R) -> R {
        crew::Crew::new(threads).unwrap().lead(f)
    }

    /// Asserts |got - want| <= tolerance (1 + |want|) for each element.
    pub(crate) fn close<T: Element>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let got = got.to_f32() as f64;
            assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{what}[{i}]: {got}, not {want}");
        }
    }

    #[test]
    fn sums_and_maxima_are_right_for_every_length() {
        for n in [0, 1, 31, 32, 33, 100, 1000] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
            let want: f64 = x.iter().map(|&v| (v * v) as f64).sum();
            assert!((sum_over(&x, &x, &x, |a, b, _| a * b) as f64 - want).abs() < 1e-4);
            assert_eq!(max_over(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }

    #[test]
    fn blocks_cover_every_row_once() {
        for (rows, width) in [(0, 4), (1, 1), (5, 20_000), (1000, 100)] {
            let seen: Vec<_> = (0..rows).map(|_| std::sync::atomic::AtomicUsize::new(0)).collect();
            with_threads(3, || {
                for_blocks(rows, width, |first, count| {
                    for seen in &seen[first..first + count] {
                        seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                })
            });
            assert!(seen.iter().all(|n| n.load(std::sync::atomic::Ordering::Relaxed) == 1));
        }
    }
}
