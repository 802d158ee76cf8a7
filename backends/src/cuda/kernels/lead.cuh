// The rows of a product's first factor, and what makes them where its kernel does that too. LEAD: NOTHING, they lie in memory;
// LAYER_NORM or RMS_NORM, the norm right before the product, of rows of WIDTH elements: each block makes them all; DISPATCH, the
// dispatch to the slots of the product: each is read as its token's row. They are as they would be in memory, rounded. A norm's are
// stored there if something else reads them.

#define NOTHING 0
#define LAYER_NORM 1
#define RMS_NORM 2
#define DISPATCH 3

#if LEAD == NOTHING
#define LEAD_PARAMETERS
#define LEADING Lead()
struct Lead {
    /// What it reads that no kernel of the run writes.
    struct Early {
        __device__ __forceinline__ void load(const Lead&) {}
    };
};
#elif LEAD == DISPATCH
#define LEAD_PARAMETERS , const int* slot_choice, const float* gate, int choices, int of_token
#define LEADING                                                                                                        \
    Lead { slot_choice, gate, choices, of_token }
/// Choices are of_token for each token.
struct Lead {
    const int* slot_choice;
    const float* gate;
    int choices, of_token;
    struct Early {
        __device__ __forceinline__ void load(const Lead&) {}
    };
};
#else
#define LEAD_PARAMETERS                                                                                                \
    , const TA* x, const float* gamma, const float* beta, float eps, TA* y, float* mean, float* rstd
#define LEADING                                                                                                        \
    Lead { x, gamma, beta, eps, y, mean, rstd }
/// y, mean and rstd are null if nothing else reads them.
struct Lead {
    const TA* x;
    const float *gamma, *beta;
    float eps;
    TA* y;
    float *mean, *rstd;
    /// A thread's part of the weights.
    struct Early {
        Part<float> gamma, beta;
        __device__ __forceinline__ void load(const Lead& lead) {
            gamma = Part<float>(lead.gamma, WIDTH);
            if (LEAD == LAYER_NORM) beta = Part<float>(lead.beta, WIDTH);
        }
    };
};

/// Gives the parts of a sum to the warps of a row.
__device__ __forceinline__ void give_part(float part, float* of_row) {
    part = warp_sum(part);
    if (threadIdx.x % 32 == 0) of_row[threadIdx.x % NORM_THREADS / 32] = part;
}

/// The sum of the parts, in order.
__device__ __forceinline__ float sum_of_parts(const float* of_row) {
    float sum = of_row[0];
    for (int w = 1; w < NORM_WARPS; w++) sum += of_row[w];
    return sum;
}

/// The norm of `count` rows, at most MOST, by THREADS threads: NORM_THREADS for each. `stores` in one block.
__device__ __forceinline__ void make_rows(TA* rows, int count, const Lead& lead, const Lead::Early& early, bool stores) {
    const int AT_ONCE = THREADS / NORM_THREADS, TURNS = (MOST + AT_ONCE - 1) / AT_ONCE;
    __shared__ float sums[MOST][NORM_WARPS], squares[MOST][NORM_WARPS];
    int first = threadIdx.x / NORM_THREADS;
    Part<TA> own[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (int row = first + i * AT_ONCE; row < count) own[i] = Part<TA>(lead.x + row * WIDTH, WIDTH);
    float mean[TURNS] = {};
#if LEAD == LAYER_NORM
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (int row = first + i * AT_ONCE; row < count) give_part(own[i].sum(WIDTH), sums[row]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (int row = first + i * AT_ONCE; row < count) mean[i] = sum_of_parts(sums[row]) / (float)WIDTH;
#endif
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (int row = first + i * AT_ONCE; row < count) give_part(own[i].squares(mean[i], WIDTH), squares[row]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int row = first + i * AT_ONCE;
        if (row >= count) continue;
        float rstd = rstd_of(sum_of_parts(squares[row]), WIDTH, lead.eps);
        own[i].normalise(mean[i], rstd, early.gamma, LEAD == LAYER_NORM ? &early.beta : 0, WIDTH);
        own[i].store(rows + row * WIDTH, WIDTH);
        if (!stores || !lead.y) continue;
        own[i].store(lead.y + row * WIDTH, WIDTH);
        if (threadIdx.x % NORM_THREADS > 0) continue;
        if (lead.mean) lead.mean[row] = mean[i];
        lead.rstd[row] = rstd;
    }
    __syncthreads();
}
#endif
