//! Random tensors on all threads; the numbers themselves are made in [`random`](mod@random).

use crate::cpu::element::{Element, simd};

use super::par::{Shared, tasks};
use super::random;

/// Elements made at a time, on the stack.
const TILE: usize = 1024;
/// The work of one number in elements touched, roughly.
const WORK: usize = 8;

/// What a random tensor of floating-point numbers holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Distribution {
    /// Multiples of 2^-24 in [0, 1).
    Uniform,
    /// Mean 0, variance 1.
    Normal,
    /// -ln(-ln u), the noise of the Gumbel-max trick.
    Gumbel,
}

/// Fills `out` with the elements 0..len of the sequence of (`key`, `stream`), each rounded once to `T`.
pub fn random<T: Element>(distribution: Distribution, key: [u32; 2], stream: u32, out: &mut [T]) {
    let len = out.len();
    let out = Shared::new(out);
    tasks(len.div_ceil(TILE), len.saturating_mul(WORK), |task| {
        let from = task * TILE;
        // SAFETY: tasks have disjoint tiles.
        let out = unsafe { out.part(from, TILE.min(len - from)) };
        simd(
            #[inline(always)]
            || {
                let mut tile = [0.0; TILE];
                let values = &mut tile[..out.len()];
                match distribution {
                    Distribution::Uniform => random::uniform(key, stream, from as u64, values),
                    Distribution::Normal => random::normal(key, stream, from as u64, values),
                    Distribution::Gumbel => random::gumbel(key, stream, from as u64, values),
                }
                for (o, &v) in out.iter_mut().zip(&*values) {
                    *o = T::from_f32(v);
                }
            },
        );
    });
}

/// Fills `out` with the raw words 0..len of the sequence of (`key`, `stream`).
pub fn random_bits(key: [u32; 2], stream: u32, out: &mut [u32]) {
    let len = out.len();
    let out = Shared::new(out);
    tasks(len.div_ceil(TILE), len.saturating_mul(WORK), |task| {
        let from = task * TILE;
        // SAFETY: tasks have disjoint tiles.
        let out = unsafe { out.part(from, TILE.min(len - from)) };
        simd(
            #[inline(always)]
            || random::bits(key, stream, from as u64, out),
        );
    });
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{bits, same_on_any_thread_count};
    use super::*;
    use half::bf16;

    #[test]
    fn the_sequence_on_any_thread_count() {
        let (key, stream, n) = ([1, 2], 9, 10_001);
        for distribution in [Distribution::Uniform, Distribution::Normal, Distribution::Gumbel] {
            let got = same_on_any_thread_count(|| {
                let mut x = vec![f32::NAN; n];
                random(distribution, key, stream, &mut x);
                bits(&x)
            });
            // Compiled without vector instructions, and as one piece.
            let mut want = vec![f32::NAN; n];
            match distribution {
                Distribution::Uniform => random::uniform(key, stream, 0, &mut want),
                Distribution::Normal => random::normal(key, stream, 0, &mut want),
                Distribution::Gumbel => random::gumbel(key, stream, 0, &mut want),
            }
            assert_eq!(got, bits(&want));
            let mut low = vec![bf16::NAN; n];
            random(distribution, key, stream, &mut low);
            assert!(low.iter().zip(&want).all(|(l, &w)| *l == bf16::from_f32(w)));
        }
        let got = same_on_any_thread_count(|| {
            let mut x = vec![0; n];
            random_bits(key, stream, &mut x);
            x
        });
        let mut want = vec![0; n];
        random::bits(key, stream, 0, &mut want);
        assert_eq!(got, want);
    }
}
