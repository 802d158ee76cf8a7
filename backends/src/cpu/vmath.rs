//! Elementary functions in f32 without branches or tables, so that a loop over them inside [`simd`] autovectorises.
//!
//! Each is written for [`Many`] values at once. A function is one long chain of operations that wait for each other, and
//! a processor looks ahead too little to start on the next vector of a loop meanwhile; with several values the chains
//! are interleaved in the code. [`map_block`] is the loop for that, the functions of one f32 are for everything else.
//!
//! Only +, -, *, /, fused multiply-adds, comparisons and bit operations are used, all of them exactly rounded, so that every
//! CPU gives the same bits (one without fused multiply-adds calls a library for them, slowly). The bounds on the error
//! were measured against f64 over a dense sweep of the inputs; the tests hold them. NaN in gives NaN out everywhere.
//!
//! The closure given to [`simd`] must itself be inlined, `simd(#[inline(always)] || ..)`: it is called from one place
//! for each instruction set, and the compiler otherwise keeps one copy, without the wide instructions.
//!
//! [`simd`]: super::element::simd
// The coefficients keep their published digits.
#![allow(clippy::excessive_precision)]

use std::array::from_fn;
use std::ops::{Add, Div, Mul, Sub};

/// Values that go through the same operations side by side.
#[derive(Clone, Copy, Debug)]
pub struct Many<const N: usize>(pub [f32; N]);

/// Values of one [`Many`] in [`map_block`]: enough chains to keep the units busy, few enough for the registers.
pub const CHAINS: usize = 4;
/// Values that [`map_block`] takes: one vector of the widest kind for each chain.
pub const BLOCK: usize = 16 * CHAINS;

/// `f(Many) -> Many` of every element of a `&[f32; BLOCK]`. A macro, as the compiler may leave a function that is passed
/// outside of the vector instructions.
macro_rules! map_block {
    ($x:expr, $f:path) => {{
        use $crate::cpu::vmath::{BLOCK, CHAINS, Many};
        const VECTOR: usize = BLOCK / CHAINS;
        let x: &[f32; BLOCK] = $x;
        // A local array: the compiler sees that writing it changes no input.
        let mut y = [0.0f32; BLOCK];
        for i in 0..VECTOR {
            let Many(out) = $f(Many([x[i], x[VECTOR + i], x[2 * VECTOR + i], x[3 * VECTOR + i]]));
            for chain in 0..CHAINS {
                y[chain * VECTOR + i] = out[chain];
            }
        }
        y
    }};
}
pub(crate) use map_block;

impl<const N: usize> Many<N> {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Many(from_fn(|i| f(self.0[i])))
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Many(from_fn(|i| f(self.0[i], other.0[i])))
    }

    /// `self * factor + term`, rounded once.
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Many(from_fn(|i| self.0[i].mul_add(factor.0[i], term.0[i])))
    }

    /// The polynomial of these coefficients, the highest power's first.
    #[inline(always)]
    fn polynomial<const M: usize>(self, coefficients: [f32; M]) -> Self {
        let mut sum = Many([coefficients[0]; N]);
        for c in &coefficients[1..] {
            sum = sum.mul_add(self, Many([*c; N]));
        }
        sum
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.map(f32::abs)
    }

    /// `max(x, lo)` that keeps a NaN `x`, unlike [`f32::max`].
    #[inline(always)]
    fn at_least(self, lo: f32) -> Self {
        self.map(|x| if x < lo { lo } else { x })
    }

    /// `min(x, hi)` that keeps a NaN `x`, unlike [`f32::min`].
    #[inline(always)]
    fn at_most(self, hi: f32) -> Self {
        self.map(|x| if x > hi { hi } else { x })
    }

    /// `then` where the test holds of this value, else `otherwise`.
    #[inline(always)]
    fn choose(self, test: impl Fn(f32) -> bool, then: Self, otherwise: Self) -> Self {
        Many(from_fn(|i| if test(self.0[i]) { then.0[i] } else { otherwise.0[i] }))
    }
}

/// The operators, value by value, also with one number for all.
macro_rules! operators {
    ($($operator:ident $name:ident $sign:tt),+) => {
        $(
            impl<const N: usize> $operator for Many<N> {
                type Output = Self;
                #[inline(always)]
                fn $name(self, other: Self) -> Self {
                    self.zip(other, |a, b| a $sign b)
                }
            }
            impl<const N: usize> $operator<f32> for Many<N> {
                type Output = Self;
                #[inline(always)]
                fn $name(self, other: f32) -> Self {
                    self.map(|a| a $sign other)
                }
            }
            impl<const N: usize> $operator<Many<N>> for f32 {
                type Output = Many<N>;
                #[inline(always)]
                fn $name(self, other: Many<N>) -> Many<N> {
                    other.map(|b| self $sign b)
                }
            }
        )+
    };
}
operators!(Add add +, Sub sub -, Mul mul *, Div div /);

/// The functions of one value.
macro_rules! of_one {
    ($($(#[$doc:meta])* $name:ident = $many:ident;)+) => {
        $(
            $(#[$doc])*
            #[inline(always)]
            pub fn $name(x: f32) -> f32 {
                $many(Many([x])).0[0]
            }
        )+
    };
}
of_one! {
    /// [`exps`] of one value.
    exp = exps;
    /// [`exps_or_zero`] of one value.
    exp_or_zero = exps_or_zero;
    /// [`lns`] of one value.
    ln = lns;
    /// [`tanhs`] of one value.
    tanh = tanhs;
    /// [`sigmoids`] of one value.
    sigmoid = sigmoids;
    /// [`erfs`] of one value.
    erf = erfs;
    /// [`gelus_tanh`] of one value.
    gelu_tanh = gelus_tanh;
    /// [`gelus_tanh_grad`] of one value.
    gelu_tanh_grad = gelus_tanh_grad;
    /// [`gelus_erf`] of one value.
    gelu_erf = gelus_erf;
    /// [`gelus_erf_grad`] of one value.
    gelu_erf_grad = gelus_erf_grad;
    /// [`silus`] of one value.
    silu = silus;
    /// [`silus_grad`] of one value.
    silu_grad = silus_grad;
}

/// 2^n for -126 <= n <= 127.
#[inline(always)]
fn pow2<const N: usize>(n: [i32; N]) -> Many<N> {
    Many(n.map(|n| f32::from_bits((n.wrapping_add(127) as u32) << 23)))
}

/// Added to a number of at most 2^22, it rounds it to an integer, which is left in the low bits of the mantissa.
const TO_INTEGER: f32 = 12_582_912.0;

/// (y, shifted) with e^x = y 2^n for |x| <= 104, where n is in the low bits of `shifted`: x = n ln 2 + r with
/// |r| <= ln 2 / 2, then a polynomial of degree 7 in r (the coefficients of Cephes' `expf`).
#[inline(always)]
fn exp_parts<const N: usize>(x: Many<N>) -> (Many<N>, [u32; N]) {
    let shifted = x.mul_add(Many([std::f32::consts::LOG2_E; N]), Many([TO_INTEGER; N]));
    let n = shifted - TO_INTEGER;
    // ln 2 in two parts; the high one has few enough bits that its product with n is exact.
    let r = n.mul_add(Many([-0.693_359_4; N]), x);
    let r = n.mul_add(Many([2.121_944_4e-4; N]), r);
    let p =
        r.polynomial([1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1]);
    (p.mul_add(r * r, r) + 1.0, shifted.0.map(f32::to_bits))
}

/// e^x within 1.5 ulp; denormal results are right to half a denormal step more; inf above 88.73, 0 below -103.98.
#[inline(always)]
pub fn exps<const N: usize>(x: Many<N>) -> Many<N> {
    // Beyond these the result is inf or 0 in any case, and within them n fits the two scale factors below.
    let (y, shifted) = exp_parts(x.at_least(-104.0).at_most(89.0));
    // In two steps: 2^n alone overflows for n = 128 and underflows for n < -126. Only the last product can round.
    let n = shifted.map(|bits| bits.wrapping_sub(TO_INTEGER.to_bits()) as i32);
    let half = n.map(|n| n >> 1);
    y * pow2(half) * pow2(from_fn(|i| n[i].wrapping_sub(half[i])))
}

/// e^x of -87 <= x <= 88, whose results are normal numbers, within 1.5 ulp.
#[inline(always)]
fn normal_exps<const N: usize>(x: Many<N>) -> Many<N> {
    let (y, shifted) = exp_parts(x);
    // The shift leaves n alone, where an exponent is.
    y * Many(shifted.map(|bits| f32::from_bits((bits << 23).wrapping_add(1.0_f32.to_bits()))))
}

/// e^x of x <= 88 within 1.5 ulp, and 0 below -87: the weights of a softmax, whose masked scores are -inf.
///
/// The results that [`exps`] gives as denormals or rounds to 0 cost some processors a hundred times as long as others.
#[inline(always)]
pub fn exps_or_zero<const N: usize>(x: Many<N>) -> Many<N> {
    x.choose(|x| x < -87.0, Many([0.0; N]), normal_exps(x.at_least(-87.0)))
}

/// The natural logarithm within 1.5 ulp: -inf at +-0, NaN below 0, inf at inf; denormals included.
///
/// x = m 2^e with sqrt(1/2) <= m < sqrt(2), then a polynomial in m - 1 (the coefficients of Cephes' `logf`).
#[inline(always)]
pub fn lns<const N: usize>(x: Many<N>) -> Many<N> {
    let tiny = |x: f32| x < f32::MIN_POSITIVE;
    let bits = x.0.map(|x| (if tiny(x) { x * 8_388_608.0 } else { x }).to_bits() as i32);
    let e = bits.map(|bits| bits.wrapping_sub(0x3f35_04f3) >> 23);
    let m = Many(from_fn(|i| f32::from_bits(bits[i].wrapping_sub(e[i] << 23) as u32))) - 1.0;
    let e = Many(from_fn(|i| e[i] as f32 - if tiny(x.0[i]) { 23.0 } else { 0.0 }));
    let z = m * m;
    let p = m.polynomial([
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ]);
    let y = (p * m).mul_add(z, e * -2.121_944_4e-4) - 0.5 * z;
    let y = e.mul_add(Many([0.693_359_4; N]), m + y);
    let y = x.choose(|x| x > 0.0, y, Many([f32::NAN; N]));
    let y = x.choose(|x| x == 0.0, Many([f32::NEG_INFINITY; N]), y);
    x.choose(|x| x == f32::INFINITY, x, y)
}

/// tanh(x) within 2 ulp: a polynomial near 0 (Cephes' `tanhf`), (1 - e) / (1 + e) with e = e^(-2|x|) elsewhere.
#[inline(always)]
pub fn tanhs<const N: usize>(x: Many<N>) -> Many<N> {
    let a = x.abs();
    let z = x * x;
    let p = z.polynomial([-5.704_988_7e-3, 2.063_908_9e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328_2e-1]);
    let near = (p * z).mul_add(x, x);
    let e = exps_or_zero(-2.0 * a);
    let far = (1.0 - e) / (1.0 + e);
    // The sign again for the polynomial too, which gives +0 at -0.
    a.choose(|a| a < 0.625, near, far).zip(x, f32::copysign)
}

/// The pair (sigmoid(x), sigmoid(-x)) from one exponential, each to full relative precision.
#[inline(always)]
fn sigmoid_pair<const N: usize>(x: Many<N>) -> (Many<N>, Many<N>) {
    let e = exps(x.map(|x| -x.abs()));
    let large = 1.0 / (1.0 + e);
    let small = e * large;
    (x.choose(|x| x < 0.0, small, large), x.choose(|x| x < 0.0, large, small))
}

/// (sigmoid(x), e^-x) for |x| <= 87, each to full relative precision; (0, e^87) below and (1, e^-87) above: for functions that
/// multiply the first with something like x.
#[inline(always)]
fn near_sigmoids<const N: usize>(x: Many<N>) -> (Many<N>, Many<N>) {
    let e = normal_exps(0.0 - x.at_least(-87.0).at_most(87.0));
    (x.choose(|x| x < -87.0, Many([0.0; N]), 1.0 / (1.0 + e)), e)
}

/// 1 / (1 + e^-x) within 3 ulp, the far negative side included (no early underflow).
#[inline(always)]
pub fn sigmoids<const N: usize>(x: Many<N>) -> Many<N> {
    sigmoid_pair(x).0
}

/// The error function within 2 ulp: minimax polynomials, below 0.9277 in x^2 and above as 1 - exp(p(|x|)).
#[inline(always)]
pub fn erfs<const N: usize>(x: Many<N>) -> Many<N> {
    let s = x * x;
    let near =
        s.polynomial([-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_2e-1, -3.761_253_4e-1, 1.283_791_7e-1]);
    let near = near.mul_add(x, x);
    // erf(4) rounds to 1, and beyond it the polynomial in the exponent is not a fit.
    let t = x.abs().at_most(4.0);
    let far = t.polynomial([
        -1.728_534_7e-5,
        3.831_971_3e-4,
        -3.883_964_4e-3,
        2.425_462_2e-2,
        -1.067_778_8e-1,
        -6.348_466_9e-1,
        -1.287_175_1e-1,
    ]);
    let far = (1.0 - exps(far.mul_add(t, 0.0 - t))).zip(x, f32::copysign);
    x.choose(|x| x.abs() > 0.927_734_4, far, near)
}

/// sqrt(2 / pi), as the tanh form of GELU is published and trained with.
const GELU_C: f32 = 0.797_884_56;
/// The cubic coefficient of the tanh form of GELU.
const GELU_A: f32 = 0.044_715;

/// 2u = 2 * 0.79788456 (x + 0.044715 x^3) of the tanh form of GELU, from x and x^2.
#[inline(always)]
fn gelu_argument<const N: usize>(x: Many<N>, square: Many<N>) -> Many<N> {
    x * square.polynomial([2.0 * GELU_C * GELU_A, 2.0 * GELU_C])
}

/// GELU, tanh form: x/2 (1 + tanh(u)), u = 0.79788456 (x + 0.044715 x^3), computed as x sigmoid(2u), which keeps
/// relative precision on the negative side. -inf gives -0.
#[inline(always)]
pub fn gelus_tanh<const N: usize>(x: Many<N>) -> Many<N> {
    let (s, _) = near_sigmoids(gelu_argument(x, x * x));
    // The sigmoid is 0 long before: only -inf is changed, whose product with 0 would be NaN.
    x.at_least(-1e30) * s
}

/// d/dx of [`gelus_tanh`]: s + x s (1 - s) 2u' with s = sigmoid(2u), u' = 0.79788456 (1 + 3 * 0.044715 x^2).
#[inline(always)]
pub fn gelus_tanh_grad<const N: usize>(x: Many<N>) -> Many<N> {
    // Beyond +-30 the derivative is 1 or 0 exactly; without the clamp inf * 0 would appear.
    let x = x.at_least(-30.0).at_most(30.0);
    let square = x * x;
    let (s, e) = near_sigmoids(gelu_argument(x, square));
    (x * s * (e * s)).mul_add(square.polynomial([6.0 * GELU_C * GELU_A, 2.0 * GELU_C]), s)
}

/// GELU, exact form: x/2 (1 + erf(x / sqrt 2)). The absolute error is within 1 ulp of |x|; -inf gives -0.
#[inline(always)]
pub fn gelus_erf<const N: usize>(x: Many<N>) -> Many<N> {
    let phi = 0.5 * (1.0 + erfs(x * std::f32::consts::FRAC_1_SQRT_2));
    x.at_least(-1e30) * phi
}

/// d/dx of [`gelus_erf`]: Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi).
#[inline(always)]
pub fn gelus_erf_grad<const N: usize>(x: Many<N>) -> Many<N> {
    // The density is 0 beyond +-20; without the clamp inf * 0 would appear.
    let x = x.at_least(-20.0).at_most(20.0);
    let phi = 0.5 * (1.0 + erfs(x * std::f32::consts::FRAC_1_SQRT_2));
    x.mul_add(0.398_942_28 * exps(-0.5 * x * x), phi)
}

/// x sigmoid(x) (SiLU, Swish). -inf gives -0.
#[inline(always)]
pub fn silus<const N: usize>(x: Many<N>) -> Many<N> {
    x.at_least(-1e30) * sigmoids(x)
}

/// d/dx of [`silus`]: s + x s (1 - s), s = sigmoid(x).
#[inline(always)]
pub fn silus_grad<const N: usize>(x: Many<N>) -> Many<N> {
    // Beyond +-110 the derivative is 1 or 0 exactly; without the clamp inf * 0 would appear.
    let x = x.at_least(-110.0).at_most(110.0);
    let (s, c) = sigmoid_pair(x);
    (x * s).mul_add(c, s)
}

/// The sine, from the standard library: right for every argument, not vectorised.
#[inline(always)]
pub fn sin(x: f32) -> f32 {
    x.sin()
}

/// The cosine, from the standard library: right for every argument, not vectorised.
#[inline(always)]
pub fn cos(x: f32) -> f32 {
    x.cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erf in f64: its Taylor series below 3, Lentz's continued fraction of erfc above.
    fn erf64(x: f64) -> f64 {
        let a = x.abs();
        let value = if a < 3.0 {
            let (mut term, mut sum, mut n) = (a, a, 0.0);
            while term.abs() > 1e-18 * sum.abs() {
                n += 1.0;
                term *= -a * a / n;
                sum += term / (2.0 * n + 1.0);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let mut tail = a;
            for n in (1..60).rev() {
                tail = a + (f64::from(n) / 2.0) / tail;
            }
            1.0 - (-a * a).exp() / (tail * std::f64::consts::PI.sqrt())
        };
        value.copysign(x)
    }

    /// The distance from `got` to `want` in units of the f32 spacing at `want` (at least the smallest denormal).
    fn ulps(got: f32, want: f64) -> f64 {
        if want.abs() > 3.402_823_6e38 {
            return if got.is_infinite() || got.abs() == f32::MAX { 0.0 } else { f64::INFINITY };
        }
        let e = want.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor();
        (f64::from(got) - want).abs() / (e - 23.0).exp2()
    }

    /// A sweep over bit patterns of both signs between the two magnitudes.
    fn sweep(lo: f32, hi: f32) -> impl Iterator<Item = f32> {
        let (a, b) = (lo.to_bits(), hi.to_bits());
        let step = ((b - a) / 40_000).max(1) as usize;
        (a..=b).step_by(step).flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
    }

    fn worst(f: fn(f32) -> f32, want: impl Fn(f64) -> f64, inputs: impl Iterator<Item = f32>) -> f64 {
        let mut worst = (0.0, 0.0);
        for x in inputs {
            let error = ulps(f(x), want(f64::from(x)));
            if error.is_nan() || error > worst.0 {
                worst = (error, x);
            }
        }
        assert!(!worst.0.is_nan());
        worst.0
    }

    #[test]
    fn exp_within_bound() {
        assert!(worst(exp, f64::exp, sweep(1e-30, 104.5)) < 1.5);
        assert!(worst(exp, f64::exp, sweep(80.0, 110.0)) < 1.5);
        for (x, y) in [(f32::INFINITY, f32::INFINITY), (f32::NEG_INFINITY, 0.0), (0.0, 1.0), (-0.0, 1.0), (1e-40, 1.0)]
        {
            assert_eq!(exp(x), y);
        }
        assert_eq!((exp(f32::MAX), exp(f32::MIN), exp(-150.0)), (f32::INFINITY, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp_or_zero_within_bound() {
        assert!(worst(exp_or_zero, f64::exp, sweep(1e-30, 87.0)) < 1.5);
        for x in [f32::NEG_INFINITY, f32::MIN, -1e4, -104.0, -87.000_01] {
            assert_eq!(exp_or_zero(x).to_bits(), 0, "{x}");
        }
        assert!(exp_or_zero(-87.0).is_normal() && exp_or_zero(f32::NAN).is_nan());
        assert_eq!((exp_or_zero(0.0), exp_or_zero(-0.0)), (1.0, 1.0));
    }

    #[test]
    fn ln_within_bound() {
        let all = || sweep(f32::from_bits(1), f32::MAX).filter(|x| *x > 0.0);
        assert!(worst(ln, f64::ln, all()) < 1.5);
        assert!(worst(ln, f64::ln, sweep(0.5, 2.0).filter(|x| *x > 0.0)) < 1.5);
        assert_eq!((ln(0.0), ln(-0.0), ln(1.0)), (f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0));
        assert_eq!(ln(f32::INFINITY), f32::INFINITY);
        for x in [f32::NAN, -1.0, f32::NEG_INFINITY, -1e-42] {
            assert!(ln(x).is_nan(), "{x}");
        }
    }

    #[test]
    fn tanh_sigmoid_erf_within_bound() {
        assert!(worst(tanh, f64::tanh, sweep(1e-40, 50.0)) < 2.0);
        assert!(worst(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), sweep(1e-40, 120.0)) < 3.0);
        assert!(worst(erf, erf64, sweep(1e-36, 20.0)) < 2.0);
        for f in [tanh, erf] {
            assert_eq!((f(f32::INFINITY), f(f32::NEG_INFINITY), f(0.0)), (1.0, -1.0, 0.0));
            assert_eq!((f(f32::MAX), f(f32::MIN)), (1.0, -1.0));
            assert!(f(-0.0).is_sign_negative() && f(f32::NAN).is_nan());
        }
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY), sigmoid(0.0)), (1.0, 0.0, 0.5));
        assert_eq!((sigmoid(f32::MAX), sigmoid(f32::MIN)), (1.0, 0.0));
        assert!(sigmoid(f32::NAN).is_nan());
    }

    fn gelu_tanh64(x: f64) -> f64 {
        0.5 * x * (1.0 + (0.797_884_56 * (x + 0.044_715 * x * x * x)).tanh())
    }

    fn gelu_erf64(x: f64) -> f64 {
        0.5 * x * (1.0 + erf64(x * std::f64::consts::FRAC_1_SQRT_2))
    }

    fn silu64(x: f64) -> f64 {
        x / (1.0 + (-x).exp())
    }

    /// The activations and their derivatives (against central differences in f64), in absolute terms.
    #[test]
    fn activations_against_f64() {
        type Case = (fn(f32) -> f32, fn(f32) -> f32, fn(f64) -> f64);
        let cases: [Case; 3] = [
            (gelu_tanh, gelu_tanh_grad, gelu_tanh64),
            (gelu_erf, gelu_erf_grad, gelu_erf64),
            (silu, silu_grad, silu64),
        ];
        for (f, grad, f64_form) in cases {
            for x in sweep(1e-6, 60.0) {
                let x64 = f64::from(x);
                let (got, want) = (f64::from(f(x)), f64_form(x64));
                assert!((got - want).abs() <= 2.5e-7 * x64.abs().max(1e-30), "{x}: {got} for {want}");
                let h = 1e-5;
                let slope = (f64_form(x64 + h) - f64_form(x64 - h)) / (2.0 * h);
                assert!((f64::from(grad(x)) - slope).abs() < 2e-6, "{x}: {} for {slope}", grad(x));
            }
            assert_eq!((f(f32::INFINITY), f(f32::NEG_INFINITY), f(0.0)), (f32::INFINITY, 0.0, 0.0));
            assert_eq!((f(1e38), f(-1e38), f(f32::MIN)), (1e38, 0.0, 0.0));
            assert_eq!((grad(f32::INFINITY), grad(f32::NEG_INFINITY), grad(0.0)), (1.0, 0.0, 0.5));
            assert!(f(f32::NAN).is_nan() && grad(f32::NAN).is_nan());
        }
    }

    /// A block of values gives the bits of each one alone.
    #[test]
    fn blocks_have_the_bits_of_single_values() {
        type Case = (fn(f32) -> f32, fn(Many<CHAINS>) -> Many<CHAINS>);
        let cases: [Case; 12] = [
            (exp, exps),
            (exp_or_zero, exps_or_zero),
            (ln, lns),
            (tanh, tanhs),
            (sigmoid, sigmoids),
            (erf, erfs),
            (gelu_tanh, gelus_tanh),
            (gelu_tanh_grad, gelus_tanh_grad),
            (gelu_erf, gelus_erf),
            (gelu_erf_grad, gelus_erf_grad),
            (silu, silus),
            (silu_grad, silus_grad),
        ];
        let edges = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MAX, f32::MIN, 1e-40];
        let inputs: Vec<f32> = sweep(1e-6, 120.0).step_by(97).chain(edges).collect();
        for (one, many) in cases {
            for x in inputs.as_chunks::<BLOCK>().0.iter().chain([&from_fn(|i| inputs[inputs.len() - 1 - i])]) {
                let got = map_block!(x, many);
                for (got, &x) in got.iter().zip(x) {
                    assert!(got.to_bits() == one(x).to_bits() || (got.is_nan() && one(x).is_nan()), "{x}");
                }
            }
        }
    }

    /// x sigmoid(2u) keeps relative precision where 1 + tanh(u) would cancel.
    #[test]
    fn negative_tails_keep_relative_precision() {
        for x in [-3.0_f32, -5.0, -7.0] {
            let x64 = f64::from(x);
            let u = 0.797_884_56 * (x64 + 0.044_715 * x64.powi(3));
            let want = x64 / (1.0 + (-2.0 * u).exp());
            assert!((f64::from(gelu_tanh(x)) - want).abs() < 1e-5 * want.abs());
        }
        assert!(ulps(silu(-60.0), silu64(-60.0)) < 4.0);
    }
}
