//! The random numbers of Moebius: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11).
//!
//! A number is a pure function of (key, stream, index of the element): any part of a tensor can be made anywhere, in
//! any order, with the same bits. Element i takes word i % 4 of block i / 4, and the counter of a block is
//! [block low, block high, stream low, stream high]. Everything below is +, -, *, /, sqrt and bit operations on f32
//! and u32, which round equally on every machine. This file uses nothing but the standard library.
// The coefficients keep their published digits.
#![allow(clippy::excessive_precision)]

/// Blocks generated together, so that the rounds vectorise.
const BLOCKS: usize = 16;
/// Words of those blocks.
const WORDS: usize = 4 * BLOCKS;

/// Philox4x32-10 of [`BLOCKS`] consecutive blocks; word w of block b is `[w][b]`.
#[inline(always)]
fn philox_blocks(key: [u32; 2], stream: u64, first: u64) -> [[u32; BLOCKS]; 4] {
    let mut c = [[0; BLOCKS], [0; BLOCKS], [stream as u32; BLOCKS], [(stream >> 32) as u32; BLOCKS]];
    for b in 0..BLOCKS {
        let block = first.wrapping_add(b as u64);
        c[0][b] = block as u32;
        c[1][b] = (block >> 32) as u32;
    }
    let mut key = key;
    for _ in 0..10 {
        for b in 0..BLOCKS {
            [c[0][b], c[1][b], c[2][b], c[3][b]] = round([c[0][b], c[1][b], c[2][b], c[3][b]], key);
        }
        key = next_key(key);
    }
    c
}

#[inline(always)]
fn round(c: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (p0, p1) = (u64::from(c[0]) * 0xd251_1f53, u64::from(c[2]) * 0xcd9e_8d57);
    [(p1 >> 32) as u32 ^ c[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ key[1], p0 as u32]
}

#[inline(always)]
fn next_key(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)]
}

/// One block of Philox4x32-10.
#[inline(always)]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut key) = (counter, key);
    for _ in 0..10 {
        c = round(c, key);
        key = next_key(key);
    }
    c
}

/// Writes elements `first..first + out.len()` of a sequence, of which `make` gives [`WORDS`] from their words.
#[inline(always)]
fn fill<U: Copy>(
    key: [u32; 2],
    stream: u64,
    first: u64,
    out: &mut [U],
    make: impl Fn(&[[u32; BLOCKS]; 4]) -> [U; WORDS],
) {
    let mut block = first / 4;
    let mut skip = (first % 4) as usize;
    let mut out = out;
    while !out.is_empty() {
        let values = make(&philox_blocks(key, stream, block));
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
pub fn bits(key: [u32; 2], stream: u64, first: u64, out: &mut [u32]) {
    fill(key, stream, first, out, interleave);
}

/// Elements `first..first + out.len()` of the uniform sequence: multiples of 2^-24 in [0, 1).
#[inline(always)]
pub fn uniform(key: [u32; 2], stream: u64, first: u64, out: &mut [f32]) {
    fill(key, stream, first, out, uniforms);
}

/// Elements `first..first + out.len()` of the standard normal sequence, |z| < 5.8.
///
/// Box and Muller: of the words (a, b) at an even place, r = sqrt(-2 ln u) with u = (a / 256 + 1) 2^-24 in (0, 1] and
/// an angle of b / 256 2^-24 turns give r cos at the even element and r sin at the odd one.
#[inline(always)]
pub fn normal(key: [u32; 2], stream: u64, first: u64, out: &mut [f32]) {
    fill(key, stream, first, out, normals);
}

/// Elements `first..first + out.len()` of the standard Gumbel sequence: -ln(-ln u), u an odd multiple of 2^-24 in
/// (0, 1).
#[inline(always)]
pub fn gumbel(key: [u32; 2], stream: u64, first: u64, out: &mut [f32]) {
    fill(key, stream, first, out, gumbels);
}

/// The upper 24 bits as a multiple of 2^-24 in [0, 1).
#[inline(always)]
fn unit(word: u32) -> f32 {
    // Through i32, for which every vector unit has a conversion.
    (word >> 8) as i32 as f32 * (1.0 / 16_777_216.0)
}

#[inline(always)]
fn uniforms(words: &[[u32; BLOCKS]; 4]) -> [f32; WORDS] {
    let mut values = [[0.0; BLOCKS]; 4];
    for w in 0..4 {
        for b in 0..BLOCKS {
            values[w][b] = unit(words[w][b]);
        }
    }
    interleave(&values)
}

#[inline(always)]
fn normals(words: &[[u32; BLOCKS]; 4]) -> [f32; WORDS] {
    let mut values = [[0.0; BLOCKS]; 4];
    for pair in [0, 2] {
        for b in 0..BLOCKS {
            let u = unit(words[pair][b]) + 1.0 / 16_777_216.0;
            let r = (-2.0 * ln(u)).sqrt();
            let (cos, sin) = cos_sin_turns(unit(words[pair + 1][b]));
            values[pair][b] = r * cos;
            values[pair + 1][b] = r * sin;
        }
    }
    interleave(&values)
}

#[inline(always)]
fn gumbels(words: &[[u32; BLOCKS]; 4]) -> [f32; WORDS] {
    let mut values = [[0.0; BLOCKS]; 4];
    for w in 0..4 {
        for b in 0..BLOCKS {
            let u = ((words[w][b] >> 8) | 1) as i32 as f32 * (1.0 / 16_777_216.0);
            values[w][b] = -ln(-ln(u));
        }
    }
    interleave(&values)
}

/// The natural logarithm of a positive normal number (the coefficients of Cephes' `logf`).
#[inline(always)]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits() as i32;
    let e = bits.wrapping_sub(0x3f35_04f3) >> 23;
    let m = f32::from_bits(bits.wrapping_sub(e << 23) as u32) - 1.0;
    let e = e as f32;
    let z = m * m;
    let mut p = 7.037_683_6e-2_f32;
    p = p * m - 1.151_461e-1;
    p = p * m + 1.167_699_9e-1;
    p = p * m - 1.242_014_1e-1;
    p = p * m + 1.424_932_3e-1;
    p = p * m - 1.666_805_8e-1;
    p = p * m + 2.000_071_5e-1;
    p = p * m - 2.499_999_4e-1;
    p = p * m + 3.333_333_1e-1;
    let y = p * m * z + e * -2.121_944_4e-4 - 0.5 * z;
    (m + y) + e * 0.693_359_4
}

/// (cos, sin) of `u` turns, 0 <= u < 1 (the coefficients of Cephes' `cosf` and `sinf`).
#[inline(always)]
fn cos_sin_turns(u: f32) -> (f32, f32) {
    // The nearest quarter; the rest is at most an eighth of a turn, and exact.
    let quarter = (u * 4.0 + 0.5) as i32;
    let x = (u - quarter as f32 * 0.25) * std::f32::consts::TAU;
    let z = x * x;
    let sin = ((-1.951_529_6e-4 * z + 8.332_160_9e-3) * z - 1.666_665_5e-1) * z * x + x;
    let cos = ((2.443_315_7e-5 * z - 1.388_731_6e-3) * z + 4.166_664_6e-2) * z * z - 0.5 * z + 1.0;
    let (c, s) = if quarter & 1 == 0 { (cos, sin) } else { (sin, cos) };
    let c = if (quarter + 1) & 2 == 0 { c } else { -c };
    let s = if quarter & 2 == 0 { s } else { -s };
    (c, s)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers Random123 ships for philox4x32-10.
    #[test]
    fn known_answers() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32_10(counter, key), want);
            let wide = |i: usize| u64::from(counter[i]) | u64::from(counter[i + 1]) << 32;
            let (stream, block) = (wide(2), wide(0));
            if let Some(first) = block.checked_mul(4) {
                let mut out = [0; 4];
                bits(key, stream, first, &mut out);
                assert_eq!(out, want);
            }
            assert_eq!(philox_blocks(key, stream, block).map(|w| w[0]), want);
        }
    }

    #[test]
    fn an_element_depends_on_its_index_alone() {
        let (key, stream) = ([7, 8], 0x1_0000_0002);
        let mut all = [0; 1000];
        bits(key, stream, 0, &mut all);
        for i in 0..1000_u64 {
            let counter = [(i / 4) as u32, 0, 2, 1];
            assert_eq!(all[i as usize], philox4x32_10(counter, key)[i as usize % 4]);
        }
        type Fill = fn([u32; 2], u64, u64, &mut [f32]);
        for f in [uniform as Fill, normal as Fill, gumbel as Fill] {
            let mut all = [f32::NAN; 1000];
            f(key, stream, 0, &mut all);
            for (first, len) in [(0, 0), (1, 1), (3, 100), (64, 64), (130, 700), (999, 1)] {
                let mut part = vec![f32::NAN; len];
                f(key, stream, first, &mut part);
                assert_eq!(part, all[first as usize..first as usize + len]);
            }
            let mut other = [f32::NAN; 1000];
            f(key, stream + 1, 0, &mut other);
            assert_ne!(all, other);
        }
    }

    #[test]
    fn transforms_against_f64() {
        let (key, stream) = ([1, 2], 3);
        let n = 20_000;
        let (mut word, mut u, mut z, mut g) = (vec![0; n], vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        bits(key, stream, 0, &mut word);
        uniform(key, stream, 0, &mut u);
        normal(key, stream, 0, &mut z);
        gumbel(key, stream, 0, &mut g);
        let part = |w: u32| f64::from(w >> 8) / f64::from(1 << 24);
        for i in 0..n {
            assert_eq!(f64::from(u[i]), part(word[i]));
            let (a, b) = (part(word[i & !1]) + f64::from(1 << 24).recip(), part(word[i | 1]));
            let angle = b * std::f64::consts::TAU;
            let want = (-2.0 * a.ln()).sqrt() * if i % 2 == 0 { angle.cos() } else { angle.sin() };
            assert!((f64::from(z[i]) - want).abs() < 1e-6, "{} for {want}", z[i]);
            let want = -(-(f64::from((word[i] >> 8) | 1) / f64::from(1 << 24)).ln()).ln();
            assert!((f64::from(g[i]) - want).abs() < 2e-6, "{} for {want}", g[i]);
        }
    }

    #[test]
    fn extreme_words_are_finite() {
        for w in [0, 255, 256, u32::MAX, u32::MAX - 255, 1 << 31] {
            let u = unit(w);
            assert!((0.0..1.0).contains(&u));
            assert!((-2.0 * ln(u + 1.0 / 16_777_216.0)).sqrt() < 5.8);
            let (c, s) = cos_sin_turns(u);
            assert!((c * c + s * s - 1.0).abs() < 1e-6);
            assert!((-ln(-ln(((w >> 8) | 1) as f32 / 16_777_216.0))).is_finite());
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
