// Rows of slots back to their tokens, weighted, and the chain behind them. Every sum has the order of its choices. PER_LANE: elements
// that a lane has at a time; LANES of them work on a token. What becomes of an element is up to `put` of chain.cuh.

#define THREADS 128
#define TOKENS (THREADS / LANES)

/// y[t] = of_rows sum_j gate[t,j] rows[slot] + of_side side[t].
KERNEL combine(const T* rows, const int* choice_slot, const float* gate, const T* side, const float* coefficient, int slots,
               int tokens, int k, int d, T* y CHAIN_PARAMETERS) {
    begin();
    i64 t = (i64)blockIdx.x * TOKENS + threadIdx.x / LANES;
    if (t >= tokens) return;
    const Chain chain = CHAIN;
    float of_rows = coefficient ? coefficient[2 * t] : 1.0f, of_side = coefficient ? coefficient[2 * t + 1] : 1.0f;
    const int* places = choice_slot + t * k;
#pragma unroll 2
    for (int i = threadIdx.x % LANES * PER_LANE; i < d; i += LANES * PER_LANE) {
        i64 at = t * d + i;
        auto loaded = chain.load<PER_LANE>(at);
        Vector<T, PER_LANE> out, of_token;
        if (side) of_token = load_vector<PER_LANE>(side + at);
        float sum[PER_LANE] = {};
#pragma unroll 4
        for (int j = 0; j < k; j++) {
            int s = places[j];
            bool used = s >= 0 && s < slots;
            float g = gate ? gate[t * k + j] : 1.0f;
            auto v = load_vector<PER_LANE>(rows + (used ? (i64)s * d : 0) + i);
#pragma unroll
            for (int u = 0; u < PER_LANE; u++) sum[u] = used ? fmaf(g, to_float(v.at[u]), sum[u]) : sum[u];
        }
        if (side)
#pragma unroll
            for (int u = 0; u < PER_LANE; u++) sum[u] = fmaf(of_rows, sum[u], __fmul_rn(of_side, to_float(of_token.at[u])));
#pragma unroll
        for (int u = 0; u < PER_LANE; u++) out.at[u] = from_float<T>(sum[u]);
        put<PER_LANE>(y, at, out, chain, loaded);
    }
}
