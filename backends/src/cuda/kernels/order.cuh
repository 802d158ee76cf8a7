// Which of an expert's choices come first.

/// Choice c comes before choice d where their priorities are equal. Choice-major: all first choices before all second ones.
__device__ __forceinline__ bool earlier(int c, int d, int n, int k, int choice_major) {
    if (!choice_major) return c < d;
    i64 rank_c = (i64)(c % k) * n + c / k, rank_d = (i64)(d % k) * n + d / k;
    return rank_c < rank_d;
}

/// A NaN comes last.
__device__ __forceinline__ float urgency(const float* priority, int c) {
    float p = priority[c];
    return p != p ? -INF_F : p;
}
