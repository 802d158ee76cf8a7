// Slots for the chosen experts, in one kernel: a block for each expert.
//
// Every block counts the choices of all experts (whole numbers: any order gives the same) and so knows where its own segment
// begins. Then it goes through the choices in order and gives each of its own the next slot.

#define THREADS 512
#define MOST_EXPERTS 1024

/// Choices that a thread takes at a time.
#define EACH 8

/// The sum of what lower threads have, and (in `all`) of what all have.
__device__ __forceinline__ int before(int own, int* counts, int& all) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, up_to = own;
    for (int d = 1; d < 32; d *= 2) {
        int left = __shfl_up_sync(WHOLE_WARP, up_to, d);
        if (lane >= d) up_to += left;
    }
    if (lane == 31) counts[warp] = up_to;
    __syncthreads();
    int sum = up_to - own;
    all = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp) sum += counts[w];
        all += counts[w];
    }
    __syncthreads();
    return sum;
}

/// The experts of EACH choices from `first` on; -1 behind the last.
__device__ __forceinline__ void read(const int* index, int first, int choices, int (&e)[EACH]) {
    if (first + EACH <= choices) {
        auto v = load_vector<EACH>(index + first);
#pragma unroll
        for (int j = 0; j < EACH; j++) e[j] = v.at[j];
    } else {
#pragma unroll
        for (int j = 0; j < EACH; j++) e[j] = first + j < choices ? index[first + j] : -1;
    }
}

/// index [n, k]; capacity -1: dropless. `kept` is scratch of a byte for each choice.
KERNEL assign(const int* index, const float* priority, int n, int k, int experts, int capacity, int choice_major, int slots,
              int* slot_choice, int* choice_slot, int* offsets, int* dropped, u8* kept) {
    begin();
    __shared__ int load[MOST_EXPERTS];
    __shared__ int counts[THREADS / 32];
    __shared__ int begin, total, lost;
    int me = blockIdx.x, choices = n * k;
    if (capacity < 0) {
        // Only how many go to the experts before, and to any.
        int lower = 0, valid = 0;
        for (int from = threadIdx.x * EACH; from < choices; from += THREADS * EACH) {
            int e[EACH];
            read(index, from, choices, e);
#pragma unroll
            for (int j = 0; j < EACH; j++) valid += e[j] >= 0 && e[j] < experts, lower += e[j] >= 0 && e[j] < me;
        }
        lower = block_sum<THREADS>(lower, counts), valid = block_sum<THREADS>(valid, counts);
        if (threadIdx.x == 0) begin = lower, total = valid, lost = 0;
    } else {
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
                int keep = min(load[e], capacity);
                if (e < me) begin += keep;
                total += keep, lost += load[e] - keep;
            }
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
            int rank = done + before(mine, counts, all);
            if (mine) kept[c] = rank < capacity;
            done += all;
        }
    }
    __syncthreads();

    int done = begin;
    for (int from = 0; from < choices; from += THREADS * EACH) {
        int first = from + threadIdx.x * EACH, e[EACH], own = 0, all;
        read(index, first, choices, e);
        bool stays[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) own += stays[j] = e[j] == me && (!full || kept[first + j]);
        int slot = done + before(own, counts, all);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int c = first + j;
            if (stays[j]) slot_choice[slot] = c;
            if (e[j] == me) choice_slot[c] = stays[j] ? slot++ : -1;
            // What goes nowhere is nobody's; the first block takes it.
            else if (me == 0 && c < choices && (e[j] < 0 || e[j] >= experts)) choice_slot[c] = -1;
        }
        done += all;
    }
    if (threadIdx.x == 0) {
        offsets[me] = begin;
        if (me == 0) offsets[experts] = total, *dropped = lost;
    }
    if (me == 0)
        for (int s = total + threadIdx.x; s < slots; s += THREADS) slot_choice[s] = -1;
}
