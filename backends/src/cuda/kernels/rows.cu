// Rows between tokens and slots: dispatch, the gradient of the gates, and sums over segments. No row is written twice, and every sum
// has the order of its slots. PER_LANE: elements that a lane has at a time.

#define THREADS 128

#define ROWS (THREADS / 32)

/// rows[s] = gate x[token]; a warp for each slot.
KERNEL dispatch(const T* x, const int* slot_choice, const float* gate, int slots, int choices, int k, int d, T* rows) {
    begin();
    i64 s = (i64)blockIdx.x * ROWS + threadIdx.x / 32;
    if (s >= slots) return;
    int c = slot_choice[s];
    bool used = c >= 0 && c < choices;
    float g = used && gate ? gate[c] : 1.0f;
    const T* from = x + (used ? (i64)(c / k) * d : 0);
    T* to = rows + s * d;
#pragma unroll 4
    for (int i = threadIdx.x % 32 * PER_LANE; i < d; i += 32 * PER_LANE) {
        auto v = load_vector<PER_LANE>(from + i);
        if (!used || gate)
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) v.at[j] = from_float<T>(used ? g * to_float(v.at[j]) : 0.0f);
        store_vector<PER_LANE>(to + i, v);
    }
}

/// out[c] = rows[slot] . y[token]; a warp for each choice.
KERNEL gate_grad(const T* rows, const T* y, const int* choice_slot, int slots, int choices, int k, int d, float* out) {
    begin();
    int c = blockIdx.x * ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (c >= choices) return;
    int s = choice_slot[c];
    bool used = s >= 0 && s < slots;
    float dot = 0.0f;
    if (used)
#pragma unroll 4
        for (int i = lane * PER_LANE; i < d; i += 32 * PER_LANE) {
            auto a = load_vector<PER_LANE>(rows + (i64)s * d + i), b = load_vector<PER_LANE>(y + (i64)(c / k) * d + i);
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) dot = fmaf(to_float(a.at[j]), to_float(b.at[j]), dot);
        }
    dot = warp_sum(dot);
    if (lane == 0) out[c] = dot;
}

/// out[e] = sum of the rows of its segment; a thread for each column, a block along y for each expert. With blocks along z each
/// takes one of as many equal parts of the segment, whose f32 sums are `partial`.
KERNEL segment_sum(const T* rows, const int* offsets, int width, float* partial, T* out) {
    begin();
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
    begin();
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= results) return;
    float sum = 0.0f;
    for (int i = 0; i < parts; i++) sum += partial[i * results + at];
    out[at] = from_float<T>(sum);
}
