// Attention of new tokens over a cache of keys and values: a block attends for each query and chunk of CHUNK keys, taking the new
// tokens' from where they come from, while some of them write those to the caches. HEAD is the width of a head; a lane has PER_LANE
// elements of it at a time, GROUP lanes have all. With more chunks than one the blocks of a query are a cluster of CLUSTER, of
// which the first joins what they found, or, where CLUSTER is 1, join_cache does.

#define THREADS 256
/// Groups of lanes, which have a key each, and a block's keys that are read at the same time.
#define GROUPS (THREADS / GROUP)
#define WARPS (THREADS / 32)
/// Pieces of PER_LANE elements that a lane has of a head.
#define PIECES ((HEAD + GROUP * PER_LANE - 1) / (GROUP * PER_LANE))
/// Keys that a group reads before it uses the first: of heads that it has in one piece, all groups together a chunk of 256.
#define AHEAD (PIECES > 1 ? 2 : 8)
#if CLUSTER > 1
#define CACHE_KERNEL extern "C" __global__ void __cluster_dims__(1, 1, CLUSTER)
#else
#define CACHE_KERNEL KERNEL
#endif

/// Extents: qkv [batch, tokens, (heads + 2 kv_heads) HEAD], caches [batch, room, kv_heads HEAD].
struct Cached {
    int batch, tokens, room, heads, kv_heads;
    float scale;
};

/// The row of the cache that the first new token goes to; one outside is rejected, and the nearest taken.
__device__ __forceinline__ int start_of(const int* start, const Cached& s) { return max(0, min(*start, s.room - s.tokens)); }

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

/// Keys that a block reads at the same time.
#define ROUND (GROUPS * AHEAD)

/// Keys and values that a lane has a part of, of one round.
struct Round {
    Vector<T, PER_LANE> keys[AHEAD][PIECES], values[AHEAD][PIECES];
    /// Those of the rows from `from` to `to` that the round from `row0` on has; key and value of row r are `pitch` elements behind those of
    /// the row before.
    __device__ __forceinline__ void load(const T* k, const T* v, i64 pitch, int row0, int from, int to) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int row = row0 + u * GROUPS + (int)threadIdx.x / GROUP;
            if (from <= row && row < to) EACH_PIECE(i, at) {
                keys[u][i] = load_vector<PER_LANE>(k + row * pitch + at);
                values[u][i] = load_vector<PER_LANE>(v + row * pitch + at);
            }
        }
    }
};

/// What of a block's keys was there before the run: where EARLY no kernel of the run writes it, nor `start`.
struct Fetched {
    int before;
    /// The first key of the chunk, and where its visible ones end.
    int first, end;
    /// This head's rows of the caches, one every `width` elements.
    T *k, *v;
    Round round;
    __device__ __forceinline__ void load(const int* start, T* k_cache, T* v_cache, const Cached& s) {
        int b = blockIdx.y / s.tokens, t = blockIdx.y % s.tokens, g = blockIdx.x / (s.heads / s.kv_heads), width = s.kv_heads * HEAD;
        i64 head = (i64)b * s.room * width + (i64)g * HEAD;
        k = k_cache + head, v = v_cache + head;
        before = start_of(start, s), first = (int)blockIdx.z * CHUNK, end = min(before + t + 1, first + CHUNK);
        round.load(k, v, width, first, first, min(before, end));
    }
};

/// Grid: heads, tokens of the batch, chunks of CHUNK keys. The keys of a chunk are dealt out to the groups of lanes, whose results
/// are joined in order. A single chunk gives the result, else each gives its part; those behind the last visible key give none.
CACHE_KERNEL attend_cache(const T* qkv, const int* start, T* k_cache, T* v_cache, Part* parts, T* out, Cached s, Fault* fault, int step) {
    Fetched fetched;
    if (EARLY) fetched.load(start, k_cache, v_cache, s);
    begin();
    __shared__ float greatest_of[WARPS], sum_of[WARPS], acc_of[WARPS][HEAD];
#if CLUSTER > 1
    __shared__ Part found[CLUSTER];
    cluster_arrive();
#endif
    if (!EARLY) fetched.load(start, k_cache, v_cache, s);
    int h = blockIdx.x, b = blockIdx.y / s.tokens, t = blockIdx.y % s.tokens, g = h / (s.heads / s.kv_heads);
    int group = threadIdx.x / GROUP, width = s.kv_heads * HEAD, pitch = s.heads * HEAD + 2 * width, before = fetched.before;
    int visible = before + t + 1, first = fetched.first, end = fetched.end;
    if (before != *start && h == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) reject(fault, step, *start);
    // In a cluster, whoever ends is waited for no more.
    if (first >= visible) return;
    const T* from = qkv + (i64)blockIdx.y * pitch + h * HEAD;
    // The new tokens' keys as if they did not begin behind the `before` old ones; their values lie behind them.
    const T* fresh = qkv + ((i64)b * s.tokens - before) * pitch + (s.heads + g) * HEAD;
    float query[PIECES][PER_LANE] = {}, acc[PIECES][PER_LANE] = {}, greatest = -INF_F, sum = 0.0f;
    EACH_PIECE(i, at) {
        auto v = load_vector<PER_LANE>(from + at);
        EACH_OF(j) query[i][j] = to_float(v.at[j]);
    }
    Round& round = fetched.round;
    round.load(fresh, fresh + width, pitch, first, before, end);
    // This token's own row, by the first of the heads that share it.
    int own = visible - 1;
    if (h == g * (s.heads / s.kv_heads) && first <= own && own < first + CHUNK)
        for (int at = threadIdx.x * PER_LANE; at < HEAD; at += THREADS * PER_LANE) {
            store_vector<PER_LANE>(fetched.k + (i64)own * width + at, load_vector<PER_LANE>(fresh + (i64)own * pitch + at));
            store_vector<PER_LANE>(fetched.v + (i64)own * width + at, load_vector<PER_LANE>(fresh + (i64)own * pitch + width + at));
        }
    // All groups go as often round, as the lanes of a warp meet in every sum.
    for (int row0 = first;;) {
        float score[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float dot = 0.0f;
            if (row0 + u * GROUPS + group < end) EACH_PIECE(i, at) EACH_OF(j) dot = fmaf(query[i][j], to_float(round.keys[u][i].at[j]), dot);
            score[u] = s.scale * group_sum(dot);
        }
        if (row0 + group < end) {
            float most = greatest;
#pragma unroll
            for (int u = 0; u < AHEAD; u++)
                if (row0 + u * GROUPS + group < end) most = max_nan(most, score[u]);
            float shrink = expf(greatest - most);
            sum *= shrink, greatest = most;
            EACH_PIECE(i, at) EACH_OF(j) acc[i][j] *= shrink;
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                if (row0 + u * GROUPS + group >= end) continue;
                float weight = expf(score[u] - most);
                sum += weight;
                EACH_PIECE(i, at) EACH_OF(j) acc[i][j] = fmaf(weight, to_float(round.values[u][i].at[j]), acc[i][j]);
            }
        }
        row0 += ROUND;
        if (row0 >= end) break;
        round.load(fetched.k, fetched.v, width, row0, row0, min(before, end));
        round.load(fresh, fresh + width, pitch, row0, before, end);
    }
    // The groups of a warp join first, then the warps; who has no keys adds nothing.
    float most = greatest;
#pragma unroll
    for (int step = GROUP; step < 32; step <<= 1) most = max_nan(most, __shfl_xor_sync(WHOLE_WARP, most, step));
    float share = sum == 0.0f ? 0.0f : expf(greatest - most);
    sum *= share;
    EACH_PIECE(i, at) EACH_OF(j) acc[i][j] *= share;
#pragma unroll
    for (int step = GROUP; step < 32; step <<= 1) {
        sum += __shfl_xor_sync(WHOLE_WARP, sum, step);
#pragma unroll
        for (int i = 0; i < PIECES; i++) EACH_OF(j) acc[i][j] += __shfl_xor_sync(WHOLE_WARP, acc[i][j], step);
    }
    int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) greatest_of[warp] = most, sum_of[warp] = sum;
    if (threadIdx.x % 32 < GROUP) EACH_PIECE(i, at) EACH_OF(j) acc_of[warp][at + j] = acc[i][j];
    __syncthreads();
    float weight_of[WARPS], total = 0.0f;
    most = -INF_F;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = max_nan(most, greatest_of[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        weight_of[w] = sum_of[w] == 0.0f ? 0.0f : expf(greatest_of[w] - most);
        total += weight_of[w] * sum_of[w];
    }
    i64 place = (i64)blockIdx.y * s.heads + h;
#if CLUSTER > 1
    // Behind this wait every block of the cluster was there. The first needs no other for keys that are all its own.
    bool alone = visible <= CHUNK;
    if (!alone) cluster_wait();
    Part* part = &found[blockIdx.z];
    auto give = [&](float* to, float x) { give_number(to, 0, x); };
#else
    Part* part = gridDim.z > 1 ? parts + place * gridDim.z + blockIdx.z : 0;
    auto give = [&](float* to, float x) { *to = x; };
    bool alone = !part;
#endif
    if (!alone && threadIdx.x == 0) give(&part->greatest, most), give(&part->sum, total);
    for (int c = threadIdx.x; c < HEAD; c += THREADS) {
        float mixed = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) mixed += weight_of[w] * acc_of[w][c];
        if (alone) out[place * HEAD + c] = from_float<T>(mixed / total);
        else give(&part->mixed[c], mixed);
    }
#if CLUSTER > 1
    if (alone) return;
    cluster_arrive();
    if (blockIdx.z > 0) return;
    cluster_wait();
    // As join_cache; parts behind the last visible key weigh nothing.
    float weight[CLUSTER], joined = 0.0f;
    most = -INF_F;
#pragma unroll
    for (int i = 0; i < CLUSTER; i++)
        if (i * CHUNK < visible) most = max_nan(most, found[i].greatest);
#pragma unroll
    for (int i = 0; i < CLUSTER; i++) {
        weight[i] = i * CHUNK < visible ? expf(found[i].greatest - most) : 0.0f;
        joined += i * CHUNK < visible ? weight[i] * found[i].sum : 0.0f;
    }
    for (int c = threadIdx.x; c < HEAD; c += THREADS) {
        float mixed = 0.0f;
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) mixed += i * CHUNK < visible ? weight[i] * found[i].mixed[c] : 0.0f;
        out[place * HEAD + c] = from_float<T>(mixed / joined);
    }
#endif
}

/// Joins the parts of `chunks` chunks in order. Grid: heads, tokens of the batch.
KERNEL join_cache(const Part* parts, const int* start, T* out, Cached s, int chunks) {
    begin();
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
