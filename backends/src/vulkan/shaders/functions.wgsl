// The functions of elementwise chains, on f32 unless they say otherwise; bools are 0 or 1 in u32. NaN in gives NaN out.

const GELU_C: f32 = 0.79788456080286536f;
const GELU_A: f32 = 0.044715f;

fn within(x: f32, bound: f32) -> f32 { return at_most(at_least(x, -bound), bound); }

// 1 / (1 + e^-x) and 1 / (1 + e^x), with full relative precision on both sides.
fn sigmoids(x: f32) -> vec2<f32> {
    let e = e_to(-abs(x));
    let large = 1.0f / (1.0f + e);
    let small = e * large;
    return select(vec2<f32>(large, small), vec2<f32>(small, large), x < 0.0f);
}
// The same for a result of 16 bits, by the device's own power of 2: within (3 + 2 |x| 1.44) 2^-23 of e^-|x|, and 0 where that is no normal number,
// as the Vulkan specification has it. See CUDA's functions.cuh for what becomes of that.
fn sigmoids_quick(x: f32) -> vec2<f32> {
    let e = exp2(-1.44269504f * abs(x));
    let large = 1.0f / (1.0f + e);
    let small = e * large;
    return select(vec2<f32>(large, small), vec2<f32>(small, large), x < 0.0f);
}
fn gelu_inner(x: f32) -> f32 { return 2.0f * GELU_C * (x + GELU_A * x * x * x); }
fn normal_distribution(x: f32) -> f32 { return 0.5f * (1.0f + erf(x * 0.70710678118654752f)); }

// (cos, sin): x = n pi / 2 + r, then polynomials in r (Cephes' sinf).
fn turned(x: f32) -> vec2<f32> {
    let n = floor(x * 0.636619772f + 0.5f);
    let r = ((x - n * 1.5703125f) - n * 4.837512969970703e-4f) - n * 7.549789948768648e-8f;
    let z = r * r;
    let sine = ((-1.9515296e-4f * z + 8.3321609e-3f) * z - 1.6666655e-1f) * z * r + r;
    let cosine = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - 0.5f * z + 1.0f;
    let quarter = i32(within(n, 1e9f)) & 3;
    let odd = (quarter & 1) == 1;
    let c = select(cosine, sine, odd);
    let s = select(sine, cosine, odd);
    return vec2<f32>(select(c, -c, ((quarter + 1) & 2) == 2), select(s, -s, (quarter & 2) == 2));
}

fn fn_neg(x: f32) -> f32 { return -x; }
fn fn_exp(x: f32) -> f32 { return e_to(x); }
fn fn_ln(x: f32) -> f32 { return ln(x); }
fn fn_sqrt(x: f32) -> f32 { return select(sqrt(x), nan(), x < 0.0f); }
fn fn_rsqrt(x: f32) -> f32 { return 1.0f / fn_sqrt(x); }
fn fn_reciprocal(x: f32) -> f32 { return 1.0f / x; }
fn fn_tanh(x: f32) -> f32 { return tanh_of(x); }
fn fn_sigmoid(x: f32) -> f32 { return sigmoids(x).x; }
// In the gated functions -inf would meet a gate of 0; a large negative number gives the limit.
fn fn_gelu_tanh(x: f32) -> f32 { return at_least(x, -1e30f) * sigmoids(gelu_inner(x)).x; }
fn fn_gelu_erf(x: f32) -> f32 { return at_least(x, -1e30f) * normal_distribution(x); }
fn fn_silu(x: f32) -> f32 { return at_least(x, -1e30f) * sigmoids(x).x; }
fn fn_sigmoid_quick(x: f32) -> f32 { return select(sigmoids_quick(x).x, x, is_nan(x)); }
fn fn_gelu_tanh_quick(x: f32) -> f32 { return at_least(x, -1e30f) * sigmoids_quick(gelu_inner(x)).x; }
fn fn_silu_quick(x: f32) -> f32 { return at_least(x, -1e30f) * sigmoids_quick(x).x; }
fn fn_relu(x: f32) -> f32 { return select(x, 0.0f, x < 0.0f); }
fn fn_abs(x: f32) -> f32 { return abs(x); }
fn fn_sign(x: f32) -> f32 {
    return select(select(0.0f, 1.0f, x > 0.0f) - select(0.0f, 1.0f, x < 0.0f), x, is_nan(x));
}
fn fn_square(x: f32) -> f32 { return x * x; }
fn fn_sin(x: f32) -> f32 { return select(nan(), turned(x).y, is_finite(x)); }
fn fn_cos(x: f32) -> f32 { return select(nan(), turned(x).x, is_finite(x)); }
fn fn_floor(x: f32) -> f32 { return floor(x); }
fn fn_is_finite(x: f32) -> u32 { return u32(is_finite(x)); }
fn fn_not(x: u32) -> u32 { return x ^ 1u; }

fn fn_add(a: f32, b: f32) -> f32 { return a + b; }
fn fn_sub(a: f32, b: f32) -> f32 { return a - b; }
fn fn_mul(a: f32, b: f32) -> f32 { return a * b; }
fn fn_div(a: f32, b: f32) -> f32 { return a / b; }
fn fn_max(a: f32, b: f32) -> f32 { return max_nan(a, b); }
fn fn_min(a: f32, b: f32) -> f32 { return min_nan(a, b); }
// Integers wrap.
fn fn_add_i32(a: i32, b: i32) -> i32 { return a + b; }
fn fn_sub_i32(a: i32, b: i32) -> i32 { return a - b; }
fn fn_mul_i32(a: i32, b: i32) -> i32 { return a * b; }
fn fn_max_i32(a: i32, b: i32) -> i32 { return max(a, b); }
fn fn_min_i32(a: i32, b: i32) -> i32 { return min(a, b); }
fn fn_add_u32(a: u32, b: u32) -> u32 { return a + b; }
fn fn_sub_u32(a: u32, b: u32) -> u32 { return a - b; }
fn fn_mul_u32(a: u32, b: u32) -> u32 { return a * b; }
fn fn_max_u32(a: u32, b: u32) -> u32 { return max(a, b); }
fn fn_min_u32(a: u32, b: u32) -> u32 { return min(a, b); }

// a^b = e^(b ln |a|), the logarithm in two parts, as b makes its error larger; of a negative a where b is a whole number.
fn fn_pow(a: f32, b: f32) -> f32 {
    if (b == 0.0f || a == 1.0f) { return 1.0f; }
    if (is_nan(a) || is_nan(b)) { return nan(); }
    let size = abs(a);
    let whole = floor(b) == b;
    let odd = whole && abs(b) < 16777216.0f && (floor(b * 0.5f) * 2.0f != b);
    var y = 0.0f;
    if (size == 0.0f || size == inf() || abs(b) == inf()) {
        let grows = (size > 1.0f) == (b > 0.0f);
        y = select(select(0.0f, inf(), grows), 1.0f, size == 1.0f);
    } else {
        let parts = ln_parts(size);
        let power = b * parts.x;
        // What the product lost, by halves of the factors that multiply without rounding.
        let b_high = bitcast<f32>(bitcast<u32>(b) & 0xfffff000u);
        let l_high = bitcast<f32>(bitcast<u32>(parts.x) & 0xfffff000u);
        let b_low = b - b_high;
        let l_low = parts.x - l_high;
        let lost = ((b_high * l_high - power) + b_high * l_low + b_low * l_high) + b_low * l_low;
        y = e_to(power);
        if (abs(power) < 100.0f) { y = y + y * (lost + b * parts.y); }
    }
    if (bitcast<i32>(a) < 0) {
        if (odd) { return -y; }
        if (!whole && size != 0.0f && size != inf()) { return nan(); }
    }
    return y;
}

// Of x and the cotangent: the derivative times it. Beyond the bounds the derivatives are 0 or 1, and infinities would meet zeros.
fn gelu_tanh_slope(x: f32, s: vec2<f32>) -> f32 {
    return s.x + x * s.x * s.y * (2.0f * GELU_C) * (1.0f + 3.0f * GELU_A * x * x);
}
fn fn_gelu_tanh_grad(x0: f32, dy: f32) -> f32 {
    let x = within(x0, 30.0f);
    return dy * gelu_tanh_slope(x, sigmoids(gelu_inner(x)));
}
fn fn_gelu_tanh_grad_quick(x0: f32, dy: f32) -> f32 {
    let x = within(x0, 30.0f);
    return dy * gelu_tanh_slope(x, sigmoids_quick(gelu_inner(x)));
}
fn fn_gelu_erf_grad(x0: f32, dy: f32) -> f32 {
    let x = within(x0, 20.0f);
    return dy * (normal_distribution(x) + x * (0.39894228040143268f * e_to(-0.5f * x * x)));
}
fn fn_silu_grad(x0: f32, dy: f32) -> f32 {
    let x = within(x0, 110.0f);
    let s = sigmoids(x);
    return dy * (s.x + x * s.x * s.y);
}
fn fn_silu_grad_quick(x0: f32, dy: f32) -> f32 {
    let x = within(x0, 110.0f);
    let s = sigmoids_quick(x);
    return dy * (s.x + x * s.x * s.y);
}
fn fn_relu_grad(x: f32, dy: f32) -> f32 { return select(0.0f, dy, x > 0.0f); }

// Conversions; from a float to an integer truncated and saturated, NaN gives 0.
fn i32_of_f32(x: f32) -> i32 {
    if (is_nan(x)) { return 0; }
    if (x >= 2147483648.0f) { return 2147483647; }
    if (x < -2147483648.0f) { return bitcast<i32>(0x80000000u); }
    return i32(x);
}
fn i32_of_i32(x: i32) -> i32 { return x; }
fn i32_of_u32(x: u32) -> i32 { return bitcast<i32>(x); }
fn u32_of_f32(x: f32) -> u32 {
    if (!(x > 0.0f)) { return 0u; }
    if (x >= 4294967296.0f) { return 0xffffffffu; }
    return u32(x);
}
fn u32_of_i32(x: i32) -> u32 { return bitcast<u32>(x); }
fn u32_of_u32(x: u32) -> u32 { return x; }
fn f32_of_f32(x: f32) -> f32 { return x; }
fn f32_of_i32(x: i32) -> f32 { return f32(x); }
fn f32_of_u32(x: u32) -> f32 { return f32(x); }
fn bool_of_f32(x: f32) -> u32 { return select(1u, 0u, x == 0.0f); }
fn bool_of_i32(x: i32) -> u32 { return u32(x != 0); }
fn bool_of_u32(x: u32) -> u32 { return u32(x != 0u); }
