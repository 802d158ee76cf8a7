// Attention of 16-bit floats on the tensor cores (Dao, arXiv 2307.08691): a block takes QUERIES queries of one head, a warp
// 16 TALL of them with their scores and results in registers, and walks over the keys in blocks of KEYS. The next block of keys
// and values is on its way while one is computed. Scores, softmax and sums are f32; the weights are rounded to T before they
// meet the values.

#define QUERIES (16 * TALL * WARPS)

/// Grid: blocks of queries, heads, batch.
KERNEL attention_mma(const T* qkv, T* out, float* lse, Heads s) {
    begin();
    __shared__ Tile<QUERIES> q_tile;
    __shared__ Tile<KEYS> k_tile[2], v_tile[2];
    int h = blockIdx.y, b = blockIdx.z, g = h / (s.heads / s.kv_heads);
    // The last queries have the most keys to see: they start first.
    int from = (int)(s.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * QUERIES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
    int first = from + warp * 16 * TALL;
    int end = s.causal ? min(from + QUERIES, s.tokens) : s.tokens;
    const T *keys = qkv + s.key(b, g), *values = qkv + s.value(b, g);
    load(q_tile, qkv + s.query(b, h), s.pitch(), from, s.tokens);
    load(k_tile[0], keys, s.pitch(), 0, s.tokens);
    load(v_tile[0], values, s.pitch(), 0, s.tokens);
    copies_end();
    // Exponents to the base 2: the chip has no other.
    float factor = s.scale * LOG2_E;
    u32 q[TALL][STEPS][4];
    float acc[TALL][SEGMENTS][4] = {}, greatest[TALL][2], sum[TALL][2] = {};
#pragma unroll
    for (int t = 0; t < TALL; t++) greatest[t][0] = greatest[t][1] = -INF_F;
    for (int key0 = 0, stage = 0; key0 < end; key0 += KEYS, stage ^= 1) {
        copies_wait();
        // All of this block is there, and nobody reads the last one any more.
        __syncthreads();
        if (key0 == 0) {
#pragma unroll
            for (int t = 0; t < TALL; t++)
#pragma unroll
                for (int c = 0; c < STEPS; c++) rows_of(q[t][c], q_tile, 16 * (warp * TALL + t), c);
        }
        if (key0 + KEYS < end) {
            load(k_tile[stage ^ 1], keys, s.pitch(), key0 + KEYS, s.tokens);
            load(v_tile[stage ^ 1], values, s.pitch(), key0 + KEYS, s.tokens);
            copies_end();
        }
        if (s.causal && key0 > first + 16 * TALL - 1) continue;
        float score[TALL][KEYS / 8][4] = {};
#pragma unroll
        for (int c = 0; c < STEPS; c++)
#pragma unroll
            for (int j = 0; j < KEYS / 8; j += 2) {
                u32 k[2][2];
                across(k, k_tile[stage], 8 * j, c);
#pragma unroll
                for (int t = 0; t < TALL; t++) mma(score[t][j], q[t][c], k[0], T()), mma(score[t][j + 1], q[t][c], k[1], T());
            }
        // Of other blocks every warp sees all.
        bool edge = key0 + KEYS > s.tokens || (s.causal && key0 + KEYS - 1 > first);
#pragma unroll
        for (int t = 0; t < TALL; t++) {
            float most[2] = {greatest[t][0], greatest[t][1]};
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float x = factor * score[t][j][i];
                    if (edge) {
                        int key = key0 + 8 * j + 2 * pair + i % 2, query = first + 16 * t + group + i / 2 * 8;
                        if (key >= s.tokens || (s.causal && key > query)) x = -INF_F;
                    }
                    score[t][j][i] = x;
                    most[i / 2] = fmaxf(most[i / 2], x);
                }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                most[half] = quad_max(most[half]);
                // Where nothing is visible yet all weights are 0, not those of a difference of infinities.
                float base = most[half] == -INF_F ? 0.0f : most[half];
                float shrink = exp2_fast(greatest[t][half] - base), total = 0.0f;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        score[t][j][i] = exp2_fast(score[t][j][i] - base);
                        total += score[t][j][i];
                    }
                greatest[t][half] = most[half];
                sum[t][half] = sum[t][half] * shrink + total;
#pragma unroll
                for (int c = 0; c < SEGMENTS; c++) acc[t][c][2 * half] *= shrink, acc[t][c][2 * half + 1] *= shrink;
            }
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; j += 2) {
            u32 p[TALL][4];
#pragma unroll
            for (int t = 0; t < TALL; t++) from_sums(p[t], score[t][j], score[t][j + 1]);
#pragma unroll
            for (int c = 0; c < STEPS; c++) {
                u32 v[2][2];
                along(v, v_tile[stage], 8 * j, c);
#pragma unroll
                for (int t = 0; t < TALL; t++) mma(acc[t][2 * c], p[t], v[0], T()), mma(acc[t][2 * c + 1], p[t], v[1], T());
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = first + 16 * t + group + 8 * half;
            float total = quad_sum(sum[t][half]), share = 1.0f / total;
            if (query >= s.tokens) continue;
            u32* to = (u32*)(out + s.result(b, h) + query * s.result_pitch());
#pragma unroll
            for (int c = 0; c < SEGMENTS; c++)
                to[4 * c + pair] = pack(acc[t][c][2 * half] * share, acc[t][c][2 * half + 1] * share, T());
            if (pair == 0) lse[s.row(b, h) + query] = LN_2 * greatest[t][half] + logf(total);
        }
}
