// Floats: the narrow formats as bits, what is not a number, and the elementary functions, whose precision Vulkan leaves open.
//
// Kernels compute in f32 whatever is stored. Every operation rounds by itself.

// Constants that are not numbers are no literals of the language.
var<private> INF_BITS: u32 = 0x7f800000u;
var<private> NAN_BITS: u32 = 0x7fc00000u;
var<private> NO_BITS: u32 = 0u;

fn inf() -> f32 { return bitcast<f32>(INF_BITS); }
fn nan() -> f32 { return bitcast<f32>(NAN_BITS); }
fn from_bits(bits: u32) -> f32 { return bitcast<f32>(bits ^ NO_BITS); }
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn is_finite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }
// The larger one; NaN if any is.
fn max_nan(a: f32, b: f32) -> f32 { return select(b, a, a > b || is_nan(a)); }
fn min_nan(a: f32, b: f32) -> f32 { return select(b, a, a < b || is_nan(a)); }
// Not below `least`, not above `most`; NaN stays.
fn at_least(x: f32, least: f32) -> f32 { return select(x, least, x < least); }
fn at_most(x: f32, most: f32) -> f32 { return select(x, most, x > most); }
fn with_sign(x: f32, s: f32) -> f32 {
    return bitcast<f32>((bitcast<u32>(x) & 0x7fffffffu) | (bitcast<u32>(s) & 0x80000000u));
}

fn bf16_to_float(bits: u32) -> f32 { return bitcast<f32>(bits << 16u); }
// Rounded to nearest even.
fn bf16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select((bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u, 0x7fc0u, is_nan(x));
}
fn f16_to_float(bits: u32) -> f32 {
    let low = bits & 0x7fffu;
    // The smallest numbers are multiples of 2^-24.
    var x = f32(low) * 5.9604644775390625e-8f;
    if (low >= 0x400u) { x = bitcast<f32>((low << 13u) + select(112u << 23u, 224u << 23u, low >= 0x7c00u)); }
    return with_sign(x, bitcast<f32>(bits << 16u));
}
fn f16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x) & 0x7fffffffu;
    var half = 0x7c00u;
    if (bits > 0x7f800000u) {
        half = 0x7e00u;
    } else if (bits < 0x38800000u) {
        // Adding 1/2 leaves multiples of 2^-24 in the low bits, rounded to nearest even.
        half = bitcast<u32>(bitcast<f32>(bits) + 0.5f) - 0x3f000000u;
    } else if (bits < 0x477ff000u) {
        half = (bits - (112u << 23u) + 0xfffu + ((bits >> 13u) & 1u)) >> 13u;
    }
    return half | (bitcast<u32>(x) >> 16u & 0x8000u);
}
// Rounded as if stored in the narrower format.
fn round_bf16(x: f32) -> f32 { return bf16_to_float(bf16_bits(x)); }
fn round_f16(x: f32) -> f32 { return f16_to_float(f16_bits(x)); }

// Division and square root may be off by 2.5 units in the last place; here they are rounded to nearest, where neither the numbers nor what
// they leave over are near the ends of what is representable. Elsewhere they are as they are.

fn is_moderate(x: f32) -> bool { return abs(x) > 8.271806e-25f && abs(x) < 1.2089258e24f; }
// a - b c without rounding, of a product near a. A fused operation may not be one: the product is made of halves of its factors that
// multiply without rounding.
fn left_over(a: f32, b: f32, c: f32) -> f32 {
    let product = b * c;
    let b_high = bitcast<f32>(bitcast<u32>(b) & 0xfffff000u);
    let c_high = bitcast<f32>(bitcast<u32>(c) & 0xfffff000u);
    let b_low = b - b_high;
    let c_low = c - c_high;
    return (a - product) - (((b_high * c_high - product) + b_high * c_low + b_low * c_high) + b_low * c_low);
}
// The distance of a positive number to the next one.
fn spacing(x: f32) -> f32 { return bitcast<f32>((bitcast<u32>(x) & 0x7f800000u) - (23u << 23u)); }
fn divide(a: f32, b: f32) -> f32 {
    let near = a / b;
    if (!(is_moderate(a) && is_moderate(b))) { return near; }
    let x = abs(a);
    let y = abs(b);
    var q = abs(near);
    q += left_over(x, q, y) / y;
    // Now the quotient or a neighbour of it.
    let twice = 2.0f * left_over(x, q, y);
    let step = spacing(q);
    if (twice > y * step) { q += step; } else if (twice < -y * step) { q -= step; }
    return select(q, -q, (bitcast<i32>(a) ^ bitcast<i32>(b)) < 0);
}
fn square_root(x: f32) -> f32 {
    var root = sqrt(x);
    if (!(x > 0.0f && is_moderate(x))) { return root; }
    root += left_over(x, root, root) / (2.0f * root);
    let rest = left_over(x, root, root);
    let step = spacing(root);
    if (rest > root * step) { root += step; } else if (rest <= -root * step) { root -= step; }
    return root;
}

fn two_to(n: i32) -> f32 { return bitcast<f32>(u32(n + 127) << 23u); }

// e^x within 1.5 units in the last place, as in backends/src/cpu/vmath.rs: x = n ln 2 + r, then a polynomial in r (Cephes' expf).
fn e_to(x0: f32) -> f32 {
    let x = at_most(at_least(x0, -104.0f), 89.0f);
    let shifted = x * 1.44269504f + 12582912.0f;
    let n = bitcast<i32>(shifted) - bitcast<i32>(12582912.0f);
    let nf = shifted - 12582912.0f;
    let r = (x - nf * 0.6933594f) - nf * -2.1219444e-4f;
    var q = 1.9875691e-4f * r + 1.3981999e-3f;
    q = q * r + 8.333452e-3f;
    q = q * r + 4.1665796e-2f;
    q = q * r + 1.6666665e-1f;
    q = q * r + 5.0000001e-1f;
    let y = (q * (r * r) + r) + 1.0f;
    // In two steps, as 2^n alone may overflow or underflow.
    let low = n >> 1u;
    return select(y * two_to(low) * two_to(n - low), x0, is_nan(x0));
}

// Of ln(1 + m), that of Cephes' logf.
fn ln_polynomial(m: f32) -> f32 {
    var q = 7.0376836e-2f;
    q = q * m - 1.151461e-1f;
    q = q * m + 1.1676999e-1f;
    q = q * m - 1.2420141e-1f;
    q = q * m + 1.4249323e-1f;
    q = q * m - 1.6668058e-1f;
    q = q * m + 2.0000715e-1f;
    q = q * m - 2.4999994e-1f;
    q = q * m + 3.3333331e-1f;
    return q;
}

// The natural logarithm of a positive number in two parts: x = (1 + m) 2^e, then a polynomial in m.
fn ln_parts(x: f32) -> vec2<f32> {
    let tiny = x < 1.17549435e-38f;
    let bits = bitcast<i32>(select(x, x * 8388608.0f, tiny));
    let e = (bits - 0x3f3504f3) >> 23u;
    let m = bitcast<f32>(bits - (e << 23u)) - 1.0f;
    let fe = f32(e) - select(0.0f, 23.0f, tiny);
    let z = m * m;
    let y = ln_polynomial(m) * m * z + fe * -2.1219444e-4f - 0.5f * z;
    let s = m + y;
    let large = fe * 0.6933594f;
    let sum = s + large;
    // What the two sums lost.
    return vec2<f32>(sum, (y - (s - m)) + (select(large - (sum - s), s - (sum - large), abs(large) > abs(s))));
}

// Within 1.5 units in the last place; -inf at 0, NaN below.
fn ln(x: f32) -> f32 {
    let parts = ln_parts(x);
    var y = parts.x + parts.y;
    if (!(x > 0.0f)) { y = nan(); }
    if (x == 0.0f) { y = -inf(); }
    return select(y, x, x == inf());
}

// ln(1 + x) of x >= 0.
fn ln_1p(x: f32) -> f32 {
    let u = 1.0f + x;
    // What the sum lost, relative to it.
    return select(ln(u) + (x - (u - 1.0f)) / u, x, u == inf());
}

fn tanh_of(x: f32) -> f32 {
    let a = abs(x);
    let z = x * x;
    var q = -5.7049887e-3f * z + 2.0639089e-2f;
    q = q * z - 5.3739716e-2f;
    q = q * z + 1.3331442e-1f;
    q = q * z - 3.3333282e-1f;
    let near = q * z * x + x;
    let far = 1.0f - 2.0f / (e_to(2.0f * a) + 1.0f);
    return select(with_sign(select(far, near, a < 0.625f), x), x, is_nan(x));
}

// The error function within 2 units in the last place, as in vmath.rs.
fn erf(x: f32) -> f32 {
    let s = x * x;
    var near = -5.967617e-4f * s + 4.9911942e-3f;
    near = near * s - 2.6768135e-2f;
    near = near * s + 1.1281992e-1f;
    near = near * s - 3.7612534e-1f;
    near = near * s + 1.2837917e-1f;
    near = near * x + x;
    let t = at_most(abs(x), 4.0f);
    var far = -1.7285347e-5f * t + 3.8319713e-4f;
    far = far * t - 3.8839644e-3f;
    far = far * t + 2.4254622e-2f;
    far = far * t - 1.0677788e-1f;
    far = far * t - 6.3484669e-1f;
    far = far * t - 1.2871751e-1f;
    far = with_sign(1.0f - e_to(far * t - t), x);
    return select(near, far, abs(x) > 0.9277344f);
}
