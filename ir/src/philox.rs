//! The random numbers of Moebius: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11).
//!
//! A number is a pure function of key, stream and index: element i of a stream takes word i % 4 of the block with the
//! counter [i/4 low, i/4 high, stream, 0]. The transforms use only +, -, *, /, sqrt and bit operations on f32 and u32,
//! which round equally on every machine, so that all backends give the same bits.
// The coefficients keep their published digits.
#![allow(clippy::excessive_precision)]

/// 2^-24, the spacing of the uniform numbers.
const UNIT: f32 = 1.0 / 16_777_216.0;

/// Rounds of a block.
pub const ROUNDS: usize = 10;

/// One block of Philox4x32-10.
#[inline]
pub fn philox4x32_10(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut c, mut key) = (counter, key);
    for _ in 0..ROUNDS {
        c = round(c, key);
        key = next_key(key);
    }
    c
}

/// One round over a counter. This and the functions below are public for backends that make many blocks at once.
#[inline(always)]
pub fn round(c: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (p0, p1) = (u64::from(c[0]) * 0xd251_1f53, u64::from(c[2]) * 0xcd9e_8d57);
    [(p1 >> 32) as u32 ^ c[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ key[1], p0 as u32]
}

/// The key of the next round.
#[inline(always)]
pub fn next_key(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)]
}

/// Element `index` of the raw words.
pub fn bits(key: [u32; 2], stream: u32, index: u64) -> u32 {
    let block = index / 4;
    philox4x32_10(key, [block as u32, (block >> 32) as u32, stream, 0])[(index % 4) as usize]
}

/// Element `index` of the uniform numbers: the upper 24 bits as a multiple of 2^-24 in [0, 1).
pub fn uniform(key: [u32; 2], stream: u32, index: u64) -> f32 {
    unit(bits(key, stream, index))
}

/// Element `index` of the standard normal numbers, |z| < 5.8 (Box and Muller).
///
/// The words at an even place and after it give the even element and the odd one, see [`normals`].
pub fn normal(key: [u32; 2], stream: u32, index: u64) -> f32 {
    let block = index / 4;
    let words = philox4x32_10(key, [block as u32, (block >> 32) as u32, stream, 0]);
    let pair = ((index % 4) & !1) as usize;
    let (even, odd) = normals(words[pair], words[pair + 1]);
    if index.is_multiple_of(2) { even } else { odd }
}

/// The elements 0..count of the standard normal numbers, each block made once.
pub fn first_normals(key: [u32; 2], stream: u32, count: usize) -> Vec<f32> {
    let blocks = count.div_ceil(4);
    let mut numbers = Vec::with_capacity(4 * blocks);
    for block in 0..blocks as u64 {
        let [a, b, c, d] = philox4x32_10(key, [block as u32, (block >> 32) as u32, stream, 0]);
        let (first, second) = (normals(a, b), normals(c, d));
        numbers.extend([first.0, first.1, second.0, second.1]);
    }
    numbers.truncate(count);
    numbers
}

/// Element `index` of the standard Gumbel numbers: -ln(-ln u), u an odd multiple of 2^-24 in (0, 1).
pub fn gumbel(key: [u32; 2], stream: u32, index: u64) -> f32 {
    gumbel_of(bits(key, stream, index))
}

/// The uniform number of a word.
#[inline(always)]
pub fn unit(word: u32) -> f32 {
    // Through i32, for which every vector unit has a conversion.
    (word >> 8) as i32 as f32 * UNIT
}

/// The two normal numbers of a pair of words: r = sqrt(-2 ln u) with u = (a / 256 + 1) 2^-24 in (0, 1] and an angle of
/// b / 256 2^-24 turns give r cos and r sin.
#[inline(always)]
pub fn normals(a: u32, b: u32) -> (f32, f32) {
    let r = (-2.0 * ln(unit(a) + UNIT)).sqrt();
    let (cos, sin) = cos_sin_turns(unit(b));
    (r * cos, r * sin)
}

/// The Gumbel number of a word.
#[inline(always)]
pub fn gumbel_of(word: u32) -> f32 {
    let u = ((word >> 8) | 1) as i32 as f32 * UNIT;
    -ln(-ln(u))
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
    (if (quarter + 1) & 2 == 0 { c } else { -c }, if quarter & 2 == 0 { s } else { -s })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 ships for philox4x32-10.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32_10([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let answer = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(philox4x32_10([0xa409_3822, 0x299f_31d0], pi), answer);
    }

    #[test]
    fn the_index_fills_the_counter_low_word_first() {
        let block = 0x3_0000_0002;
        let words = philox4x32_10([5, 6], [2, 3, 9, 0]);
        assert_eq!([0, 1, 2, 3].map(|lane| bits([5, 6], 9, 4 * block + lane)), words);
        assert_eq!(uniform([5, 6], 9, 4 * block + 1), (words[1] >> 8) as f32 / 16_777_216.0);
    }

    #[test]
    fn many_normal_numbers_are_those_of_their_indices() {
        for count in [0, 1, 2, 3, 4, 5, 103] {
            let each: Vec<f32> = (0..count as u64).map(|i| normal([8, 9], 2, i)).collect();
            assert_eq!(first_normals([8, 9], 2, count), each);
        }
    }

    #[test]
    fn transforms_are_those_of_the_formulas() {
        let (key, stream) = ([1, 2], 3);
        let part = |i: u64| f64::from(bits(key, stream, i) >> 8) / f64::from(1 << 24);
        let (mut sum, mut squares) = (0.0, 0.0);
        let n = 20_000;
        for i in 0..n {
            let (a, angle) = (part(i & !1) + f64::from(UNIT), part(i | 1) * std::f64::consts::TAU);
            let want = (-2.0 * a.ln()).sqrt() * if i % 2 == 0 { angle.cos() } else { angle.sin() };
            let z = f64::from(normal(key, stream, i));
            assert!((z - want).abs() < 1e-6, "{z} for {want}");
            (sum, squares) = (sum + z, squares + z * z);
            let u = f64::from((bits(key, stream, i) >> 8) | 1) * f64::from(UNIT);
            let (g, want) = (f64::from(gumbel(key, stream, i)), -(-u.ln()).ln());
            assert!((g - want).abs() < 2e-6, "{g} for {want}");
        }
        let (mean, variance) = (sum / n as f64, squares / n as f64);
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }

    #[test]
    fn extreme_words_are_finite() {
        for w in [0, 255, 256, u32::MAX, u32::MAX - 255, 1 << 31] {
            assert!((0.0..1.0).contains(&unit(w)));
            let (r, _) = normals(w, 0);
            assert!((0.0..5.8).contains(&r), "{r}");
            let (c, s) = cos_sin_turns(unit(w));
            assert!((c * c + s * s - 1.0).abs() < 1e-6);
            assert!(gumbel_of(w).is_finite());
        }
    }
}
