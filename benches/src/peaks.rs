//! What this machine can do at most: the yardsticks for the kernels.

use std::hint::black_box;
use std::time::{Duration, Instant};

use pulp::{Arch, Simd, WithSimd};

/// Best time of a call in about half a second, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    let (mut best, end) = (f64::INFINITY, Instant::now() + Duration::from_millis(500));
    while Instant::now() < end {
        let begun = Instant::now();
        run();
        best = best.min(begun.elapsed().as_secs_f64());
    }
    best
}

/// Chains of fused multiply-adds, enough of them to hide the latency of each.
struct Chains;

impl Chains {
    const COUNT: usize = 12;
    const STEPS: usize = 200_000;
}

impl WithSimd for Chains {
    /// A sum that keeps the chains alive, and the operations done.
    type Output = (f32, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f32, f64) {
        let mut chains = [simd.splat_f32s(1.0); Chains::COUNT];
        let (a, b) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(1.0)));
        for _ in 0..Chains::STEPS {
            for chain in &mut chains {
                *chain = simd.mul_add_e_f32s(*chain, a, b);
            }
        }
        let sum = chains.into_iter().map(|chain| simd.reduce_sum_f32s(chain)).sum();
        (sum, (2 * Chains::COUNT * Chains::STEPS * S::F32_LANES) as f64)
    }
}

/// FLOP/s of independent fused multiply-adds on every core at once.
pub fn fma() -> f64 {
    let mut operations = 0.0;
    let seconds = best(|| {
        operations = rayon::broadcast(|_| black_box(Arch::new().dispatch(Chains)).1).into_iter().sum();
    });
    operations / seconds
}

/// Bytes a second that all cores read from memory, a slab of 4 MiB at a time out of 512 MiB.
pub fn read_bandwidth() -> f64 {
    const SLAB: usize = (4 << 20) / size_of::<u64>();
    let all = vec![1u64; 128 * SLAB];
    let mut turn = 0;
    let seconds = best(|| {
        turn = (turn + 1) % 128;
        let slab = &all[turn * SLAB..][..SLAB];
        let part = SLAB / rayon::current_num_threads();
        rayon::broadcast(|thread| {
            let mut sums = [0u64; 32];
            for chunk in slab[thread.index() * part..][..part].chunks_exact(32) {
                sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum ^= x);
            }
            black_box(sums)
        });
    });
    (SLAB * size_of::<u64>()) as f64 / seconds
}
