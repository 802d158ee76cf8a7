// Matrix products on Hopper: dense, M-grouped (rows of an expert times its weights) and K-grouped (gradient of the weights).

/// The sums, with a bias for each expert's columns or none, become rows of `out`, or of what the chain makes of them.
struct Stored {
    const void* bias;
    /// The bias is f32 although T is not.
    int wide;
    T* out;
    Chain chain;

    __device__ __forceinline__ float bias_of(const Sizes& s, int expert, int column) const {
        i64 at = (i64)expert * s.columns + column;
        if (column >= s.columns) return 0.0f;
        return wide ? ((const float*)bias)[at] : to_float(((const T*)bias)[at]);
    }

    template <int N>
    __device__ __forceinline__ void finish(Room& room, const Sizes& s, const Tile& t, Turn& turn, float (&sum)[N / 2]) const {
        // Unused slots are 0 and have no bias.
        if (bias && t.k > 0) {
            int column = t.column0 + Place().column();
            float low = bias_of(s, t.expert, column), high = bias_of(s, t.expert, column + 8);
#pragma unroll
            for (int i = 0; i < N / 2; i += 4) sum[i] += low, sum[i + 1] += low, sum[i + 2] += high, sum[i + 3] += high;
        }
        store<N>(room, s, t, turn, sum, out + (K_GROUPED ? (i64)t.expert * s.rows * s.columns : 0), chain);
    }
};

HOPPER_KERNEL gemm_hopper(PRODUCT, const void* bias, int wide_bias, T* out CHAIN_PARAMETERS) {
    begin();
    products(x_map, w_map, offsets, s, Stored{bias, wide_bias, out, CHAIN});
}
