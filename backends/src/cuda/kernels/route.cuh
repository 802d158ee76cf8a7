// The choice of experts for a token, and what its block learns for the statistics of their load.
//
// COUNTED choices of a token count in the load-balancing loss. GROUPS (0: none), KEEP and TOP2 describe groups of experts.
// LATER says that noise is for the choices after the first.

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

/// Before the first token of a block of ROUTING_WARPS warps.
__device__ __forceinline__ void clear(Desk& desk, int (&counts)[2][EXPERTS]) {
    for (int e = threadIdx.x; e < EXPERTS; e += 32 * ROUTING_WARPS) counts[0][e] = counts[1][e] = 0;
    EACH_EXPERT(e) desk.p_sum[e] = 0.0f;
}

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

/// What is given for all tokens; optional ones are null where there are none.
struct Given {
    const float *logits, *bias, *noise;
    const u8* used;
    const int* given;
};

/// Sums of a warp over its tokens: of the squares of the log of their weights' sum, and of the entropy.
struct Found { float z, entropy; };

/// The K gates and experts of token t, by a warp. `counts`: all choices and the counted ones, of each expert. COUNTS: they are counted, and
/// what else the statistics need is found.
template <bool COUNTS>
__device__ __forceinline__ void choose(Desk& desk, const Given& from, int t, float* gate, int* index, int (*counts)[EXPERTS], Found& found) {
    const float* logits = from.logits + (i64)t * EXPERTS;
    const float* noise = from.noise ? from.noise + (i64)t * EXPERTS : 0;
    int lane = threadIdx.x % 32;
    bool unused = from.used && !from.used[t];
    Row row = row_of(logits);
    bool finite = row.finite();
    float lse = row.lse(), total = 0.0f, h = 0.0f;
    if (COUNTS) found.z = fmaf(lse, lse, found.z);
    EACH_EXPERT(e) {
        float v = SCORE == 0 ? row.softmax(logits[e]) : own_value(logits[e]);
        desk.value[e] = finite ? v : NAN_F;
        desk.closed[e] = 0;
        total += v;
    }
    if (COUNTS && NORMALISED) total = warp_sum(total);
    if (COUNTS) EACH_EXPERT(e) {
        float p = row.softmax(logits[e]);
        if (NORMALISED && finite) p = total < 1.17549435e-38f ? 1.0f / EXPERTS : desk.value[e] / total;
        desk.p_sum[e] += p;
        if (p != 0.0f) h -= p * (NORMALISED ? logf(fmaxf(p, 1.17549435e-38f)) : logits[e] - row.greatest - logf(row.total));
    }
    if (COUNTS) found.entropy += warp_sum(h);
    __syncwarp();

    bool chooses = !from.given && !unused && finite;
    if (chooses) {
        rank_all(desk, logits, LATER ? 0 : noise, from.bias);
        close_groups(desk);
    }
    for (int j = 0; j < K; j++) {
        int x;
        if (unused) {
            x = -1;
        } else if (from.given) {
            x = from.given[(i64)t * K + j];
            if (x < 0 || x >= EXPERTS) x = -1;
        } else if (!finite) {
            x = j;
        } else {
            if (LATER && j == 1) rank_all(desk, logits, noise, from.bias);
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
            gate[j] = g, index[j] = x;
            if (COUNTS && x >= 0) {
                atomicAdd(&counts[0][x], 1);
                if (j < COUNTED) atomicAdd(&counts[1][x], 1);
            }
        }
    }
    __syncwarp();
}
