// The choice of experts for every token, and the statistics of their load: one kernel for the tokens, one that joins the
// statistics of its blocks in order.

#define THREADS (32 * ROUTING_WARPS)
/// Tokens of one block.
#define TOKENS (4 * ROUTING_WARPS)

/// Optional operands are null where there are none. partial_p [blocks, EXPERTS], partial_counts [blocks, 2, EXPERTS] (all
/// choices, counted ones), partial_sums [blocks, 2] (lse squared, entropy).
KERNEL route(const float* all_logits, const float* bias, const float* all_noise, const u8* used, const int* given, int n,
             float* gate, int* index, float* partial_p, int* partial_counts, float* partial_sums) {
    begin();
    __shared__ Desk desks[ROUTING_WARPS];
    __shared__ int counts[2][EXPERTS];
    __shared__ float sums[ROUTING_WARPS][2];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Desk& desk = desks[warp];
    clear(desk, counts);
    Given from{all_logits, bias, all_noise, used, given};
    Found found{0.0f, 0.0f};
    __syncthreads();

    const int each = TOKENS / ROUTING_WARPS;
    int first = blockIdx.x * TOKENS + warp * each, last = min(first + each, n);
    for (int t = first; t < last; t++) {
        choose<true>(desk, from, t, gate + (i64)t * K, index + (i64)t * K, counts, found);
    }

    if (lane == 0) sums[warp][0] = found.z, sums[warp][1] = found.entropy;
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        float p = 0.0f;
        for (int w = 0; w < ROUTING_WARPS; w++) p += desks[w].p_sum[e];
        partial_p[(i64)blockIdx.x * EXPERTS + e] = p;
        for (int which = 0; which < 2; which++)
            partial_counts[((i64)blockIdx.x * 2 + which) * EXPERTS + e] = counts[which][e];
    }
    if (threadIdx.x < 2) {
        float sum = 0.0f;
        for (int w = 0; w < ROUTING_WARPS; w++) sum += sums[w][threadIdx.x];
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
