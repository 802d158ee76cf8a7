// The gradient of the router's logits: the counted choices of all tokens are counted, then a warp works on each token.

#define THREADS 128
#define WARPS (THREADS / 32)

/// counts[e] += choices of e among the first COUNTED of each token. Whole numbers: any order gives the same.
KERNEL count_choices(const int* index, int n, int* counts) {
    begin();
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (i64)n * COUNTED) return;
    int x = index[i / COUNTED * K + i % COUNTED];
    if (x >= 0 && x < EXPERTS) atomicAdd(&counts[x], 1);
}

KERNEL route_grad(const float* all_logits, const int* index, const float* d_gate, const float* d_balance, const float* d_z,
                  const int* counts, int n, float* all_d) {
    begin();
    int warp = threadIdx.x / 32, t = blockIdx.x * WARPS + warp;
    if (t >= n) return;
    const float* logits = all_logits + (i64)t * EXPERTS;
    float* d = all_d + (i64)t * EXPERTS;
    Row row = row_of(logits);
    if (!row.finite()) {
        EACH_EXPERT(e) d[e] = NAN_F;
        return;
    }
    float total = 0.0f;
    if (NORMALISED) {
        EACH_EXPERT(e) total += own_value(logits[e]);
        total = warp_sum(total);
    }
    bool flat = NORMALISED && total < 1.17549435e-38f;
    // d of the loss by p[e] is this times the count of e.
    float by_count = *d_balance * (float)EXPERTS / (float)n / ((float)n * COUNTED), dot = 0.0f;
    EACH_EXPERT(e) {
        float p = !NORMALISED ? row.softmax(logits[e]) : flat ? 1.0f / EXPERTS : own_value(logits[e]) / total;
        dot += p * (by_count * (float)counts[e]);
    }
    dot = warp_sum(dot);
    float of_z = *d_z * 2.0f / (float)n * row.lse();
    EACH_EXPERT(e) {
        // p times the derivative of ln p, up to what all experts share.
        float weight = row.softmax(logits[e]);
        if (NORMALISED) weight = flat ? 0.0f : own_slope(logits[e], own_value(logits[e])) / total;
        float sum = weight * (by_count * (float)counts[e] - dot) + of_z * row.softmax(logits[e]);
        for (int j = 0; j < K && SCORE != 4; j++) {
            int x = index[(i64)t * K + j];
            if (x < 0 || x >= EXPERTS) continue;
            float g = d_gate[(i64)t * K + j];
            if (SCORE == 0) sum += g * row.softmax(logits[x]) * ((e == x ? 1.0f : 0.0f) - row.softmax(logits[e]));
            else if (e == x) sum += g * own_slope(logits[e], own_value(logits[e]));
        }
        d[e] = sum;
    }
#if SCORE == 4
    // The logits left after each choice.
    __shared__ float lefts[WARPS][EXPERTS];
    float* left = lefts[warp];
    EACH_EXPERT(e) left[e] = logits[e];
    __syncwarp();
    for (int j = 0; j < K; j++) {
        int x = index[(i64)t * K + j];
        // The same for the whole warp.
        if (x < 0 || x >= EXPERTS) continue;
        Mixer mixer = mixer_of(left);
        float g = d_gate[(i64)t * K + j], q = mixer.share(left[x]);
        EACH_EXPERT(e) d[e] += g * q * ((e == x ? 1.0f : 0.0f) - mixer.share(left[e]));
        __syncwarp();
        if (threadIdx.x % 32 == 0) left[x] = -INF_F;
        __syncwarp();
    }
#endif
}
