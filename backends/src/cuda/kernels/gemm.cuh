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

/// Where a thread's first element is, row and column, and how far the next is from it: neighbouring threads go along the axis
/// that lies together in memory.
struct Walk {
    int r, c, dr, dc;
    __device__ __forceinline__ Walk(bool along_k) {
        r = along_k ? threadIdx.x / DEPTH : threadIdx.x % TILE, dr = along_k ? GEMM_THREADS / DEPTH : 0;
        c = along_k ? threadIdx.x % DEPTH : threadIdx.x / TILE, dc = along_k ? 0 : GEMM_THREADS / TILE;
    }
};

/// Loads rows `row0..` and columns `k0..` of m (rows x k).
__device__ __forceinline__ Carried fetch(const Matrix& m, int row0, int rows, int k0, int k) {
    Carried carried;
    Walk w(m.column == 1);
    int r = row0 + w.r, c = k0 + w.c;
    const T* from = m.at + r * m.row + c * m.column;
    i64 step = w.dr * m.row + w.dc * m.column;
#pragma unroll
    for (int i = 0; i < CARRIED; i++) {
        bool inside = r + i * w.dr < rows && c + i * w.dc < k;
        carried.element[i] = inside ? from[i * step] : 0.0f;
    }
    return carried;
}

/// Puts what was loaded into `to[k][row]`.
__device__ __forceinline__ void place(float (*to)[TILE + 4], const Matrix& m, const Carried& carried) {
    Walk w(m.column == 1);
#pragma unroll
    for (int i = 0; i < CARRIED; i++) to[w.c + i * w.dc][w.r + i * w.dr] = carried.element[i];
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

/// Where a thread's first segment begins, row and column, and how far the next is from it: segments go along the axis that lies
/// together in memory.
struct Walk {
    int r, c, dr, dc;
    __device__ __forceinline__ Walk(bool along_k) {
        r = along_k ? threadIdx.x / (DEPTH / 8) : threadIdx.x % (TILE / 8) * 8, dr = along_k ? GEMM_THREADS / (DEPTH / 8) : 0;
        c = along_k ? threadIdx.x % (DEPTH / 8) * 8 : threadIdx.x / (TILE / 8), dc = along_k ? 0 : GEMM_THREADS / (TILE / 8);
    }
};

/// Loads rows `row0..` and columns `k0..` of m (rows x k).
__device__ __forceinline__ Carried fetch(const Matrix& m, int row0, int rows, int k0, int k) {
    Carried carried;
    bool along_k = m.column == 1;
    bool aligned = ((u64)m.at % 16 == 0) && (along_k ? m.row : m.column) % 8 == 0;
    Walk w(along_k);
    int r = row0 + w.r, c = k0 + w.c;
    const T* at = m.at + r * m.row + c * m.column;
    i64 step = w.dr * m.row + w.dc * m.column;
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++, r += w.dr, c += w.dc) {
        const T* from = at + i * step;
        // How many of the 8 elements are there: they go on along k, or along the rows.
        int there = along_k ? (r < rows ? k - c : 0) : (c < k ? rows - r : 0);
        if (there >= 8 && aligned) {
            carried.segment[i] = *(const uint4*)from;
            continue;
        }
        u32 words[4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 bits = j < there ? from[j].bits : 0;
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
    Walk w(along_k);
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
        int r = w.r + i * w.dr, c = w.c + i * w.dc;
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
