//! How kernels share work between threads, and the fixed-order sums that keep their bits equal on any thread count.

use std::marker::PhantomData;

use crate::cpu::crew;
use crate::cpu::element::Element;

/// Up to this much work (elements touched) a kernel stays on the calling thread: waking others costs more.
pub(crate) const SERIAL: usize = 16 * 1024;

/// The work one task should have, so that stealing it is worth it and a kernel still splits well.
pub(crate) const TASK: usize = 8 * 1024;

/// Calls `f(0..count)`, on several threads when `work` (elements touched in all) is worth it. What task `i` writes
/// must depend on `i` alone.
#[inline]
pub(crate) fn tasks(count: usize, work: usize, f: impl Fn(usize) + Sync) {
    let workers = if work <= SERIAL { 1 } else { crew::threads() };
    crew::share(workers, count, |_, i| f(i));
}

/// Splits `rows` rows of `row_work` elements of work into tasks of about [`TASK`] and calls `f(first_row, end_row)`.
#[inline]
pub(crate) fn row_tasks(rows: usize, row_work: usize, f: impl Fn(usize, usize) + Sync) {
    let step = (TASK / row_work.max(1)).max(1);
    tasks(rows.div_ceil(step), rows.saturating_mul(row_work), |i| f(i * step, rows.min((i + 1) * step)));
}

/// A mutable slice that tasks write disjoint parts of.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `part`, whose contract is that parts handed out at one time are disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Shared { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Elements `from..from + len`. Panics when they are not inside the slice.
    ///
    /// # Safety
    /// No other part that is alive may overlap it.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "part outside its slice");
        // SAFETY: inside the slice by the assertion, not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }

    /// [`Shared::part`]; of a slice without elements the one without.
    ///
    /// # Safety
    /// As there.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn part_if_any(&self, from: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        if self.len == 0 { &mut [] } else { unsafe { self.part(from, len) } }
    }
}

/// Partial sums kept side by side, so that a sum vectorises and has one order.
pub(crate) const LANES: usize = 16;

/// Folds the lanes pairwise.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of `x` in f32, in [`LANES`] interleaved partial sums.
#[inline(always)]
pub(crate) fn sum<T: Element>(x: &[T]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for l in 0..LANES {
            lanes[l] += x[l].to_f32();
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x.to_f32();
    }
    fold(lanes)
}

/// The inner product of `a` and `b` (of equal length) in f32, in [`LANES`] interleaved partial sums.
#[inline(always)]
pub(crate) fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += a[l].to_f32() * b[l].to_f32();
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a.to_f32() * b.to_f32();
    }
    fold(lanes)
}

/// The larger one; NaN when either is.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// The maximum of `x`; NaN when any element is, -inf of nothing.
#[inline(always)]
pub(crate) fn greatest<T: Element>(x: &[T]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for l in 0..LANES {
            lanes[l] = larger(lanes[l], x[l].to_f32());
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, x.to_f32());
    }
    let mut max = lanes[0];
    for lane in &lanes[1..] {
        max = larger(max, *lane);
    }
    max
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small generator for test inputs (splitmix64), independent of the kernels.
    pub(crate) struct Rng(pub(crate) u64);

    impl Rng {
        pub(crate) fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
        /// Uniform in 0..n.
        pub(crate) fn below(&mut self, n: usize) -> usize {
            (self.next() % n as u64) as usize
        }
        /// Uniform in [-scale, scale).
        pub(crate) fn value(&mut self, scale: f32) -> f32 {
            ((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
        }
        pub(crate) fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
            (0..n).map(|_| self.value(scale)).collect()
        }
    }

    /// Runs `f` with crews of 1 and of 3 threads and requires equal results.
    pub(crate) fn same_on_any_thread_count<R: PartialEq + std::fmt::Debug>(f: impl Fn() -> R) -> R {
        let run = |threads| crew::Crew::new(threads).unwrap().lead(&f);
        let (one, three) = (run(1), run(3));
        assert!(one == three, "the result depends on the number of threads");
        one
    }

    /// The bits of f32 values, for comparisons in which NaN equals itself.
    pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    /// |got - want| <= tol * max(1, |want|), with the position in the message; NaN fails.
    pub(crate) fn assert_close(got: &[f32], want: &[f64], tol: f64) {
        assert_eq!(got.len(), want.len());
        for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(g) - w).abs() <= tol * w.abs().max(1.0), "at {i}: {g} for {w}");
        }
    }

    #[test]
    fn every_row_once() {
        for (rows, work) in [(0, 5), (1, 0), (7, 100_000), (100_000, 1), (3000, 17)] {
            let mut seen = vec![0u8; rows];
            let shared = Shared::new(&mut seen);
            row_tasks(rows, work, |a, b| {
                // SAFETY: tasks have disjoint row ranges.
                unsafe { shared.part(a, b - a) }.iter_mut().for_each(|s| *s += 1);
            });
            assert!(seen.iter().all(|&s| s == 1));
        }
    }

    #[test]
    fn sums_and_maxima_of_every_length() {
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum(&x), (0..n).sum::<usize>() as f32);
            assert_eq!(dot(&x, &x), (0..n).map(|i| i * i).sum::<usize>() as f32);
            assert_eq!(greatest(&x), x.last().copied().unwrap_or(f32::NEG_INFINITY));
        }
    }
}
