// Attention without ever holding T x T scores (Dao et al., arXiv 2205.14135): a block takes BLOCK queries (or keys) of one
// head and walks over the others in blocks, with the softmax kept up to date on the way. HEAD is the width of a head.
//
// A row of a block belongs to LANES neighbouring threads: thread `part` of them has the keys (queries) part, part + LANES, ..
// and the columns part, part + LANES, .. of the result.

#define THREADS 128
#define LANES (THREADS / BLOCK)
/// One more than HEAD, so that the rows of a block lie in different banks.
#define PITCH (HEAD + 1)
#define COLUMNS ((HEAD + LANES - 1) / LANES)
/// Keys (queries) of one thread; where there are more threads than keys, some have none.
#define OTHERS ((BLOCK + LANES - 1) / LANES)

/// Rows `from..from + BLOCK` of a matrix whose rows are `pitch` apart, 0 beyond the last.
__device__ __forceinline__ void load(float (*to)[PITCH], const T* m, i64 pitch, int from, int rows) {
    for (int i = threadIdx.x; i < BLOCK * HEAD; i += THREADS) {
        int r = i / HEAD, c = i % HEAD;
        to[r][c] = from + r < rows ? to_float(m[(from + r) * pitch + c]) : 0.0f;
    }
}

__device__ __forceinline__ float dot(const float* a, const float* b) {
    float sum = 0.0f;
#pragma unroll 8
    for (int c = 0; c < HEAD; c++) sum = fmaf(a[c], b[c], sum);
    return sum;
}

/// Sum, or maximum, over the LANES threads of a row.
__device__ __forceinline__ float row_sum(float x) {
    for (int step = LANES / 2; step > 0; step >>= 1) x += __shfl_xor_sync(WHOLE_WARP, x, step);
    return x;
}
__device__ __forceinline__ float row_max(float x) {
    for (int step = LANES / 2; step > 0; step >>= 1) x = max_nan(x, __shfl_xor_sync(WHOLE_WARP, x, step));
    return x;
}

/// Grid: blocks of queries, heads, batch.
KERNEL attention(const T* qkv, T* out, float* lse, Heads s) {
    begin();
    __shared__ float q[BLOCK][PITCH], k[BLOCK][PITCH], v[BLOCK][PITCH], p[BLOCK][BLOCK + 1];
    int h = blockIdx.y, b = blockIdx.z, g = h / (s.heads / s.kv_heads), from = blockIdx.x * BLOCK;
    int r = threadIdx.x / LANES, part = threadIdx.x % LANES, query = from + r;
    load(q, qkv + s.query(b, h), s.pitch(), from, s.tokens);
    float greatest = -INF_F, sum = 0.0f, acc[COLUMNS] = {};
    int end = s.causal ? min(from + BLOCK, s.tokens) : s.tokens;
    for (int key0 = 0; key0 < end; key0 += BLOCK) {
        // Nobody reads the last block's keys and values any more.
        __syncthreads();
        load(k, qkv + s.key(b, g), s.pitch(), key0, s.tokens);
        load(v, qkv + s.value(b, g), s.pitch(), key0, s.tokens);
        __syncthreads();
        float score[OTHERS], most = greatest;
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            int j = part + i * LANES, key = key0 + j;
            bool visible = j < BLOCK && key < s.tokens && (!s.causal || key <= query);
            score[i] = visible ? s.scale * dot(q[r], k[j]) : -INF_F;
            most = max_nan(most, score[i]);
        }
        most = row_max(most);
        // A row of which nothing is visible yet (beyond the last token) stays at -inf.
        float shrink = most == -INF_F ? 1.0f : expf(greatest - most), total = 0.0f;
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            float weight = most == -INF_F ? 0.0f : expf(score[i] - most);
            total += weight;
            if (part + i * LANES < BLOCK) p[r][part + i * LANES] = weight;
        }
        sum = sum * shrink + row_sum(total);
        greatest = most;
        // A row of p is written and read by the threads of one warp.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            int c = part + i * LANES;
            if (c >= HEAD) continue;
            float mixed = 0.0f;
#pragma unroll 4
            for (int j = 0; j < BLOCK; j++) mixed = fmaf(p[r][j], v[j][c], mixed);
            acc[i] = acc[i] * shrink + mixed;
        }
        __syncwarp();
    }
    if (query >= s.tokens) return;
    for (int i = 0; i < COLUMNS; i++) {
        int c = part + i * LANES;
        if (c < HEAD) out[s.result(b, h) + query * s.result_pitch() + c] = from_float<T>(acc[i] / sum);
    }
    if (part == 0) lse[s.row(b, h) + query] = greatest + logf(sum);
}

/// delta [batch, heads, tokens] = dout . out; a warp for each.
KERNEL attention_delta(const T* out, const T* dout, float* delta, Heads s) {
    begin();
    i64 i = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (i >= (i64)s.batch * s.heads * s.tokens) return;
    int t = (int)(i % s.tokens), h = (int)(i / s.tokens % s.heads), b = (int)(i / s.tokens / s.heads);
    i64 at = s.result(b, h) + t * s.result_pitch();
    float sum = 0.0f;
    for (int c = lane; c < HEAD; c += 32) sum += to_float(out[at + c]) * to_float(dout[at + c]);
    sum = warp_sum(sum);
    if (lane == 0) delta[i] = sum;
}

/// The gradient of the queries. Grid: blocks of queries, heads, batch.
KERNEL attention_grad_query(const T* qkv, const float* lse, const T* dout, const float* delta, T* dqkv, Heads s) {
    begin();
    __shared__ float q[BLOCK][PITCH], d[BLOCK][PITCH], k[BLOCK][PITCH], v[BLOCK][PITCH], ds[BLOCK][BLOCK + 1];
    int h = blockIdx.y, b = blockIdx.z, g = h / (s.heads / s.kv_heads), from = blockIdx.x * BLOCK;
    int r = threadIdx.x / LANES, part = threadIdx.x % LANES, query = from + r;
    load(q, qkv + s.query(b, h), s.pitch(), from, s.tokens);
    load(d, dout + s.result(b, h), s.result_pitch(), from, s.tokens);
    bool real = query < s.tokens;
    float my_lse = real ? lse[s.row(b, h) + query] : 0.0f, my_delta = real ? delta[s.row(b, h) + query] : 0.0f;
    float acc[COLUMNS] = {};
    int end = s.causal ? min(from + BLOCK, s.tokens) : s.tokens;
    for (int key0 = 0; key0 < end; key0 += BLOCK) {
        __syncthreads();
        load(k, qkv + s.key(b, g), s.pitch(), key0, s.tokens);
        load(v, qkv + s.value(b, g), s.pitch(), key0, s.tokens);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            int j = part + i * LANES, key = key0 + j;
            if (j >= BLOCK) continue;
            bool visible = real && key < s.tokens && (!s.causal || key <= query);
            float weight = visible ? expf(s.scale * dot(q[r], k[j]) - my_lse) : 0.0f;
            ds[r][j] = visible ? s.scale * weight * (dot(d[r], v[j]) - my_delta) : 0.0f;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            int c = part + i * LANES;
            if (c >= HEAD) continue;
            float mixed = 0.0f;
#pragma unroll 4
            for (int j = 0; j < BLOCK; j++) mixed = fmaf(ds[r][j], k[j][c], mixed);
            acc[i] += mixed;
        }
        __syncwarp();
    }
    if (!real) return;
    for (int i = 0; i < COLUMNS; i++) {
        int c = part + i * LANES;
        if (c < HEAD) dqkv[s.query(b, h) + query * s.pitch() + c] = from_float<T>(acc[i]);
    }
}

/// The gradients of keys and values, summed over the query heads that share them. Grid: blocks of keys, kv heads, batch.
KERNEL attention_grad_key(const T* qkv, const float* lse, const T* dout, const float* delta, T* dqkv, Heads s) {
    begin();
    __shared__ float q[BLOCK][PITCH], d[BLOCK][PITCH], k[BLOCK][PITCH], v[BLOCK][PITCH];
    __shared__ float p[BLOCK][BLOCK + 1], ds[BLOCK][BLOCK + 1];
    int g = blockIdx.y, b = blockIdx.z, from = blockIdx.x * BLOCK, shared = s.heads / s.kv_heads;
    int r = threadIdx.x / LANES, part = threadIdx.x % LANES, key = from + r;
    load(k, qkv + s.key(b, g), s.pitch(), from, s.tokens);
    load(v, qkv + s.value(b, g), s.pitch(), from, s.tokens);
    float of_key[COLUMNS] = {}, of_value[COLUMNS] = {};
    for (int h = g * shared; h < (g + 1) * shared; h++) {
        // Queries before the block see none of its keys.
        for (int query0 = s.causal ? from : 0; query0 < s.tokens; query0 += BLOCK) {
            __syncthreads();
            load(q, qkv + s.query(b, h), s.pitch(), query0, s.tokens);
            load(d, dout + s.result(b, h), s.result_pitch(), query0, s.tokens);
            __syncthreads();
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
                int j = part + i * LANES, query = query0 + j;
                if (j >= BLOCK) continue;
                bool visible = key < s.tokens && query < s.tokens && (!s.causal || key <= query);
                float weight = 0.0f, slope = 0.0f;
                if (visible) {
                    weight = expf(s.scale * dot(q[j], k[r]) - lse[s.row(b, h) + query]);
                    slope = s.scale * weight * (dot(d[j], v[r]) - delta[s.row(b, h) + query]);
                }
                p[r][j] = weight, ds[r][j] = slope;
            }
            __syncwarp();
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
                int c = part + i * LANES;
                if (c >= HEAD) continue;
                float k_part = 0.0f, v_part = 0.0f;
#pragma unroll 4
                for (int j = 0; j < BLOCK; j++) {
                    k_part = fmaf(ds[r][j], q[j][c], k_part);
                    v_part = fmaf(p[r][j], d[j][c], v_part);
                }
                of_key[i] += k_part, of_value[i] += v_part;
            }
            __syncwarp();
        }
    }
    if (key >= s.tokens) return;
    for (int i = 0; i < COLUMNS; i++) {
        int c = part + i * LANES;
        if (c >= HEAD) continue;
        dqkv[s.key(b, g) + key * s.pitch() + c] = from_float<T>(of_key[i]);
        dqkv[s.value(b, g) + key * s.pitch() + c] = from_float<T>(of_value[i]);
    }
}
