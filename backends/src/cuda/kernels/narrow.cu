// Matrix products with a result of f32 of a long matrix of bf16 and a narrow one of f32, by the parts of its numbers (parts.cuh):
// logits of a router, and the gradient of its weights. What there is to do is to read the long one, which is copied to shared memory
// some rounds ahead.
//
// x is the long matrix, w the narrow one: c(row, column) = sum over k of x(row, k) w(column, k). NARROW: columns of a tile, 32 or 64.
// X_ALONG_K and W_ALONG_K: whether elements lie together in memory along k, or along the other axis. Lines begin at multiples of 16
// bytes, and have whole segments of 16 bytes.

#define THREADS 256
#define ROWS 64
/// Elements of k of a round: half of them for the first four warps, and half for the others.
#define DEPTH 32
/// Tiles of x in shared memory.
#define STAGES (NARROW > 32 ? 3 : 4)
#define PARTS 3
/// Elements of a line in shared memory: 8 more than there are, so that lines lie in different banks.
#define X_PITCH ((X_ALONG_K ? DEPTH : ROWS) + 8)
#define X_LINES (X_ALONG_K ? ROWS : DEPTH)
#define W_PITCH ((W_ALONG_K ? DEPTH : NARROW) + 8)
#define W_LINES (W_ALONG_K ? NARROW : DEPTH)
/// Rounds for which a thread carries its part of w.
#define AHEAD (NARROW > 32 ? 3 : 4)
/// Segments of 8 elements of x that a thread copies in a round, and segments of 4 of w that it carries.
#define X_SEGMENTS (ROWS * DEPTH / 8 / THREADS)
#define W_SEGMENTS (NARROW * DEPTH / 4 / THREADS)

/// Sizes; strides in elements: of x and w from one line in memory to the next, of c along both axes.
struct Sizes {
    i64 x_line, w_line, c_row, c_column;
    /// Elements of c.
    i64 total;
    int rows, columns, k;
    /// Elements of k of one block; with several blocks for a tile their sums are `partial`.
    int chunk;
};

struct Room {
    __align__(16) u16 x[STAGES][X_LINES][X_PITCH];
    /// Of this round and the next.
    __align__(16) u16 w[2][PARTS][W_LINES][W_PITCH];
};
static_assert(sizeof(Room) <= 48 * 1024 && sizeof(Room) >= 128 * (NARROW / 2) * sizeof(float), "the memory of a block");

/// Starts to copy the tile of x that begins at `row0` and `k0`.
__device__ __forceinline__ void copy_x(u16 (*to)[X_PITCH], const bf16* x, const Sizes& s, int row0, int k0, int end) {
#pragma unroll
    for (int i = 0; i < X_SEGMENTS; i++) {
        const int PER_LINE = (X_ALONG_K ? DEPTH : ROWS) / 8;
        int at = threadIdx.x + i * THREADS, line = at / PER_LINE, in_line = at % PER_LINE * 8;
        int row = row0 + (X_ALONG_K ? line : in_line), k = k0 + (X_ALONG_K ? in_line : line);
        bool real = row < s.rows && k < end;
        copy_async(&to[line][in_line], real ? x + (X_ALONG_K ? row * s.x_line + k : k * s.x_line + row) : x, real);
    }
    copies_end();
}

/// Segments of w on their way from global to shared memory.
struct Carried { Vector<float, 4> segment[W_SEGMENTS]; };

/// Where segment i of a thread begins, along the lines and across them.
struct Walk {
    static const int PER_LINE = (W_ALONG_K ? DEPTH : NARROW) / 4;
    int line, at;
    __device__ __forceinline__ Walk(int i) : line((threadIdx.x + i * THREADS) / PER_LINE), at((threadIdx.x + i * THREADS) % PER_LINE * 4) {}
};

__device__ __forceinline__ Carried fetch_w(const float* w, const Sizes& s, int column0, int k0, int end) {
    Carried carried;
#pragma unroll
    for (int i = 0; i < W_SEGMENTS; i++) {
        Walk walk(i);
        int column = column0 + (W_ALONG_K ? walk.line : walk.at), k = k0 + (W_ALONG_K ? walk.at : walk.line);
        if (column < s.columns && k < end) {
            carried.segment[i] = load_vector<4>(w + (W_ALONG_K ? column * s.w_line + k : k * s.w_line + column));
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) carried.segment[i].at[j] = 0.0f;
        }
    }
    return carried;
}

/// Puts the parts of what was loaded into their tiles.
__device__ __forceinline__ void place_w(u16 (*to)[W_LINES][W_PITCH], const Carried& carried) {
#pragma unroll
    for (int i = 0; i < W_SEGMENTS; i++) {
        Walk walk(i);
        Vector<u16, 4> parts[PARTS];
        parts_of(parts, carried.segment[i]);
#pragma unroll
        for (int p = 0; p < PARTS; p++) store_vector<4>(&to[p][walk.line][walk.at], parts[p]);
    }
}

/// Adds the products of a round to the sums of a warp: of 16 rows from `row0` on, and 16 elements of k from `k` on.
__device__ __forceinline__ void round_of(const Room& room, int stage, int turn, int row0, int k, float (&sum)[NARROW / 8][4]) {
    int lane = threadIdx.x % 32;
    u32 x[4], w[PARTS][NARROW / 8][2];
    {
        int r = row0 + lane / 8 % 2 * 8, q = k + lane / 16 * 8;
#if X_ALONG_K
        ldmatrix(x[0], x[1], x[2], x[3], &room.x[stage][r + lane % 8][q]);
#else
        ldmatrix_transposed(x[0], x[1], x[2], x[3], &room.x[stage][q + lane % 8][r]);
#endif
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int j = 0; j < NARROW / 8; j += 2) {
            int r = 8 * j + lane / 16 * 8, q = k + lane / 8 % 2 * 8;
#if W_ALONG_K
            ldmatrix(w[p][j][0], w[p][j][1], w[p][j + 1][0], w[p][j + 1][1], &room.w[turn][p][r + lane % 8][q]);
#else
            ldmatrix_transposed(w[p][j][0], w[p][j][1], w[p][j + 1][0], w[p][j + 1][1], &room.w[turn][p][q + lane % 8][r]);
#endif
        }
#pragma unroll
    for (int j = 0; j < NARROW / 8; j++) {
        // The small products first.
        float part[4] = {};
#pragma unroll
        for (int p = PARTS - 1; p >= 0; p--) mma(part, x, w[p][j], bf16());
#pragma unroll
        for (int q = 0; q < 4; q++) sum[j][q] += part[q];
    }
}

/// Grid: tiles of rows, tiles of columns, chunks of k.
KERNEL narrow(const bf16* x, const float* w, const float* bias, float* partial, float* c, Sizes s) {
    begin();
    __shared__ Room room;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_of_warp = warp % 4 * 16, half = warp / 4;
    int row0 = blockIdx.x * ROWS, column0 = blockIdx.y * NARROW, first = blockIdx.z * s.chunk, end = min(first + s.chunk, s.k);
    int rounds = ceil_div(end - first, DEPTH);
    float sum[NARROW / 8][4] = {};
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_x(room.x[i], x, s, row0, first + i * DEPTH, end);
    Carried next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) next[i] = fetch_w(w, s, column0, first + i * DEPTH, end);
    for (int i0 = 0; i0 < rounds; i0 += AHEAD)
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int i = i0 + u;
            if (i >= rounds) break;
            place_w(room.w[i % 2], next[u]);
            copies_wait_but<STAGES - 2>();
            __syncthreads();
            // Into the tile of the round before, which every warp is through with.
            copy_x(room.x[(i + STAGES - 1) % STAGES], x, s, row0, first + (i + STAGES - 1) * DEPTH, end);
            next[u] = fetch_w(w, s, column0, first + (i + AHEAD) * DEPTH, end);
            round_of(room, i % STAGES, i % 2, row_of_warp, half * 16, sum);
        }
    copies_wait_but<0>();
    __syncthreads();
    // The second half's sums come to the first.
    float* others = (float*)&room + (warp % 4 * 32 + lane) * 4;
    if (half == 1)
#pragma unroll
        for (int j = 0; j < NARROW / 8; j++)
#pragma unroll
            for (int q = 0; q < 4; q++) others[j * 512 + q] = sum[j][q];
    __syncthreads();
    if (half == 1) return;
    float* to = partial ? partial + blockIdx.z * s.total : c;
    bool wrong = false, pairs = s.c_column == 1 && s.c_row % 2 == 0 && s.total % 2 == 0;
#pragma unroll
    for (int j = 0; j < NARROW / 8; j++)
#pragma unroll
        for (int low = 0; low < 2; low++) {
            int row = row0 + row_of_warp + lane / 4 + 8 * low, column = column0 + 8 * j + lane % 4 * 2;
            if (row >= s.rows || column >= s.columns) continue;
            Vector<float, 2> v;
#pragma unroll
            for (int q = 0; q < 2; q++) {
                v.at[q] = sum[j][2 * low + q] + others[j * 512 + 2 * low + q];
                if (column + q >= s.columns) continue;
                if (bias && blockIdx.z == 0) v.at[q] += bias[column + q];
                wrong |= v.at[q] != v.at[q];
            }
            float* at = to + row * s.c_row + column * s.c_column;
            if (pairs) store_vector<2>(at, v);
            else {
                at[0] = v.at[0];
                if (column + 1 < s.columns) at[s.c_column] = v.at[1];
            }
        }
    if (!wrong) return;
    // In plain arithmetic what was stored as NaN: an infinity has no parts.
    for (int at = 0; at < NARROW / 8 * 4; at++) {
        int row = row0 + row_of_warp + lane / 4 + at % 4 / 2 * 8, column = column0 + at / 4 * 8 + lane % 4 * 2 + at % 2;
        if (row >= s.rows || column >= s.columns) continue;
        float& stored = to[row * s.c_row + column * s.c_column];
        if (stored == stored) continue;
        float v = 0.0f;
        for (int k = first; k < end; k++) {
            bf16 a = x[X_ALONG_K ? row * s.x_line + k : k * s.x_line + row];
            v = fmaf(to_float(a), w[W_ALONG_K ? column * s.w_line + k : k * s.w_line + column], v);
        }
        stored = bias && blockIdx.z == 0 ? v + bias[column] : v;
    }
}
