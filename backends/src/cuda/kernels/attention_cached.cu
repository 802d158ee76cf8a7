// Attention of new tokens over a cache of keys and values: the new rows are written first, then a block attends for each
// query. HEAD is the width of a head.

#define THREADS 128
#define WARPS (THREADS / 32)
#define COLUMNS ((HEAD + 31) / 32)

/// Extents: qkv [batch, tokens, (heads + 2 kv_heads) HEAD], caches [batch, room, kv_heads HEAD].
struct Cached {
    int batch, tokens, room, heads, kv_heads;
    float scale;
};

/// The row of the cache that the first new token goes to; one outside is rejected, and the nearest taken.
__device__ __forceinline__ int start_of(const int* start, const Cached& s) { return max(0, min(*start, s.room - s.tokens)); }

/// The new keys and values to their rows of the caches: a block for each token of the batch.
KERNEL cache_rows(const T* qkv, const int* start, T* k_cache, T* v_cache, Cached s, Fault* fault, int step) {
    int b = blockIdx.x / s.tokens, t = blockIdx.x % s.tokens, width = s.kv_heads * HEAD;
    int at = start_of(start, s);
    if (at != *start && blockIdx.x == 0 && threadIdx.x == 0) reject(fault, step, *start);
    const T* from = qkv + ((i64)blockIdx.x * (s.heads + 2 * s.kv_heads) + s.heads) * HEAD;
    i64 to = ((i64)b * s.room + at + t) * width;
    for (int i = threadIdx.x; i < width; i += THREADS) k_cache[to + i] = from[i], v_cache[to + i] = from[width + i];
}

/// Grid: heads, tokens of the batch. The keys are dealt out to the warps, whose results are joined in order.
KERNEL attend_cache(const T* qkv, const int* start, const T* k_cache, const T* v_cache, T* out, Cached s) {
    __shared__ float query[HEAD];
    __shared__ float greatest_of[WARPS], sum_of[WARPS], acc_of[WARPS][HEAD];
    int h = blockIdx.x, b = blockIdx.y / s.tokens, t = blockIdx.y % s.tokens, g = h / (s.heads / s.kv_heads);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = s.kv_heads * HEAD;
    const T* from = qkv + ((i64)blockIdx.y * (s.heads + 2 * s.kv_heads) + h) * HEAD;
    for (int c = threadIdx.x; c < HEAD; c += THREADS) query[c] = to_float(from[c]);
    __syncthreads();
    int visible = start_of(start, s) + t + 1;
    float greatest = -INF_F, sum = 0.0f, acc[COLUMNS] = {};
    for (int row = warp; row < visible; row += WARPS) {
        i64 at = ((i64)b * s.room + row) * width + (i64)g * HEAD;
        float score = 0.0f;
        for (int c = lane; c < HEAD; c += 32) score = fmaf(query[c], to_float(k_cache[at + c]), score);
        score = s.scale * warp_sum(score);
        float most = max_nan(greatest, score), shrink = expf(greatest - most), weight = expf(score - most);
        sum = sum * shrink + weight;
        greatest = most;
        for (int i = 0; i < COLUMNS; i++) {
            int c = lane + 32 * i;
            if (c < HEAD) acc[i] = acc[i] * shrink + weight * to_float(v_cache[at + c]);
        }
    }
    if (lane == 0) greatest_of[warp] = greatest, sum_of[warp] = sum;
    for (int i = 0; i < COLUMNS; i++)
        if (lane + 32 * i < HEAD) acc_of[warp][lane + 32 * i] = acc[i];
    __syncthreads();
    float most = -INF_F, total = 0.0f, share[WARPS];
    for (int w = 0; w < WARPS; w++) most = max_nan(most, greatest_of[w]);
    for (int w = 0; w < WARPS; w++) {
        // A warp without keys adds nothing.
        share[w] = sum_of[w] == 0.0f ? 0.0f : expf(greatest_of[w] - most);
        total += share[w] * sum_of[w];
    }
    for (int c = threadIdx.x; c < HEAD; c += THREADS) {
        float mixed = 0.0f;
        for (int w = 0; w < WARPS; w++) mixed += share[w] * acc_of[w][c];
        out[((i64)blockIdx.y * s.heads + h) * HEAD + c] = from_float<T>(mixed / total);
    }
}
