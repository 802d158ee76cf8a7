// What routing knows of one token; a warp works on it, with the experts spread over the lanes: expert e belongs to lane e % 32.
//
// EXPERTS and K are the extents. SCORE: 0 softmax, 1 sigmoid, 2 square root of softplus, 3 identity, 4 SparseMixer, the last
// with JITTER, twice its epsilon.

#define NORMALISED (SCORE == 1 || SCORE == 2)

/// Walks the experts of this lane.
#define EACH_EXPERT(e) for (int e = threadIdx.x % 32; e < EXPERTS; e += 32)

__device__ __forceinline__ float sigmoid(float x) {
    float e = expf(-fabsf(x)), large = 1.0f / (1.0f + e);
    return x < 0.0f ? e * large : large;
}

/// The score value of one expert by itself; of the others the logit.
__device__ __forceinline__ float own_value(float logit) {
    if (SCORE == 1) return sigmoid(logit);
    if (SCORE == 2) return sqrtf(fmaxf(logit, 0.0f) + log1pf(expf(-fabsf(logit))));
    return logit;
}

/// Its derivative.
__device__ __forceinline__ float own_slope(float logit, float value) {
    if (SCORE == 1) return value * sigmoid(-logit);
    if (SCORE == 2) return value > 0.0f ? sigmoid(logit) / (2.0f * value) : 0.0f;
    return 1.0f;
}

/// The softmax of a row: e^(l - greatest) / total.
struct Row {
    float greatest, total;
    /// No NaN, and the largest logit is finite.
    __device__ __forceinline__ bool finite() const { return total == total; }
    __device__ __forceinline__ float lse() const { return greatest + logf(total); }
    __device__ __forceinline__ float softmax(float logit) const { return expf(logit - greatest) / total; }
};

__device__ __forceinline__ Row row_of(const float* logits) {
    Row row;
    row.greatest = -INF_F;
    EACH_EXPERT(e) row.greatest = max_nan(row.greatest, logits[e]);
    row.greatest = warp_max(row.greatest);
    float total = 0.0f;
    EACH_EXPERT(e) total += expf(logits[e] - row.greatest);
    row.total = warp_sum(total);
    return row;
}

/// SparseMixer's softmax over the logits that are left (taken ones are -inf): the best of them and the sum of the weights.
struct Mixer {
    float best, sum;
    __device__ __forceinline__ float weight(float left) const {
#if SCORE == 4
        bool near = left > -INF_F && best - left <= JITTER * fmaxf(best, fabsf(left));
        return near ? expf(left - best) : 0.0f;
#else
        return 0.0f;
#endif
    }
    __device__ __forceinline__ float share(float left) const { return sum > 0.0f ? weight(left) / sum : 0.0f; }
};

__device__ __forceinline__ Mixer mixer_of(const float* left) {
    Mixer mixer;
    mixer.best = -INF_F, mixer.sum = 0.0f;
    EACH_EXPERT(e) mixer.best = max_nan(mixer.best, left[e]);
    mixer.best = warp_max(mixer.best);
    if (mixer.best == -INF_F) return mixer;
    float sum = 0.0f;
    EACH_EXPERT(e) sum += mixer.weight(left[e]);
    mixer.sum = warp_sum(sum);
    return mixer;
}
