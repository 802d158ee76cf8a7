// What the kernels of AdamW share: the scalars of a step, and the step of one element.

/// Elements of one block of AdamW, and fours of neighbours of a thread.
#define STEP_ELEMENTS 4096

/// What a step takes from its scalars.
struct Rule { float scale, beta1, beta2, eps, keep, rate, root; };

/// What one thread of a block computes for all.
struct Rates { float keep, rate, root; int skip; };

/// Completes the rule; all threads of a block call it, `rates` is shared memory. False for a step that changes nothing: where lr or the
/// scale is not finite or the step is below 1.
__device__ __forceinline__ bool begin_step(Rule& rule, Rates& rates, const float* lr, const float* step, float weight_decay) {
    if (threadIdx.x == 0) {
        float l = *lr, t = *step;
        rates.skip = !(fabsf(l) < INF_F) || !(fabsf(rule.scale) < INF_F) || !(t >= 1.0f);
        rates.keep = (float)(1.0 - (double)l * (double)weight_decay);
        rates.rate = (float)((double)l / (1.0 - pow((double)rule.beta1, (double)t)));
        rates.root = (float)(1.0 / sqrt(1.0 - pow((double)rule.beta2, (double)t)));
    }
    __syncthreads();
    rule.keep = rates.keep, rule.rate = rates.rate, rule.root = rates.root;
    return !rates.skip;
}

__device__ __forceinline__ void step_of(const Rule& r, float grad, float& param, float& m, float& v) {
    float g = grad * r.scale;
    m = r.beta1 * m + (1.0f - r.beta1) * g, v = r.beta2 * v + (1.0f - r.beta2) * (g * g);
    param = r.keep * param - r.rate * (m / (sqrtf(v) * r.root + r.eps));
}

/// Stores four parameters, and their rounded copies if there are any.
__device__ __forceinline__ void store_params(float* param, ROUNDED* rounded, i64 i, const Vector<float, 4>& ps) {
    store_vector<4>(param + i, ps);
    if (!rounded) return;
    Vector<ROUNDED, 4> rs;
#pragma unroll
    for (int j = 0; j < 4; j++) rs.at[j] = from_float<ROUNDED>(ps.at[j]);
    store_vector<4>(rounded + i, rs);
}
