// The norm of all gradients, and the AdamW step.

#define THREADS 256
/// Elements whose squares one block adds up.
#define BLOCK_ELEMENTS 8192

/// partial[block] = sum of squares of BLOCK_ELEMENTS elements, in f64 from the warp's sum on.
KERNEL sum_of_squares(const T* x, i64 n, double* partial) {
    __shared__ double room[THREADS / 32];
    i64 from = (i64)blockIdx.x * BLOCK_ELEMENTS;
    double sum = 0.0;
    for (i64 i = from + threadIdx.x; i < from + BLOCK_ELEMENTS && i < n; i += THREADS) {
        double v = to_float(x[i]);
        sum += v * v;
    }
    sum = block_sum<THREADS>(sum, room);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// The root of the sum of all parts; one block.
KERNEL norm_of_parts(const double* partial, i64 parts, float* norm) {
    __shared__ double room[THREADS / 32];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < parts; i += THREADS) sum += partial[i];
    sum = block_sum<THREADS>(sum, room);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

/// One step of AdamW in place; nothing changes where lr or the scale is not finite or the step is below 1.
KERNEL adamw(float* param, const T* grad, float* m, float* v, const float* lr, const float* step, const float* grad_scale,
             float beta1, float beta2, float eps, float weight_decay, i64 n) {
    __shared__ float keep, rate, root;
    __shared__ int skip;
    float scale = *grad_scale;
    if (threadIdx.x == 0) {
        float l = *lr, t = *step;
        skip = !(fabsf(l) < INF_F) || !(fabsf(scale) < INF_F) || !(t >= 1.0f);
        keep = (float)(1.0 - (double)l * (double)weight_decay);
        rate = (float)((double)l / (1.0 - pow((double)beta1, (double)t)));
        root = (float)(1.0 / sqrt(1.0 - pow((double)beta2, (double)t)));
    }
    __syncthreads();
    if (skip) return;
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    float g = to_float(grad[i]) * scale;
    float mi = beta1 * m[i] + (1.0f - beta1) * g, vi = beta2 * v[i] + (1.0f - beta2) * (g * g);
    m[i] = mi, v[i] = vi;
    param[i] = keep * param[i] - rate * (mi / (sqrtf(vi) * root + eps));
}
