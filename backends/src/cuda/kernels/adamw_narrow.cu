// AdamW with moments in fewer bits than they are computed in, rounded stochastically: ir/src/moments.rs. The compiler must not
// join products and sums here: moments have the same bits as on the CPU.

#define THREADS 256
/// The key of all roundings.
#define KEY0 0x6d6f6d65u
#define KEY1 0x726f756eu

/// Rounds stochastically, with the lower half of `random`.
__device__ __forceinline__ bf16 round_bf16(float x, u32 random) {
    u32 bits = __float_as_uint(x);
    bf16 y;
    y.bits = (u16)((x != x ? bits | 0x400000u : bits + (random & 0xffffu)) >> 16);
    return y;
}

/// One step in place, as `adamw` of optimizer.cu; moments are bf16.
KERNEL adamw_bf16(float* param, const T* grad, bf16* m, bf16* v, const float* lr, const float* step, const float* grad_scale,
                  float beta1, float beta2, float eps, float weight_decay, i64 n, u32 stream, ROUNDED* rounded) {
    __shared__ Rates rates;
    Rule rule = {*grad_scale, beta1, beta2, eps};
    if (!begin_step(rule, rates, lr, step, weight_decay)) return;
    u32 number = (u32)*step;
    for (int at = 4 * threadIdx.x; at < STEP_ELEMENTS; at += 4 * THREADS) {
        i64 i = (i64)blockIdx.x * STEP_ELEMENTS + at;
        if (i >= n) return;
        Words words = philox(KEY0, KEY1, (u64)i / 4, stream, number);
        if (i + 4 <= n) {
            auto g = load_vector<4>(grad + i);
            auto ps = load_vector<4>(param + i);
            auto ms = load_vector<4>(m + i), vs = load_vector<4>(v + i);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float new_m = to_float(ms.at[j]), new_v = to_float(vs.at[j]);
                step_of(rule, to_float(g.at[j]), ps.at[j], new_m, new_v);
                ms.at[j] = round_bf16(new_m, words.w[j]), vs.at[j] = round_bf16(new_v, words.w[j] >> 16);
            }
            store_vector<4>(m + i, ms);
            store_vector<4>(v + i, vs);
            store_vector<4>(param + i, ps);
            if (rounded) {
                Vector<ROUNDED, 4> rs;
#pragma unroll
                for (int j = 0; j < 4; j++) rs.at[j] = from_float<ROUNDED>(ps.at[j]);
                store_vector<4>(rounded + i, rs);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 3; j++) {
                if (i + j >= n) return;
                float new_m = to_float(m[i + j]), new_v = to_float(v[i + j]);
                step_of(rule, to_float(grad[i + j]), param[i + j], new_m, new_v);
                m[i + j] = round_bf16(new_m, words.w[j]), v[i + j] = round_bf16(new_v, words.w[j] >> 16);
                if (rounded) rounded[i + j] = from_float<ROUNDED>(param[i + j]);
            }
        }
    }
}

// Moments in 8 bits: ir/src/moments/eight.rs has the formulas. Blocks of 256 elements are a warp's; each lane has two words of codes,
// four elements each, so that a warp's accesses lie together.

#define CODED 256
/// The square of the highest code of the first moment.
#define MOST_M 16129.0f
/// Adding and subtracting it rounds a small number to a whole one.
#define WHOLE 8388608.0f

/// A root that may be off by some of its spacings.
__device__ __forceinline__ float rough_root(float x) {
#ifdef MOEBIUS_EMULATOR
    return sqrtf(x);
#else
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/// A float whose lowest byte is this one: 2^23 + byte over 2^23, or 2^15 + byte / 256 over 2^15.
__device__ __forceinline__ float with_byte(u32 over, u32 word, int byte) {
    return __uint_as_float(over | (word >> 8 * byte & 0xffu));
}

__device__ __forceinline__ float m_of(u32 word, int byte, float scale) {
    u32 code = word >> 8 * byte;
    float j = __uint_as_float(0x4b000000u | (code & 0x7fu)) - WHOLE;
    return __uint_as_float(__float_as_uint(j * j * scale) | (code & 0x80u) << 24);
}

__device__ __forceinline__ float level(float t) {
    float square = t * t;
    return square * square;
}

/// The constant is 2^15 - 1/256.
__device__ __forceinline__ float v_of(u32 word, int byte, float scale) {
    return level(with_byte(0x47000000u, word, byte) - 32767.99609375f) * scale;
}

/// The middle of a part: the lower half of `random`, and a half.
__device__ __forceinline__ float part(u32 random) {
    return __uint_as_float(0x4b000000u | (random & 0xffffu)) - 8388607.5f;
}

__device__ __forceinline__ u32 code_of_m(float m, float inverse, u32 random) {
    float x = fminf(fabsf(m) * inverse, MOST_M);
    float j = (rough_root(x) + WHOLE) - WHOLE;
    if (j * j > x) j -= 1.0f;
    bool up = (x - j * j) * 65536.0f > part(random) * (j + j + 1.0f);
    return (__float_as_uint(j + (up ? WHOLE + 1.0f : WHOLE)) & 0x7fu) | (__float_as_uint(m) >> 31 << 7);
}

__device__ __forceinline__ u32 code_of_v(float v, float inverse, u32 random) {
    float x = fminf(v * inverse, 1.0f);
    float t = fmaxf((256.0f * rough_root(rough_root(x)) + WHOLE) - WHOLE, 1.0f);
    if (level(t * 0.00390625f) > x) t = fmaxf(t - 1.0f, 1.0f);
    float below = level(t * 0.00390625f), above = level((t + 1.0f) * 0.00390625f);
    bool up = (x - below) * 65536.0f > part(random) * (above - below);
    return __float_as_uint(t + (up ? WHOLE : WHOLE - 1.0f)) & 0xffu;
}

/// The scale of a block whose largest number, over `parts`, has these bits.
__device__ __forceinline__ float scale_of(u32 largest, float parts) {
    float scale = fminf(__uint_as_float(largest), 3.402823466e38f) / parts;
    return scale >= 1.175494351e-38f ? scale : 0.0f;
}

/// One step in place, as `adamw` of optimizer.cu; of the moments there are codes and scales.
KERNEL adamw_8bit(float* param, const T* grad, u32* m, u32* v, const float* lr, const float* step, const float* grad_scale,
                  float beta1, float beta2, float eps, float weight_decay, i64 n, u32 stream, float* scales, ROUNDED* rounded) {
    __shared__ Rates rates;
    Rule rule = {*grad_scale, beta1, beta2, eps};
    if (!begin_step(rule, rates, lr, step, weight_decay)) return;
    u32 number = (u32)*step, lane = threadIdx.x % 32;
    for (int at = threadIdx.x / 32 * CODED; at < STEP_ELEMENTS; at += THREADS / 32 * CODED) {
        i64 first = (i64)blockIdx.x * STEP_ELEMENTS + at;
        // For the whole warp.
        if (first >= n) return;
        float* own = scales + first / CODED * 2;
        float m_scale = own[0], v_scale = own[1];
        float ms[8], vs[8];
        u32 m_most = 0, v_most = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            i64 i = first + half * (CODED / 2) + 4 * lane;
            float* new_m = ms + 4 * half;
            float* new_v = vs + 4 * half;
            u32 m_codes = 0, v_codes = 0;
            if (i < n) m_codes = m[i / 4], v_codes = v[i / 4];
#pragma unroll
            for (int j = 0; j < 4; j++) new_m[j] = m_of(m_codes, j, m_scale), new_v[j] = v_of(v_codes, j, v_scale);
            if (i + 4 <= n) {
                auto g = load_vector<4>(grad + i);
                auto ps = load_vector<4>(param + i);
#pragma unroll
                for (int j = 0; j < 4; j++) step_of(rule, to_float(g.at[j]), ps.at[j], new_m[j], new_v[j]);
                store_vector<4>(param + i, ps);
                if (rounded) {
                    Vector<ROUNDED, 4> rs;
#pragma unroll
                    for (int j = 0; j < 4; j++) rs.at[j] = from_float<ROUNDED>(ps.at[j]);
                    store_vector<4>(rounded + i, rs);
                }
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (i + j < n) {
                        step_of(rule, to_float(grad[i + j]), param[i + j], new_m[j], new_v[j]);
                        if (rounded) rounded[i + j] = from_float<ROUNDED>(param[i + j]);
                    } else {
                        new_m[j] = 0.0f, new_v[j] = 0.0f;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                m_most = max(m_most, __float_as_uint(new_m[j]) & 0x7fffffffu);
                v_most = max(v_most, __float_as_uint(new_v[j]) & 0x7fffffffu);
            }
        }
        // The bits of numbers that are not negative rise with them.
        m_scale = scale_of(__reduce_max_sync(WHOLE_WARP, m_most), MOST_M);
        v_scale = scale_of(__reduce_max_sync(WHOLE_WARP, v_most), 1.0f);
        float m_inverse = m_scale > 0.0f ? 1.0f / m_scale : 0.0f, v_inverse = v_scale > 0.0f ? 1.0f / v_scale : 0.0f;
        if (lane == 0) own[0] = m_scale, own[1] = v_scale;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            i64 i = first + half * (CODED / 2) + 4 * lane;
            if (i >= n) continue;
            Words words = philox(KEY0, KEY1, (u64)i / 4, stream, number);
            u32 m_codes = 0, v_codes = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                m_codes |= code_of_m(ms[4 * half + j], m_inverse, words.w[j]) << 8 * j;
                v_codes |= code_of_v(vs[4 * half + j], v_inverse, words.w[j] >> 16) << 8 * j;
            }
            m[i / 4] = m_codes, v[i / 4] = v_codes;
        }
    }
}
