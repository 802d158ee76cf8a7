// Softmax and norms over rows of d elements, with their gradients: a block for each row.

#define THREADS 128

KERNEL softmax(const T* x, int d, T* y) {
    __shared__ float room[THREADS / 32];
    x += (i64)blockIdx.x * d, y += (i64)blockIdx.x * d;
    float greatest = -INF_F, sum = 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) greatest = fmaxf(greatest, to_float(x[i]));
    greatest = block_max<THREADS>(greatest, room);
    // A NaN, and a row of -inf, make the sum NaN.
    for (int i = threadIdx.x; i < d; i += THREADS) sum += expf(to_float(x[i]) - greatest);
    sum = block_sum<THREADS>(sum, room);
    for (int i = threadIdx.x; i < d; i += THREADS) y[i] = from_float<T>(expf(to_float(x[i]) - greatest) / sum);
}

KERNEL softmax_grad(const T* y, const T* dy, int d, T* dx) {
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    float dot = 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) dot += to_float(y[row + i]) * to_float(dy[row + i]);
    dot = block_sum<THREADS>(dot, room);
    for (int i = threadIdx.x; i < d; i += THREADS)
        dx[row + i] = from_float<T>(to_float(y[row + i]) * (to_float(dy[row + i]) - dot));
}

KERNEL layer_norm(const T* x, const float* gamma, const float* beta, int d, float eps, T* y, float* mean, float* rstd) {
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) sum += to_float(x[row + i]);
    float m = block_sum<THREADS>(sum, room) / (float)d;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        float distance = to_float(x[row + i]) - m;
        squares += distance * distance;
    }
    float r = 1.0f / sqrtf(block_sum<THREADS>(squares, room) / (float)d + eps);
    for (int i = threadIdx.x; i < d; i += THREADS)
        y[row + i] = from_float<T>((to_float(x[row + i]) - m) * r * gamma[i] + beta[i]);
    if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = r;
}

KERNEL rms_norm(const T* x, const float* gamma, int d, float eps, T* y, float* rstd) {
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) squares += to_float(x[row + i]) * to_float(x[row + i]);
    float r = 1.0f / sqrtf(block_sum<THREADS>(squares, room) / (float)d + eps);
    for (int i = threadIdx.x; i < d; i += THREADS) y[row + i] = from_float<T>(to_float(x[row + i]) * r * gamma[i]);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

/// dx of layer_norm; of rms_norm where mean is null.
KERNEL norm_grad(const T* x, const float* gamma, const float* mean, const float* rstd, const T* dy, int d, T* dx) {
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    float m = mean ? mean[blockIdx.x] : 0.0f, r = rstd[blockIdx.x];
    float sum_g = 0.0f, sum_gh = 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        float h = (to_float(x[row + i]) - m) * r, g = __fmul_rn(to_float(dy[row + i]), gamma[i]);
        sum_g += g, sum_gh += g * h;
    }
    float mean_gh = block_sum<THREADS>(sum_gh, room) / (float)d;
    float mean_g = mean ? block_sum<THREADS>(sum_g, room) / (float)d : 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        float h = (to_float(x[row + i]) - m) * r, g = __fmul_rn(to_float(dy[row + i]), gamma[i]);
        dx[row + i] = from_float<T>(r * (g - mean_g - h * mean_gh));
    }
}

/// The sums over a chunk of rows that dgamma and (with a mean) dbeta are made of: a thread for each column of 32 and each fourth
/// row, whose sums are then added in order.
KERNEL norm_weights(const T* x, const float* mean, const float* rstd, const T* dy, int rows, int d, int chunk,
                    float* partial_gamma, float* partial_beta) {
    const int WARPS = THREADS / 32;
    __shared__ float gammas[WARPS][32 * PER_LANE], betas[WARPS][32 * PER_LANE];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column0 = blockIdx.x * 32 * PER_LANE, column = column0 + lane * PER_LANE;
    int from = blockIdx.y * chunk, to = min(from + chunk, rows);
    float of_gamma[PER_LANE] = {}, of_beta[PER_LANE] = {};
    if (column < d) {
#pragma unroll 4
        for (int r = from + warp; r < to; r += WARPS) {
            i64 at = (i64)r * d + column;
            float m = mean ? mean[r] : 0.0f, s = rstd[r];
#if PER_LANE > 1
            auto gs = load_vector<PER_LANE>(dy + at), xs = load_vector<PER_LANE>(x + at);
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) {
                float g = to_float(gs.at[j]);
                of_gamma[j] += g * ((to_float(xs.at[j]) - m) * s);
                of_beta[j] += g;
            }
#else
            float g = to_float(dy[at]);
            of_gamma[0] += g * ((to_float(x[at]) - m) * s);
            of_beta[0] += g;
#endif
        }
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) gammas[warp][lane * PER_LANE + j] = of_gamma[j], betas[warp][lane * PER_LANE + j] = of_beta[j];
    __syncthreads();
    for (int c = threadIdx.x; c < 32 * PER_LANE && column0 + c < d; c += THREADS) {
        float gamma = 0.0f, beta = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) gamma += gammas[w][c], beta += betas[w][c];
        partial_gamma[(i64)blockIdx.y * d + column0 + c] = gamma;
        if (mean) partial_beta[(i64)blockIdx.y * d + column0 + c] = beta;
    }
}

/// The chunks together, in order.
KERNEL norm_weights_finish(const float* partial_gamma, const float* partial_beta, int chunks, int d, float* dgamma,
                           float* dbeta) {
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= d) return;
    float of_gamma = 0.0f, of_beta = 0.0f;
    for (int c = 0; c < chunks; c++) {
        of_gamma += partial_gamma[(i64)c * d + column];
        if (dbeta) of_beta += partial_beta[(i64)c * d + column];
    }
    dgamma[column] = of_gamma;
    if (dbeta) dbeta[column] = of_beta;
}
