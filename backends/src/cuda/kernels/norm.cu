// Norms over rows of d elements, with their gradients: a block for each row.
//
// PER_LANE: elements that a thread has at a time; PIECES: how often, so that THREADS of them cover a row.

#define THREADS 128

#define EACH_OF(j) _Pragma("unroll") for (int j = 0; j < PER_LANE; j++)

/// Walks what a thread has of a row: its i-th piece is the PER_LANE elements from `at` on.
#define EACH_PIECE(i, at)                                                                                              \
    _Pragma("unroll") for (int i = 0; i < PIECES; i++) if (int at = (i * THREADS + threadIdx.x) * PER_LANE; at < d)

/// The pieces of a row that a thread has, in registers.
struct Part {
    Vector<T, PER_LANE> pieces[PIECES];
    __device__ __forceinline__ Part(const T* row, int d) {
        EACH_PIECE(i, at) pieces[i] = load_vector<PER_LANE>(row + at);
    }
};

KERNEL layer_norm(const T* x, const float* gamma, const float* beta, int d, float eps, T* y, float* mean, float* rstd) {
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    Part own(x + row, d);
    float sum = 0.0f, squares = 0.0f;
    EACH_PIECE(i, at) EACH_OF(j) sum += to_float(own.pieces[i].at[j]);
    float m = block_sum<THREADS>(sum, room) / (float)d;
    EACH_PIECE(i, at) EACH_OF(j) {
        float distance = to_float(own.pieces[i].at[j]) - m;
        squares += distance * distance;
    }
    float r = 1.0f / sqrtf(block_sum<THREADS>(squares, room) / (float)d + eps);
    EACH_PIECE(i, at) {
        auto g = load_vector<PER_LANE>(gamma + at), b = load_vector<PER_LANE>(beta + at);
        EACH_OF(j) own.pieces[i].at[j] = from_float<T>((to_float(own.pieces[i].at[j]) - m) * r * g.at[j] + b.at[j]);
        store_vector<PER_LANE>(y + row + at, own.pieces[i]);
    }
    if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = r;
}

KERNEL rms_norm(const T* x, const float* gamma, int d, float eps, T* y, float* rstd) {
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    Part own(x + row, d);
    float squares = 0.0f;
    EACH_PIECE(i, at) EACH_OF(j) squares += to_float(own.pieces[i].at[j]) * to_float(own.pieces[i].at[j]);
    float r = 1.0f / sqrtf(block_sum<THREADS>(squares, room) / (float)d + eps);
    EACH_PIECE(i, at) {
        auto g = load_vector<PER_LANE>(gamma + at);
        EACH_OF(j) own.pieces[i].at[j] = from_float<T>(to_float(own.pieces[i].at[j]) * r * g.at[j]);
        store_vector<PER_LANE>(y + row + at, own.pieces[i]);
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

/// dx of layer_norm; of rms_norm where mean is null.
KERNEL norm_grad(const T* x, const float* gamma, const float* mean, const float* rstd, const T* dy, int d, T* dx) {
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    float m = mean ? mean[blockIdx.x] : 0.0f, r = rstd[blockIdx.x];
    Part own(x + row, d), cotangent(dy + row, d);
    float sum_g = 0.0f, sum_gh = 0.0f;
    EACH_PIECE(i, at) {
        auto weight = load_vector<PER_LANE>(gamma + at);
        EACH_OF(j) {
            float h = (to_float(own.pieces[i].at[j]) - m) * r, g = __fmul_rn(to_float(cotangent.pieces[i].at[j]), weight.at[j]);
            sum_g += g, sum_gh += g * h;
        }
    }
    float mean_gh = block_sum<THREADS>(sum_gh, room) / (float)d;
    float mean_g = mean ? block_sum<THREADS>(sum_g, room) / (float)d : 0.0f;
    EACH_PIECE(i, at) {
        auto weight = load_vector<PER_LANE>(gamma + at);
        EACH_OF(j) {
            float h = (to_float(own.pieces[i].at[j]) - m) * r, g = __fmul_rn(to_float(cotangent.pieces[i].at[j]), weight.at[j]);
            own.pieces[i].at[j] = from_float<T>(r * (g - mean_g - h * mean_gh));
        }
        store_vector<PER_LANE>(dx + row + at, own.pieces[i]);
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
