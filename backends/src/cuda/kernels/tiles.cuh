// Rows of one head in shared memory, as the tensor cores take them. HEAD is the width of a head: 32, 64 or 128.

/// Warps of a block.
#define WARPS 4
#define THREADS (32 * WARPS)
/// Segments of 8 neighbouring elements, 16 bytes, in a row.
#define SEGMENTS (HEAD / 8)
/// Products of the tensor cores along a head.
#define STEPS (HEAD / 16)

/// Rows of a head, whose segments are shuffled within each row so that the same segment of 8 neighbouring rows lies in all banks.
template <int ROWS> struct Tile {
    __align__(128) uint4 segment[ROWS * SEGMENTS];

    __device__ __forceinline__ uint4* at(int row, int s) {
        return &segment[row * SEGMENTS + (s ^ (SEGMENTS == 4 ? row / 2 % 4 : row % 8))];
    }
};

/// Starts to load rows `from..from + ROWS` of a matrix whose rows are `pitch` apart, 0 beyond the last.
template <int ROWS> __device__ __forceinline__ void load(Tile<ROWS>& to, const T* m, i64 pitch, int from, int rows) {
    constexpr int APART = THREADS / SEGMENTS;
    static_assert(ROWS % APART == 0, "every thread has as many segments");
    int row = threadIdx.x / SEGMENTS, s = threadIdx.x % SEGMENTS;
    const T* at = m + (from + row) * pitch + 8 * s;
#pragma unroll
    for (int i = 0; i < ROWS; i += APART) {
        bool real = from + row + i < rows;
        // A copy of nothing still wants an address that exists.
        copy_async(to.at(row + i, s), real ? at + i * pitch : m, real);
    }
}

/// A of a product: rows `row0..` of a tile by the columns of step c.
template <int ROWS> __device__ __forceinline__ void rows_of(u32 (&a)[4], Tile<ROWS>& tile, int row0, int c) {
    int lane = threadIdx.x % 32;
    ldmatrix(a[0], a[1], a[2], a[3], tile.at(row0 + lane % 16, 2 * c + lane / 16));
}
/// B of two products that are summed over the columns of step c: rows `row0..` of the tile, 8 for each product.
template <int ROWS> __device__ __forceinline__ void across(u32 (&b)[2][2], Tile<ROWS>& tile, int row0, int c) {
    int lane = threadIdx.x % 32;
    ldmatrix(b[0][0], b[0][1], b[1][0], b[1][1], tile.at(row0 + lane / 16 * 8 + lane % 8, 2 * c + lane / 8 % 2));
}
/// B of two products that are summed over rows `row0..row0 + 16` of the tile: the columns of step c, 8 for each product.
template <int ROWS> __device__ __forceinline__ void along(u32 (&b)[2][2], Tile<ROWS>& tile, int row0, int c) {
    int lane = threadIdx.x % 32;
    ldmatrix_transposed(b[0][0], b[0][1], b[1][0], b[1][1], tile.at(row0 + lane % 16, 2 * c + lane / 16));
}
/// A of a product from the sums of two products, which lie side by side; rounded to T.
__device__ __forceinline__ void from_sums(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack(left[0], left[1], T()), a[1] = pack(left[2], left[3], T());
    a[2] = pack(right[0], right[1], T()), a[3] = pack(right[2], right[3], T());
}
