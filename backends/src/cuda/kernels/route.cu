// The choice of experts for every token, and the statistics of their load: one kernel for the tokens, one that joins the
// statistics of its blocks in order.
//
// COUNTED choices of a token count in the load-balancing loss. GROUPS (0: none), KEEP and TOP2 describe groups of experts.
// LATER says that noise is for the choices after the first.

#define THREADS (32 * WARPS)
/// Tokens of one block.
#define TOKENS (4 * WARPS)

/// Shared memory of a warp.
struct Desk {
    /// Score values; for SparseMixer the logits left.
    float value[EXPERTS];
    /// Selection values.
    float rank[EXPERTS];
    /// 1: taken, or in a group that is left out.
    u8 closed[EXPERTS];
    /// Sum of p over the warp's tokens.
    float p_sum[EXPERTS];
    float group[GROUPS > 0 ? GROUPS : 1];
};

/// The lowest expert with the largest rank among those that are not closed; the same in every lane.
__device__ __forceinline__ int best_open(const Desk& desk) {
    float best = -INF_F;
    int at = 0x7fffffff;
    EACH_EXPERT(e) {
        float r = desk.rank[e];
        if (!desk.closed[e] && (r > best || (r == best && e < at))) best = r, at = e;
    }
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(WHOLE_WARP, best, step);
        int other_at = __shfl_xor_sync(WHOLE_WARP, at, step);
        if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    return at;
}

/// Fills the selection values: the score values, or logits + noise, plus the bias.
__device__ __forceinline__ void rank_all(Desk& desk, const float* logits, const float* noise, const float* bias) {
    EACH_EXPERT(e) {
        float r = noise ? logits[e] + noise[e] : desk.value[e];
        if (bias) r += bias[e];
        // -0 and 0 are equal, and a NaN comes last.
        desk.rank[e] = r != r ? -INF_F : r + 0.0f;
    }
    __syncwarp();
}

/// Closes every expert outside of the best groups.
__device__ __forceinline__ void close_groups(Desk& desk) {
#if GROUPS > 0
    const int size = EXPERTS / GROUPS;
    for (int g = threadIdx.x % 32; g < GROUPS; g += 32) {
        float first = -INF_F, second = -INF_F;
        for (int e = g * size; e < (g + 1) * size; e++) {
            float r = desk.rank[e];
            second = fmaxf(second, fminf(first, r));
            first = fmaxf(first, r);
        }
        float score = TOP2 ? first + second : first;
        desk.group[g] = score != score ? -INF_F : score + 0.0f;
    }
    __syncwarp();
    EACH_EXPERT(e) {
        int mine = e / size, better = 0;
        for (int g = 0; g < GROUPS; g++)
            better += desk.group[g] > desk.group[mine] || (desk.group[g] == desk.group[mine] && g < mine);
        if (better >= KEEP) desk.closed[e] = 1;
    }
    __syncwarp();
#endif
}

/// Optional operands are null where there are none. partial_p [blocks, EXPERTS], partial_counts [blocks, 2, EXPERTS] (all
/// choices, counted ones), partial_sums [blocks, 2] (lse squared, entropy).
KERNEL route(const float* all_logits, const float* bias, const float* all_noise, const u8* used, const int* given, int n,
             float* gate, int* index, float* partial_p, int* partial_counts, float* partial_sums) {
    begin();
    __shared__ Desk desks[WARPS];
    __shared__ int counts[2][EXPERTS];
    __shared__ float sums[WARPS][2];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Desk& desk = desks[warp];
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) counts[0][e] = counts[1][e] = 0;
    EACH_EXPERT(e) desk.p_sum[e] = 0.0f;
    float z = 0.0f, entropy = 0.0f;
    __syncthreads();

    const int each = TOKENS / WARPS;
    int first = blockIdx.x * TOKENS + warp * each, last = min(first + each, n);
    for (int t = first; t < last; t++) {
        const float* logits = all_logits + (i64)t * EXPERTS;
        const float* noise = all_noise ? all_noise + (i64)t * EXPERTS : 0;
        Row row = row_of(logits);
        bool finite = row.finite();
        float lse = row.lse(), total = 0.0f, h = 0.0f;
        z += lse * lse;
        EACH_EXPERT(e) {
            float v = SCORE == 0 ? row.softmax(logits[e]) : own_value(logits[e]);
            desk.value[e] = finite ? v : NAN_F;
            desk.closed[e] = 0;
            total += v;
        }
        if (NORMALISED) total = warp_sum(total);
        EACH_EXPERT(e) {
            float p = row.softmax(logits[e]);
            if (NORMALISED && finite) p = total < 1.17549435e-38f ? 1.0f / EXPERTS : desk.value[e] / total;
            desk.p_sum[e] += p;
            if (p != 0.0f) h -= p * (NORMALISED ? logf(fmaxf(p, 1.17549435e-38f)) : logits[e] - row.greatest - logf(row.total));
        }
        entropy += warp_sum(h);
        __syncwarp();

        bool chooses = !given && (!used || used[t]) && finite;
        if (chooses) {
            rank_all(desk, logits, LATER ? 0 : noise, bias);
            close_groups(desk);
        }
        for (int j = 0; j < K; j++) {
            int x;
            if (used && !used[t]) {
                x = -1;
            } else if (given) {
                x = given[(i64)t * K + j];
                if (x < 0 || x >= EXPERTS) x = -1;
            } else if (!finite) {
                x = j;
            } else {
                if (LATER && j == 1) rank_all(desk, logits, noise, bias);
                x = best_open(desk);
                __syncwarp();
                if (lane == 0) desk.closed[x] = 1;
                __syncwarp();
            }
            float g = 0.0f;
            if (x >= 0) {
                if (SCORE == 4 && finite) {
                    Mixer mixer = mixer_of(desk.value);
                    g = mixer.share(desk.value[x]);
                    __syncwarp();
                    if (lane == 0) desk.value[x] = -INF_F;
                    __syncwarp();
                } else {
                    g = desk.value[x];
                }
            }
            if (lane == 0) {
                gate[(i64)t * K + j] = g, index[(i64)t * K + j] = x;
                if (x >= 0) {
                    atomicAdd(&counts[0][x], 1);
                    if (j < COUNTED) atomicAdd(&counts[1][x], 1);
                }
            }
        }
        __syncwarp();
    }

    if (lane == 0) sums[warp][0] = z, sums[warp][1] = entropy;
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        float p = 0.0f;
        for (int w = 0; w < WARPS; w++) p += desks[w].p_sum[e];
        partial_p[(i64)blockIdx.x * EXPERTS + e] = p;
        for (int which = 0; which < 2; which++)
            partial_counts[((i64)blockIdx.x * 2 + which) * EXPERTS + e] = counts[which][e];
    }
    if (threadIdx.x < 2) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += sums[w][threadIdx.x];
        partial_sums[blockIdx.x * 2 + threadIdx.x] = sum;
    }
}

#define FINISH_THREADS 1024
/// Threads that share the blocks of one expert.
#define SHARES (EXPERTS >= FINISH_THREADS / 2 ? 1 : FINISH_THREADS / EXPERTS)

/// One block joins what the blocks of `route` found: each share of them in order, then the shares in order.
KERNEL route_finish(const float* partial_p, const int* partial_counts, const float* partial_sums, int blocks, int n,
                    float* balance, float* z, int* counts, float* entropy) {
    begin();
    __shared__ float room[FINISH_THREADS / 32];
    __shared__ float p_of[SHARES][EXPERTS];
    __shared__ int counts_of[SHARES][2][EXPERTS];
    int share = ceil_div(blocks, SHARES);
    for (int i = threadIdx.x; i < SHARES * EXPERTS; i += FINISH_THREADS) {
        int e = i % EXPERTS, from = i / EXPERTS * share, to = min(from + share, blocks), all = 0, counted = 0;
        float p = 0.0f;
#pragma unroll 4
        for (int b = from; b < to; b++) {
            p += partial_p[(i64)b * EXPERTS + e];
            all += partial_counts[((i64)b * 2) * EXPERTS + e];
            counted += partial_counts[((i64)b * 2 + 1) * EXPERTS + e];
        }
        p_of[i / EXPERTS][e] = p, counts_of[i / EXPERTS][0][e] = all, counts_of[i / EXPERTS][1][e] = counted;
    }
    float z_sum = 0.0f, entropy_sum = 0.0f;
    for (int b = threadIdx.x; b < blocks; b += FINISH_THREADS) z_sum += partial_sums[b * 2], entropy_sum += partial_sums[b * 2 + 1];
    z_sum = block_sum<FINISH_THREADS>(z_sum, room);
    entropy_sum = block_sum<FINISH_THREADS>(entropy_sum, room);
    float loss = 0.0f;
    for (int e = threadIdx.x; e < EXPERTS; e += FINISH_THREADS) {
        float p = 0.0f;
        int all = 0, counted = 0;
        for (int i = 0; i < SHARES; i++) p += p_of[i][e], all += counts_of[i][0][e], counted += counts_of[i][1][e];
        counts[e] = all;
        loss += (p / (float)n) * ((float)counted / ((float)n * COUNTED));
    }
    loss = block_sum<FINISH_THREADS>(loss, room);
    if (threadIdx.x > 0) return;
    // Without tokens all of them are 0.
    *balance = n > 0 ? (float)EXPERTS * loss : 0.0f;
    *z = n > 0 ? z_sum / (float)n : 0.0f;
    *entropy = n > 0 ? entropy_sum / (float)n : 0.0f;
}
