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
            store_params(param, rounded, i, ps);
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
/// What the levels of the second moment are fourth powers of multiples of.
#define STEP 0.00390625f
/// Adding and subtracting it rounds a number of at most 1 to a multiple of STEP.
#define STEPS 32768.0f

// A root and an inverse that may be off by some of their spacings; numbers that are not normal count as 0.
__device__ __forceinline__ float rough_root(float x) {
#ifdef MOEBIUS_EMULATOR
    return sqrtf(x);
#else
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
__device__ __forceinline__ float rough_inverse(float x) {
#ifdef MOEBIUS_EMULATOR
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/// `step_of` with the same bits in the moments and a few spacings of freedom in what the parameter moves by: the instructions count here,
/// as little memory is moved. A second moment below the normal numbers is taken as the least of those.
__device__ __forceinline__ void quick_step_of(const Rule& r, float grad, float& param, float& m, float& v) {
    float g = grad * r.scale;
    m = r.beta1 * m + (1.0f - r.beta1) * g, v = r.beta2 * v + (1.0f - r.beta2) * (g * g);
    float denominator = fmaf(rough_root(fmaxf(v, 1.175494351e-38f)), r.root, r.eps);
    param = fmaf(r.keep, param, -(r.rate * (m * rough_inverse(denominator))));
}

/// A float with this byte of a word as its lowest.
__device__ __forceinline__ float with_byte(float over, u32 word, int byte) {
    return __uint_as_float(__byte_perm(word, __float_as_uint(over), 0x7650 + byte));
}

/// `word` has the codes with the upper bit of each turned over: j + 128.
__device__ __forceinline__ float m_of(u32 word, int byte, float scale) {
    float j = with_byte(WHOLE, word, byte) - (WHOLE + 128.0f);
    return j * fabsf(j) * scale;
}

__device__ __forceinline__ float level(float t) {
    float square = t * t;
    return square * square;
}

__device__ __forceinline__ float v_of(u32 word, int byte, float scale) {
    return level(with_byte(STEPS, word, byte) - (STEPS - STEP)) * scale;
}

/// The middle of a part of 0..1, by bits 7 to 22.
__device__ __forceinline__ float part(u32 random) {
    return __uint_as_float(0x3f800000u | (random & 0x7fff80u)) - (1.0f - 1.0f / 131072.0f);
}

/// The lowest byte of the result is the code with its upper bit turned over.
__device__ __forceinline__ u32 code_of_m(float m, float inverse, u32 random) {
    float x = fminf(fabsf(m) * inverse, MOST_M);
    float j = (rough_root(x) + WHOLE) - WHOLE;
    // The squares are exact, so that joining products and sums changes nothing.
    float over = fmaf(-j, j, x);
    if (over < 0.0f) j -= 1.0f, over = fmaf(-j, j, x);
    if (over > part(random) * fmaf(2.0f, j, 1.0f)) j += 1.0f;
    return __float_as_uint(copysignf(j, m) + (WHOLE + 128.0f));
}

/// The lowest byte of the result is the code.
__device__ __forceinline__ u32 code_of_v(float v, float inverse, u32 random) {
    float x = fminf(v * inverse, 1.0f);
    float near = (rough_root(rough_root(x)) + STEPS) - STEPS;
    float at = level(near), other = near + (at > x ? -STEP : STEP), beside = level(other);
    float below = fminf(at, beside), above = fmaxf(at, beside);
    float t = fminf(near, other);
    if (x - below > part(random) * (above - below)) t += STEP;
    return __float_as_uint(fmaxf(t, STEP) + (STEPS - STEP));
}

/// The lowest bytes of four words as one word.
__device__ __forceinline__ u32 lowest_bytes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
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
            for (int j = 0; j < 4; j++) {
                new_m[j] = m_of(m_codes ^ 0x80808080u, j, m_scale), new_v[j] = v_of(v_codes, j, v_scale);
            }
            if (i + 4 <= n) {
                auto g = load_vector<4>(grad + i);
                auto ps = load_vector<4>(param + i);
#pragma unroll
                for (int j = 0; j < 4; j++) quick_step_of(rule, to_float(g.at[j]), ps.at[j], new_m[j], new_v[j]);
                store_params(param, rounded, i, ps);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (i + j < n) {
                        quick_step_of(rule, to_float(grad[i + j]), param[i + j], new_m[j], new_v[j]);
                        if (rounded) rounded[i + j] = from_float<ROUNDED>(param[i + j]);
                    } else {
                        new_m[j] = 0.0f, new_v[j] = 0.0f;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                m_most = max(m_most, __float_as_uint(new_m[j]) & 0x7fffffffu);
                v_most = max(v_most, __float_as_uint(new_v[j]));
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
            u32 m_codes[4], v_codes[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 word = words.w[j];
                m_codes[j] = code_of_m(ms[4 * half + j], m_inverse, word);
                v_codes[j] = code_of_v(vs[4 * half + j], v_inverse, word << 16 | word >> 16);
            }
            m[i / 4] = lowest_bytes(m_codes[0], m_codes[1], m_codes[2], m_codes[3]) ^ 0x80808080u;
            v[i / 4] = lowest_bytes(v_codes[0], v_codes[1], v_codes[2], v_codes[3]);
        }
    }
}
