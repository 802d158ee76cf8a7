// Matrix products: plain and batched, M-grouped (rows of an expert times its weights), K-grouped (gradient of the weights). To the first
// two a chain can be joined (chain.cuh).

/// Sizes and strides, in elements; c is row-major.
struct Product {
    i64 a_row, a_column, a_batch;
    i64 b_row, b_column, b_batch;
    i64 c_batch;
    int m, n, k;
    /// The bias is f32 although T is not.
    int wide_bias;
};

/// c = a b + bias + add, for blockIdx.z of a batch. With `sum` the f32 result goes there and c is left alone; `add` is f32 of
/// the same shape, and may be `sum`.
KERNEL gemm(const T* a, const T* b, const void* bias, const float* add, float* sum, T* c, Product p CHAIN_PARAMETERS) {
    begin();
    __shared__ GemmRoom room;
    i64 batch = blockIdx.z;
    Matrix left = {a + batch * p.a_batch, p.a_row, p.a_column}, right = {b + batch * p.b_batch, p.b_row, p.b_column};
    BiasRow row_of_bias = {bias, p.wide_bias};
    gemm_tile(room, left, right, p.m, p.n, p.k, blockIdx.y * TILE, blockIdx.x * TILE, [&](int row, int column, float v) {
        i64 at = batch * p.c_batch + (i64)row * p.n + column;
        v += row_of_bias[column];
        if (add) v += add[at];
        if (sum) sum[at] = v;
        else put(c, at, from_float<T>(v), CHAIN);
    });
}

/// The most experts: their tiles are counted in shared memory.
#define MOST_EXPERTS 1024

/// Rows of an expert's segment times its weights. A block finds its tile by counting those of the experts before it: segments
/// are cut into tiles one by one, so that no tile crosses the border of a segment. Behind the last expert the unused slots
/// form a segment of their own, which becomes 0.
KERNEL gemm_m_grouped(const T* rows, const T* w, const int* offsets, const void* bias, T* out, int experts,
                      Product p CHAIN_PARAMETERS) {
    begin();
    __shared__ GemmRoom room;
    __shared__ int tiles[MOST_EXPERTS + 1];
    __shared__ int my_expert, my_tile;
    for (int e = threadIdx.x; e <= experts; e += GEMM_THREADS) {
        int from = offsets[e], to = e < experts ? offsets[e + 1] : p.m;
        tiles[e] = ceil_div(to - from, TILE);
    }
    if (threadIdx.x == 0) my_expert = -1;
    __syncthreads();
    for (int e = threadIdx.x; e <= experts; e += GEMM_THREADS) {
        int before = 0;
        for (int i = 0; i < e; i++) before += tiles[i];
        int tile = (int)blockIdx.y - before;
        if (tile >= 0 && tile < tiles[e]) my_expert = e, my_tile = tile;
    }
    __syncthreads();
    int e = my_expert;
    if (e < 0) return;
    int from = offsets[e], to = e < experts ? offsets[e + 1] : p.m;
    int row0 = my_tile * TILE, column0 = blockIdx.x * TILE;
    if (e == experts) {
        for (int i = threadIdx.x; i < TILE * TILE; i += GEMM_THREADS) {
            int row = row0 + i / TILE, column = column0 + i % TILE;
            if (row < to - from && column < p.n) put(out, (i64)(from + row) * p.n + column, from_float<T>(0.0f), CHAIN);
        }
        return;
    }
    Matrix left = {rows + (i64)from * p.a_row, p.a_row, 1}, right = {w + e * p.b_batch, p.b_row, p.b_column};
    BiasRow row_of_bias = {bias, p.wide_bias};
    gemm_tile(room, left, right, to - from, p.n, p.k, row0, column0, [&](int row, int column, float v) {
        put(out, (i64)(from + row) * p.n + column, from_float<T>(v + row_of_bias[(i64)e * p.n + column]), CHAIN);
    });
}

/// out[e] = a^T b over the segment of expert e = blockIdx.z; 0 where that is empty.
KERNEL gemm_k_grouped(const T* a, const T* b, const int* offsets, T* out, Product p) {
    begin();
    __shared__ GemmRoom room;
    i64 e = blockIdx.z;
    int from = offsets[e], to = offsets[e + 1];
    Matrix left = {a + (i64)from * p.m, 1, p.m}, right = {b + (i64)from * p.n, p.n, 1};
    T* c = out + e * p.c_batch;
    gemm_tile(room, left, right, p.m, p.n, to - from, blockIdx.y * TILE, blockIdx.x * TILE,
              [&](int row, int column, float v) { c[(i64)row * p.n + column] = from_float<T>(v); });
}
