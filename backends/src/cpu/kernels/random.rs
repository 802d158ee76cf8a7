//! The random numbers of [`moebius_ir::philox`], many at a time: same bits, in an order that vectorises.
//!
//! A number is a pure function of (key, stream, index of the element), so any part of a tensor can be made anywhere, in
//! any order. Rounds and transforms are the language's own functions; here are only the loops around them.

use moebius_ir::{moments, philox};

/// Blocks generated together, so that the rounds vectorise.
const BLOCKS: usize = 16;
/// Words of those blocks.
const WORDS: usize = 4 * BLOCKS;

/// Philox4x32-10 of [`BLOCKS`] consecutive blocks, whose counters end in `upper`; word w of block b is `[w][b]`.
#[inline(always)]
fn philox_blocks(key: [u32; 2], upper: [u32; 2], first: u64) -> [[u32; BLOCKS]; 4] {
    let mut c = [[0; BLOCKS], [0; BLOCKS], [upper[0]; BLOCKS], [upper[1]; BLOCKS]];
    for b in 0..BLOCKS {
        let block = first.wrapping_add(b as u64);
        c[0][b] = block as u32;
        c[1][b] = (block >> 32) as u32;
    }
    let mut key = key;
    for _ in 0..philox::ROUNDS {
        for b in 0..BLOCKS {
            [c[0][b], c[1][b], c[2][b], c[3][b]] = philox::round([c[0][b], c[1][b], c[2][b], c[3][b]], key);
        }
        key = philox::next_key(key);
    }
    c
}

/// Writes elements `first..first + out.len()` of a sequence, of which `make` gives [`WORDS`] from their words.
#[inline(always)]
fn fill<U: Copy>(
    key: [u32; 2],
    upper: [u32; 2],
    first: u64,
    out: &mut [U],
    make: impl Fn(&[[u32; BLOCKS]; 4]) -> [U; WORDS],
) {
    let mut block = first / 4;
    let mut skip = (first % 4) as usize;
    let mut out = out;
    while !out.is_empty() {
        let values = make(&philox_blocks(key, upper, block));
        let count = out.len().min(WORDS - skip);
        let (now, later) = out.split_at_mut(count);
        now.copy_from_slice(&values[skip..skip + count]);
        out = later;
        block = block.wrapping_add(BLOCKS as u64);
        skip = 0;
    }
}

/// Element 4 b + w of the result is `[w][b]`.
#[inline(always)]
fn interleave<U: Copy + Default>(values: &[[U; BLOCKS]; 4]) -> [U; WORDS] {
    let mut out = [U::default(); WORDS];
    for b in 0..BLOCKS {
        for w in 0..4 {
            out[4 * b + w] = values[w][b];
        }
    }
    out
}

/// Elements `first..first + out.len()` of the raw u32 sequence.
#[inline(always)]
pub fn bits(key: [u32; 2], stream: u32, first: u64, out: &mut [u32]) {
    fill(key, [stream, 0], first, out, interleave);
}

/// The words that round the moments of elements `first..first + out.len()` in a step: [`moebius_ir::moments::words`].
#[inline(always)]
pub fn moment_words(stream: u32, step: u32, first: u64, out: &mut [u32]) {
    fill(moments::KEY, [stream, step], first, out, interleave);
}

/// Elements `first..first + out.len()` of the uniform sequence: multiples of 2^-24 in [0, 1).
#[inline(always)]
pub fn uniform(key: [u32; 2], stream: u32, first: u64, out: &mut [f32]) {
    fill(key, [stream, 0], first, out, uniforms);
}

/// Elements `first..first + out.len()` of the standard normal sequence, |z| < 5.8.
#[inline(always)]
pub fn normal(key: [u32; 2], stream: u32, first: u64, out: &mut [f32]) {
    fill(key, [stream, 0], first, out, normals);
}

/// Elements `first..first + out.len()` of the standard Gumbel sequence: -ln(-ln u), u an odd multiple of 2^-24 in
/// (0, 1).
#[inline(always)]
pub fn gumbel(key: [u32; 2], stream: u32, first: u64, out: &mut [f32]) {
    fill(key, [stream, 0], first, out, gumbels);
}

#[inline(always)]
fn uniforms(words: &[[u32; BLOCKS]; 4]) -> [f32; WORDS] {
    let mut values = [[0.0; BLOCKS]; 4];
    for w in 0..4 {
        for b in 0..BLOCKS {
            values[w][b] = philox::unit(words[w][b]);
        }
    }
    interleave(&values)
}

#[inline(always)]
fn normals(words: &[[u32; BLOCKS]; 4]) -> [f32; WORDS] {
    let mut values = [[0.0; BLOCKS]; 4];
    for pair in [0, 2] {
        for b in 0..BLOCKS {
            (values[pair][b], values[pair + 1][b]) = philox::normals(words[pair][b], words[pair + 1][b]);
        }
    }
    interleave(&values)
}

#[inline(always)]
fn gumbels(words: &[[u32; BLOCKS]; 4]) -> [f32; WORDS] {
    let mut values = [[0.0; BLOCKS]; 4];
    for w in 0..4 {
        for b in 0..BLOCKS {
            values[w][b] = philox::gumbel_of(words[w][b]);
        }
    }
    interleave(&values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_the_language_s_own_wherever_a_part_begins() {
        let (key, stream) = ([7, u32::MAX], 0x8000_0002);
        // Also across the carry into the upper half of a block's number.
        for base in [0, (1 << 34) - 500] {
            for (first, len) in [(0, 0), (0, 1000), (1, 1), (3, 100), (64, 64), (130, 700), (999, 1)] {
                let first = base + first;
                let indices = || first..first + len as u64;
                let mut words = vec![0; len];
                bits(key, stream, first, &mut words);
                assert!(words.iter().copied().eq(indices().map(|i| philox::bits(key, stream, i))));
                moment_words(stream, 5, first, &mut words);
                let of_element = |i: u64| moments::words(stream, 5, i / 4)[(i % 4) as usize];
                assert!(words.iter().copied().eq(indices().map(of_element)));
                type Fill = fn([u32; 2], u32, u64, &mut [f32]);
                type One = fn([u32; 2], u32, u64) -> f32;
                let all: [(Fill, One); 3] =
                    [(uniform, philox::uniform), (normal, philox::normal), (gumbel, philox::gumbel)];
                for (fill, one) in all {
                    let mut values = vec![f32::NAN; len];
                    fill(key, stream, first, &mut values);
                    let same = values.iter().zip(indices()).all(|(v, i)| v.to_bits() == one(key, stream, i).to_bits());
                    assert!(same, "from {first}");
                }
            }
        }
    }

    #[test]
    fn moments() {
        let n = 1 << 18;
        let mut x = vec![0.0; n];
        let moments = |x: &[f32]| {
            let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
            (mean, x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64)
        };
        let near = |got: (f64, f64), want: (f64, f64)| {
            assert!((got.0 - want.0).abs() < 0.01 && (got.1 - want.1).abs() < 0.02, "{got:?} for {want:?}");
        };
        uniform([5, 6], 0, 0, &mut x);
        near(moments(&x), (0.5, 1.0 / 12.0));
        normal([5, 6], 1, 0, &mut x);
        near(moments(&x), (0.0, 1.0));
        gumbel([5, 6], 2, 0, &mut x);
        near(moments(&x), (0.577_215_7, std::f64::consts::PI.powi(2) / 6.0));
    }
}
