// A linear classifier with its cross entropy. The logits are never in memory: a block computes a tile of them and keeps of
// each row the largest and the sum of exponentials.

/// Sizes: n rows of d elements, classes in total, tiles of classes.
struct Classes { int n, d, classes, tiles; };

/// largest and sum [n, tiles] of the rows of each tile, and the logit of each target.
KERNEL cross_entropy_tiles(const T* x, const T* w, const int* targets, float* largest, float* sum, float* of_target,
                           Classes s) {
    begin();
    __shared__ GemmRoom room;
    __shared__ float logits[TILE][TILE + 1];
    int row0 = blockIdx.y * TILE, class0 = blockIdx.x * TILE;
    for (int i = threadIdx.x; i < TILE * TILE; i += GEMM_THREADS) logits[i / TILE][i % TILE] = -INF_F;
    __syncthreads();
    Matrix left = {x, s.d, 1}, right = {w, 1, s.d};
    gemm_tile(room, left, right, s.n, s.classes, s.d, row0, class0,
              [&](int row, int column, float v) { logits[row - row0][column - class0] = v; });
    __syncthreads();
    int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < TILE; r += GEMM_THREADS / 32) {
        int row = row0 + r;
        // The same for a whole warp.
        if (row >= s.n) break;
        float greatest = warp_max(max_nan(logits[r][lane], logits[r][lane + 32]));
        float total = warp_sum(expf(logits[r][lane] - greatest) + expf(logits[r][lane + 32] - greatest));
        if (lane == 0) {
            largest[(i64)row * s.tiles + blockIdx.x] = greatest;
            sum[(i64)row * s.tiles + blockIdx.x] = total;
            int at = targets[row] - class0;
            if (targets[row] >= 0 && at >= 0 && at < TILE && targets[row] < s.classes) of_target[row] = logits[r][at];
        }
    }
}

/// The tiles of a row together: a warp for each row.
KERNEL cross_entropy_rows(const float* largest, const float* sum, const float* of_target, const int* targets, float* loss,
                          float* lse, Classes s, Fault* fault, int step) {
    begin();
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= s.n) return;
    float greatest = -INF_F, total = 0.0f;
    for (int t = lane; t < s.tiles; t += 32) greatest = max_nan(greatest, largest[(i64)row * s.tiles + t]);
    greatest = warp_max(greatest);
    for (int t = lane; t < s.tiles; t += 32) {
        i64 at = (i64)row * s.tiles + t;
        // A tile of -inf alone has a sum of NaN and adds nothing.
        if (largest[at] != -INF_F || greatest == -INF_F) total += sum[at] * expf(largest[at] - greatest);
    }
    total = warp_sum(total);
    if (lane > 0) return;
    float l = greatest + logf(total);
    int target = targets[row];
    lse[row] = l;
    if (target >= s.classes) {
        reject(fault, step, target);
        loss[row] = NAN_F;
    } else {
        loss[row] = target < 0 ? 0.0f : l - of_target[row];
    }
}

/// c [n, width] = dloss (softmax - [class = target]) for the `width` classes from class0 on.
KERNEL cross_entropy_grad(const T* x, const T* w, const int* targets, const float* lse, const float* dloss, T* c, int class0,
                          int width, Classes s, Fault* fault, int step) {
    begin();
    __shared__ GemmRoom room;
    Matrix left = {x, s.d, 1}, right = {w + (i64)class0 * s.d, 1, s.d};
    gemm_tile(room, left, right, s.n, width, s.d, blockIdx.y * TILE, blockIdx.x * TILE, [&](int row, int column, float v) {
        int target = targets[row];
        float g = 0.0f;
        if (target >= s.classes) {
            reject(fault, step, target);
            g = NAN_F;
        } else if (target >= 0) {
            g = dloss[row] * (expf(v - lse[row]) - (target == class0 + column ? 1.0f : 0.0f));
        }
        c[(i64)row * width + column] = from_float<T>(g);
    });
}
