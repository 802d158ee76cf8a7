// Matrix products on Hopper whose sums stay f32, or are added to sums that are there: gradients in several parts, chunks of k, blocks of
// classes.

/// The number at an address, or 0 if it is not to be read. As the store below, an instruction under a condition instead of a branch for each
/// of the sums, which takes the compiler many times as long and lets no load begin before the last one has ended.
__device__ __forceinline__ float load_if(bool read, const float* from) {
    float v;
    asm volatile("{\n .reg .pred read;\n setp.ne.b32 read, %2, 0;\n mov.f32 %0, 0f00000000;\n @read ld.global.f32 %0, [%1];\n}"
                 : "=f"(v)
                 : "l"(from), "r"((int)read));
    return v;
}

/// Writes a number, if it is to be written.
__device__ __forceinline__ void store_if(bool write, float* to, float v) {
    asm volatile("{\n .reg .pred write;\n setp.ne.b32 write, %2, 0;\n @write st.global.f32 [%0], %1;\n}"
                 :
                 : "l"(to), "f"(v), "r"((int)write)
                 : "memory");
}

/// The sums and those of `add`, if that is not null, become rows of `sum`, or of `out` if that is null. `add` may be `sum`. The sums of
/// chunks of k lie one after another.
struct Added {
    const float* add;
    float* sum;
    T* out;

    template <int N>
    __device__ __forceinline__ void finish(Room& room, const Sizes& s, const Tile& t, Turn& turn, float (&v)[N / 2]) const {
        Place place;
        int row0 = place.lane % 4 * 2, column = t.column0 + place.column(), rows = t.rows - row0;
        i64 start = ((K_GROUPED ? (i64)t.expert * s.rows : 0) + t.row0 + row0) * s.columns + column;
        bool low = column < s.columns, high = column + 8 < s.columns;
        auto row = [](int i) { return i / 4 * 8 + i % 2; };
        auto in = [&](int i) { return row(i) < rows && (i % 4 < 2 ? low : high); };
        auto at = [&](int i) { return start + (i64)row(i) * s.columns + i % 4 / 2 * 8; };
        if (add) {
#pragma unroll
            for (int i = 0; i < N / 2; i++) v[i] += load_if(in(i), add + at(i));
        }
        if (sum) {
#pragma unroll
            for (int i = 0; i < N / 2; i++) store_if(in(i), sum + at(i), v[i]);
        } else {
            store<N>(room, s, t, turn, v, out);
        }
    }
};

HOPPER_KERNEL gemm_added_hopper(PRODUCT, const float* add, float* sum, T* out) {
    begin();
    products(x_map, w_map, offsets, s, Added{add, sum, out});
}
