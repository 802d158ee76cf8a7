// Norms over rows of d elements, with their gradients: a block for each row.

#define THREADS NORM_THREADS
#define FINISH_THREADS 1024

KERNEL layer_norm(const T* x, const float* gamma, const float* beta, int d, float eps, T* y, float* mean, float* rstd) {
    begin();
    __shared__ float room[NORM_WARPS];
    i64 row = (i64)blockIdx.x * d;
    Part<T> own(x + row, d);
    float m = block_sum<THREADS>(own.sum(d), room) / (float)d;
    float r = rstd_of(block_sum<THREADS>(own.squares(m, d), room), d, eps);
    Part<float> g(gamma, d), b(beta, d);
    own.normalise(m, r, g, &b, d);
    own.store(y + row, d);
    if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = r;
}

KERNEL rms_norm(const T* x, const float* gamma, int d, float eps, T* y, float* rstd) {
    begin();
    __shared__ float room[NORM_WARPS];
    i64 row = (i64)blockIdx.x * d;
    Part<T> own(x + row, d);
    float r = rstd_of(block_sum<THREADS>(own.squares(0.0f, d), room), d, eps);
    Part<float> g(gamma, d);
    own.normalise(0.0f, r, g, 0, d);
    own.store(y + row, d);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

/// dx of layer_norm, and the sums over a chunk of rows that dgamma and dbeta are made of; of rms_norm where mean is null. A block
/// goes through the rows of its chunk; a thread has the same columns of each.
KERNEL norm_grad(const T* x, const float* gamma, const float* mean, const float* rstd, const T* dy, int rows, int d, int chunk,
                 T* dx, float* partial_gamma, float* partial_beta) {
    begin();
    // Two rows' sums take turns, so that one barrier for each row is enough.
    __shared__ float2 room[2][THREADS / 32];
    int from = blockIdx.x * chunk, to = min(from + chunk, rows);
    Vector<float, PER_LANE> weights[PIECES];
    EACH_PIECE(i, at) weights[i] = load_vector<PER_LANE>(gamma + at);
    float of_gamma[PIECES][PER_LANE] = {}, of_beta[PIECES][PER_LANE] = {};
    Part<T> next_x(x + (i64)from * d, d), next_dy(dy + (i64)from * d, d);
    for (int row = from; row < to; row++) {
        Part<T> own = next_x, cotangent = next_dy;
        // The next row is on its way meanwhile.
        i64 next = (i64)min(row + 1, to - 1) * d;
        next_x = Part<T>(x + next, d), next_dy = Part<T>(dy + next, d);
        float m = mean ? mean[row] : 0.0f, r = rstd[row], sum_g = 0.0f, sum_gh = 0.0f;
        EACH_PIECE(i, at) EACH_OF(j) {
            float h = (to_float(own.pieces[i].at[j]) - m) * r, of_y = to_float(cotangent.pieces[i].at[j]);
            float g = __fmul_rn(of_y, weights[i].at[j]);
            sum_g += g, sum_gh += g * h;
            of_gamma[i][j] += of_y * h, of_beta[i][j] += of_y;
        }
        sum_g = warp_sum(sum_g), sum_gh = warp_sum(sum_gh);
        float2* sums = room[row % 2];
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = make_float2(sum_g, sum_gh);
        __syncthreads();
        float mean_g = 0.0f, mean_gh = 0.0f;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) mean_g += sums[w].x, mean_gh += sums[w].y;
        mean_g = mean ? mean_g / (float)d : 0.0f, mean_gh /= (float)d;
        EACH_PIECE(i, at) {
            EACH_OF(j) {
                float h = (to_float(own.pieces[i].at[j]) - m) * r, g = __fmul_rn(to_float(cotangent.pieces[i].at[j]), weights[i].at[j]);
                own.pieces[i].at[j] = from_float<T>(r * (g - mean_g - h * mean_gh));
            }
            store_vector<PER_LANE>(dx + (i64)row * d + at, own.pieces[i]);
        }
    }
    EACH_PIECE(i, at) EACH_OF(j) {
        partial_gamma[(i64)blockIdx.x * d + at + j] = of_gamma[i][j];
        if (mean) partial_beta[(i64)blockIdx.x * d + at + j] = of_beta[i][j];
    }
}

/// The chunks together: a warp for each 32nd, in order, then the warps. A block for 32 columns.
KERNEL norm_weights(const float* partial_gamma, const float* partial_beta, int chunks, int d, float* dgamma, float* dbeta) {
    begin();
    const int WARPS = FINISH_THREADS / 32;
    __shared__ float gammas[WARPS][32], betas[WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float of_gamma = 0.0f, of_beta = 0.0f;
    if (column < d)
#pragma unroll 4
        for (int c = warp; c < chunks; c += WARPS) {
            of_gamma += partial_gamma[(i64)c * d + column];
            if (dbeta) of_beta += partial_beta[(i64)c * d + column];
        }
    gammas[warp][lane] = of_gamma, betas[warp][lane] = of_beta;
    __syncthreads();
    if (warp > 0 || column >= d) return;
    for (int w = 1; w < WARPS; w++) of_gamma += gammas[w][lane], of_beta += betas[w][lane];
    dgamma[column] = of_gamma;
    if (dbeta) dbeta[column] = of_beta;
}
