// The products of a linear classifier with its cross entropy on Hopper: x [rows, d] times w [classes, d]. As in
// cross_entropy.cu, the logits are never in memory.

/// Pairs of logits, of one row and two columns, that a thread has in a tile of N rows: pair q is of row q / 2 * 8 + q % 2 from its first
/// on, and at logit[first_of(q)] and two further.
#define PAIRS(N) ((N) / 4)
__device__ constexpr int first_of(int q) { return q / 2 * 4 + q % 2; }
__device__ __forceinline__ int row_of(int q, const Place& place) { return q / 2 * 8 + place.lane % 4 * 2 + q % 2; }

/// `join` of what the eight lanes with the same rows have, for eight rows at a time: each lane keeps that of row `place.lane / 4` of them.
/// Every round halves the rows that a lane still has, so that it gives away as many as it gets.
template <typename Join>
__device__ __forceinline__ float joined_of_lanes(float (&of)[8], int lane, Join join) {
#pragma unroll
    for (int rows = 4; rows > 0; rows /= 2) {
        bool upper = lane / 4 & rows;
#pragma unroll
        for (int q = 0; q < rows; q++) {
            float other = __shfl_xor_sync(WHOLE_WARP, upper ? of[q] : of[q + rows], 4 * rows);
            of[q] = join(upper ? of[q + rows] : of[q], other);
        }
    }
    return of[0];
}

/// Whether some row of the tile has its target among the 16 classes of a warp, the first of which is `first`.
__device__ __forceinline__ bool has_target(const int* targets, const Tile& t, int lane, int first) {
    bool found = false;
    for (int row = lane; row < t.rows; row += 32) found |= (u32)(targets[t.row0 + row] - first) < 16;
    return __any_sync(WHOLE_WARP, found);
}

/// largest and sum [rows, tiles] of each 64 classes of a row, and the logit of each target.
struct Tiles {
    const int* targets;
    float *largest, *sum, *of_target;
    int tiles;

    template <int N>
    __device__ __forceinline__ void finish(Room& room, const Sizes& s, const Tile& t, Turn& turn, float (&logit)[N / 2]) const {
        Place place;
        int column = t.column0 + place.column(), lane = place.lane;
        bool low = column < s.columns, high = column + 8 < s.columns;
        // What a warp has of each row: the largest of its 16 classes, and the sum of the exponentials relative to that.
        float2(*found)[ROWS] = (float2(*)[ROWS])room.pieces[place.group];
        // The memory may still be read for the tile before.
        named_barrier(1 + place.group, 128);
#pragma unroll
        for (int q0 = 0; q0 < PAIRS(N); q0 += 8) {
            float of[8];
            // Pairs behind the last are those of no row.
            auto a = [&](int q) { return low && q < PAIRS(N) ? logit[first_of(q < PAIRS(N) ? q : 0)] : -INF_F; };
            auto b = [&](int q) { return high && q < PAIRS(N) ? logit[first_of(q < PAIRS(N) ? q : 0) + 2] : -INF_F; };
#pragma unroll
            for (int q = 0; q < 8; q++) of[q] = max_nan(a(q0 + q), b(q0 + q));
            float greatest = joined_of_lanes(of, lane, [](float x, float y) { return max_nan(x, y); });
#pragma unroll
            for (int q = 0; q < 8; q++) {
                // Not -inf, from which nothing may be taken: of it are rows whose logits all are, and their sum is 0.
                float of_row = at_least(__shfl_sync(WHOLE_WARP, greatest, q * 4 + lane % 4), -3e38f);
                of[q] = exp_quick(a(q0 + q) - of_row) + exp_quick(b(q0 + q) - of_row);
            }
            float total = joined_of_lanes(of, lane, [](float x, float y) { return x + y; });
            int q = q0 + lane / 4;
            if (q < PAIRS(N)) found[place.warp][row_of(q, place)] = make_float2(greatest, total);
        }
        if (has_target(targets, t, lane, t.column0 + place.group * 64 + place.warp * 16)) {
#pragma unroll
            for (int q = 0; q < PAIRS(N); q++) {
                int row = row_of(q, place);
                if (row >= t.rows) continue;
                int target = targets[t.row0 + row];
                if (low && target == column) of_target[t.row0 + row] = logit[first_of(q)];
                if (high && target == column + 8) of_target[t.row0 + row] = logit[first_of(q) + 2];
            }
        }
        named_barrier(1 + place.group, 128);
        int tile = t.column0 / 64 + place.group;
        for (int row = place.thread; row < t.rows && tile < tiles; row += 128) {
            float greatest = -INF_F, total = 0.0f;
#pragma unroll
            for (int w = 0; w < 4; w++) greatest = max_nan(greatest, found[w][row].x);
#pragma unroll
            for (int w = 0; w < 4; w++)
                if (found[w][row].x != -INF_F) total += found[w][row].y * exp_quick(found[w][row].x - greatest);
            i64 at = (i64)(t.row0 + row) * tiles + tile;
            largest[at] = greatest;
            sum[at] = total;
        }
    }
};

HOPPER_KERNEL cross_entropy_tiles_hopper(PRODUCT, const int* targets, float* largest, float* sum, float* of_target, int tiles) {
    begin();
    products(x_map, w_map, offsets, s, Tiles{targets, largest, sum, of_target, tiles});
}

/// c [rows, width] = dloss (softmax - [class = target]) for the classes from class0 on.
struct Gradient {
    const int* targets;
    const float *lse, *dloss;
    T* c;
    int class0, classes;
    Fault* fault;
    int step;

    template <int N>
    __device__ __forceinline__ void finish(Room& room, const Sizes& s, const Tile& t, Turn& turn, float (&logit)[N / 2]) const {
        Place place;
        int first = class0 + t.column0, column = first + place.column();
        // Of each row lse and the cotangent of its loss; of one without a target -inf and 0, and of one with a target that is no class
        // NaN. The memory may still be read for the tile before.
        float2* of_row = (float2*)room.pieces[place.group];
        named_barrier(1 + place.group, 128);
        for (int row = place.thread; row < N; row += 128) {
            int at = t.row0 + min(row, t.rows - 1), target = targets[at];
            if (target >= classes) reject(fault, step, target);
            of_row[row] = target < 0 ? make_float2(-INF_F, 0.0f) : make_float2(lse[at], target >= classes ? NAN_F : dloss[at]);
        }
        named_barrier(1 + place.group, 128);
#pragma unroll
        for (int q = 0; q < PAIRS(N); q++) {
            float2 v = of_row[row_of(q, place)];
            bool none = v.x == -INF_F && v.y == 0.0f;
            auto of = [&](float l) { return none ? 0.0f : v.y * exp_quick(l - v.x); };
            logit[first_of(q)] = of(logit[first_of(q)]), logit[first_of(q) + 2] = of(logit[first_of(q) + 2]);
        }
        if (has_target(targets, t, place.lane, first + place.group * 64 + place.warp * 16)) {
#pragma unroll
            for (int q = 0; q < PAIRS(N); q++) {
                int row = row_of(q, place), target = targets[t.row0 + min(row, t.rows - 1)];
                float of_target = of_row[row].y;
                if (target == column) logit[first_of(q)] -= of_target;
                if (target == column + 8) logit[first_of(q) + 2] -= of_target;
            }
        }
        // What is stored goes through the same memory.
        named_barrier(1 + place.group, 128);
        store<N>(room, s, t, turn, logit, c);
    }
};

HOPPER_KERNEL cross_entropy_grad_hopper(PRODUCT, const int* targets, const float* lse, const float* dloss, T* c, int class0,
                                        int classes, Fault* fault, int step) {
    begin();
    products(x_map, w_map, offsets, s, Gradient{targets, lse, dloss, c, class0, classes, fault, step});
}
