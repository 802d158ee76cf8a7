//! Root-mean-square normalisation over the last axis (Zhang and Sennrich, arXiv:1910.07467) and its vjp.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::rows::{add_partials, for_blocks, for_blocks_of, partial_height, sum_over};
use crate::cpu::kernels::tile::Shared;

/// y = x rstd gamma for each row, with rstd = 1 / sqrt(sum(x^2) / D + eps).
///
/// `x`, `y` [R, D]; `gamma` [D]; `rstd` [R] is an output that the vjp needs.
///
/// # Panics
/// If the lengths do not fit (a bug of the caller).
pub fn rms_norm<T: Element, P: Element>(x: &[T], gamma: &[P], eps: f32, y: &mut [T], rstd: &mut [f32]) {
    let (rows, width) = (rstd.len(), gamma.len());
    assert!(x.len() == rows * width && y.len() == x.len());
    let (y, rstd) = (Shared::new(y), Shared::new(rstd));
    let scale = 1.0 / width as f32;
    for_blocks(rows, width, |first, count| {
        // SAFETY: the blocks are disjoint.
        let (y, rstd) = unsafe { (y.piece(first * width, count * width), rstd.piece(first, count)) };
        simd(
            #[inline(always)]
            || {
                for r in 0..count {
                    let (x, y) = (&x[(first + r) * width..][..width], &mut y[r * width..][..width]);
                    let s = 1.0 / (sum_over(x, x, x, |x, _, _| x * x) * scale + eps).sqrt();
                    rstd[r] = s;
                    for ((y, x), gamma) in y.iter_mut().zip(x).zip(gamma) {
                        *y = T::from_f32(x.to_f32() * s * gamma.to_f32());
                    }
                }
            },
        );
    });
}

/// Workspace of [`rms_norm_grad`] in f32. The thread count makes no difference.
pub const fn rms_norm_grad_workspace(rows: usize, width: usize) -> usize {
    rows.div_ceil(partial_height(rows)) * width
}

/// The vjp of [`rms_norm`]: cotangents of x and gamma from that of y.
///
/// With h = x rstd and g = dy gamma: dx = rstd (g - h sum(g h) / D), dgamma = sum over rows of dy h.
/// `x`, `dy`, `dx` [R, D]; `rstd` [R] from the forward; `gamma`, `dgamma` [D]. Row sums go through blocks of a height that
/// depends on R only, so the bits do not depend on the threads.
///
/// # Panics
/// If the lengths do not fit or the workspace is below [`rms_norm_grad_workspace`] (bugs of the caller).
pub fn rms_norm_grad<T: Element, P: Element, G: Element>(
    x: &[T],
    gamma: &[P],
    rstd: &[f32],
    dy: &[T],
    dx: &mut [T],
    dgamma: &mut [G],
    workspace: &mut [f32],
) {
    let (rows, width) = (rstd.len(), gamma.len());
    assert!(x.len() == rows * width && dy.len() == x.len() && dx.len() == x.len() && dgamma.len() == width);
    let height = partial_height(rows);
    let partials = &mut workspace[..rms_norm_grad_workspace(rows, width)];
    let (dx, parts) = (Shared::new(dx), Shared::new(&mut *partials));
    let scale = 1.0 / width as f32;
    for_blocks_of(height, rows, width, |first, count| {
        // SAFETY: the blocks are disjoint.
        let (dx, dgamma) =
            unsafe { (dx.piece(first * width, count * width), parts.piece(first / height * width, width)) };
        dgamma.fill(0.0);
        simd(
            #[inline(always)]
            || {
                for r in 0..count {
                    let at = (first + r) * width;
                    let (x, dy, dx) = (&x[at..][..width], &dy[at..][..width], &mut dx[r * width..][..width]);
                    let s = rstd[first + r];
                    let gh = sum_over(dy, gamma, x, |dy, gamma, x| dy * gamma * (x * s)) * scale;
                    for (((dx, x), dy), (dgamma, gamma)) in
                        dx.iter_mut().zip(x).zip(dy).zip(dgamma.iter_mut().zip(gamma))
                    {
                        let (dy, h) = (dy.to_f32(), x.to_f32() * s);
                        *dx = T::from_f32((dy * gamma.to_f32() - h * gh) * s);
                        *dgamma += dy * h;
                    }
                }
            },
        );
    });
    simd(
        #[inline(always)]
        || add_partials(partials, rows.div_ceil(height), width, 0, dgamma),
    );
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::kernels::attention::tests::values;
    use crate::cpu::kernels::rows::tests::{close, with_threads};

    const SIZES: [(usize, usize); 6] = [(1, 1), (1, 7), (5, 64), (70, 33), (300, 256), (1100, 20)];

    fn f64s<T: Element>(x: &[T]) -> Vec<f64> {
        x.iter().map(|x| x.to_f32() as f64).collect()
    }

    fn forward(x: &[f64], gamma: &[f64], eps: f64) -> Vec<f64> {
        let d = gamma.len();
        let mut y = Vec::new();
        for row in x.chunks(d) {
            let mean_square = row.iter().map(|x| x * x).sum::<f64>() / d as f64;
            y.extend((0..d).map(|i| row[i] / (mean_square + eps).sqrt() * gamma[i]));
        }
        y
    }

    fn run<T: Element, P: Element>(x: &[T], gamma: &[P], dy: &[T], threads: usize) -> (Vec<T>, Vec<T>, Vec<f32>) {
        let (d, nan) = (gamma.len(), T::from_f32(f32::NAN));
        let rows = x.len() / d;
        let (mut y, mut dx) = (vec![nan; x.len()], vec![nan; x.len()]);
        let (mut rstd, mut dgamma) = (vec![f32::NAN; rows], vec![f32::NAN; d]);
        let mut space = vec![f32::NAN; rms_norm_grad_workspace(rows, d)];
        with_threads(threads, || {
            rms_norm(x, gamma, 1e-2, &mut y, &mut rstd);
            rms_norm_grad(x, gamma, &rstd, dy, &mut dx, &mut dgamma, &mut space);
        });
        (y, dx, dgamma)
    }

    fn against_oracle<T: Element, P: Element>(rounding: f64) {
        for (rows, d) in SIZES {
            let (x, dy, gamma) = (values::<T>(rows * d, 1), values::<T>(rows * d, 2), values::<P>(d, 3));
            let (y, dx, dgamma) = run(&x, &gamma, &dy, 2);
            let (x, dy, gamma) = (f64s(&x), f64s(&dy), f64s(&gamma));
            let eps = 1e-2f32 as f64;
            close(&y, &forward(&x, &gamma, eps), rounding, "y");
            // Central differences in f64 of the sum of y dy, each row by itself.
            let step = 1e-5;
            for i in (0..rows * d).step_by(if rows * d > 1000 { 7 } else { 1 }) {
                let row = i / d * d;
                let mut moved = x[row..row + d].to_vec();
                let mut sides = [0.0; 2];
                for (side, delta) in sides.iter_mut().zip([step, -step]) {
                    moved[i - row] = x[i] + delta;
                    *side = forward(&moved, &gamma, eps).iter().zip(&dy[row..]).map(|(y, dy)| y * dy).sum();
                }
                close(&dx[i..i + 1], &[(sides[0] - sides[1]) / (2.0 * step)], 2.0 * rounding, "dx");
            }
            let h = forward(&x, &vec![1.0; d], eps);
            let want: Vec<f64> = (0..d).map(|c| (0..rows).map(|r| dy[r * d + c] * h[r * d + c]).sum()).collect();
            close(&dgamma, &want, 1e-5, "dgamma");
        }
    }

    #[test]
    fn f32_agrees_with_the_oracle() {
        against_oracle::<f32, f32>(1e-5);
    }

    #[test]
    fn bf16_agrees_with_the_oracle() {
        against_oracle::<bf16, f32>(1.0 / 200.0);
        against_oracle::<bf16, bf16>(1.0 / 200.0);
    }

    #[test]
    fn the_bits_do_not_depend_on_the_threads() {
        for (rows, d) in [(300, 256), (5000, 20)] {
            let (x, dy, gamma) = (values::<f32>(rows * d, 5), values::<f32>(rows * d, 6), values::<f32>(d, 7));
            assert_eq!(run(&x, &gamma, &dy, 1), run(&x, &gamma, &dy, 3));
        }
    }
}
