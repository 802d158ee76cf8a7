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
