// The norm of all gradients, and the AdamW step.

#define THREADS 256
/// Elements whose squares one block adds up.
#define BLOCK_ELEMENTS 32768
/// Their sums, that a block adds up where there are many.
#define BLOCK_PARTS 2048

/// Elements of one load.
#define VECTOR (16 / (int)sizeof(T))

/// A gradient of n elements, which begins at a multiple of 16 bytes, and where the sums of its blocks go.
struct Gradient {
    i64 first;
    const T* x;
    double* partial;
    i64 n;
};

/// partial[block of the task] = sum of squares of BLOCK_ELEMENTS elements, in f64.
KERNEL sum_of_squares(const Gradient* tasks, int count) {
    begin();
    __shared__ double room[THREADS / 32];
    const Gradient& task = task_of_block(tasks, count);
    const T* x = task.x;
    i64 n = task.n, block = blockIdx.x - task.first, from = block * BLOCK_ELEMENTS + threadIdx.x * VECTOR;
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
    if (threadIdx.x == 0) task.partial[block] = sum;
}

/// sums[block] = sum of BLOCK_PARTS parts.
KERNEL sum_of_parts(const double* partial, i64 parts, double* sums) {
    begin();
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
    begin();
    __shared__ double room[THREADS / 32];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < parts; i += THREADS) sum += partial[i];
    sum = block_sum<THREADS>(sum, room);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

/// One step of AdamW in place; nothing changes where lr or the scale is not finite or the step is below 1. The rounded copy, if
/// there is one, is kept equal to the parameter, rounded.
KERNEL adamw(const Step<float>* tasks, int count) {
    begin();
    __shared__ Rates rates;
    const Step<float>& task = task_of_block(tasks, count);
    Rule rule;
    if (!begin_step(rule, rates, task)) return;
    float *param = task.param, *m = task.m, *v = task.v;
    const T* grad = task.grad;
    ROUNDED* rounded = task.rounded;
    i64 n = task.n, from = (blockIdx.x - task.first) * STEP_ELEMENTS;
    for (int at = 4 * threadIdx.x; at < STEP_ELEMENTS; at += 4 * THREADS) {
        i64 i = from + at;
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
            return;
        }
    }
}
