// The functions of elementwise chains, on f32 unless they say otherwise. NaN in gives NaN out.

#define GELU_C 0.79788456080286536f
#define GELU_A 0.044715f

/// x, but not below `least`; NaN stays.
__device__ __forceinline__ float at_least(float x, float least) { return x < least ? least : x; }
__device__ __forceinline__ float at_most(float x, float most) { return x > most ? most : x; }
__device__ __forceinline__ float within(float x, float bound) { return at_most(at_least(x, -bound), bound); }

// The chip's own functions: e^x of an x that is not positive, and 1 / y of a normal y.
//
// ex2.approx is within 2^-22 of its result, rcp.approx within 2^-23 (PTX ISA). Rounding x log2(e) and that constant moves the exponent by
// at most 1.23 2^-24 of itself, and so e^x by 1.23 2^-24 |x|: below 2^-17 while e^x is a normal number, which is down to x = -87.33.
// Below, it is 0 (.ftz), without the instructions that would scale it up and back, instead of less than 2^-126. Results of 16 bits, which
// alone are made of it, are off by less than 3e-36 by that, of silu and gelu and their derivatives (times the cotangent): of what e^x is
// multiplied with, the most is gelu's derivative's 2.3e2, at x = -10. In f16 that is 0. In bf16 the tolerance of one function
// (verify/tolerance.rs) is 2e-6 of the size of all results, or of 1 if they are larger: far more, unless they all are below 1e-29.
#ifdef MOEBIUS_EMULATOR
__device__ __forceinline__ float exp_quick(float x) { return expf(x); }
__device__ __forceinline__ float reciprocal_quick(float y) { return 1.0f / y; }
#else
__device__ __forceinline__ float exp_quick(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}
__device__ __forceinline__ float reciprocal_quick(float y) {
    float x;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(y));
    return x;
}
#endif

/// 1 / (1 + e^-x) and 1 / (1 + e^x), with full relative precision on both sides. QUICK: by the chip's own functions, to 17 bits,
/// which is enough for a result of 16 bits.
template <int QUICK> struct Sigmoids {
    float of, other;
    __device__ __forceinline__ Sigmoids(float x) {
        float e = QUICK ? exp_quick(-fabsf(x)) : expf(-fabsf(x));
        float large = QUICK ? reciprocal_quick(1.0f + e) : 1.0f / (1.0f + e), small = e * large;
        of = x < 0.0f ? small : large, other = x < 0.0f ? large : small;
    }
};
template <int QUICK> __device__ __forceinline__ float fn_sigmoid(float x) { return Sigmoids<QUICK>(x).of; }
__device__ __forceinline__ float gelu_inner(float x) { return 2.0f * GELU_C * (x + GELU_A * x * x * x); }
__device__ __forceinline__ float normal_distribution(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }

__device__ __forceinline__ float fn_neg(float x) { return -x; }
__device__ __forceinline__ float fn_exp(float x) { return expf(x); }
__device__ __forceinline__ float fn_ln(float x) { return logf(x); }
__device__ __forceinline__ float fn_sqrt(float x) { return sqrtf(x); }
__device__ __forceinline__ float fn_rsqrt(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ float fn_reciprocal(float x) { return 1.0f / x; }
__device__ __forceinline__ float fn_tanh(float x) { return tanhf(x); }
// In the gated functions -inf would meet a gate of 0; a large negative number gives the limit.
template <int QUICK> __device__ __forceinline__ float fn_gelu_tanh(float x) {
    return at_least(x, -1e30f) * fn_sigmoid<QUICK>(gelu_inner(x));
}
__device__ __forceinline__ float fn_gelu_erf(float x) { return at_least(x, -1e30f) * normal_distribution(x); }
template <int QUICK> __device__ __forceinline__ float fn_silu(float x) { return at_least(x, -1e30f) * fn_sigmoid<QUICK>(x); }
__device__ __forceinline__ float fn_relu(float x) { return x < 0.0f ? 0.0f : x; }
__device__ __forceinline__ float fn_abs(float x) { return fabsf(x); }
__device__ __forceinline__ float fn_sign(float x) { return x != x ? x : (float)(x > 0.0f) - (float)(x < 0.0f); }
__device__ __forceinline__ float fn_square(float x) { return x * x; }
__device__ __forceinline__ float fn_sin(float x) { return sinf(x); }
__device__ __forceinline__ float fn_cos(float x) { return cosf(x); }
__device__ __forceinline__ float fn_floor(float x) { return floorf(x); }
__device__ __forceinline__ u8 fn_is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ u8 fn_not(u8 x) { return x ^ 1; }

// Integers wrap: their sums and products are those of u32.
__device__ __forceinline__ float fn_add(float a, float b) { return a + b; }
__device__ __forceinline__ u32 fn_add(u32 a, u32 b) { return a + b; }
__device__ __forceinline__ int fn_add(int a, int b) { return (int)((u32)a + (u32)b); }
__device__ __forceinline__ float fn_sub(float a, float b) { return a - b; }
__device__ __forceinline__ u32 fn_sub(u32 a, u32 b) { return a - b; }
__device__ __forceinline__ int fn_sub(int a, int b) { return (int)((u32)a - (u32)b); }
__device__ __forceinline__ float fn_mul(float a, float b) { return a * b; }
__device__ __forceinline__ u32 fn_mul(u32 a, u32 b) { return a * b; }
__device__ __forceinline__ int fn_mul(int a, int b) { return (int)((u32)a * (u32)b); }
__device__ __forceinline__ float fn_div(float a, float b) { return a / b; }
__device__ __forceinline__ float fn_max(float a, float b) { return max_nan(a, b); }
__device__ __forceinline__ float fn_min(float a, float b) { return (a < b || a != a) ? a : b; }
__device__ __forceinline__ int fn_max(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int fn_min(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ u32 fn_max(u32 a, u32 b) { return a > b ? a : b; }
__device__ __forceinline__ u32 fn_min(u32 a, u32 b) { return a < b ? a : b; }
__device__ __forceinline__ float fn_pow(float a, float b) { return powf(a, b); }

// Of x and the cotangent: the derivative times it. Beyond the bounds the derivatives are 0 or 1, and infinities would meet zeros.
template <int QUICK> __device__ __forceinline__ float fn_gelu_tanh_grad(float x, float dy) {
    x = within(x, 30.0f);
    Sigmoids<QUICK> s(gelu_inner(x));
    return dy * (s.of + x * s.of * s.other * (2.0f * GELU_C) * (1.0f + 3.0f * GELU_A * x * x));
}
__device__ __forceinline__ float fn_gelu_erf_grad(float x, float dy) {
    x = within(x, 20.0f);
    return dy * (normal_distribution(x) + x * (0.39894228040143268f * expf(-0.5f * x * x)));
}
template <int QUICK> __device__ __forceinline__ float fn_silu_grad(float x, float dy) {
    x = within(x, 110.0f);
    Sigmoids<QUICK> s(x);
    return dy * (s.of + x * s.of * s.other);
}
__device__ __forceinline__ float fn_relu_grad(float x, float dy) { return x > 0.0f ? dy : 0.0f; }

// Conversions; from a float to an integer truncated and saturated, NaN gives 0.
__device__ __forceinline__ int to_int(float x) {
    if (x != x) return 0;
    if (x >= 2147483648.0f) return 2147483647;
    return x < -2147483648.0f ? (int)0x80000000u : (int)x;
}
__device__ __forceinline__ int to_int(int x) { return x; }
__device__ __forceinline__ int to_int(u32 x) { return (int)x; }
__device__ __forceinline__ int to_int(u8 x) { return x; }
__device__ __forceinline__ u32 to_uint(float x) {
    if (!(x > 0.0f)) return 0u;
    return x >= 4294967296.0f ? 0xffffffffu : (u32)x;
}
__device__ __forceinline__ u32 to_uint(int x) { return (u32)x; }
__device__ __forceinline__ u32 to_uint(u32 x) { return x; }
__device__ __forceinline__ u32 to_uint(u8 x) { return x; }
template <typename Number> __device__ __forceinline__ u8 to_bool(Number x) { return x != (Number)0; }
__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(int x) { return (float)x; }
__device__ __forceinline__ float to_f32(u32 x) { return (float)x; }
__device__ __forceinline__ float to_f32(u8 x) { return (float)x; }

// Rounded as if stored in the narrower format.
__device__ __forceinline__ float round_bf16(float x) { return to_float(from_float<bf16>(x)); }
__device__ __forceinline__ float round_f16(float x) { return to_float(from_float<f16>(x)); }
/// A number that is rounded already, in its format.
template <typename Float> __device__ __forceinline__ Float narrowed(float x) { return from_float<Float>(x); }
template <> __device__ __forceinline__ bf16 narrowed<bf16>(float x) { bf16 y; y.bits = (u16)(__float_as_uint(x) >> 16); return y; }
