// Matrix products of f32 numbers over a short k with a large result of f32, by the parts of numbers (parts.cuh): what the gradient of
// a router's logits gives to the tokens. What there is to do is to write the result. A block keeps its columns of w in shared memory;
// its warps go through rows of x, each by itself, and load the next ones while they compute.
//
// c [rows, columns] = x [rows, k] w [k, columns] + bias. SHORT: 32 or 64, at least k, which is even. Columns are a multiple of 4.

#define THREADS 128
/// Columns of a block, and rows of a warp at a time.
#define COLUMNS 64
#define ROWS 16
#define PARTS 3
#define STEPS (SHORT / 16)
/// Elements of a line in shared memory: 8 more than there are, so that lines lie in different banks.
#define PITCH (COLUMNS + 8)

struct Sizes { int rows, columns, k; };

struct Room {
    __align__(16) u16 w[PARTS][SHORT][PITCH];
    /// Of each warp.
    __align__(16) float result[THREADS / 32][ROWS][COLUMNS + 4];
};

/// A lane's numbers of ROWS rows of x, in pairs, as mma takes their parts.
struct Rows { Vector<float, 2> pair[STEPS][4]; };

__device__ __forceinline__ Rows fetch(const float* x, const Sizes& s, int row0) {
    int lane = threadIdx.x % 32;
    Rows rows;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = row0 + lane / 4 + i % 2 * 8, k = step * 16 + lane % 4 * 2 + i / 2 * 8;
            if (row < s.rows && k < s.k) {
                rows.pair[step][i] = load_vector<2>(x + (i64)row * s.k + k);
            } else {
                rows.pair[step][i].at[0] = rows.pair[step][i].at[1] = 0.0f;
            }
        }
    return rows;
}

/// What a lane stored as NaN, in plain arithmetic: an infinity has no parts. By itself, as so much code would slow the loop that never
/// needs it.
__device__ __noinline__ void compute_anew(const float* x, const float* w, const float* bias, float* c, const Sizes& s, int row0, int first) {
    int lane = threadIdx.x % 32;
    for (int at = 0; at < ROWS / 2 * 4; at++) {
        int row = row0 + at / 4 * 2 + lane / 16, column = first + lane % 16 * 4 + at % 4;
        if (row >= s.rows || column >= s.columns) continue;
        float& stored = c[(i64)row * s.columns + column];
        if (stored == stored) continue;
        float v = 0.0f;
        for (int k = 0; k < s.k; k++) v = fmaf(x[(i64)row * s.k + k], w[(i64)k * s.columns + column], v);
        stored = bias ? v + bias[column] : v;
    }
}

/// Grid: tiles of columns, and blocks that share out the rows.
KERNEL short_k(const float* x, const float* w, const float* bias, float* c, Sizes s) {
    begin();
    __shared__ Room room;
    int lane = threadIdx.x % 32, first = blockIdx.x * COLUMNS, apart = gridDim.y * (THREADS / 32) * ROWS;
    int row0 = (blockIdx.y * (THREADS / 32) + threadIdx.x / 32) * ROWS;
    Rows next = fetch(x, s, row0);
    for (int at = threadIdx.x; at < SHORT * COLUMNS / 4; at += THREADS) {
        int k = at / (COLUMNS / 4), column = at % (COLUMNS / 4) * 4;
        Vector<float, 4> v;
        if (k < s.k && first + column < s.columns) {
            v = load_vector<4>(w + (i64)k * s.columns + first + column);
        } else {
            v.at[0] = v.at[1] = v.at[2] = v.at[3] = 0.0f;
        }
        Vector<u16, 4> parts[PARTS];
        parts_of(parts, v);
#pragma unroll
        for (int p = 0; p < PARTS; p++) store_vector<4>(&room.w[p][k][column], parts[p]);
    }
    __syncthreads();
    float (*mine)[COLUMNS + 4] = room.result[threadIdx.x / 32];
    for (; row0 < s.rows; row0 += apart) {
        Rows now = next;
        next = fetch(x, s, row0 + apart);
        float sum[COLUMNS / 8][4] = {};
#pragma unroll
        for (int k0 = 0; k0 < STEPS; k0 += 2) {
            float part[COLUMNS / 8][4] = {};
#pragma unroll
            for (int step = k0; step < k0 + 2; step++) {
                u32 a[PARTS][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    Vector<float, 2> v = now.pair[step][i];
#pragma unroll
                    for (int p = 0; p < PARTS; p++) {
                        u32 low = first_part(v.at[0]), high = first_part(v.at[1]);
                        a[p][i] = low | high << 16;
                    }
                }
                // The small products first: those of one part of w together.
#pragma unroll
                for (int q = PARTS - 1; q >= 0; q--) {
                    u32 b[COLUMNS / 8][2];
#pragma unroll
                    for (int j = 0; j < COLUMNS / 8; j += 2)
                        ldmatrix_transposed(b[j][0], b[j][1], b[j + 1][0], b[j + 1][1],
                                            &room.w[q][step * 16 + lane / 8 % 2 * 8 + lane % 8][8 * j + lane / 16 * 8]);
#pragma unroll
                    for (int p = PARTS - 1 - q; p >= 0; p--)
#pragma unroll
                        for (int j = 0; j < COLUMNS / 8; j++) mma(part[j], a[p], b[j], bf16());
                }
            }
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) sum[j][q] += part[j][q];
        }
        // Through shared memory, so that a row's numbers are stored together.
        __syncwarp();
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int low = 0; low < 2; low++) {
                Vector<float, 2> v;
                v.at[0] = sum[j][2 * low], v.at[1] = sum[j][2 * low + 1];
                store_vector<2>(&mine[lane / 4 + 8 * low][8 * j + lane % 4 * 2], v);
            }
        __syncwarp();
        bool wrong = false;
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) {
            int row = row0 + 2 * i + lane / 16, column = lane % 16 * 4;
            if (row >= s.rows || first + column >= s.columns) continue;
            Vector<float, 4> v = load_vector<4>(&mine[2 * i + lane / 16][column]);
#pragma unroll
            for (int q = 0; q < 4; q++) {
                if (bias) v.at[q] += bias[first + column + q];
                wrong |= v.at[q] != v.at[q];
            }
            store_vector<4>(c + (i64)row * s.columns + first + column, v);
        }
        if (wrong) compute_anew(x, w, bias, c, s, row0, first);
    }
}
