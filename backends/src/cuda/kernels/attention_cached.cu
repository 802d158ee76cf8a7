// Attention of new tokens over a cache of keys and values: the new rows are written first, then a block attends for each
// query and chunk of CHUNK keys. HEAD is the width of a head.

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

/// What the keys of one chunk give a query: the greatest score, and relative to it the sum of weights and of weighted values.
struct Part {
    float greatest, sum, mixed[HEAD];
};

/// Grid: heads, tokens of the batch, chunks of CHUNK keys. The keys of a chunk are dealt out to the warps, whose results are
/// joined in order. A single chunk gives the result, else each gives its part; those behind the last visible key give none.
KERNEL attend_cache(const T* qkv, const int* start, const T* k_cache, const T* v_cache, Part* parts, T* out, Cached s) {
    __shared__ float query[HEAD];
    __shared__ float greatest_of[WARPS], sum_of[WARPS], acc_of[WARPS][HEAD];
    int h = blockIdx.x, b = blockIdx.y / s.tokens, t = blockIdx.y % s.tokens, g = h / (s.heads / s.kv_heads);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = s.kv_heads * HEAD;
    int visible = start_of(start, s) + t + 1, first = (int)blockIdx.z * CHUNK, end = min(visible, first + CHUNK);
    if (first >= visible) return;
    const T* from = qkv + ((i64)blockIdx.y * (s.heads + 2 * s.kv_heads) + h) * HEAD;
    for (int c = threadIdx.x; c < HEAD; c += THREADS) query[c] = to_float(from[c]);
    __syncthreads();
    float greatest = -INF_F, sum = 0.0f, acc[COLUMNS] = {};
    for (int row = first + warp; row < end; row += WARPS) {
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
    i64 place = (i64)blockIdx.y * s.heads + h;
    Part* part = gridDim.z > 1 ? parts + place * gridDim.z + blockIdx.z : 0;
    if (part && threadIdx.x == 0) part->greatest = most, part->sum = total;
    for (int c = threadIdx.x; c < HEAD; c += THREADS) {
        float mixed = 0.0f;
        for (int w = 0; w < WARPS; w++) mixed += share[w] * acc_of[w][c];
        if (part) part->mixed[c] = mixed;
        else out[place * HEAD + c] = from_float<T>(mixed / total);
    }
}

/// Joins the parts of `chunks` chunks in order. Grid: heads, tokens of the batch.
KERNEL join_cache(const Part* parts, const int* start, T* out, Cached s, int chunks) {
    int t = blockIdx.y % s.tokens, used = ceil_div(start_of(start, s) + t + 1, CHUNK);
    i64 place = (i64)blockIdx.y * s.heads + blockIdx.x;
    const Part* mine = parts + place * chunks;
    float most = -INF_F, total = 0.0f;
    for (int i = 0; i < used; i++) most = max_nan(most, mine[i].greatest);
    for (int i = 0; i < used; i++) total += expf(mine[i].greatest - most) * mine[i].sum;
    for (int c = threadIdx.x; c < HEAD; c += THREADS) {
        float mixed = 0.0f;
        for (int i = 0; i < used; i++) mixed += expf(mine[i].greatest - most) * mine[i].mixed[c];
        out[place * HEAD + c] = from_float<T>(mixed / total);
    }
}
