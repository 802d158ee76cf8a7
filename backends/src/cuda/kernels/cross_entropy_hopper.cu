// The products of a linear classifier with its cross entropy on Hopper: x [rows, d] times w [classes, d]. As in
// cross_entropy.cu, the logits are never in memory.

/// largest and sum [rows, tiles] of each 64 classes of a row, and the logit of each target.
struct Tiles {
    const int* targets;
    float *largest, *sum, *of_target;
    int tiles;

    template <int N>
    __device__ __forceinline__ void finish(Room& room, const Sizes& s, const Tile& t, Turn& turn, float (&logit)[N / 2]) const {
        Place place;
        int column = t.column0 + place.column();
        bool low = column < s.columns, high = column + 8 < s.columns;
        // What a warp has of each row: the largest of its 16 classes, and the sum of the exponentials relative to that.
        float2(*found)[ROWS] = (float2(*)[ROWS])room.pieces[place.group];
        // The memory may still be read for the tile before.
        named_barrier(1 + place.group, 128);
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            // Once for each row: the second sum of the pair of columns is 2 further.
            if (i % 4 >= 2) continue;
            int row = i / 4 * 8 + place.lane % 4 * 2 + i % 2;
            float a = low ? logit[i] : -INF_F, b = high ? logit[i + 2] : -INF_F;
            float greatest = max_nan(a, b);
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) greatest = max_nan(greatest, __shfl_xor_sync(WHOLE_WARP, greatest, lanes));
            float total = greatest == -INF_F ? 0.0f : expf(a - greatest) + expf(b - greatest);
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(WHOLE_WARP, total, lanes);
            if (place.lane < 4) found[place.warp][row] = make_float2(greatest, total);
            if (row < t.rows) {
                int target = targets[t.row0 + row];
                if (low && target == column) of_target[t.row0 + row] = logit[i];
                if (high && target == column + 8) of_target[t.row0 + row] = logit[i + 2];
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
                if (found[w][row].x != -INF_F) total += found[w][row].y * expf(found[w][row].x - greatest);
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

    __device__ __forceinline__ float of(float logit, int column, int target, float lse, float dloss) const {
        if (target >= classes) return NAN_F;
        if (target < 0) return 0.0f;
        return dloss * (expf(logit - lse) - (target == column ? 1.0f : 0.0f));
    }

    template <int N>
    __device__ __forceinline__ void finish(Room& room, const Sizes& s, const Tile& t, Turn& turn, float (&logit)[N / 2]) const {
        Place place;
        int column = class0 + t.column0 + place.column();
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            if (i % 4 >= 2) continue;
            int row = i / 4 * 8 + place.lane % 4 * 2 + i % 2, at = t.row0 + min(row, t.rows - 1);
            int target = targets[at];
            if (target >= classes) reject(fault, step, target);
            logit[i] = of(logit[i], column, target, lse[at], dloss[at]);
            logit[i + 2] = of(logit[i + 2], column + 8, target, lse[at], dloss[at]);
        }
        store<N>(room, s, t, turn, logit, c);
    }
};

HOPPER_KERNEL cross_entropy_grad_hopper(PRODUCT, const int* targets, const float* lse, const float* dloss, T* c, int class0,
                                        int classes, Fault* fault, int step) {
    begin();
    products(x_map, w_map, offsets, s, Gradient{targets, lse, dloss, c, class0, classes, fault, step});
}
