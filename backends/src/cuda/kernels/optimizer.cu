// The norm of all gradients, and the AdamW step.

#define THREADS 256
/// Elements whose squares one block adds up.
#define BLOCK_ELEMENTS 8192
/// Their sums, that a block adds up where there are many.
#define BLOCK_PARTS 2048

/// Elements of one load.
#define VECTOR (16 / (int)sizeof(T))

/// partial[block] = sum of squares of BLOCK_ELEMENTS elements, in f64. x begins at a multiple of 16 bytes.
KERNEL sum_of_squares(const T* x, i64 n, double* partial) {
    __shared__ double room[THREADS / 32];
    i64 from = (i64)blockIdx.x * BLOCK_ELEMENTS + threadIdx.x * VECTOR;
    double sum = 0.0;
#pragma unroll 4
    for (int at = 0; at < BLOCK_ELEMENTS; at += THREADS * VECTOR) {
        i64 i = from + at;
        if (i + VECTOR <= n) {
            auto v = load_vector<VECTOR>(x + i);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                double w = to_float(v.at[j]);
                sum += w * w;
            }
        } else {
            for (; i < n && i < from + at + VECTOR; i++) {
                double w = to_float(x[i]);
                sum += w * w;
            }
        }
    }
    sum = block_sum<THREADS>(sum, room);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// sums[block] = sum of BLOCK_PARTS parts.
KERNEL sum_of_parts(const double* partial, i64 parts, double* sums) {
    __shared__ double room[THREADS / 32];
    i64 from = (i64)blockIdx.x * BLOCK_PARTS;
    double sum = 0.0;
#pragma unroll 8
    for (int at = threadIdx.x; at < BLOCK_PARTS; at += THREADS) sum += from + at < parts ? partial[from + at] : 0.0;
    sum = block_sum<THREADS>(sum, room);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/// The root of the sum of all parts; one block.
KERNEL norm_of_parts(const double* partial, i64 parts, float* norm) {
    __shared__ double room[THREADS / 32];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < parts; i += THREADS) sum += partial[i];
    sum = block_sum<THREADS>(sum, room);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

/// One step of AdamW in place; nothing changes where lr or the scale is not finite or the step is below 1. Every tensor begins
/// at a multiple of 16 bytes. `rounded`, if it is not null, is kept equal to param, rounded.
KERNEL adamw(float* param, const T* grad, float* m, float* v, const float* lr, const float* step, const float* grad_scale,
             float beta1, float beta2, float eps, float weight_decay, i64 n, ROUNDED* rounded) {
    __shared__ Rates rates;
    Rule rule = {*grad_scale, beta1, beta2, eps};
    if (!begin_step(rule, rates, lr, step, weight_decay)) return;
    for (int at = 4 * threadIdx.x; at < STEP_ELEMENTS; at += 4 * THREADS) {
        i64 i = (i64)blockIdx.x * STEP_ELEMENTS + at;
        if (i + 4 <= n) {
            auto g = load_vector<4>(grad + i);
            auto ps = load_vector<4>(param + i), ms = load_vector<4>(m + i), vs = load_vector<4>(v + i);
#pragma unroll
            for (int j = 0; j < 4; j++) step_of(rule, to_float(g.at[j]), ps.at[j], ms.at[j], vs.at[j]);
            store_vector<4>(m + i, ms);
            store_vector<4>(v + i, vs);
            store_params(param, rounded, i, ps);
        } else {
            for (; i < n; i++) {
                step_of(rule, to_float(grad[i]), param[i], m[i], v[i]);
                if (rounded) rounded[i] = from_float<ROUNDED>(param[i]);
            }
        }
    }
}
