// Attention of new tokens over a cache of keys and values: the new rows are written first, then a block attends for each
// query and chunk of CHUNK keys. HEAD is the width of a head; a lane has PER_LANE elements of it at a time, GROUP lanes have all.

#define THREADS 128
/// Groups of lanes, which have a key each, and a block's keys that are read at the same time.
#define GROUPS (THREADS / GROUP)
/// Pieces of PER_LANE elements that a lane has of a head.
#define PIECES ((HEAD + GROUP * PER_LANE - 1) / (GROUP * PER_LANE))
/// Keys that a group reads before it uses the first.
#define AHEAD (PIECES > 1 ? 2 : 4)

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
    for (int i = threadIdx.x * PER_LANE; i < width; i += THREADS * PER_LANE) {
        store_vector<PER_LANE>(k_cache + to + i, load_vector<PER_LANE>(from + i));
        store_vector<PER_LANE>(v_cache + to + i, load_vector<PER_LANE>(from + width + i));
    }
}

/// What the keys of one chunk give a query: the greatest score, and relative to it the sum of weights and of weighted values.
struct Part {
    float greatest, sum, mixed[HEAD];
};

/// Walks what a lane has of a head: its i-th piece is the PER_LANE elements from `at` on.
#define EACH_PIECE(i, at)                                                                                              \
    _Pragma("unroll") for (int i = 0; i < PIECES; i++) if (int at = (i * GROUP + (int)threadIdx.x % GROUP) * PER_LANE; at < HEAD)

/// The sum over the lanes of a group.
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int step = GROUP / 2; step > 0; step >>= 1) x += __shfl_xor_sync(WHOLE_WARP, x, step);
    return x;
}

/// Grid: heads, tokens of the batch, chunks of CHUNK keys. The keys of a chunk are dealt out to the groups of lanes, whose results
/// are joined in order. A single chunk gives the result, else each gives its part; those behind the last visible key give none.
KERNEL attend_cache(const T* qkv, const int* start, const T* k_cache, const T* v_cache, Part* parts, T* out, Cached s) {
    __shared__ float greatest_of[GROUPS], sum_of[GROUPS], acc_of[GROUPS][HEAD];
    int h = blockIdx.x, b = blockIdx.y / s.tokens, t = blockIdx.y % s.tokens, g = h / (s.heads / s.kv_heads);
    int group = threadIdx.x / GROUP, width = s.kv_heads * HEAD;
    int visible = start_of(start, s) + t + 1, first = (int)blockIdx.z * CHUNK, end = min(visible, first + CHUNK);
    if (first >= visible) return;
    const T* from = qkv + ((i64)blockIdx.y * (s.heads + 2 * s.kv_heads) + h) * HEAD;
    i64 caches = (i64)b * s.room * width + (i64)g * HEAD;
    float query[PIECES][PER_LANE] = {}, acc[PIECES][PER_LANE] = {}, greatest = -INF_F, sum = 0.0f;
    EACH_PIECE(i, at) {
        auto v = load_vector<PER_LANE>(from + at);
        EACH_OF(j) query[i][j] = to_float(v.at[j]);
    }
    // All groups go as often round, as the lanes of a warp meet in every sum.
    for (int row0 = first; row0 < end; row0 += GROUPS * AHEAD) {
        Vector<T, PER_LANE> keys[AHEAD][PIECES], values[AHEAD][PIECES];
        float score[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int row = row0 + u * GROUPS + group;
            if (row < end) EACH_PIECE(i, at) {
                keys[u][i] = load_vector<PER_LANE>(k_cache + caches + (i64)row * width + at);
                values[u][i] = load_vector<PER_LANE>(v_cache + caches + (i64)row * width + at);
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float dot = 0.0f;
            if (row0 + u * GROUPS + group < end) EACH_PIECE(i, at) EACH_OF(j) dot = fmaf(query[i][j], to_float(keys[u][i].at[j]), dot);
            score[u] = s.scale * group_sum(dot);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (row0 + u * GROUPS + group >= end) continue;
            float most = max_nan(greatest, score[u]), shrink = expf(greatest - most), weight = expf(score[u] - most);
            sum = sum * shrink + weight;
            greatest = most;
            EACH_PIECE(i, at) EACH_OF(j) acc[i][j] = acc[i][j] * shrink + weight * to_float(values[u][i].at[j]);
        }
    }
    if (threadIdx.x % GROUP == 0) greatest_of[group] = greatest, sum_of[group] = sum;
    EACH_PIECE(i, at) EACH_OF(j) acc_of[group][at + j] = acc[i][j];
    __syncthreads();
    float most = -INF_F, total = 0.0f;
    for (int w = 0; w < GROUPS; w++) most = max_nan(most, greatest_of[w]);
    // A group without keys adds nothing.
    auto share = [&](int w) { return sum_of[w] == 0.0f ? 0.0f : expf(greatest_of[w] - most); };
    for (int w = 0; w < GROUPS; w++) total += share(w) * sum_of[w];
    i64 place = (i64)blockIdx.y * s.heads + h;
    Part* part = gridDim.z > 1 ? parts + place * gridDim.z + blockIdx.z : 0;
    if (part && threadIdx.x == 0) part->greatest = most, part->sum = total;
    for (int c = threadIdx.x; c < HEAD; c += THREADS) {
        float mixed = 0.0f;
        for (int w = 0; w < GROUPS; w++) mixed += share(w) * acc_of[w][c];
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
