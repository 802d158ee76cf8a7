//! Layer normalisation over the last axis (Ba et al., arXiv:1607.06450) and its vjp.

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::rows::{add_partials, for_blocks, for_blocks_of, partial_height, sum_over};
use crate::cpu::kernels::tile::Shared;

/// y = (x - mean) rstd gamma + beta for each row, with mean = sum(x) / D and rstd = 1 / sqrt(sum((x - mean)^2) / D + eps).
///
/// `x`, `y` [R, D]; `gamma`, `beta` [D]; `mean`, `rstd` [R] are outputs that the vjp needs.
///
/// # Panics
/// If the lengths do not fit (a bug of the caller).
pub fn layer_norm<T: Element, P: Element>(
    x: &[T],
    gamma: &[P],
    beta: &[P],
    eps: f32,
    y: &mut [T],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let (rows, width) = (mean.len(), gamma.len());
    assert!(beta.len() == width && rstd.len() == rows && x.len() == rows * width && y.len() == x.len());
    let (y, mean, rstd) = (Shared::new(y), Shared::new(mean), Shared::new(rstd));
    let scale = 1.0 / width as f32;
    for_blocks(rows, width, |first, count| {
        // SAFETY: the blocks are disjoint.
        let (y, mean, rstd) =
            unsafe { (y.piece(first * width, count * width), mean.piece(first, count), rstd.piece(first, count)) };
        simd(
            #[inline(always)]
            || {
                for r in 0..count {
                    let (x, y) = (&x[(first + r) * width..][..width], &mut y[r * width..][..width]);
                    let m = sum_over(x, x, x, |x, _, _| x) * scale;
                    // From the differences: sum(x^2) / D - mean^2 would lose the variance of rows far from 0.
                    let variance = sum_over(x, x, x, |x, _, _| (x - m) * (x - m)) * scale;
                    let s = 1.0 / (variance + eps).sqrt();
                    (mean[r], rstd[r]) = (m, s);
                    for (((y, x), gamma), beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
                        *y = T::from_f32((x.to_f32() - m) * s * gamma.to_f32() + beta.to_f32());
                    }
                }
            },
        );
    });
}

/// Workspace of [`layer_norm_grad`] in f32. The thread count makes no difference.
pub const fn layer_norm_grad_workspace(rows: usize, width: usize) -> usize {
    rows.div_ceil(partial_height(rows)) * 2 * width
}

/// The vjp of [`layer_norm`]: cotangents of x, gamma and beta from that of y.
///
/// With h = (x - mean) rstd and g = dy gamma: dx = rstd (g - sum(g) / D - h sum(g h) / D), dgamma = sum over rows of dy h,
/// dbeta = sum over rows of dy. `x`, `dy`, `dx` [R, D]; `mean`, `rstd` [R] from the forward; `gamma`, `dgamma`, `dbeta` [D].
/// Row sums go through blocks of a height that depends on R only, so the bits do not depend on the threads.
///
/// # Panics
/// If the lengths do not fit or the workspace is below [`layer_norm_grad_workspace`] (bugs of the caller).
pub fn layer_norm_grad<T: Element, P: Element, G: Element>(
    x: &[T],
    gamma: &[P],
    mean: &[f32],
    rstd: &[f32],
    dy: &[T],
    dx: &mut [T],
    dgamma: &mut [G],
    dbeta: &mut [G],
    workspace: &mut [f32],
) {
    let (rows, width) = (mean.len(), gamma.len());
    assert!(rstd.len() == rows && x.len() == rows * width && dy.len() == x.len() && dx.len() == x.len());
    assert!(dgamma.len() == width && dbeta.len() == width);
    let height = partial_height(rows);
    let partials = &mut workspace[..layer_norm_grad_workspace(rows, width)];
    let (dx, parts) = (Shared::new(dx), Shared::new(&mut *partials));
    let scale = 1.0 / width as f32;
    for_blocks_of(height, rows, width, |first, count| {
        // SAFETY: the blocks are disjoint.
        let (dx, part) =
            unsafe { (dx.piece(first * width, count * width), parts.piece(first / height * 2 * width, 2 * width)) };
        part.fill(0.0);
        let (dgamma, dbeta) = part.split_at_mut(width);
        simd(
            #[inline(always)]
            || {
                for r in 0..count {
                    let at = (first + r) * width;
                    let (x, dy, dx) = (&x[at..][..width], &dy[at..][..width], &mut dx[r * width..][..width]);
                    let (m, s) = (mean[first + r], rstd[first + r]);
                    let g = sum_over(dy, gamma, x, |dy, gamma, _| dy * gamma) * scale;
                    let gh = sum_over(dy, gamma, x, |dy, gamma, x| dy * gamma * ((x - m) * s)) * scale;
                    let sums = dgamma.iter_mut().zip(&mut *dbeta).zip(gamma);
                    for (((dx, x), dy), ((dgamma, dbeta), gamma)) in dx.iter_mut().zip(x).zip(dy).zip(sums) {
                        let (dy, h) = (dy.to_f32(), (x.to_f32() - m) * s);
                        *dx = T::from_f32((dy * gamma.to_f32() - g - h * gh) * s);
                        *dgamma += dy * h;
                        *dbeta += dy;
                    }
                }
            },
        );
    });
    let blocks = rows.div_ceil(height);
    simd(
        #[inline(always)]
        || {
            add_partials(partials, blocks, 2 * width, 0, dgamma);
            add_partials(partials, blocks, 2 * width, width, dbeta);
        },
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

    fn forward(x: &[f64], gamma: &[f64], beta: &[f64], eps: f64) -> Vec<f64> {
        let d = gamma.len();
        let mut y = Vec::new();
        for row in x.chunks(d) {
            let mean = row.iter().sum::<f64>() / d as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            y.extend((0..d).map(|i| (row[i] - mean) / (variance + eps).sqrt() * gamma[i] + beta[i]));
        }
        y
    }

    type Outputs<T> = (Vec<T>, Vec<T>, Vec<f32>, Vec<f32>);

    fn run<T: Element, P: Element>(x: &[T], gamma: &[P], beta: &[P], dy: &[T], threads: usize) -> Outputs<T> {
        let (d, nan) = (gamma.len(), T::from_f32(f32::NAN));
        let rows = x.len() / d;
        let (mut y, mut dx) = (vec![nan; x.len()], vec![nan; x.len()]);
        let (mut mean, mut rstd) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
        let (mut dgamma, mut dbeta) = (vec![f32::NAN; d], vec![f32::NAN; d]);
        let mut space = vec![f32::NAN; layer_norm_grad_workspace(rows, d)];
        with_threads(threads, || {
            layer_norm(x, gamma, beta, 1e-2, &mut y, &mut mean, &mut rstd);
            layer_norm_grad(x, gamma, &mean, &rstd, dy, &mut dx, &mut dgamma, &mut dbeta, &mut space);
        });
        (y, dx, dgamma, dbeta)
    }

    /// The vjp by central differences in f64 of the sum of y dy.
    fn against_oracle<T: Element, P: Element>(rounding: f64) {
        for (rows, d) in SIZES {
            let (x, dy) = (values::<T>(rows * d, 1), values::<T>(rows * d, 2));
            let (gamma, beta) = (values::<P>(d, 3), values::<P>(d, 4));
            let (y, dx, dgamma, dbeta) = run(&x, &gamma, &beta, &dy, 2);
            let (x, dy, gamma, beta) = (f64s(&x), f64s(&dy), f64s(&gamma), f64s(&beta));
            let eps = 1e-2f32 as f64;
            close(&y, &forward(&x, &gamma, &beta, eps), rounding, "y");
            let step = 1e-5;
            let dot = |y: &[f64], dy: &[f64]| -> f64 { y.iter().zip(dy).map(|(y, dy)| y * dy).sum() };
            // A row of y depends on its own row of x only; every 7th element will do.
            for i in (0..rows * d).step_by(if rows * d > 1000 { 7 } else { 1 }) {
                let row = i / d * d;
                let mut moved = x[row..row + d].to_vec();
                moved[i - row] += step;
                let up = dot(&forward(&moved, &gamma, &beta, eps), &dy[row..row + d]);
                moved[i - row] -= 2.0 * step;
                let down = dot(&forward(&moved, &gamma, &beta, eps), &dy[row..row + d]);
                close(&dx[i..i + 1], &[(up - down) / (2.0 * step)], 2.0 * rounding, "dx");
            }
            let h = forward(&x, &vec![1.0; d], &vec![0.0; d], eps);
            let column = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
                (0..d).map(|c| (0..rows).map(|r| f(r * d + c)).sum()).collect()
            };
            close(&dgamma, &column(&|i| dy[i] * h[i]), 1e-5, "dgamma");
            close(&dbeta, &column(&|i| dy[i]), 1e-5, "dbeta");
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
            let (x, dy) = (values::<f32>(rows * d, 5), values::<f32>(rows * d, 6));
            let (gamma, beta) = (values::<f32>(d, 7), values::<f32>(d, 8));
            assert_eq!(run(&x, &gamma, &beta, &dy, 1), run(&x, &gamma, &beta, &dy, 3));
        }
    }

    #[test]
    fn a_row_far_from_zero_keeps_its_variance() {
        let x: Vec<f32> = (0..64).map(|i| 1000.0 + (i % 2) as f32).collect();
        let (mut y, mut mean, mut rstd) = (vec![f32::NAN; 64], [0.0], [0.0]);
        layer_norm(&x, &[1.0f32; 64], &[0.0; 64], 0.0, &mut y, &mut mean, &mut rstd);
        assert_eq!((mean[0], rstd[0]), (1000.5, 2.0));
        assert_eq!(y[..2], [-1.0, 1.0]);
    }

    #[test]
    fn no_rows_give_zero_gradients_of_the_parameters() {
        let (mut dgamma, mut dbeta) = ([f32::NAN; 3], [f32::NAN; 3]);
        layer_norm_grad::<f32, f32, f32>(&[], &[1.0; 3], &[], &[], &[], &mut [], &mut dgamma, &mut dbeta, &mut []);
        assert_eq!((dgamma, dbeta), ([0.0; 3], [0.0; 3]));
    }
}
