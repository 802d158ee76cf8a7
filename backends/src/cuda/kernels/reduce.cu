// Sum, mean or maximum over the middle axis of x [outer, n, inner]. FUNCTION: 0 sum, 1 mean, 2 maximum.
//
// A long axis is cut into chunks, whose results (f32) are joined in order: those of a row by the block that ends its chunk last, those of
// columns by a second kernel. Which element is added where depends on the extents alone.

#define THREADS 256
/// Elements of 16 bytes.
#define VECTOR (16 / (int)sizeof(T))

__device__ __forceinline__ float start() { return FUNCTION == 2 ? -INF_F : 0.0f; }
__device__ __forceinline__ float join(float a, float b) { return FUNCTION == 2 ? max_nan(a, b) : a + b; }
__device__ __forceinline__ float end(float x, i64 n) { return FUNCTION == 1 ? x / (float)n : x; }

/// What the block's threads have, together: of thread 0.
__device__ __forceinline__ float of_block(float acc, float* room) {
    return FUNCTION == 2 ? block_max<THREADS>(acc, room) : block_sum<THREADS>(acc, room);
}

/// inner = 1: a block for each row and chunk. `partial` and `counters`, one for each row and 0 between runs, are null for one chunk.
KERNEL reduce_rows(const T* x, i64 outer, i64 n, i64 chunk, float* partial, u32* counters, T* y) {
    begin();
    __shared__ float room[THREADS / 32];
    __shared__ bool is_last;
    i64 row = blockIdx.x, from = (i64)blockIdx.y * chunk, to = from + chunk < n ? from + chunk : n;
    float acc = start();
    for (i64 i = from + threadIdx.x; i < to; i += THREADS) acc = join(acc, to_float(x[row * n + i]));
    acc = of_block(acc, room);
    if (partial) {
        if (threadIdx.x == 0) {
            partial[blockIdx.y * outer + row] = acc;
            // What this block stored is there for whoever sees it counted. The last one leaves 0 for the next run.
            __threadfence();
            is_last = atomicInc(counters + row, gridDim.y - 1) == gridDim.y - 1;
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;
        acc = start();
        for (int c = threadIdx.x; c < gridDim.y; c += THREADS) acc = join(acc, __ldcg(partial + c * outer + row));
        acc = of_block(acc, room);
    }
    if (threadIdx.x == 0) y[row] = from_float<T>(end(acc, n));
}

/// A thread for each result and chunk; neighbouring threads read neighbouring elements.
KERNEL reduce_columns(const T* x, i64 outer, i64 n, i64 inner, i64 chunk, float* partial, T* y) {
    begin();
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= outer * inner) return;
    i64 from = (i64)blockIdx.y * chunk, to = from + chunk < n ? from + chunk : n;
    const T* column = x + at / inner * n * inner + at % inner;
    float acc = start();
    // Sums of 16 first, whose loads do not wait for each other: a long sum in one go loses digits.
    for (i64 i = from; i < to; i += 16) {
        float elements[16], part = start();
#pragma unroll
        for (int j = 0; j < 16; j++) elements[j] = i + j < to ? to_float(column[(i + j) * inner]) : start();
#pragma unroll
        for (int j = 0; j < 16; j++) part = join(part, elements[j]);
        acc = join(acc, part);
    }
    if (partial) partial[blockIdx.y * outer * inner + at] = acc;
    else y[at] = from_float<T>(end(acc, n));
}

/// The same for columns by the VECTOR, where there are a multiple of it: a lane has VECTOR neighbouring columns and a warp every
/// eighth row of the chunk.
KERNEL reduce_vectors(const T* x, i64 outer, i64 n, i64 inner, i64 chunk, float* partial, T* y) {
    begin();
    const int WARPS = THREADS / 32;
    __shared__ float parts[WARPS][32 * VECTOR + 1];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 results = outer * inner, at0 = (i64)blockIdx.x * 32 * VECTOR, at = at0 + lane * VECTOR;
    i64 from = (i64)blockIdx.y * chunk, to = from + chunk < n ? from + chunk : n;
    float acc[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; j++) acc[j] = start();
    if (at < results) {
        const T* column = x + at / inner * n * inner + at % inner;
#pragma unroll 8
        for (i64 i = from + warp; i < to; i += WARPS) {
            auto v = load_vector<VECTOR>(column + i * inner);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) acc[j] = join(acc[j], to_float(v.at[j]));
        }
    }
#pragma unroll
    for (int j = 0; j < VECTOR; j++) parts[warp][lane * VECTOR + j] = acc[j];
    __syncthreads();
    for (int c = threadIdx.x; c < 32 * VECTOR && at0 + c < results; c += THREADS) {
        float sum = start();
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum = join(sum, parts[w][c]);
        if (partial) partial[blockIdx.y * results + at0 + c] = sum;
        else y[at0 + c] = from_float<T>(end(sum, n));
    }
}

/// The results of the chunks of columns together.
KERNEL reduce_finish(const float* partial, i64 results, int chunks, i64 n, T* y) {
    begin();
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= results) return;
    float acc = start();
#pragma unroll 16
    for (int c = 0; c < chunks; c++) acc = join(acc, partial[c * results + at]);
    y[at] = from_float<T>(end(acc, n));
}
