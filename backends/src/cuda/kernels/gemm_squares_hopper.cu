// Gradients of experts' weights on Hopper, and of their squares a sum for each warp, for the norm of all gradients: that need not read
// again what is most of a sparse model.

/// Sums of eight squares that f32 holds without loss; others are made in f64.
#define MOST_SQUARES 1e36f
#define LEAST_SQUARES 1e-24f

/// The sums, rounded, become rows of `out`; the squares of those that the thread stores are added to `total`.
struct Squared {
    T* out;
    double* total;

    template <int N>
    __device__ __forceinline__ void finish(Room& room, const Sizes& s, const Tile& t, Turn& turn, float (&sum)[N / 2]) const {
        T* rows = out + (i64)t.expert * s.rows * s.columns;
        float squares = 0.0f;
        give_eights<N>(room, s, t, turn, sum, [&](i64 at, const Vector<T, 8>& v) {
            store_vector<8>(rows + at, v);
            float eight = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float x = to_float(v.at[i]);
                eight = fmaf(x, x, eight);
            }
            if (eight >= LEAST_SQUARES && eight <= MOST_SQUARES) {
                squares += eight;
            } else if (t.k > 0) {
                // An expert without tokens has none.
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    double x = to_float(v.at[i]);
                    *total += x * x;
                }
            }
        });
        *total += squares;
    }
};

/// `partial` has a sum for each warp of the grid.
HOPPER_KERNEL gemm_squares_hopper(PRODUCT, T* out, double* partial) {
    begin();
    double total = 0.0;
    products(x_map, w_map, offsets, s, Squared{out, &total});
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) partial[(blockIdx.x * THREADS + threadIdx.x) / 32] = total;
}
