// One tile of a matrix product: a block computes TILE x TILE elements of A B, whatever the strides of A and B, and gives each
// to `end(row, column, value)`. WIDE says that T is float: then plain f32 arithmetic, else the tensor cores.
//
// TILE is 64 or 128. The order of a sum depends on its length alone, not on TILE. Rows and columns beyond the ends count as 0
// and are not given out.

/// A matrix in memory, strides in elements: one of them is 1.
struct Matrix {
    const T* at;
    i64 row, column;
};

#if WIDE

#define GEMM_THREADS 256
#define DEPTH 16
/// Sums are made of parts of this many blocks of DEPTH: one long f32 sum would lose digits.
#define PART 4
/// Rows, and columns, of one thread: fours of neighbours, 64 apart.
#define OWN (TILE / 16)
/// Elements that a thread carries for one matrix.
#define CARRIED (TILE * DEPTH / GEMM_THREADS)

struct GemmRoom {
    // Rows of 16 bytes more: fours stay aligned, and rows lie in different banks.
    __align__(16) float a[DEPTH][TILE + 4];
    __align__(16) float b[DEPTH][TILE + 4];
};

/// Part of a stage on its way from global to shared memory.
struct Carried { float element[CARRIED]; };

/// Row and column of element i: neighbouring threads go along the axis that lies together in memory.
__device__ __forceinline__ void element_at(bool along_k, int i, int& r, int& c) {
    r = along_k ? i / DEPTH : i % TILE;
    c = along_k ? i % DEPTH : i / TILE;
}

/// Loads rows `row0..` and columns `k0..` of m (rows x k).
__device__ __forceinline__ Carried fetch(const Matrix& m, int row0, int rows, int k0, int k) {
    Carried carried;
    bool along_k = m.column == 1;
#pragma unroll
    for (int i = 0; i < CARRIED; i++) {
        int r, c;
        element_at(along_k, threadIdx.x + i * GEMM_THREADS, r, c);
        bool inside = row0 + r < rows && k0 + c < k;
        carried.element[i] = inside ? m.at[(i64)(row0 + r) * m.row + (i64)(k0 + c) * m.column] : 0.0f;
    }
    return carried;
}

/// Puts what was loaded into `to[k][row]`.
__device__ __forceinline__ void place(float (*to)[TILE + 4], const Matrix& m, const Carried& carried) {
    bool along_k = m.column == 1;
#pragma unroll
    for (int i = 0; i < CARRIED; i++) {
        int r, c;
        element_at(along_k, threadIdx.x + i * GEMM_THREADS, r, c);
        to[c][r] = carried.element[i];
    }
}

/// The elements of one row of shared memory that belong to place `at` of 16.
__device__ __forceinline__ void own(float (&to)[OWN], const float* row, int at) {
#pragma unroll
    for (int i = 0; i < OWN; i += 4) {
        float4 four = *(const float4*)&row[16 * i + 4 * at];
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
}

template <typename End>
__device__ __forceinline__ void gemm_tile(GemmRoom& room, Matrix a, Matrix b, int m, int n, int k, int m0, int n0, End end) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[OWN][OWN] = {}, part[OWN][OWN] = {};
    // B is read as its transpose, rows along n.
    Matrix bt = {b.at, b.column, b.row};
    Carried next_a = fetch(a, m0, m, 0, k), next_b = fetch(bt, n0, n, 0, k);
    for (int k0 = 0, block = 0; k0 < k; k0 += DEPTH, block++) {
        place(room.a, a, next_a);
        place(room.b, bt, next_b);
        __syncthreads();
        // What the next round needs is on its way while this one computes.
        if (k0 + DEPTH < k) next_a = fetch(a, m0, m, k0 + DEPTH, k), next_b = fetch(bt, n0, n, k0 + DEPTH, k);
#pragma unroll
        for (int c = 0; c < DEPTH; c++) {
            float x[OWN], y[OWN];
            own(x, room.a[c], ty);
            own(y, room.b[c], tx);
#pragma unroll
            for (int i = 0; i < OWN; i++)
#pragma unroll
                for (int j = 0; j < OWN; j++) part[i][j] = fmaf(x[i], y[j], part[i][j]);
        }
        __syncthreads();
        if (block % PART == PART - 1 || k0 + DEPTH >= k) {
#pragma unroll
            for (int i = 0; i < OWN; i++)
#pragma unroll
                for (int j = 0; j < OWN; j++) sum[i][j] += part[i][j], part[i][j] = 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            int row = m0 + i / 4 * 64 + 4 * ty + i % 4, column = n0 + j / 4 * 64 + 4 * tx + j % 4;
            if (row < m && column < n) end(row, column, sum[i][j]);
        }
}

#else

/// Warps with 32 columns each, and half of the rows.
#define GEMM_THREADS (2 * TILE)
#define DEPTH 32
/// Products of the tensor cores, 16 rows each, that a warp has one above the other.
#define TALL (TILE / 32)
/// Elements of a row in shared memory: 8 more than DEPTH, so that rows lie in different banks.
#define PITCH (DEPTH + 8)
/// Segments of 8 neighbouring elements that a thread carries for one matrix.
#define SEGMENTS (TILE * DEPTH / 8 / GEMM_THREADS)

struct GemmRoom {
    __align__(16) u16 a[TILE][PITCH];
    __align__(16) u16 b[TILE][PITCH];
};

/// Part of a stage on its way from global to shared memory.
struct Carried { uint4 segment[SEGMENTS]; };

/// Row and column of the first element of segment s: segments go along the axis that lies together in memory.
__device__ __forceinline__ void segment_at(bool along_k, int s, int& r, int& c) {
    r = along_k ? s / (DEPTH / 8) : s % (TILE / 8) * 8;
    c = along_k ? s % (DEPTH / 8) * 8 : s / (TILE / 8);
}

/// Loads rows `row0..` and columns `k0..` of m (rows x k).
__device__ __forceinline__ Carried fetch(const Matrix& m, int row0, int rows, int k0, int k) {
    Carried carried;
    bool along_k = m.column == 1;
    i64 across = along_k ? m.row : m.column;
    bool aligned = ((u64)m.at % 16 == 0) && across % 8 == 0;
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
        int r, c;
        segment_at(along_k, threadIdx.x + i * GEMM_THREADS, r, c);
        r += row0, c += k0;
        const T* from = m.at + (i64)r * m.row + (i64)c * m.column;
        bool whole = along_k ? r < rows && c + 8 <= k : r + 8 <= rows && c < k;
        if (whole && aligned) {
            carried.segment[i] = *(const uint4*)from;
            continue;
        }
        u32 words[4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            bool inside = along_k ? r < rows && c + j < k : r + j < rows && c < k;
            u32 bits = inside ? from[j].bits : 0;
            if (j % 2 == 0) words[j / 2] = bits;
            else words[j / 2] |= bits << 16;
        }
        carried.segment[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    return carried;
}

/// Puts what was loaded into `to[row][k]`.
__device__ __forceinline__ void place(u16 (*to)[PITCH], const Matrix& m, const Carried& carried) {
    bool along_k = m.column == 1;
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
        int r, c;
        segment_at(along_k, threadIdx.x + i * GEMM_THREADS, r, c);
        uint4 segment = carried.segment[i];
        if (along_k) {
            *(uint4*)&to[r][c] = segment;
        } else {
            u32 words[4] = {segment.x, segment.y, segment.z, segment.w};
#pragma unroll
            for (int j = 0; j < 8; j++) to[r + j][c] = (u16)(words[j / 2] >> (16 * (j % 2)));
        }
    }
}

template <typename End>
__device__ __forceinline__ void gemm_tile(GemmRoom& room, Matrix a, Matrix b, int m, int n, int k, int m0, int n0, End end) {
    // A warp has half of the rows and 32 columns: TALL x 4 products of the tensor cores.
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int group = lane / 4, pair = lane % 4;
    int row0 = warp / (TILE / 32) * (TILE / 2), column0 = warp % (TILE / 32) * 32;
    float sum[TALL][4][4] = {};
    // B is read as its transpose, rows along n.
    Matrix bt = {b.at, b.column, b.row};
    Carried next_a = fetch(a, m0, m, 0, k), next_b = fetch(bt, n0, n, 0, k);
    for (int k0 = 0; k0 < k; k0 += DEPTH) {
        place(room.a, a, next_a);
        place(room.b, bt, next_b);
        __syncthreads();
        // What the next round needs is on its way while this one computes.
        if (k0 + DEPTH < k) next_a = fetch(a, m0, m, k0 + DEPTH, k), next_b = fetch(bt, n0, n, k0 + DEPTH, k);
#pragma unroll
        for (int c = 0; c < DEPTH; c += 16) {
            u32 x[TALL][4], y[4][2];
#pragma unroll
            for (int i = 0; i < TALL; i++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    x[i][q] = *(const u32*)&room.a[row0 + 16 * i + group + q % 2 * 8][c + 2 * pair + q / 2 * 8];
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int q = 0; q < 2; q++)
                    y[j][q] = *(const u32*)&room.b[column0 + 8 * j + group][c + 2 * pair + q * 8];
#pragma unroll
            for (int i = 0; i < TALL; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma(sum[i][j], x[i], y[j], T());
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < TALL; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                int row = m0 + row0 + 16 * i + group + q / 2 * 8, column = n0 + column0 + 8 * j + 2 * pair + q % 2;
                if (row < m && column < n) end(row, column, sum[i][j][q]);
            }
}

#endif

/// A bias row: f32, or T, or none.
struct BiasRow {
    const void* at;
    int wide;
    __device__ __forceinline__ float operator[](i64 i) const {
        if (!at) return 0.0f;
        return wide ? ((const float*)at)[i] : to_float(((const T*)at)[i]);
    }
};
