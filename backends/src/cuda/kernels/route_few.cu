// The choice of experts for few tokens, the statistics of their load, and the slots of the choices, by one block. TOKENS: how many; of
// ASSIGNED experts the slots are.

#define THREADS (32 * WARPS)
#define CHOICES (TOKENS * K)

/// Operands of route and assign; optional ones are null where there are none. Capacity -1: dropless.
KERNEL route_few(const float* all_logits, const float* bias, const float* all_noise, const u8* used, const int* given, float* gate,
                 int* index, float* balance, float* z, int* all_counts, float* entropy, const float* priority, int capacity,
                 int choice_major, int slots, int* slot_choice, int* choice_slot, int* offsets, int* dropped) {
    begin();
    __shared__ Desk desks[WARPS];
    __shared__ int counts[2][EXPERTS], chosen[CHOICES], stays[CHOICES];
    __shared__ float gates[CHOICES], room[WARPS], sums[WARPS][2];
    int warp = threadIdx.x / 32;
    Desk& desk = desks[warp];
    clear(desk, counts);
    Given from{all_logits, bias, all_noise, used, given};
    Found found{0.0f, 0.0f};
    __syncthreads();
    for (int t = warp; t < TOKENS; t += WARPS) choose(desk, from, t, gates + t * K, chosen + t * K, counts, found);
    if (threadIdx.x % 32 == 0) sums[warp][0] = found.z, sums[warp][1] = found.entropy;
    __syncthreads();
    for (int c = threadIdx.x; c < CHOICES; c += THREADS) gate[c] = gates[c], index[c] = chosen[c];
    // The priority may be the gates.
    __syncthreads();

    // Which choices stay.
    for (int c = threadIdx.x; c < CHOICES; c += THREADS) {
        int e = chosen[c], better = 0;
        if (capacity >= 0)
            for (int d = 0; d < CHOICES; d++) {
                if (chosen[d] != e) continue;
                float own = priority ? urgency(priority, c) : 0.0f, other = priority ? urgency(priority, d) : 0.0f;
                better += other > own || (other == own && earlier(d, c, TOKENS, K, choice_major));
            }
        stays[c] = e >= 0 && e < ASSIGNED && (capacity < 0 || better < capacity);
    }
    __syncthreads();
    for (int e = threadIdx.x; e <= ASSIGNED; e += THREADS) {
        int before = 0;
        for (int d = 0; d < CHOICES; d++) before += stays[d] && chosen[d] < e;
        offsets[e] = before;
    }
    int total = 0;
    for (int d = 0; d < CHOICES; d++) total += stays[d];
    for (int c = threadIdx.x; c < CHOICES; c += THREADS) {
        int e = chosen[c], slot = 0;
        for (int d = 0; d < CHOICES; d++) slot += stays[d] && (chosen[d] < e || (chosen[d] == e && d < c));
        choice_slot[c] = stays[c] ? slot : -1;
        if (stays[c]) slot_choice[slot] = c;
    }
    for (int s = total + threadIdx.x; s < slots; s += THREADS) slot_choice[s] = -1;

    // The statistics.
    float loss = 0.0f;
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        float p = 0.0f;
        for (int w = 0; w < WARPS; w++) p += desks[w].p_sum[e];
        all_counts[e] = counts[0][e];
        loss = fmaf(p / (float)TOKENS, (float)counts[1][e] / ((float)TOKENS * COUNTED), loss);
    }
    loss = block_sum<THREADS>(loss, room);
    if (threadIdx.x > 0) return;
    float z_sum = 0.0f, entropy_sum = 0.0f;
    for (int w = 0; w < WARPS; w++) z_sum += sums[w][0], entropy_sum += sums[w][1];
    int valid = 0;
    for (int d = 0; d < CHOICES; d++) valid += chosen[d] >= 0 && chosen[d] < ASSIGNED;
    *dropped = valid - total;
    *balance = (float)EXPERTS * loss, *z = z_sum / (float)TOKENS, *entropy = entropy_sum / (float)TOKENS;
}
