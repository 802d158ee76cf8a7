// Sum, mean or maximum over the middle axis of x [outer, n, inner]. FUNCTION: 0 sum, 1 mean, 2 maximum.
//
// A long axis is cut into chunks, whose results (f32) a second kernel joins in order. Which element is added where depends
// on the extents alone.

#define THREADS 256

__device__ __forceinline__ float start() { return FUNCTION == 2 ? -INF_F : 0.0f; }
__device__ __forceinline__ float join(float a, float b) { return FUNCTION == 2 ? max_nan(a, b) : a + b; }
__device__ __forceinline__ float end(float x, i64 n) { return FUNCTION == 1 ? x / (float)n : x; }

/// inner = 1: a block for each row and chunk.
KERNEL reduce_rows(const T* x, i64 outer, i64 n, i64 chunk, float* partial, T* y) {
    __shared__ float room[THREADS / 32];
    i64 row = blockIdx.x, from = (i64)blockIdx.y * chunk, to = from + chunk < n ? from + chunk : n;
    float acc = start();
    for (i64 i = from + threadIdx.x; i < to; i += THREADS) acc = join(acc, to_float(x[row * n + i]));
    acc = FUNCTION == 2 ? block_max<THREADS>(acc, room) : block_sum<THREADS>(acc, room);
    if (threadIdx.x > 0) return;
    if (partial) partial[blockIdx.y * outer + row] = acc;
    else y[row] = from_float<T>(end(acc, n));
}

/// A thread for each result and chunk; neighbouring threads read neighbouring elements.
KERNEL reduce_columns(const T* x, i64 outer, i64 n, i64 inner, i64 chunk, float* partial, T* y) {
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= outer * inner) return;
    i64 from = (i64)blockIdx.y * chunk, to = from + chunk < n ? from + chunk : n;
    const T* column = x + at / inner * n * inner + at % inner;
    float acc = start();
    // Sums of 16 first: a long sum in one go loses digits.
    for (i64 i = from; i < to; i += 16) {
        // All loaded before the first is added.
        T x16[16];
#pragma unroll
        for (int j = 0; j < 16; j++) x16[j] = column[(i + j < to ? i + j : i) * inner];
        float part = start();
#pragma unroll
        for (int j = 0; j < 16; j++) part = i + j < to ? join(part, to_float(x16[j])) : part;
        acc = join(acc, part);
    }
    if (partial) partial[blockIdx.y * outer * inner + at] = acc;
    else y[at] = from_float<T>(end(acc, n));
}

/// The results of the chunks together.
KERNEL reduce_finish(const float* partial, i64 results, int chunks, i64 n, T* y) {
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= results) return;
    float acc = start();
    for (int c = 0; c < chunks; c++) acc = join(acc, partial[c * results + at]);
    y[at] = from_float<T>(end(acc, n));
}
