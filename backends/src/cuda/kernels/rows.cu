// Rows between tokens and slots: dispatch, combine, the gradient of the gates, and sums over segments. No row is written
// twice, and every sum has the order of its choices or slots.

#define THREADS 128

/// rows[s] = gate x[token]; a block for each slot.
KERNEL dispatch(const T* x, const int* slot_choice, const float* gate, int choices, int k, int d, T* rows) {
    i64 s = blockIdx.x;
    int c = slot_choice[s];
    bool used = c >= 0 && c < choices;
    float g = used && gate ? gate[c] : 1.0f;
    const T* from = x + (i64)(c / k) * d;
    for (int i = threadIdx.x; i < d; i += THREADS)
        rows[s * d + i] = used ? (gate ? from_float<T>(g * to_float(from[i])) : from[i]) : from_float<T>(0.0f);
}

/// y[t] = of_rows sum_j gate[t,j] rows[slot] + of_side side[t]; a block for each token.
KERNEL combine(const T* rows, const int* choice_slot, const float* gate, const T* side, const float* coefficient, int slots,
               int k, int d, T* y) {
    i64 t = blockIdx.x;
    float of_rows = coefficient ? coefficient[2 * t] : 1.0f, of_side = coefficient ? coefficient[2 * t + 1] : 1.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        float sum = 0.0f;
        for (int j = 0; j < k; j++) {
            int s = choice_slot[t * k + j];
            if (s < 0 || s >= slots) continue;
            float v = to_float(rows[(i64)s * d + i]);
            sum += gate ? gate[t * k + j] * v : v;
        }
        if (side) sum = of_rows * sum + of_side * to_float(side[t * d + i]);
        y[t * d + i] = from_float<T>(sum);
    }
}

/// out[c] = rows[slot] . y[token]; a warp for each choice.
KERNEL gate_grad(const T* rows, const T* y, const int* choice_slot, int slots, int choices, int k, int d, float* out) {
    int c = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (c >= choices) return;
    int s = choice_slot[c];
    bool used = s >= 0 && s < slots;
    float dot = 0.0f;
    if (used)
        for (int i = lane; i < d; i += 32) dot += to_float(rows[(i64)s * d + i]) * to_float(y[(i64)(c / k) * d + i]);
    dot = warp_sum(dot);
    if (lane == 0) out[c] = dot;
}

/// out[e] = sum of the rows of its segment; a thread for each column, a block along y for each expert. With blocks along z each
/// takes one of as many equal parts of the segment, whose f32 sums are `partial`.
KERNEL segment_sum(const T* rows, const int* offsets, int width, float* partial, T* out) {
    int column = blockIdx.x * THREADS + threadIdx.x;
    i64 e = blockIdx.y;
    if (column >= width) return;
    int first = offsets[e], last = offsets[e + 1], part_rows = ceil_div(last - first, (int)gridDim.z);
    int from = min(first + (int)blockIdx.z * part_rows, last), to = min(from + part_rows, last);
    float sum = 0.0f;
    for (int s = from; s < to; s += 16) {
        // All loaded before the first is added.
        T x[16];
#pragma unroll
        for (int r = 0; r < 16; r++) x[r] = rows[(i64)(s + r < to ? s + r : s) * width + column];
        float part = 0.0f;
#pragma unroll
        for (int r = 0; r < 16; r++) part = s + r < to ? part + to_float(x[r]) : part;
        sum += part;
    }
    if (partial) partial[((i64)blockIdx.z * gridDim.y + e) * width + column] = sum;
    else out[e * width + column] = from_float<T>(sum);
}

/// The sums of the parts of the segments together, in order.
KERNEL segment_sum_finish(const float* partial, i64 results, int parts, T* out) {
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= results) return;
    float sum = 0.0f;
    for (int i = 0; i < parts; i++) sum += partial[i * results + at];
    out[at] = from_float<T>(sum);
}
