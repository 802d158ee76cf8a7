//! The norm of all gradients together, for clipping.

use crate::cpu::element::{Element, simd};

use super::par::{LANES, Shared, tasks};

/// Elements of one partial sum, whatever the thread count.
const CHUNK: usize = 16 * 1024;

/// The scratch [`sum_of_squares`] needs for a tensor of `len` elements (and [`global_norm`] for its longest one), in
/// f64 elements.
pub fn global_norm_workspace(len: usize) -> usize {
    len.div_ceil(CHUNK)
}

/// The sum of the squares of `x`, in f64 (no overflow for any f32), in chunks combined in fixed order.
/// `workspace` has [`global_norm_workspace`] elements.
pub fn sum_of_squares<T: Element>(x: &[T], workspace: &mut [f64]) -> f64 {
    let chunks = global_norm_workspace(x.len());
    let partial = &mut workspace[..chunks];
    let out = Shared::new(&mut *partial);
    tasks(chunks, x.len(), |c| {
        // SAFETY: each chunk has its own element.
        let out = unsafe { out.part(c, 1) };
        let x = &x[c * CHUNK..x.len().min((c + 1) * CHUNK)];
        simd(
            #[inline(always)]
            || {
                let mut lanes = [0.0_f64; LANES];
                let (whole, rest) = x.as_chunks::<LANES>();
                for x in whole {
                    for l in 0..LANES {
                        let v = f64::from(x[l].to_f32());
                        lanes[l] += v * v;
                    }
                }
                for (lane, x) in lanes.iter_mut().zip(rest) {
                    let v = f64::from(x.to_f32());
                    *lane += v * v;
                }
                out[0] = lanes.iter().sum();
            },
        );
    });
    partial.iter().sum()
}

/// sqrt(sum over all tensors of the sum of squares), the tensors in the given order.
/// `workspace` has [`global_norm_workspace`] elements for the longest tensor.
pub fn global_norm<T: Element>(tensors: &[&[T]], workspace: &mut [f64]) -> f32 {
    tensors.iter().map(|x| sum_of_squares(x, workspace)).sum::<f64>().sqrt() as f32
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, same_on_any_thread_count};
    use super::*;
    use half::bf16;

    #[test]
    fn against_f64_on_any_thread_count() {
        let mut rng = Rng(24);
        let tensors: Vec<Vec<f32>> = [0, 1, 15, 16, 40_000, 100_001].map(|n| rng.values(n, 2.0)).into();
        let views: Vec<&[f32]> = tensors.iter().map(|t| &t[..]).collect();
        let got = same_on_any_thread_count(|| global_norm(&views, &mut [f64::NAN; 7]).to_bits());
        let want = tensors.iter().flatten().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        assert!((f64::from(f32::from_bits(got)) - want).abs() < 1e-6 * want);
        let low = [bf16::from_f32(3.0), bf16::from_f32(4.0)];
        assert_eq!(global_norm(&[&low[..]], &mut [0.0; 1]), 5.0);
    }

    #[test]
    fn extremes() {
        assert_eq!(global_norm::<f32>(&[], &mut []), 0.0);
        assert_eq!(global_norm(&[&[1e30_f32][..]], &mut [0.0]), 1e30);
        assert_eq!(global_norm(&[&[f32::INFINITY, 1.0][..]], &mut [0.0]), f32::INFINITY);
        assert!(global_norm(&[&[f32::NAN][..], &[1.0][..]], &mut [0.0]).is_nan());
    }
}
