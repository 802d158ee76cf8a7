// Products c = a b + bias of few rows, where reading b is the work: dense and batched, or M-grouped by `offsets`. Every element
// of b is read once for each MOST rows, 16 bytes at a time where ALIGNED; plain f32 arithmetic.
//
// T is b's type, TA that of a and TC that of c. b is stored [k, n], or [n, k] if TRANSPOSED. MOST is 1, 2, 4 or 8. k is cut into
// chunks, one for each block along y. With more than one their f32 results are added up in order: the blocks are a cluster of
// CLUSTER, of which the first adds up, or, where CLUSTER is 1, they are `partial`, and few_rows_finish adds them up. The order of a
// sum depends on k, the chunk and the layout alone, neither on the row's place nor on the number of rows. What becomes of an element is
// up to `put` of chain.cuh.

#define THREADS 256
#define WARPS (THREADS / 32)
/// Elements of one load.
#define VECTOR (16 / (int)sizeof(T))
/// Loads of a thread on their way at a time: fewer where the sums of many rows take the registers.
#define AHEAD (MOST > 4 ? 2 : 4)
#if CLUSTER > 1
#define FEW_KERNEL extern "C" __global__ void __cluster_dims__(1, CLUSTER, 1)
#else
#define FEW_KERNEL KERNEL
#endif

#if TRANSPOSED
/// Columns of a warp: where there are more rows, elements of a are used twice.
#define ACROSS (MOST > 2 ? 2 : 1)
#define COLUMNS (WARPS * ACROSS)
#define ROOM 1
#else
/// Columns of a block: eight loads side by side, 128 bytes.
#define COLUMNS (8 * VECTOR)
#define ROOM (WARPS * MOST * COLUMNS)
#endif

/// Sizes, and strides in elements. `b_line` is from one stored row of b to the next.
struct Few {
    i64 a_row, a_column, a_batch;
    i64 b_line, b_batch;
    i64 c_row, c_column, c_batch;
    i64 bias_row, bias_column, bias_batch;
    /// Elements of c.
    i64 total;
    int m, n, k, chunk;
    int experts;
    /// The bias is f32 although c is not.
    int wide_bias;
};

/// Elements that lie together.
struct Elements { float at[VECTOR]; };

/// The first `count` elements from here on, the others 0; where ALIGNED all are there, or `count` is not positive.
__device__ __forceinline__ Elements load(const T* from, int count) {
    Elements v;
#if ALIGNED
    uint4 four = make_uint4(0, 0, 0, 0);
    if (count > 0) four = *(const uint4*)from;
    u32 word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
#if WIDE
        v.at[i] = __uint_as_float(word[i]);
#else
        T element;
        element.bits = (u16)(word[i / 2] >> (i % 2 * 16));
        v.at[i] = to_float(element);
#endif
    }
#else
#pragma unroll
    for (int i = 0; i < VECTOR; i++) v.at[i] = i < count ? to_float(from[i]) : 0.0f;
#endif
    return v;
}

/// Gives `end(row, column, sum)` the products of rows 0..rows of a, at most ROWS, and the columns of the block over k0..k1.
template <int ROWS, typename End>
__device__ __forceinline__ void few(float* room, const TA* a, const T* b, const Few& p, int rows, int k0, int k1, End end) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#if TRANSPOSED
    const int steps = AHEAD / ACROSS, step = 32 * VECTOR;
    int column0 = blockIdx.x * COLUMNS + warp * ACROSS;
    float sum[ACROSS][ROWS] = {};
    // `whole`: nothing of it is behind k1, so that loads wait for no comparison.
    auto add = [&](int k, bool whole) {
        Elements w[steps][ACROSS];
#pragma unroll
        for (int u = 0; u < steps; u++)
#pragma unroll
            for (int c = 0; c < ACROSS; c++) {
                int at = k + step * u;
                // A column behind the last is read as the last, and not given out.
                w[u][c] = load(b + min(column0 + c, p.n - 1) * p.b_line + at, whole ? VECTOR : k1 - at);
            }
#pragma unroll
        for (int u = 0; u < steps; u++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                int at = k + step * u, there = whole ? VECTOR : k1 - at;
                const TA* row = a + min(r, rows - 1) * p.a_row;
#if TOGETHER
                Elements x = load(row + at, there);
#else
                Elements x;
#pragma unroll
                for (int i = 0; i < VECTOR; i++) x.at[i] = i < there ? to_float(row[(at + i) * p.a_column]) : 0.0f;
#endif
#pragma unroll
                for (int c = 0; c < ACROSS; c++)
#pragma unroll
                    for (int i = 0; i < VECTOR; i++) sum[c][r] = fmaf(x.at[i], w[u][c].at[i], sum[c][r]);
            }
    };
    int from = k0;
    for (; from + step * steps <= k1; from += step * steps) add(from + lane * VECTOR, true);
    if (from < k1) add(from + lane * VECTOR, false);
#pragma unroll
    for (int c = 0; c < ACROSS; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float s = warp_sum(sum[c][r]);
            if (lane == 0 && r < rows && column0 + c < p.n) end(r, column0 + c, s);
        }
#else
    int column = lane % 8 * VECTOR, columns = p.n - (int)blockIdx.x * COLUMNS - column;
    const T* from = b + (i64)blockIdx.x * COLUMNS + column;
    float sum[ROWS][VECTOR] = {};
    // Four rows of b for each warp at a time. `whole`: nothing of it is behind k1, so that loads wait for no comparison.
    const int step = 4 * WARPS;
    auto add = [&](int k, bool whole) {
        Elements w[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int at = k + step * u;
            w[u] = load(from + at * p.b_line, whole || at < k1 ? columns : 0);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                int at = k + step * u;
                float x = whole || at < k1 ? to_float(a[min(r, rows - 1) * p.a_row + at * p.a_column]) : 0.0f;
#pragma unroll
                for (int i = 0; i < VECTOR; i++) sum[r][i] = fmaf(x, w[u].at[i], sum[r][i]);
            }
    };
    if (columns > 0) {
        int first = 4 * warp + lane / 8, k = k0;
        for (; k + step * AHEAD <= k1; k += step * AHEAD) add(k + first, true);
        if (k < k1) add(k + first, false);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            float s = sum[r][i];
            s += __shfl_xor_sync(WHOLE_WARP, s, 8);
            s += __shfl_xor_sync(WHOLE_WARP, s, 16);
            if (lane < 8) room[(warp * ROWS + r) * COLUMNS + column + i] = s;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS) {
        int c = blockIdx.x * COLUMNS + i % COLUMNS;
        float s = room[i];
        for (int w = 1; w < WARPS; w++) s += room[w * ROWS * COLUMNS + i];
        if (c < p.n) end(i / COLUMNS, c, s);
    }
#endif
}

/// Blocks along z: for each product of a batch, groups of MOST rows; with `offsets` one for each slot, of which only those at
/// the start of MOST rows of an expert have work, and those of unused slots, which become 0.
FEW_KERNEL few_rows(const TA* a, const T* b, const int* offsets, const void* bias, float* partial, TC* c, Few p CHAIN_PARAMETERS) {
    begin();
    __shared__ float room[ROOM];
    __shared__ int of_slot;
#if CLUSTER > 1
    __shared__ float sums[MOST * COLUMNS];
#endif
    i64 batch;
    int row0, rows;
    if (offsets) {
        row0 = blockIdx.z;
        if (threadIdx.x == 0) of_slot = -1;
        __syncthreads();
        for (int e = threadIdx.x; e < p.experts; e += THREADS)
            if (offsets[e] <= row0 && row0 < offsets[e + 1]) of_slot = e;
        __syncthreads();
        batch = of_slot;
        rows = batch < 0 ? 1 : min(MOST, offsets[batch + 1] - row0);
        if (batch >= 0 && (row0 - offsets[batch]) % MOST != 0) return;
    } else {
        int groups = ceil_div(p.m, MOST);
        batch = blockIdx.z / groups, row0 = blockIdx.z % groups * MOST, rows = min(MOST, p.m - row0);
    }
    int k0 = blockIdx.y * p.chunk, k1 = min(k0 + p.chunk, p.k);
    auto store = [&](int row, int column, float v) {
        i64 at = batch * p.c_batch + (row0 + row) * p.c_row + column * p.c_column;
        if (bias && batch >= 0 && blockIdx.y == 0) {
            i64 i = batch * p.bias_batch + (row0 + row) * p.bias_row + column * p.bias_column;
            v += p.wide_bias ? ((const float*)bias)[i] : to_float(((const TC*)bias)[i]);
        }
        if (partial) partial[blockIdx.y * p.total + at] = v;
        else put(c, at, from_float<TC>(v), CHAIN);
    };
#if CLUSTER > 1
    auto end = [&](int row, int column, float v) { sums[row * COLUMNS + column - blockIdx.x * COLUMNS] = v; };
#else
    auto& end = store;
#endif
    if (batch < 0) {
        // c_batch is 0 where there are offsets.
        int column = blockIdx.x * COLUMNS + threadIdx.x;
        if (threadIdx.x < COLUMNS && column < p.n && (CLUSTER == 1 || blockIdx.y == 0)) store(0, column, 0.0f);
        return;
    }
    a += batch * p.a_batch + row0 * p.a_row, b += batch * p.b_batch;
    if (rows == 1) few<1>(room, a, b, p, rows, k0, k1, end);
#if MOST > 1
    else if (rows == 2) few<2>(room, a, b, p, rows, k0, k1, end);
#endif
#if MOST > 2
    else if (rows <= 4) few<4>(room, a, b, p, rows, k0, k1, end);
#endif
#if MOST > 4
    else few<8>(room, a, b, p, rows, k0, k1, end);
#endif
#if CLUSTER > 1
    cluster_sync();
    if (blockIdx.y == 0) {
        for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS) {
            int column = blockIdx.x * COLUMNS + i % COLUMNS;
            if (column >= p.n) continue;
            float v = sums[i];
#pragma unroll
            for (int block = 1; block < CLUSTER; block++) v += number_of(sums + i, block);
            store(i / COLUMNS, column, v);
        }
    }
    // No block ends while the first may still read its memory.
    cluster_sync();
#endif
}

/// The results of the chunks together.
KERNEL few_rows_finish(const float* partial, i64 total, int chunks, TC* c CHAIN_PARAMETERS) {
    begin();
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at < total) put(c, at, from_float<TC>(sum_of_chunks(partial, total, chunks, at)), CHAIN);
}
