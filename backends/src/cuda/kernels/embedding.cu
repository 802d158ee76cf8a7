// Rows of a table by id, and the gradient of the table. VECTOR: elements of dy that a thread has, of 16 bytes or one.

#define THREADS 256

/// A block for each id. An id without a row is rejected and gives NaN.
KERNEL embedding(const T* table, const int* ids, int rows, int d, T* out, Fault* fault, int step) {
    begin();
    i64 i = blockIdx.x;
    int id = ids[i];
    bool known = id >= 0 && id < rows;
    if (!known && threadIdx.x == 0) reject(fault, step, id);
    for (int c = threadIdx.x; c < d; c += THREADS)
        out[i * d + c] = known ? table[(i64)id * d + c] : from_float<T>(NAN_F);
}

/// A block for each row of the table and THREADS times VECTOR columns of it: it goes through all ids, lists those that are its own
/// in order, and adds up their rows of dy. So no two blocks write one element, and the order of each sum is that of the ids.
KERNEL embedding_grad(const int* ids, const T* dy, int n, int rows, int d, T* out, Fault* fault, int step) {
    begin();
    __shared__ int mine[THREADS];
    __shared__ int counts[THREADS / 32];
    int row = blockIdx.x, column = (blockIdx.y * THREADS + threadIdx.x) * VECTOR;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum[VECTOR] = {};
    for (int from = 0; from < n; from += THREADS) {
        int i = from + threadIdx.x, id = i < n ? ids[i] : row - 1;
        if (i < n && (id < 0 || id >= rows) && row == 0 && blockIdx.y == 0) reject(fault, step, id);
        // Most rows have no id among these.
        if (!__syncthreads_or(id == row)) continue;
        u32 votes = __ballot_sync(WHOLE_WARP, id == row);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        int before = 0, found = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) before += counts[w];
            found += counts[w];
        }
        if (id == row) mine[before + __popc(votes & ((1u << lane) - 1u))] = i;
        __syncthreads();
        if (column < d) {
            float part[VECTOR] = {};
            for (int j = 0; j < found; j++) {
                const T* from_row = dy + (i64)mine[j] * d + column;
#if VECTOR > 1
                auto v = load_vector<VECTOR>(from_row);
#pragma unroll
                for (int c = 0; c < VECTOR; c++) part[c] += to_float(v.at[c]);
#else
                part[0] += to_float(*from_row);
#endif
            }
#pragma unroll
            for (int c = 0; c < VECTOR; c++) sum[c] += part[c];
        }
    }
    if (column < d) {
#pragma unroll
        for (int c = 0; c < VECTOR; c++) out[(i64)row * d + column + c] = from_float<T>(sum[c]);
    }
}
