// The gradient of attention of 16-bit floats on the tensor cores. The weights are computed again, once in a walk over the keys
// for the gradient of the queries, once in a walk over the queries for those of keys and values: each sum is one block's own, in
// one order. Weights and their gradients are rounded to T before the second product.
//
// In both walks a block owns OWN rows, a warp 16 of them, and meets the others in blocks of OTHERS, the next one on its way
// while one is computed. HELD: the own rows stay in registers, else they are read from shared memory each time.

#define OWN (16 * WARPS)

/// delta [batch, heads, tokens] = dout . out; SEGMENTS lanes for each.
KERNEL attention_delta(const T* out, const T* dout, float* delta, Heads s) {
    begin();
    i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) / SEGMENTS, rows = (i64)s.batch * s.tokens * s.heads;
    int segment = threadIdx.x % SEGMENTS;
    float sum = 0.0f;
    if (i < rows) {
        uint4 x = *(const uint4*)(out + i * HEAD + 8 * segment), y = *(const uint4*)(dout + i * HEAD + 8 * segment);
        u32 a[4] = {x.x, x.y, x.z, x.w}, d[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            T own, other;
            own.bits = (u16)(a[j / 2] >> (16 * (j % 2))), other.bits = (u16)(d[j / 2] >> (16 * (j % 2)));
            sum = fmaf(to_float(own), to_float(other), sum);
        }
    }
#pragma unroll
    for (int step = SEGMENTS / 2; step > 0; step >>= 1) sum += __shfl_xor_sync(WHOLE_WARP, sum, step);
    int h = (int)(i % s.heads), t = (int)(i / s.heads % s.tokens), b = (int)(i / s.heads / s.tokens);
    if (i < rows && segment == 0) delta[s.row(b, h) + t] = sum;
}

/// Writes a warp's 16 rows, times `factor`, of which those before `rows` exist.
__device__ __forceinline__ void store(T* to, i64 pitch, int first, int rows, const float (&sums)[SEGMENTS][4], float factor) {
    int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + group + 8 * half;
        if (row >= rows) continue;
        u32* at = (u32*)(to + row * pitch);
#pragma unroll
        for (int c = 0; c < SEGMENTS; c++)
            at[4 * c + pair] = pack(factor * sums[c][2 * half], factor * sums[c][2 * half + 1], T());
    }
}

/// One block of rows `from..from + OWN` of one head. With OF_KEYS these are keys and values of kv head `head` and the others
/// queries, of all heads that share them, with their dout; without, queries and dout of `head`, and the others keys and values.
template <bool OF_KEYS>
__device__ __forceinline__ void grads(const T* qkv, const float* lse, const T* dout, const float* delta, T* dqkv, const Heads& s,
                                      int from, int head, int b) {
    __shared__ Tile<OWN> own_x, own_y;
    __shared__ Tile<OTHERS> x_tile[2], y_tile[2];
    int shared = s.heads / s.kv_heads, g = OF_KEYS ? head : head / shared;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
    int first = from + 16 * warp;
    // Queries before a block see none of its keys, nor do those of a block see keys behind it.
    int begin = OF_KEYS && s.causal ? from : 0;
    int end = !OF_KEYS && s.causal ? min(from + OWN, s.tokens) : s.tokens;
    int h = OF_KEYS ? head * shared : head, last_head = OF_KEYS ? h + shared - 1 : h;
    auto fetch = [&](int stage, int h, int at) {
        load(x_tile[stage], qkv + (OF_KEYS ? s.query(b, h) : s.key(b, g)), s.pitch(), at, s.tokens);
        if (OF_KEYS) load(y_tile[stage], dout + s.result(b, h), s.result_pitch(), at, s.tokens);
        else load(y_tile[stage], qkv + s.value(b, g), s.pitch(), at, s.tokens);
        copies_end();
    };
    load(own_x, qkv + (OF_KEYS ? s.key(b, g) : s.query(b, h)), s.pitch(), from, s.tokens);
    if (OF_KEYS) load(own_y, qkv + s.value(b, g), s.pitch(), from, s.tokens);
    else load(own_y, dout + s.result(b, h), s.result_pitch(), from, s.tokens);
    fetch(0, h, begin);
    float factor = s.scale * LOG2_E;
    // Of the queries: where they are the own rows, those of this lane's two.
    float exponent[2] = {}, drop[2] = {};
    if (!OF_KEYS) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = first + group + 8 * half;
            if (query < s.tokens) exponent[half] = LOG2_E * lse[s.row(b, h) + query], drop[half] = delta[s.row(b, h) + query];
        }
    }
    u32 x[HELD ? STEPS : 1][4], y[HELD ? STEPS : 1][4];
    float of_x[SEGMENTS][4] = {}, of_y[SEGMENTS][4] = {};
    bool begun = false;
    for (int at = begin, stage = 0; h <= last_head; stage ^= 1) {
        copies_wait();
        // All of this block is there, and nobody reads the last one any more.
        __syncthreads();
        if (HELD && !begun) {
#pragma unroll
            for (int c = 0; c < STEPS; c++) rows_of(x[HELD ? c : 0], own_x, 16 * warp, c), rows_of(y[HELD ? c : 0], own_y, 16 * warp, c);
        }
        begun = true;
        int other0 = at, of_head = h;
        at += OTHERS;
        if (at >= end) at = begin, h++;
        if (h <= last_head) fetch(stage ^ 1, h, at);
        if (s.causal && (OF_KEYS ? other0 + OTHERS - 1 < first : other0 > first + 15)) continue;
        float exponents[OTHERS / 8][2], drops[OTHERS / 8][2];
        if (OF_KEYS) {
#pragma unroll
            for (int j = 0; j < OTHERS / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int query = other0 + 8 * j + 2 * pair + i;
                    i64 row = s.row(b, of_head) + query;
                    exponents[j][i] = query < s.tokens ? LOG2_E * lse[row] : 0.0f;
                    drops[j][i] = query < s.tokens ? delta[row] : 0.0f;
                }
        }
        float weight[OTHERS / 8][4] = {}, slope[OTHERS / 8][4] = {};
#pragma unroll
        for (int c = 0; c < STEPS; c++) {
            if (!HELD) rows_of(x[0], own_x, 16 * warp, c), rows_of(y[0], own_y, 16 * warp, c);
            int held = HELD ? c : 0;
#pragma unroll
            for (int j = 0; j < OTHERS / 8; j += 2) {
                u32 other[2][2];
                across(other, x_tile[stage], 8 * j, c);
                mma(weight[j], x[held], other[0], T()), mma(weight[j + 1], x[held], other[1], T());
                across(other, y_tile[stage], 8 * j, c);
                mma(slope[j], y[held], other[0], T()), mma(slope[j + 1], y[held], other[1], T());
            }
        }
        bool edge = other0 + OTHERS > s.tokens || first + 16 > s.tokens ||
                    (s.causal && (OF_KEYS ? first + 15 > other0 : other0 + OTHERS - 1 > first));
#pragma unroll
        for (int j = 0; j < OTHERS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float w = exp2_fast(fmaf(factor, weight[j][i], -(OF_KEYS ? exponents[j][i % 2] : exponent[i / 2])));
                float d = w * (slope[j][i] - (OF_KEYS ? drops[j][i % 2] : drop[i / 2]));
                if (edge) {
                    int own = first + group + i / 2 * 8, other = other0 + 8 * j + 2 * pair + i % 2;
                    int key = OF_KEYS ? own : other, query = OF_KEYS ? other : own;
                    if (key >= s.tokens || query >= s.tokens || (s.causal && key > query)) w = d = 0.0f;
                }
                weight[j][i] = w, slope[j][i] = d;
            }
#pragma unroll
        for (int j = 0; j < OTHERS / 8; j += 2) {
            u32 p[4], ds[4], other[2][2];
            from_sums(ds, slope[j], slope[j + 1]);
            if (OF_KEYS) from_sums(p, weight[j], weight[j + 1]);
#pragma unroll
            for (int c = 0; c < STEPS; c++) {
                along(other, x_tile[stage], 8 * j, c);
                mma(of_x[2 * c], ds, other[0], T()), mma(of_x[2 * c + 1], ds, other[1], T());
                if (OF_KEYS) {
                    along(other, y_tile[stage], 8 * j, c);
                    mma(of_y[2 * c], p, other[0], T()), mma(of_y[2 * c + 1], p, other[1], T());
                }
            }
        }
    }
    store(dqkv + (OF_KEYS ? s.key(b, g) : s.query(b, head)), s.pitch(), first, s.tokens, of_x, s.scale);
    if (OF_KEYS) store(dqkv + s.value(b, g), s.pitch(), first, s.tokens, of_y, 1.0f);
}

/// The gradient of the queries. Grid: blocks of queries, heads, batch.
KERNEL attention_grad_query(const T* qkv, const float* lse, const T* dout, const float* delta, T* dqkv, Heads s) {
    begin();
    // The last queries have the most keys to see: they start first.
    int block = (int)(s.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    grads<false>(qkv, lse, dout, delta, dqkv, s, block * OWN, blockIdx.y, blockIdx.z);
}

/// The gradients of keys and values, summed over the query heads that share them. Grid: blocks of keys, kv heads, batch.
KERNEL attention_grad_key(const T* qkv, const float* lse, const T* dout, const float* delta, T* dqkv, Heads s) {
    begin();
    grads<true>(qkv, lse, dout, delta, dqkv, s, (int)blockIdx.x * OWN, blockIdx.y, blockIdx.z);
}
