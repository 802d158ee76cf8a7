// Slots for the chosen experts, in one kernel: a block for each expert.
//
// Every block counts the choices of all experts (whole numbers: any order gives the same) and so knows where its own segment
// begins. Then it goes through the choices in order and gives each of its own the next slot.

#define THREADS 512
#define MOST_EXPERTS 1024

/// How many of the flags of lower threads are set, and (in `all`) how many of all.
__device__ __forceinline__ int rank_of(bool flag, int* counts, int& all) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 votes = __ballot_sync(WHOLE_WARP, flag);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1u));
    all = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp) before += counts[w];
        all += counts[w];
    }
    __syncthreads();
    return before;
}

/// Choice c comes before choice d where their priorities are equal. Choice-major: all first choices before all second ones.
__device__ __forceinline__ bool earlier(int c, int d, int n, int k, int choice_major) {
    if (!choice_major) return c < d;
    i64 rank_c = (i64)(c % k) * n + c / k, rank_d = (i64)(d % k) * n + d / k;
    return rank_c < rank_d;
}

/// A NaN comes last.
__device__ __forceinline__ float urgency(const float* priority, int c) {
    float p = priority[c];
    return p != p ? -INF_F : p;
}

/// index [n, k]; capacity -1: dropless. `kept` is scratch of a byte for each choice.
KERNEL assign(const int* index, const float* priority, int n, int k, int experts, int capacity, int choice_major, int slots,
              int* slot_choice, int* choice_slot, int* offsets, int* dropped, u8* kept) {
    __shared__ int load[MOST_EXPERTS];
    __shared__ int counts[THREADS / 32];
    __shared__ int begin, total, lost;
    int me = blockIdx.x, choices = n * k;
    for (int e = threadIdx.x; e < experts; e += THREADS) load[e] = 0;
    __syncthreads();
    for (int c = threadIdx.x; c < choices; c += THREADS) {
        int e = index[c];
        if (e >= 0 && e < experts) atomicAdd(&load[e], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        begin = total = lost = 0;
        for (int e = 0; e < experts; e++) {
            int keep = capacity >= 0 && load[e] > capacity ? capacity : load[e];
            if (e < me) begin += keep;
            total += keep, lost += load[e] - keep;
        }
    }
    __syncthreads();
    bool full = capacity >= 0 && load[me] > capacity;

    // Which of the choices stay, where not all do.
    if (full && priority) {
        for (int c = threadIdx.x; c < choices; c += THREADS) {
            if (index[c] != me) continue;
            float p = urgency(priority, c);
            int better = 0;
            for (int d = 0; d < choices; d++) {
                if (index[d] != me) continue;
                float q = urgency(priority, d);
                better += q > p || (q == p && earlier(d, c, n, k, choice_major));
            }
            kept[c] = better < capacity;
        }
    } else if (full) {
        int done = 0;
        for (int from = 0; from < choices; from += THREADS) {
            int at = from + threadIdx.x, all;
            // The choice that is `at`-th in the order.
            int c = choice_major ? at % n * k + at / n : at;
            bool mine = at < choices && index[c] == me;
            int rank = done + rank_of(mine, counts, all);
            if (mine) kept[c] = rank < capacity;
            done += all;
        }
    }
    __syncthreads();

    int done = begin;
    for (int from = 0; from < choices; from += THREADS) {
        int c = from + threadIdx.x, all;
        bool mine = c < choices && index[c] == me;
        bool stays = mine && (!full || kept[c]);
        int slot = done + rank_of(stays, counts, all);
        if (stays) slot_choice[slot] = c;
        if (mine) choice_slot[c] = stays ? slot : -1;
        done += all;
        // What goes nowhere is nobody's; the first block takes it.
        if (me == 0 && c < choices && (index[c] < 0 || index[c] >= experts)) choice_slot[c] = -1;
    }
    if (threadIdx.x == 0) {
        offsets[me] = begin;
        if (me == 0) offsets[experts] = total, *dropped = lost;
    }
    if (me == 0)
        for (int s = total + threadIdx.x; s < slots; s += THREADS) slot_choice[s] = -1;
}
