// The choice of experts for few tokens, the statistics of their load, and the slots of the choices, by the ROUTING_WARPS warps of a block, or its first one.
// TOKENS: how many; of ASSIGNED experts the slots are.

#define CHOICES (TOKENS * K)
#define ROUTING_PARAMETERS                                                                                             \
    const float *logits, const float *selection_bias, const float *noise, const u8 *used, const int *given, float *gate, int *index,      \
        float *balance, float *z, int *counts, float *entropy, const float *priority, int capacity, int choice_major,  \
        int slots, int *slot_choice, int *choice_slot, int *offsets_of, int *dropped
#define ROUTING                                                                                                        \
    Routing {                                                                                                          \
        Given{logits, selection_bias, noise, used, given}, gate, index, balance, z, counts, entropy, priority, capacity, choice_major,    \
            slots, slot_choice, choice_slot, offsets_of, dropped                                                       \
    }
/// Operands and results of route and assign; optional ones are null where there are none. Capacity -1: dropless.
struct Routing {
    Given from;
    float* gate;
    int* index;
    float *balance, *z;
    int* counts;
    float* entropy;
    const float* priority;
    int capacity, choice_major, slots;
    int *slot_choice, *choice_slot, *offsets, *dropped;
};

/// Where the warps that route meet: the first ones of a block, all of it if they are several.
__device__ __forceinline__ void meet() {
    if (ROUTING_WARPS == 1) __syncwarp();
    else __syncthreads();
}

__device__ __forceinline__ void route_and_assign(const Routing& to) {
    __shared__ Desk desks[ROUTING_WARPS];
    __shared__ int counts[2][EXPERTS], chosen[CHOICES], stays[CHOICES];
    __shared__ float gates[CHOICES], room[ROUTING_WARPS], sums[ROUTING_WARPS][2];
    int warp = threadIdx.x / 32;
    Desk& desk = desks[warp];
    clear(desk, counts);
    Found found{0.0f, 0.0f};
    meet();
    for (int t = warp; t < TOKENS; t += ROUTING_WARPS) choose<true>(desk, to.from, t, gates + t * K, chosen + t * K, counts, found);
    if (threadIdx.x % 32 == 0) sums[warp][0] = found.z, sums[warp][1] = found.entropy;
    meet();
    for (int c = threadIdx.x; c < CHOICES; c += 32 * ROUTING_WARPS) to.gate[c] = gates[c], to.index[c] = chosen[c];
    // The priority may be the gates.
    meet();

    // Which choices stay.
    for (int c = threadIdx.x; c < CHOICES; c += 32 * ROUTING_WARPS) {
        int e = chosen[c], better = 0;
        if (to.capacity >= 0)
            for (int d = 0; d < CHOICES; d++) {
                if (chosen[d] != e) continue;
                float own = to.priority ? urgency(to.priority, c) : 0.0f, other = to.priority ? urgency(to.priority, d) : 0.0f;
                better += other > own || (other == own && earlier(d, c, TOKENS, K, to.choice_major));
            }
        stays[c] = e >= 0 && e < ASSIGNED && (to.capacity < 0 || better < to.capacity);
    }
    meet();
    for (int e = threadIdx.x; e <= ASSIGNED; e += 32 * ROUTING_WARPS) {
        int before = 0;
        for (int d = 0; d < CHOICES; d++) before += stays[d] && chosen[d] < e;
        to.offsets[e] = before;
    }
    int total = 0;
    for (int d = 0; d < CHOICES; d++) total += stays[d];
    for (int c = threadIdx.x; c < CHOICES; c += 32 * ROUTING_WARPS) {
        int e = chosen[c], slot = 0;
        for (int d = 0; d < CHOICES; d++) slot += stays[d] && (chosen[d] < e || (chosen[d] == e && d < c));
        to.choice_slot[c] = stays[c] ? slot : -1;
        if (stays[c]) to.slot_choice[slot] = c;
    }
    for (int s = total + threadIdx.x; s < to.slots; s += 32 * ROUTING_WARPS) to.slot_choice[s] = -1;

    // The statistics.
    float loss = 0.0f;
    for (int e = threadIdx.x; e < EXPERTS; e += 32 * ROUTING_WARPS) {
        float p = 0.0f;
        for (int w = 0; w < ROUTING_WARPS; w++) p += desks[w].p_sum[e];
        to.counts[e] = counts[0][e];
        loss = fmaf(p / (float)TOKENS, (float)counts[1][e] / ((float)TOKENS * COUNTED), loss);
    }
    loss = ROUTING_WARPS == 1 ? warp_sum(loss) : block_sum<32 * ROUTING_WARPS>(loss, room);
    if (threadIdx.x > 0) return;
    float z_sum = 0.0f, entropy_sum = 0.0f;
    for (int w = 0; w < ROUTING_WARPS; w++) z_sum += sums[w][0], entropy_sum += sums[w][1];
    int valid = 0;
    for (int d = 0; d < CHOICES; d++) valid += chosen[d] >= 0 && chosen[d] < ASSIGNED;
    *to.dropped = valid - total;
    *to.balance = (float)EXPERTS * loss, *to.z = z_sum / (float)TOKENS, *to.entropy = entropy_sum / (float)TOKENS;
}

/// The expert of the one token, which has one choice, -1 if it gets no slot; by a warp.
__device__ __forceinline__ int expert_of_token(const Routing& to, Desk& desk) {
    __shared__ float gate;
    __shared__ int expert;
    Found found{0.0f, 0.0f};
    choose<false>(desk, to.from, 0, &gate, &expert, 0, found);
    return to.capacity != 0 && expert < ASSIGNED ? expert : -1;
}
