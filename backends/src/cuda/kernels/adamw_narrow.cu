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
KERNEL adamw_bf16(const Step<bf16>* tasks, int count) {
    begin();
    __shared__ Rates rates;
    const Step<bf16>& task = task_of_block(tasks, count);
    Rule rule;
    if (!begin_step(rule, rates, task)) return;
    float* param = task.param;
    bf16 *m = task.m, *v = task.v;
    const T* grad = task.grad;
    ROUNDED* rounded = task.rounded;
    i64 n = task.n, from = (blockIdx.x - task.first) * STEP_ELEMENTS;
    u32 number = (u32)*task.step, stream = task.stream;
    for (int at = 4 * threadIdx.x; at < STEP_ELEMENTS; at += 4 * THREADS) {
        i64 i = from + at;
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

/// Writes words that lie together to global memory, in one instruction.
__device__ __forceinline__ void store_words(void* to, u32 a, u32 b) {
#ifdef MOEBIUS_EMULATOR
    u32 words[2] = {a, b};
    memcpy(to, words, 8);
#else
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
#endif
}
__device__ __forceinline__ void store_words(void* to, uint4 w) {
#ifdef MOEBIUS_EMULATOR
    memcpy(to, &w, 16);
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
#endif
}

/// Between 0 and 1; NaN becomes 0.
__device__ __forceinline__ float saturated(float x) {
#ifdef MOEBIUS_EMULATOR
    return fminf(fmaxf(x, 0.0f), 1.0f);
#else
    return __saturatef(x);
#endif
}
/// The larger one, NaN if one is: a NaN without a sign, whose bits are above those of all numbers.
__device__ __forceinline__ float largest_or_nan(float a, float b) {
#ifdef MOEBIUS_EMULATOR
    return a != a || b != b ? NAN_F : fmaxf(a, b);
#else
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
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

/// WHOLE and STEPS, as numbers that the compiler does not know: an instruction has room for one constant, and another one is which
/// byte of a word is wanted.
struct Bases { float whole, steps; };

/// A float with this byte of a word as its lowest.
__device__ __forceinline__ float with_byte(float over, u32 word, int byte) {
    return __uint_as_float(__byte_perm(word, __float_as_uint(over), 0x7650 + byte));
}

/// `word` has the codes with the upper bit of each turned over: j + 128.
__device__ __forceinline__ float m_of(const Bases& bases, u32 word, int byte, float scale) {
    float j = with_byte(bases.whole, word, byte) - (WHOLE + 128.0f);
    return j * fabsf(j) * scale;
}

__device__ __forceinline__ float level(float t) {
    float square = t * t;
    return square * square;
}

__device__ __forceinline__ float v_of(const Bases& bases, u32 word, int byte, float scale) {
    return level(with_byte(bases.steps, word, byte) - (STEPS - STEP)) * scale;
}

/// The middle of a part of 0..1, by bits 7 to 22.
__device__ __forceinline__ float part(u32 random) {
    u32 bits;
#ifdef MOEBIUS_EMULATOR
    bits = 0x3f800000u | (random & 0x7fff80u);
#else
    // The compiler would take two instructions for two constants.
    u32 one = 0x3f800000u;
    asm("lop3.b32 %0, %1, 0x7fff80, %2, 0xea;" : "=r"(bits) : "r"(random), "r"(one));
#endif
    return __uint_as_float(bits) - (1.0f - 1.0f / 131072.0f);
}

/// The code of a first moment, as a whole number: its sign is that of m.
__device__ __forceinline__ float code_of_m(float m, float inverse, u32 random) {
    float x = fminf(fabsf(m) * inverse, MOST_M);
    float j = (rough_root(x) + WHOLE) - WHOLE;
    // The squares are exact, so that joining products and sums changes nothing.
    float over = fmaf(-j, j, x);
    if (over < 0.0f) j -= 1.0f, over = fmaf(-j, j, x);
    if (over > part(random) * fmaf(2.0f, j, 1.0f)) j += 1.0f;
    return copysignf(j, m);
}

/// The code of a second moment that is no NaN, in steps: of the two levels around it the lower one, or the upper one. Comparisons and
/// sums are chosen before minima: the chip does twice as many at a time.
__device__ __forceinline__ float code_of_v(float v, float inverse, u32 random) {
    float x = saturated(v * inverse);
    float t = (rough_root(rough_root(x)) + STEPS) - STEPS;
    if (level(t) > x) t -= STEP;
    float below = level(t), code = saturated(t - STEP);
    if (x - below > part(random) * (level(t + STEP) - below)) code = t;
    return code;
}

/// The lowest bytes of four whole numbers, once `base` is added, in units of `unit`. The sums are exact: each pair of bytes is a number
/// of 16 bits.
__device__ __forceinline__ u32 bytes_of(const float (&codes)[4], float base) {
    u32 low = __float_as_uint(fmaf(256.0f, codes[1], codes[0] + base));
    u32 high = __float_as_uint(fmaf(256.0f, codes[3], codes[2] + base));
    return __byte_perm(low, high, 0x5410);
}

/// Rare, so that it must stay behind its branch: the compiler would rather do it always.
__device__ __forceinline__ void infinite_if_nan(float& x) {
#ifdef MOEBIUS_EMULATOR
    if (x != x) x = INF_F;
#else
    asm volatile("{\n .reg .pred nan;\n setp.nan.f32 nan, %0, %0;\n @nan mov.b32 %0, 0x7f800000;\n}" : "+f"(x));
#endif
}

/// The scale of a block whose largest first moment has these bits. The quotient is the correctly rounded one: checked for all numbers.
__device__ __forceinline__ float scale_of_m(u32 largest) {
    const float inverse = 1.0f / MOST_M;
    float most = fminf(__uint_as_float(largest), 3.402823466e38f), scale = most * inverse;
    scale = fmaf(fmaf(-scale, MOST_M, most), inverse, scale);
    return scale >= 1.175494351e-38f ? scale : 0.0f;
}

/// The scale of a block whose largest second moment has these bits.
__device__ __forceinline__ float scale_of_v(u32 largest) {
    float scale = fminf(__uint_as_float(largest), 3.402823466e38f);
    return scale >= 1.175494351e-38f ? scale : 0.0f;
}

/// What a lane holds of a block of elements that share scales: two times four that lie together, CODED / 2 apart.
struct Held {
    Vector<float, 4> params[2];
    Vector<T, 4> grads[2];
    u32 m[2], v[2];
    Vector<float, 2> scales;
};

/// Where the elements of a thread block lie, and how many there are.
struct Places {
    float* param;
    const T* grad;
    u32 *m, *v;
    float* scales;
    ROUNDED* rounded;
    u32 count;
};

/// Reads what this lane has of the elements from `first`. FULL: all CODED are there; else those that are not count as 0.
template <bool FULL> __device__ __forceinline__ void load_held(Held& held, const Places& at, u32 first) {
    held.scales = load_vector<2>(at.scales + first / CODED * 2);
    u32 own = first + 4 * (threadIdx.x % 32);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 APART = half * (CODED / 2), i = own + APART;
        if (FULL) {
            held.params[half] = load_vector<4>(at.param + own + APART);
            held.grads[half] = load_vector<4>(at.grad + own + APART);
        } else {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                bool there = i + j < at.count;
                held.params[half].at[j] = there ? at.param[i + j] : 0.0f;
                held.grads[half].at[j] = there ? at.grad[i + j] : from_float<T>(0.0f);
            }
        }
        bool there = FULL || i < at.count;
        held.m[half] = there ? (at.m + own / 4)[APART / 4] : 0, held.v[half] = there ? (at.v + own / 4)[APART / 4] : 0;
    }
}

/// Of the random numbers of a thread block: the number of its first four elements, and what else they depend on.
struct Draw { u64 fours; u32 stream, number; };

/// The step of the elements from `first`, which this warp holds. Once what is held is used, `ahead` may load the next.
template <bool FULL, typename Ahead>
__device__ __forceinline__ void step_held(const Held& held, const Rule& rule, const Places& at, u32 first, const Draw& draw,
                                          const Bases& bases, Ahead ahead) {
    float ms[8], vs[8], m_most = 0.0f;
    u32 v_most = 0, own = first + 4 * (threadIdx.x % 32);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 APART = half * (CODED / 2);
        u32 i = own + APART, m_codes = held.m[half] ^ 0x80808080u;
        Vector<float, 4> params = held.params[half];
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            float &m = ms[4 * half + j], &v = vs[4 * half + j];
            m = m_of(bases, m_codes, j, held.scales.at[0]), v = v_of(bases, held.v[half], j, held.scales.at[1]);
            quick_step_of(rule, to_float(held.grads[half].at[j]), params.at[j], m, v);
            if (!FULL && i + j >= at.count) m = v = 0.0f;
            m_most = largest_or_nan(m_most, fabsf(m));
            // The bits of numbers that are not negative rise with them.
            v_most = max(v_most, __float_as_uint(v));
        }
        if (FULL) {
            store_words(at.param + own + APART, params.fours[0]);
            u32 low = pack(params.at[0], params.at[1], ROUNDED()), high = pack(params.at[2], params.at[3], ROUNDED());
            if (at.rounded) store_words(at.rounded + own + APART, low, high);
        } else {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                if (i + j >= at.count) continue;
                at.param[i + j] = params.at[j];
                if (at.rounded) at.rounded[i + j] = from_float<ROUNDED>(params.at[j]);
            }
        }
    }
    ahead();
    v_most = __reduce_max_sync(WHOLE_WARP, v_most);
    float m_scale = scale_of_m(__reduce_max_sync(WHOLE_WARP, __float_as_uint(m_most))), v_scale = scale_of_v(v_most);
    if (v_most > __float_as_uint(INF_F)) {
        // A NaN counts as infinite.
#pragma unroll
        for (int j = 0; j < 8; j++) infinite_if_nan(vs[j]);
    }
    float m_inverse = m_scale > 0.0f ? 1.0f / m_scale : 0.0f, v_inverse = v_scale > 0.0f ? 1.0f / v_scale : 0.0f;
    if (threadIdx.x % 32 == 0) store_words(at.scales + first / CODED * 2, __float_as_uint(m_scale), __float_as_uint(v_scale));
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 APART = half * (CODED / 2);
        u32 i = own + APART;
        // Their numbers have the upper word in common: a thread block's begin with a multiple of how many they are.
        u64 four = draw.fours & ~0xffffffffull | ((u32)draw.fours + i / 4);
        Words words = philox(KEY0, KEY1, four, draw.stream, draw.number);
        float m_codes[4], v_codes[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 word = words.w[j];
            m_codes[j] = code_of_m(ms[4 * half + j], m_inverse, word);
            v_codes[j] = code_of_v(vs[4 * half + j], v_inverse, word << 16 | word >> 16);
        }
        if (!FULL && i >= at.count) continue;
        (at.m + own / 4)[APART / 4] = bytes_of(m_codes, WHOLE + 32896.0f) ^ 0x80808080u;
        (at.v + own / 4)[APART / 4] = bytes_of(v_codes, STEPS);
    }
}

/// One step in place, as `adamw` of optimizer.cu; of the moments there are codes and scales. While a warp finds the codes of some
/// elements, its next ones are on the way.
KERNEL __launch_bounds__(THREADS, 4) adamw_8bit(const Step<u32>* tasks, int count) {
    begin();
    __shared__ Rates rates;
    const Step<u32>& task = task_of_block(tasks, count);
    i64 from = (blockIdx.x - task.first) * STEP_ELEMENTS, left = task.n - from;
    Places at = {in_global(task.param + from), in_global(task.grad + from), in_global(task.m + from / 4),
                 in_global(task.v + from / 4), in_global(task.scales + from / CODED * 2),
                 task.rounded ? in_global(task.rounded + from) : nullptr, (u32)(left < STEP_ELEMENTS ? left : STEP_ELEMENTS)};
    u32 first = threadIdx.x / 32 * CODED;
    Held held;
    if (first + CODED <= at.count) load_held<true>(held, at, first);
    Rule rule;
    if (!begin_step(rule, rates, task)) return;
    // No launch has so many tasks.
    u32 none = (u32)count >> 31;
    Bases bases = {__uint_as_float(__float_as_uint(WHOLE) + none), __uint_as_float(__float_as_uint(STEPS) + none)};
    Draw draw = {(u64)from / 4, task.stream, (u32)*task.step};
    for (; first + CODED <= at.count; first += THREADS / 32 * CODED) {
        u32 next = first + THREADS / 32 * CODED;
        step_held<true>(held, rule, at, first, draw, bases, [&] {
            if (next + CODED <= at.count) load_held<true>(held, at, next);
        });
    }
    if (first < at.count) {
        load_held<false>(held, at, first);
        step_held<false>(held, rule, at, first, draw, bases, [] {});
    }
}
