//! Softmax over the last axis and its vjp.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::rows::{for_blocks, max_over, sum_over};
use crate::cpu::kernels::tile::Shared;
use crate::cpu::vmath;

/// y = exp(x - max(x)) / sum(exp(x - max(x))) for each row of `width` elements; `x`, `y` [R, width].
///
/// -inf gives 0; a row with a NaN, with +inf or with nothing but -inf gives NaN.
///
/// # Panics
/// If the lengths differ or are no multiple of `width` (a bug of the caller).
pub fn softmax<T: Element>(x: &[T], width: usize, y: &mut [T]) {
    if x.is_empty() && y.is_empty() {
        return;
    }
    assert!(x.len() == y.len() && x.len().is_multiple_of(width));
    let out = Shared::new(y);
    for_blocks(x.len() / width, width, |first, count| {
        // SAFETY: the blocks are disjoint.
        let y = unsafe { out.piece(first * width, count * width) };
        simd(
            #[inline(always)]
            || {
                for (x, y) in x[first * width..][..count * width].chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                    let max = max_over(x);
                    let inverse = 1.0 / sum_over(x, x, x, |x, _, _| vmath::exp_or_zero(x - max));
                    // The exponentials again rather than stored and read: a narrow T would round them twice.
                    for (y, x) in y.iter_mut().zip(x) {
                        *y = T::from_f32(vmath::exp_or_zero(x.to_f32() - max) * inverse);
                    }
                }
            },
        );
    });
}

/// The vjp of [`softmax`]: dx = y (dy - sum(dy y)) for each row of `width` elements; `y`, `dy`, `dx` [R, width].
///
/// # Panics
/// If the lengths differ or are no multiple of `width` (a bug of the caller).
pub fn softmax_grad<T: Element>(y: &[T], dy: &[T], width: usize, dx: &mut [T]) {
    if y.is_empty() && dx.is_empty() {
        return;
    }
    assert!(y.len() == dy.len() && y.len() == dx.len() && y.len().is_multiple_of(width));
    let out = Shared::new(dx);
    for_blocks(y.len() / width, width, |first, count| {
        // SAFETY: the blocks are disjoint.
        let dx = unsafe { out.piece(first * width, count * width) };
        simd(
            #[inline(always)]
            || {
                for (r, dx) in dx.chunks_exact_mut(width).enumerate() {
                    let at = (first + r) * width;
                    let (y, dy) = (&y[at..][..width], &dy[at..][..width]);
                    let dot = sum_over(y, dy, y, |y, dy, _| y * dy);
                    for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
                        *dx = T::from_f32(y.to_f32() * (dy.to_f32() - dot));
                    }
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::kernels::attention::tests::values;
    use crate::cpu::kernels::rows::tests::{close, with_threads};

    fn run<T: Element>(x: &[T], dy: &[T], width: usize, threads: usize) -> (Vec<T>, Vec<T>) {
        let nan = T::from_f32(f32::NAN);
        let (mut y, mut dx) = (vec![nan; x.len()], vec![nan; x.len()]);
        with_threads(threads, || {
            softmax(x, width, &mut y);
            softmax_grad(&y, dy, width, &mut dx);
        });
        (y, dx)
    }

    fn against_oracle<T: Element>(tolerance: f64) {
        for (rows, width) in [(1, 1), (3, 7), (64, 64), (5, 1000), (700, 50), (2, 50_304)] {
            let dy = values::<T>(rows * width, 2);
            let x: Vec<T> = values::<T>(rows * width, 1).iter().map(|x| T::from_f32(x.to_f32() * 8.0)).collect();
            let (y, dx) = run(&x, &dy, width, 2);
            let (mut want_y, mut want_dx) = (Vec::new(), Vec::new());
            for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
                let e: Vec<f64> = x.iter().map(|x| (x.to_f32() as f64).exp()).collect();
                let sum: f64 = e.iter().sum();
                let dot: f64 = e.iter().zip(dy).map(|(e, dy)| e / sum * dy.to_f32() as f64).sum();
                want_y.extend(e.iter().map(|e| e / sum));
                want_dx.extend(e.iter().zip(dy).map(|(e, dy)| e / sum * (dy.to_f32() as f64 - dot)));
            }
            close(&y, &want_y, tolerance, "y");
            close(&dx, &want_dx, 2.0 * tolerance, "dx");
            for (y, width) in y.chunks(width).zip(std::iter::repeat(width)) {
                let sum: f64 = y.iter().map(|y| y.to_f32() as f64).sum();
                assert!((sum - 1.0).abs() < tolerance * 10.0, "a row of {width} sums to {sum}");
            }
        }
    }

    #[test]
    fn f32_agrees_with_the_oracle() {
        against_oracle::<f32>(1e-6);
    }

    #[test]
    fn bf16_agrees_with_the_oracle() {
        against_oracle::<bf16>(1.0 / 250.0);
    }

    #[test]
    fn the_bits_do_not_depend_on_the_threads() {
        let (x, dy) = (values::<f32>(70_000, 3), values::<f32>(70_000, 4));
        assert_eq!(run(&x, &dy, 70, 1), run(&x, &dy, 70, 3));
    }

    #[test]
    fn extreme_rows_are_as_documented() {
        let mut y = [0.0f32; 3];
        softmax(&[f32::NEG_INFINITY, 3.0, 3.0], 3, &mut y);
        assert_eq!(y, [0.0, 0.5, 0.5]);
        softmax(&[-3e38f32, 3e38, -3e38], 3, &mut y);
        assert_eq!(y, [0.0, 1.0, 0.0]);
        for x in [[f32::NAN, 1.0, 2.0], [f32::INFINITY, 1.0, 2.0], [f32::NEG_INFINITY; 3]] {
            softmax(&x, 3, &mut y);
            assert!(y.iter().any(|y| y.is_nan()), "{x:?}");
        }
    }
}
