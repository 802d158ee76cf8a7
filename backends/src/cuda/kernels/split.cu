// Matrix products with a result of f32 on the tensor cores, by the parts of numbers (parts.cuh): each factor is f32, or has 16 bits.
// Sums are made of parts of DEPTH along k, as the tensor cores round what they add up towards 0.
//
// TA, TB: the factors' types; A_PARTS, B_PARTS: the parts of a number, 3 of f32, 2 of f16 and 1 of bf16. A_ALONG_K and B_ALONG_K:
// whether elements lie together in memory along k, or along the other axis.

#define THREADS 128
#define TILE 64
#define DEPTH 32
/// Elements of a line in shared memory: 8 more than there are, so that lines lie in different banks.
#define PITCH(along_k) ((along_k ? DEPTH : TILE) + 8)
#define LINES(along_k) (along_k ? TILE : DEPTH)
/// Segments of 8 elements that a thread carries for one matrix.
#define SEGMENTS (TILE * DEPTH / 8 / THREADS)

/// Sizes; strides in elements from one line in memory to the next, and from one matrix of a batch to the next.
struct Sizes {
    i64 a_line, a_batch, b_line, b_batch, c_batch;
    /// Elements of c.
    i64 total;
    int m, n, k, batch;
    /// Elements of k of one block; with several blocks for a tile their sums are `partial`.
    int chunk;
};

/// Segments of a matrix on their way from global to shared memory.
template <typename Element> struct Carried { Vector<Element, 8> segment[SEGMENTS]; };

/// Where segment i of a thread begins, along the lines and across them.
template <bool ALONG_K> struct Walk {
    static const int PER_LINE = (ALONG_K ? DEPTH : TILE) / 8;
    int line, at;
    __device__ __forceinline__ Walk(int i)
        : line((threadIdx.x + i * THREADS) / PER_LINE), at((threadIdx.x + i * THREADS) % PER_LINE * 8) {}
};

/// Loads the tile that begins at `row0` and `k0` of a matrix of so many rows, and k.
template <bool ALONG_K, typename Element>
__device__ __forceinline__ Carried<Element> fetch(const Element* m, i64 pitch, int row0, int rows, int k0, int k) {
    Carried<Element> carried;
    bool aligned = (u64)m % 16 == 0 && pitch % (16 / (int)sizeof(Element)) == 0;
    if (aligned && row0 + TILE <= rows && k0 + DEPTH <= k) {
#pragma unroll
        for (int i = 0; i < SEGMENTS; i++) {
            Walk<ALONG_K> w(i);
            carried.segment[i] = load_vector<8>(m + ((ALONG_K ? row0 : k0) + w.line) * pitch + (ALONG_K ? k0 : row0) + w.at);
        }
        return carried;
    }
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
        Walk<ALONG_K> w(i);
        int line = (ALONG_K ? row0 : k0) + w.line, at = (ALONG_K ? k0 : row0) + w.at;
        int there = line < (ALONG_K ? rows : k) ? (ALONG_K ? k : rows) - at : 0;
        const Element* from = m + line * pitch + at;
        if (there >= 8 && aligned) {
            carried.segment[i] = load_vector<8>(from);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) carried.segment[i].at[j] = j < there ? from[j] : from_float<Element>(0.0f);
        }
    }
    return carried;
}

/// Puts the parts of what was loaded into their tiles.
template <bool ALONG_K, int PARTS, typename Element>
__device__ __forceinline__ void place(u16 (*to)[LINES(ALONG_K)][PITCH(ALONG_K)], const Carried<Element>& carried) {
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
        Walk<ALONG_K> w(i);
        Vector<u16, 8> parts[PARTS];
        parts_of(parts, carried.segment[i]);
#pragma unroll
        for (int p = 0; p < PARTS; p++) *(uint4*)&to[p][w.line][w.at] = parts[p].fours[0];
    }
}

struct Room {
    __align__(16) u16 left[A_PARTS][LINES(A_ALONG_K)][PITCH(A_ALONG_K)];
    __align__(16) u16 right[B_PARTS][LINES(B_ALONG_K)][PITCH(B_ALONG_K)];
};

/// c = a b + bias. Grid: tiles of rows, tiles of columns, chunks of k of each product of the batch.
KERNEL split(const TA* a, const TB* b, const float* bias, float* partial, float* c, Sizes s) {
    begin();
    __shared__ Room room;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
    int m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE, batch = blockIdx.z % s.batch, chunk = blockIdx.z / s.batch;
    int first = chunk * s.chunk, end = min(first + s.chunk, s.k), row0 = warp / 2 * 32, column0 = warp % 2 * 32;
    a += batch * s.a_batch, b += batch * s.b_batch;
    float sum[2][4][4] = {};
    auto next_a = fetch<A_ALONG_K>(a, s.a_line, m0, s.m, first, end);
    auto next_b = fetch<B_ALONG_K>(b, s.b_line, n0, s.n, first, end);
    for (int k0 = first; k0 < end; k0 += DEPTH) {
        place<A_ALONG_K, A_PARTS>(room.left, next_a);
        place<B_ALONG_K, B_PARTS>(room.right, next_b);
        __syncthreads();
        // What the next round needs is on its way while this one computes.
        if (k0 + DEPTH < end) {
            next_a = fetch<A_ALONG_K>(a, s.a_line, m0, s.m, k0 + DEPTH, end);
            next_b = fetch<B_ALONG_K>(b, s.b_line, n0, s.n, k0 + DEPTH, end);
        }
        float part[2][4][4] = {};
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            u32 x[A_PARTS][2][4], y[B_PARTS][4][2];
#pragma unroll
            for (int p = 0; p < A_PARTS; p++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int r = row0 + 16 * i + lane / 8 % 2 * 8, q = k + lane / 16 * 8;
#if A_ALONG_K
                    ldmatrix(x[p][i][0], x[p][i][1], x[p][i][2], x[p][i][3], &room.left[p][r + lane % 8][q]);
#else
                    ldmatrix_transposed(x[p][i][0], x[p][i][1], x[p][i][2], x[p][i][3], &room.left[p][q + lane % 8][r]);
#endif
                }
#pragma unroll
            for (int p = 0; p < B_PARTS; p++)
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    int r = column0 + 8 * j + lane / 16 * 8, q = k + lane / 8 % 2 * 8;
#if B_ALONG_K
                    ldmatrix(y[p][j][0], y[p][j][1], y[p][j + 1][0], y[p][j + 1][1], &room.right[p][r + lane % 8][q]);
#else
                    ldmatrix_transposed(y[p][j][0], y[p][j][1], y[p][j + 1][0], y[p][j + 1][1], &room.right[p][q + lane % 8][r]);
#endif
                }
            // The small products first.
#pragma unroll
            for (int of = A_PARTS + B_PARTS - 2; of >= 0; of--)
#pragma unroll
                for (int p = 0; p < A_PARTS; p++) {
                    int q = of - p;
                    if (of > 2 || q < 0 || q >= B_PARTS) continue;
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) mma(part[i][j], x[p][i], y[q][j], bf16());
                }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) sum[i][j][q] += part[i][j][q];
    }
    float* to = partial ? partial + chunk * s.total : c;
    bool wrong = false, pairs = s.n % 2 == 0 && s.total % 2 == 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = m0 + row0 + 16 * i + group + half * 8, column = n0 + column0 + 8 * j + 2 * pair;
                if (row >= s.m || column >= s.n) continue;
                Vector<float, 2> v;
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    v.at[q] = sum[i][j][2 * half + q];
                    if (column + q >= s.n) continue;
                    if (bias && chunk == 0) v.at[q] += bias[column + q];
                    wrong |= v.at[q] != v.at[q];
                }
                float* at = to + batch * s.c_batch + (i64)row * s.n + column;
                if (pairs) store_vector<2>(at, v);
                else {
                    at[0] = v.at[0];
                    if (column + 1 < s.n) at[1] = v.at[1];
                }
            }
    if (!wrong) return;
    // An infinity has no parts: what is left of it is a NaN, or meets a part that is 0. What was stored as NaN is computed anew in plain
    // arithmetic.
    for (int at = 0; at < 32; at++) {
        int row = m0 + row0 + at / 16 * 16 + group + at % 4 / 2 * 8, column = n0 + column0 + at / 4 % 4 * 8 + 2 * pair + at % 2;
        if (row >= s.m || column >= s.n) continue;
        float& stored = to[batch * s.c_batch + (i64)row * s.n + column];
        if (stored == stored) continue;
        float v = 0.0f;
        for (int k = first; k < end; k++) {
            TA x = a[A_ALONG_K ? row * s.a_line + k : k * s.a_line + row];
            TB y = b[B_ALONG_K ? column * s.b_line + k : k * s.b_line + column];
            v = fmaf(to_float(x), to_float(y), v);
        }
        stored = bias && chunk == 0 ? v + bias[column] : v;
    }
}
