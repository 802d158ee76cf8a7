// What the kernels of AdamW share: the scalars of a step, and the step of one element.

/// Elements of one block of AdamW.
#define STEP_ELEMENTS 32768

/// A parameter of n elements with its gradient, its moments of type Moment, and where its rounded copy is, or null. Every tensor
/// begins at a multiple of 16 bytes.
template <typename Moment> struct Step {
    i64 first;
    float* param;
    const T* grad;
    Moment* m;
    Moment* v;
    const float* lr;
    const float* step;
    const float* grad_scale;
    ROUNDED* rounded;
    /// Of moments in 8 bits, else null.
    float* scales;
    i64 n;
    float beta1, beta2, eps, weight_decay;
    /// Of the random numbers that moments are rounded with.
    u32 stream;
};

/// What a step takes from its scalars.
struct Rule { float scale, beta1, beta2, eps, keep, rate, root; };

/// What two threads of a block compute for all.
struct Rates { float keep, rate, root; int skip; };

/// Completes the rule; all threads of a block call it, `rates` is shared memory. False for a step that changes nothing: where lr or the
/// scale is not finite or the step is below 1.
template <typename Moment> __device__ __forceinline__ bool begin_step(Rule& rule, Rates& rates, const Step<Moment>& s) {
    rule = {*s.grad_scale, s.beta1, s.beta2, s.eps};
    // Powers in f64 take long: each by another warp.
    if (threadIdx.x % 32 == 0 && threadIdx.x < 64) {
        float l = *s.lr, t = *s.step;
        double left = 1.0 - pow((double)(threadIdx.x == 0 ? rule.beta1 : rule.beta2), (double)t);
        if (threadIdx.x == 0) {
            rates.skip = !(fabsf(l) < INF_F) || !(fabsf(rule.scale) < INF_F) || !(t >= 1.0f);
            rates.keep = (float)(1.0 - (double)l * (double)s.weight_decay);
            rates.rate = (float)((double)l / left);
        } else {
            rates.root = (float)(1.0 / sqrt(left));
        }
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
