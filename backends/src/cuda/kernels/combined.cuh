// COMBINES: the combine right behind a product of experts of few rows, done by the product's kernel for a tile of columns at a time,
// and the chain behind that (`put` of chain.cuh). Its sums are those of combine.cu, term by term.
//
// Every block that ends elements of a tile counts, when they are stored; the last one combines them. ALONE: one block ends them all, of
// the one slot there is: it has that row in shared memory, and nothing is counted. SIDE says what comes beside the rows: NO_SIDE,
// SIDE_BEFORE, rows that were made before the kernel, or SIDE_OF_TWIN, those of the twin. WEIGHS: a token's two coefficients are the softmax
// of what is given for them. There are at most TOKENS tokens, which have
// CHOICES choices together.

#if COMBINES
#define NO_SIDE 0
#define SIDE_BEFORE 1
#define SIDE_OF_TWIN 2

#define COMBINE_PARAMETERS                                                                                             \
    , const int* choice_slot, const float* choice_gate, const TC* side, const float* coefficient, int tokens,          \
        int choices_each, TC* combined, u32* counters
#define COMBINING                                                                                                      \
    Combine { choice_slot, choice_gate, side, coefficient, tokens, choices_each, combined, counters }
/// What combine.cu is given but the rows, and the numbers that count a tile's blocks, one for each block along x: 0 between runs.
struct Combine {
    const int* choice_slot;
    const float* gate;
    const TC* side;
    const float* coefficient;
    int tokens, k;
    TC* y;
    u32* counters;
};

/// An element that another block of the kernel may have stored: not from a cache of this processor's own.
__device__ __forceinline__ float shared_element(const float* from) { return __ldcg(from); }
template <typename Half> __device__ __forceinline__ Half shared_element(const Half* from) {
    Half x;
    x.bits = __ldcg((const u16*)from);
    return x;
}

/// A token's coefficient: the number itself, or as the softmax of rows of two makes it, term by term as in softmax.cu.
__device__ __forceinline__ float coefficient_of(const float* given, int i) {
    float own = given[i];
#if WEIGHS
    float other = given[i ^ 1];
    float greatest = fmaxf(fmaxf(-INF_F, own), fmaxf(-INF_F, other));
    own = expf(own - greatest);
    return own / (own + expf(other - greatest));
#else
    return own;
#endif
}

/// The work on the block's tile of TILE columns. A thread's j-th element is the (threadIdx.x + j THREADS)-th in rows of TILE.
template <int TILE> struct Combined {
    static constexpr int COUNT = TOKENS * TILE > THREADS ? TOKENS * TILE / THREADS : 1;
    /// Of the choice of the thread's number, and the coefficient of that number.
    int place;
    float gate, coefficient;
    Chain::Loaded<1> loaded[COUNT];
    TC side[COUNT];

    static __device__ __forceinline__ int token(int j) { return (threadIdx.x + j * THREADS) / TILE; }
    static __device__ __forceinline__ int column(int j) { return blockIdx.x * TILE + (threadIdx.x + j * THREADS) % TILE; }

    /// What does not depend on the product, of rows of `d` elements: on its way while the product is made.
    __device__ __forceinline__ void load(const Combine& to, int d, const Chain& chain) {
        if (blockIdx.y > 0) return;
        int i = threadIdx.x;
        place = i < to.tokens * to.k ? to.choice_slot[i] : -1;
        gate = to.gate && i < to.tokens * to.k ? to.gate[i] : 1.0f;
        coefficient = to.coefficient && i < 2 * to.tokens ? coefficient_of(to.coefficient, i) : 1.0f;
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            if (token(j) >= to.tokens || column(j) >= d) continue;
            i64 at = (i64)token(j) * d + column(j);
#if SIDE == SIDE_BEFORE
            side[j] = to.side[at];
#endif
            loaded[j] = chain.load<1>(at);
        }
    }

    /// Its end, when the block has ended its own elements of `slots` rows, or with others of its cluster those of the first: one of
    /// every number along y. ALONE, `rows` are the block's own columns of the one row.
    __device__ __forceinline__ void end(const Combine& to, const TC* rows, int slots, int d, const Chain& chain) const {
        if (blockIdx.y > 0) return;
        __shared__ int places[CHOICES];
        __shared__ float gates[CHOICES], coefficients[2 * TOKENS];
        if (threadIdx.x < CHOICES) places[threadIdx.x] = place, gates[threadIdx.x] = gate;
        if (threadIdx.x < 2 * TOKENS) coefficients[threadIdx.x] = coefficient;
#if ALONE
        __syncthreads();
#else
        __shared__ bool is_last;
        // What this block stored is there for whoever sees it counted.
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            // The last one leaves 0 for the next run.
            is_last = atomicInc(to.counters + blockIdx.x, gridDim.z - 1) == gridDim.z - 1;
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;
#endif
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            int t = token(j);
            if (t >= to.tokens || column(j) >= d) continue;
            i64 at = (i64)t * d + column(j);
            float sum = 0.0f;
#if SIDE == SIDE_OF_TWIN
            TC of_token = shared_element(to.side + at);
#elif SIDE == SIDE_BEFORE
            TC of_token = side[j];
#endif
#pragma unroll 4
            for (int c = t * to.k; c < (t + 1) * to.k; c++) {
                int s = places[c];
                bool used = s >= 0 && s < slots;
#if ALONE
                TC v = rows[(threadIdx.x + j * THREADS) % TILE];
#else
                TC v = shared_element(rows + (used ? (i64)s * d : 0) + column(j));
#endif
                sum = used ? fmaf(gates[c], to_float(v), sum) : sum;
            }
#if SIDE != NO_SIDE
            sum = fmaf(coefficients[2 * t], sum, __fmul_rn(coefficients[2 * t + 1], to_float(of_token)));
#endif
            Vector<TC, 1> out;
            out.at[0] = from_float<TC>(sum);
            put<1>(to.y, at, out, chain, loaded[j]);
        }
    }
};
#else
#define COMBINE_PARAMETERS
#endif
