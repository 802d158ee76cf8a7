// A linear classifier with its cross entropy and its divergence from a teacher: either a whole one (`distillation_*`), whose logits
// are computed beside the student's and are never in memory either, or what is kept of one (`kept_*`): the log-probabilities of its
// likeliest tokens, and of all others together.
//
// SOFT says that the temperature is not 1, so that the student has two softmaxes. `colder` is 1 / T.

/// Sizes: n rows of d elements, classes in total, tiles of classes.
struct Classes { int n, d, classes, tiles; };

/// The largest of a row of a tile in shared memory and the sum of exponentials of what is less; 0 of nothing but -inf.
__device__ __forceinline__ void tile_sums(const float* row, int lane, float scale, float& greatest, float& total) {
    float a = row[lane] * scale, b = row[lane + 32] * scale;
    greatest = warp_max(max_nan(a, b));
    float shift = greatest == -INF_F ? 0.0f : greatest;
    total = warp_sum(expf(a - shift) + expf(b - shift));
}

/// The largest and the sum of all tiles of a row, from those of each.
__device__ __forceinline__ void row_sums(const float* largest, const float* sum, int tiles, int lane, float& greatest,
                                         float& total) {
    greatest = -INF_F, total = 0.0f;
    for (int t = lane; t < tiles; t += 32) greatest = max_nan(greatest, largest[t]);
    greatest = warp_max(greatest);
    float shift = greatest == -INF_F ? 0.0f : greatest;
    for (int t = lane; t < tiles; t += 32) total += sum[t] * expf(largest[t] - shift);
    total = warp_sum(total);
}

/// The loss of a row, by its first lane; whether the row counts for kd: 1, 0 for an ignored one, NaN for a bad target.
__device__ __forceinline__ float row_loss(int target, const Classes& s, float lse, const float* of_target, float* loss,
                                          Fault* fault, int step) {
    if (target >= s.classes) {
        reject(fault, step, target);
        *loss = NAN_F;
        return NAN_F;
    }
    *loss = target < 0 ? 0.0f : lse - *of_target;
    return target < 0 ? 0.0f : 1.0f;
}

/// Of the rows of each tile, for student, student at T (if SOFT) and teacher at T: the largest and the sum [n, tiles] each, in
/// this order in `sums`; then the teacher's sum of exp(teacher - largest) (teacher - student). And the logit of each target.
KERNEL distillation_tiles(const T* x, const T* w, const int* targets, const T* teacher_x, const T* teacher_w, float* sums,
                          float* of_target, Classes s, int width, float colder) {
    begin();
    __shared__ GemmRoom room;
    __shared__ float student[TILE][TILE + 1];
    __shared__ float teacher[TILE][TILE + 1];
    int row0 = blockIdx.y * TILE, class0 = blockIdx.x * TILE;
    for (int i = threadIdx.x; i < TILE * TILE; i += GEMM_THREADS)
        student[i / TILE][i % TILE] = teacher[i / TILE][i % TILE] = -INF_F;
    __syncthreads();
    gemm_tile(room, Matrix{x, s.d, 1}, Matrix{w, 1, s.d}, s.n, s.classes, s.d, row0, class0,
              [&](int row, int column, float v) { student[row - row0][column - class0] = v; });
    gemm_tile(room, Matrix{teacher_x, width, 1}, Matrix{teacher_w, 1, width}, s.n, s.classes, width, row0, class0,
              [&](int row, int column, float v) { teacher[row - row0][column - class0] = v; });
    __syncthreads();
    int lane = threadIdx.x % 32;
    i64 all = (i64)s.n * s.tiles;
    for (int r = threadIdx.x / 32; r < TILE; r += GEMM_THREADS / 32) {
        int row = row0 + r;
        // The same for a whole warp.
        if (row >= s.n) break;
        float* to = sums + (i64)row * s.tiles + blockIdx.x;
        float greatest, total;
        tile_sums(student[r], lane, 1.0f, greatest, total);
        if (lane == 0) to[0] = greatest, to[all] = total;
        to += 2 * all;
#if SOFT
        tile_sums(student[r], lane, colder, greatest, total);
        if (lane == 0) to[0] = greatest, to[all] = total;
        to += 2 * all;
#endif
        tile_sums(teacher[r], lane, colder, greatest, total);
        float gap = 0.0f;
        for (int column = lane; column < TILE && class0 + column < s.classes; column += 32) {
            float a = teacher[r][column] * colder;
            gap += expf(a - greatest) * (a - student[r][column] * colder);
        }
        gap = warp_sum(gap);
        if (lane == 0) {
            to[0] = greatest, to[all] = total, to[2 * all] = gap;
            int at = targets[row] - class0;
            if (targets[row] >= 0 && at >= 0 && at < TILE && targets[row] < s.classes) of_target[row] = student[r][at];
        }
    }
}

/// The tiles of a row together: a warp for each row.
KERNEL distillation_rows(const float* sums, const float* of_target, const int* targets, float* loss, float* kd, float* lse,
                         float* soft_lse, float* teacher_lse, Classes s, float temperature, Fault* fault, int step) {
    begin();
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= s.n) return;
    i64 all = (i64)s.n * s.tiles;
    const float* from = sums + (i64)row * s.tiles;
    float greatest, total;
    row_sums(from, from + all, s.tiles, lane, greatest, total);
    float hard = greatest + logf(total), soft = hard;
    from += 2 * all;
#if SOFT
    row_sums(from, from + all, s.tiles, lane, greatest, total);
    soft = greatest + logf(total);
    from += 2 * all;
#endif
    row_sums(from, from + all, s.tiles, lane, greatest, total);
    float gap = 0.0f;
    for (int t = lane; t < s.tiles; t += 32) gap += from[2 * all + t] * expf(from[t] - greatest);
    gap = warp_sum(gap);
    if (lane > 0) return;
    float of_teacher = greatest + logf(total);
    lse[row] = hard, soft_lse[row] = soft, teacher_lse[row] = of_teacher;
    float counts = row_loss(targets[row], s, hard, of_target + row, loss + row, fault, step);
    kd[row] = counts == 0.0f ? 0.0f : counts * temperature * temperature * (gap / total + (soft - of_teacher));
}

/// c [n, width] for the `width` classes from class0 on: dloss (q - [class = target]) + dkd T (Q - P).
KERNEL distillation_grad(const T* x, const T* w, const int* targets, const T* teacher_x, const T* teacher_w, const float* lse,
                         const float* soft_lse, const float* teacher_lse, const float* dloss, const float* dkd, T* c,
                         int class0, int width, Classes s, int teacher_width, float temperature, float colder, Fault* fault,
                         int step) {
    begin();
    __shared__ GemmRoom room;
    __shared__ float p[TILE][TILE + 1];
    int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    gemm_tile(room, Matrix{teacher_x, teacher_width, 1}, Matrix{teacher_w + (i64)class0 * teacher_width, 1, teacher_width},
              s.n, width, teacher_width, row0, column0, [&](int row, int column, float v) {
                  p[row - row0][column - column0] = expf(v * colder - teacher_lse[row]);
              });
    __syncthreads();
    gemm_tile(room, Matrix{x, s.d, 1}, Matrix{w + (i64)class0 * s.d, 1, s.d}, s.n, width, s.d, row0, column0,
              [&](int row, int column, float v) {
                  int target = targets[row];
                  float g = 0.0f;
                  if (target >= s.classes) {
                      reject(fault, step, target);
                      g = NAN_F;
                  } else if (target >= 0) {
                      float q = expf(v - lse[row]);
#if SOFT
                      float soft = expf(v * colder - soft_lse[row]);
#else
                      float soft = q;
#endif
                      g = dloss[row] * (q - (target == class0 + column ? 1.0f : 0.0f));
                      g += dkd[row] * temperature * (soft - p[row - row0][column - column0]);
                  }
                  c[(i64)row * width + column] = from_float<T>(g);
              });
}

/// Of the rows of each tile: the largest and the sum [n, tiles] of all classes (if SOFT), then of those that are not kept, at T. And
/// the logits of the kept tokens at T, and of each target.
KERNEL kept_tiles(const T* x, const T* w, const int* targets, const int* ids, float* sums, float* logits_kept,
                  float* of_target, Classes s, int kept, float colder, Fault* fault, int step) {
    begin();
    __shared__ GemmRoom room;
    __shared__ float logits[TILE][TILE + 1];
    int row0 = blockIdx.y * TILE, class0 = blockIdx.x * TILE;
    for (int i = threadIdx.x; i < TILE * TILE; i += GEMM_THREADS) logits[i / TILE][i % TILE] = -INF_F;
    __syncthreads();
    gemm_tile(room, Matrix{x, s.d, 1}, Matrix{w, 1, s.d}, s.n, s.classes, s.d, row0, class0,
              [&](int row, int column, float v) { logits[row - row0][column - class0] = v; });
    __syncthreads();
    int lane = threadIdx.x % 32;
    i64 all = (i64)s.n * s.tiles;
    for (int r = threadIdx.x / 32; r < TILE; r += GEMM_THREADS / 32) {
        int row = row0 + r;
        // The same for a whole warp.
        if (row >= s.n) break;
        float* to = sums + (i64)row * s.tiles + blockIdx.x;
        float greatest, total;
#if SOFT
        tile_sums(logits[r], lane, 1.0f, greatest, total);
        if (lane == 0) to[0] = greatest, to[all] = total;
        to += 2 * all;
#endif
        if (lane == 0) {
            int at = targets[row] - class0;
            if (targets[row] >= 0 && at >= 0 && at < TILE && targets[row] < s.classes) of_target[row] = logits[r][at];
        }
        __syncwarp();
        for (int k = lane; k < kept; k += 32) {
            int id = ids[(i64)row * kept + k], at = id - class0;
            if (id < 0 || id >= s.classes) {
                reject(fault, step, id);
            } else if (at >= 0 && at < TILE) {
                logits_kept[(i64)row * kept + k] = logits[r][at] * colder;
                logits[r][at] = -INF_F;
            }
        }
        __syncwarp();
        tile_sums(logits[r], lane, colder, greatest, total);
        if (lane == 0) to[0] = greatest, to[all] = total;
    }
}

/// p (ln p - ln q), and 0 where p is.
__device__ __forceinline__ float divergence(float log_p, float log_q) {
    float p = expf(log_p);
    return p == 0.0f ? 0.0f : p * (log_p - log_q);
}

/// The tiles of a row together: a warp for each row.
KERNEL kept_rows(const float* sums, const float* logits_kept, const float* of_target, const int* targets, const float* log_p,
                 const float* log_tail, float* loss, float* kd, float* lse, float* soft_lse, float* tail_lse, Classes s, int kept,
                 float temperature, Fault* fault, int step) {
    begin();
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= s.n) return;
    i64 all = (i64)s.n * s.tiles;
    const float* from = sums + (i64)row * s.tiles;
    float greatest, total, hard = 0.0f;
#if SOFT
    row_sums(from, from + all, s.tiles, lane, greatest, total);
    hard = greatest + logf(total);
    from += 2 * all;
#endif
    row_sums(from, from + all, s.tiles, lane, greatest, total);
    float tail = total == 0.0f ? -INF_F : greatest + logf(total);
    const float* own = logits_kept + (i64)row * kept;
    const float* teacher = log_p + (i64)row * kept;
    float most = tail;
    for (int k = lane; k < kept; k += 32) most = max_nan(most, own[k]);
    most = warp_max(most);
    float sum = 0.0f;
    for (int k = lane; k < kept; k += 32) sum += expf(own[k] - most);
    float soft = most + logf(warp_sum(sum) + expf(tail - most));
    sum = 0.0f;
    for (int k = lane; k < kept; k += 32) sum += divergence(teacher[k], own[k] - soft);
    sum = warp_sum(sum);
    if (lane > 0) return;
#if !SOFT
    hard = soft;
#endif
    lse[row] = hard, soft_lse[row] = soft, tail_lse[row] = tail;
    float counts = row_loss(targets[row], s, hard, of_target + row, loss + row, fault, step);
    sum += divergence(log_tail[row], tail - soft);
    kd[row] = counts == 0.0f ? 0.0f : counts * temperature * temperature * sum;
}

/// c [n, width] for the `width` classes from class0 on: dloss (q - [class = target]) + dkd T (s Q - P), where s is the sum of the
/// teacher's probabilities and P that of a kept token, or the tail's share of another.
KERNEL kept_grad(const T* x, const T* w, const int* targets, const int* ids, const float* log_p, const float* log_tail,
                 const float* lse, const float* soft_lse, const float* tail_lse, const float* dloss, const float* dkd, T* c,
                 int class0, int width, Classes s, int kept, float temperature, float colder, Fault* fault, int step) {
    begin();
    __shared__ GemmRoom room;
    __shared__ float logits[TILE][TILE + 1];
    __shared__ u8 is_kept[TILE][TILE];
    int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    for (int i = threadIdx.x; i < TILE * TILE; i += GEMM_THREADS) is_kept[i / TILE][i % TILE] = 0;
    gemm_tile(room, Matrix{x, s.d, 1}, Matrix{w + (i64)class0 * s.d, 1, s.d}, s.n, width, s.d, row0, column0,
              [&](int row, int column, float v) { logits[row - row0][column - column0] = v; });
    __syncthreads();
    int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < TILE; r += GEMM_THREADS / 32) {
        int row = row0 + r;
        // The same for a whole warp.
        if (row >= s.n) break;
        int target = targets[row];
        float of_loss = dloss[row], of_kd = dkd[row] * temperature;
        if (target >= s.classes) {
            reject(fault, step, target);
            of_loss = of_kd = NAN_F;
        } else if (target < 0) {
            of_loss = of_kd = 0.0f;
        }
        float hard = lse[row], soft = soft_lse[row], tail = tail_lse[row], p_tail = expf(log_tail[row]);
        float sum = 0.0f;
        for (int k = lane; k < kept; k += 32) sum += expf(log_p[(i64)row * kept + k]);
        sum = warp_sum(sum) + p_tail;
        auto own = [&](float logit) {
            float q = expf(logit - hard);
#if SOFT
            return of_loss * q + of_kd * sum * expf(logit * colder - soft);
#else
            return (of_loss + of_kd * sum) * q;
#endif
        };
        for (int k = lane; k < kept; k += 32) {
            i64 i = (i64)row * kept + k;
            int id = ids[i], at = id - class0 - column0;
            if (id < 0 || id >= s.classes) {
                reject(fault, step, id);
            } else if (at >= 0 && at < TILE && column0 + at < width) {
                logits[r][at] = own(logits[r][at]) - of_kd * expf(log_p[i]);
                is_kept[r][at] = 1;
            }
        }
        __syncwarp();
        for (int column = lane; column < TILE && column0 + column < width; column += 32) {
            float v = logits[r][column];
            // A class of the tail is at most all of it.
            if (!is_kept[r][column]) v = own(v) - of_kd * p_tail * expf(fminf(v * colder - tail, 0.0f));
            if (class0 + column0 + column == target) v -= of_loss;
            c[(i64)row * width + column0 + column] = from_float<T>(v);
        }
    }
}
