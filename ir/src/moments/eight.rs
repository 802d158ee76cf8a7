//! Moments in 8 bits: blocks of 256 numbers with a scale of their own each, after Dettmers et al., "8-bit Optimizers via Block-wise
//! Quantization" (arXiv 2110.02861), with two differences: the codes are powers instead of a table, and they are rounded to
//! stochastically, so that moments do not lag behind ([`super`]).
//!
//! With `M` the largest `|m|` of a block and `V` its largest `v`:
//!
//! - The code of a first moment is `j` in -127..=127 (two's complement) and means `j |j| M / 127²`. Neighbours near `m` are about
//!   `2 sqrt(|m| / M) / 127` of `M` apart: 1.6 % of the largest number at that, and 5 % of a number that is a tenth of it.
//! - The code of a second moment is `k` in 0..=255 and means `((k + 1) / 256)⁴ V`: 4 / (k + 1) of a number to the next one, which is 1.6 % at
//!   the largest, 5 % at a hundredth of it and 16 % at a ten-thousandth, half of that for its root, by which a step is divided. No
//!   number becomes 0, which a step would be divided by: what is less than `256⁻⁴ V` is kept as that, so that its steps are smaller.
//!
//! A number lies between two levels and becomes the upper one with a probability that is its distance from the lower one in parts
//! of theirs, in 65536ths. Everything is one elementary operation of f32 after another, each rounded: the same bits on every machine,
//! if no product and sum are joined. [`scale_of_m`] and [`scale_of_v`] are what is stored of a block; where the largest number is
//! below f32's normal numbers (for `m`, 127² times that), the block is kept as zeros, with the scale 0.

/// Elements that share their scales; the last block of a tensor may have fewer.
pub const BLOCK: usize = 256;

/// The square of the highest code of the first moment.
const MOST_M: f32 = 127.0 * 127.0;
/// Adding and subtracting it rounds a small number to a whole one.
const WHOLE: f32 = 8_388_608.0;
/// What the levels of the second moment are fourth powers of multiples of.
const STEP: f32 = 1.0 / 256.0;
/// Adding and subtracting it rounds a number of at most 1 to a multiple of [`STEP`].
const STEPS: f32 = 32_768.0;

/// What is stored for a block whose largest `|m|` has these bits: a 127²th of it. Numbers beyond the finite ones count as the
/// largest of those.
#[inline(always)]
pub fn scale_of_m(largest: u32) -> f32 {
    normal(f32::from_bits(largest).min(f32::MAX) / MOST_M)
}

/// What is stored for a block whose largest `v` has these bits: that, with the bounds of [`scale_of_m`].
#[inline(always)]
pub fn scale_of_v(largest: u32) -> f32 {
    normal(f32::from_bits(largest).min(f32::MAX))
}

#[inline(always)]
fn normal(scale: f32) -> f32 {
    if scale >= f32::MIN_POSITIVE { scale } else { 0.0 }
}

/// What numbers are multiplied with before they are coded; 0 for a block of zeros.
#[inline(always)]
pub fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// The first moment of a code.
#[inline(always)]
pub fn m_of(code: u8, scale: f32) -> f32 {
    let j = f32::from(code as i8);
    j * j.abs() * scale
}

/// The code of a first moment; `random` rounds it by its bits 7 to 22.
#[inline(always)]
pub fn code_of_m(m: f32, inverse: f32, random: u32) -> u8 {
    let x = (m.abs() * inverse).min(MOST_M);
    // The highest j whose level is not above x: the nearest to the root, or the one below.
    let near = (x.sqrt() + WHOLE) - WHOLE;
    let j = if x - near * near < 0.0 { near - 1.0 } else { near };
    let up = x - j * j > part(random) * (j + j + 1.0);
    let size = if up { j + 1.0 } else { j };
    let signed = if m.to_bits() >> 31 == 1 { -size } else { size };
    (signed + (WHOLE + 128.0)).to_bits() as u8 ^ 0x80
}

/// The second moment of a code.
#[inline(always)]
pub fn v_of(code: u8, scale: f32) -> f32 {
    level((f32::from(code) + 1.0) * STEP) * scale
}

/// The code of a second moment; `random` rounds it by its bits 7 to 22.
#[inline(always)]
pub fn code_of_v(v: f32, inverse: f32, random: u32) -> u8 {
    let x = (v * inverse).min(1.0);
    // The level nearest to the root, and its neighbour on the other side of x.
    let near = (x.sqrt().sqrt() + STEPS) - STEPS;
    let at = level(near);
    let other = near + if at > x { -STEP } else { STEP };
    let beside = level(other);
    let (below, above) = (at.min(beside), at.max(beside));
    let up = x - below > part(random) * (above - below);
    let t = (near.min(other) + if up { STEP } else { 0.0 }).max(STEP);
    (t + (STEPS - STEP)).to_bits() as u8
}

/// The middle of a part of 0..1, by 16 random bits: 1 and 16 bits of a mantissa, less 1 and half of the last one.
#[inline(always)]
fn part(random: u32) -> f32 {
    f32::from_bits(0x3f80_0000 | random & 0x7f_ff80) - (1.0 - 1.0 / 131_072.0)
}

#[inline(always)]
fn level(t: f32) -> f32 {
    let square = t * t;
    square * square
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All levels of a moment in f64, rising, with the codes that mean them.
    fn levels(largest: f64, of: impl Fn(f64) -> f64, codes: std::ops::RangeInclusive<u8>) -> Vec<(u8, f64)> {
        codes.map(|code| (code, of(f64::from(code)) * largest)).collect()
    }

    /// A code is that of a neighbour, and over all random numbers each neighbour comes as often as it should.
    fn check(x: f32, levels: &[(u8, f64)], code: impl Fn(u32) -> u8) {
        let x = f64::from(x);
        let above = levels.partition_point(|&(_, level)| level <= x * (1.0 + 1e-6)).clamp(1, levels.len() - 1);
        let ((low, below), (high, above)) = (levels[above - 1], levels[above]);
        let wanted = ((x - below) / (above - below)).clamp(0.0, 1.0);
        let mut ups = 0;
        for random in 0..1 << 16 {
            let got = code(random << 7);
            assert!(got == low || got == high || !(1e-3..=0.999).contains(&wanted), "{x}: {got} for {low} or {high}");
            ups += u32::from(got == high);
        }
        // f32 tells x from a level to a few of its spacings.
        let exact = 2e-6 * x / (above - below) + 1.0 / 65_536.0;
        assert!((f64::from(ups) / 65_536.0 - wanted).abs() <= exact, "{x}: {ups} of 65536 for {wanted}");
    }

    #[test]
    fn a_code_is_a_neighbour_s_and_each_comes_as_often_as_it_is_near() {
        for largest in [1.0f32, 0.7, 3.3e-7, 1e-20, 2e20] {
            let (m_scale, v_scale) = (scale_of_m(largest.to_bits()), scale_of_v(largest.to_bits()));
            let of_m = levels(f64::from(largest), |j| (j / 127.0).powi(2), 0..=127);
            let of_v = levels(f64::from(largest), |k| ((k + 1.0) / 256.0).powi(4), 0..=255);
            for part in [1.0f32, 0.999, 0.9173, 0.5, 0.1, 0.0123, 1e-3, 1.1e-4, 3e-5, 1e-8, 1e-11, 0.0] {
                let x = part * largest;
                check(x, &of_m, |random| code_of_m(x, inverse(m_scale), random));
                check(x, &of_v, |random| code_of_v(x, inverse(v_scale), random));
                // The other sign has the negative code.
                let both = |random: u32| [x, -x].map(|m| code_of_m(m, inverse(m_scale), random << 7) as i8);
                assert!((0..100).all(|i| both(i * 655)[0] == -both(i * 655)[1]));
            }
        }
    }

    #[test]
    fn every_level_is_kept_as_it_is() {
        for largest in [1.0f32, 0.3, 1.7e-9] {
            let (m_scale, v_scale) = (scale_of_m(largest.to_bits()), scale_of_v(largest.to_bits()));
            // Rounding of the scale may put a level a hair below itself, which some 100 of 65536 random numbers tell.
            for random in [200 << 7, 0x8000 << 7, 0xff00 << 7] {
                for code in 0..=255u8 {
                    // -128 is no code.
                    let m = if code == 128 { 0.0 } else { m_of(code, m_scale) };
                    assert_eq!(m_of(code_of_m(m, inverse(m_scale), random), m_scale), m, "{code}");
                    let v = v_of(code, v_scale);
                    assert_eq!(code_of_v(v, inverse(v_scale), random), code);
                }
            }
            assert!((m_of(127, m_scale) / largest - 1.0).abs() < 1e-6 && v_of(255, v_scale) == largest);
        }
    }

    #[test]
    fn what_is_too_small_or_too_large_has_a_code_too() {
        assert_eq!((m_of(0, 0.0), v_of(0, 0.0), scale_of_m(0), scale_of_v(0)), (0.0, 0.0, 0.0, 0.0));
        let tiny = f32::from_bits(9);
        assert_eq!((scale_of_m(tiny.to_bits()), scale_of_v(tiny.to_bits()), inverse(0.0)), (0.0, 0.0, 0.0));
        assert_eq!((code_of_m(tiny, 0.0, 7), code_of_v(tiny, 0.0, 7)), (0, 0));
        // A zero among other numbers becomes the lowest level.
        assert_eq!((code_of_m(0.0, 1.0, 0), code_of_v(0.0, 1.0, 0)), (0, 0));
        for bad in [f32::INFINITY, f32::NAN] {
            let (m, v) = (scale_of_m(bad.to_bits()), scale_of_v(bad.to_bits()));
            assert!(m.is_finite() && v == f32::MAX);
            assert_eq!((code_of_m(bad, inverse(m), 0), code_of_v(bad, inverse(v), 0)), (127, 255));
        }
    }
}
