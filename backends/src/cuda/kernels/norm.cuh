// What a thread does of a norm, where NORM_THREADS threads have a row of d elements. Products and sums that are one operation are
// written as one, so that a row has the same bits in every kernel.
//
// PER_LANE: elements that a thread has at a time; PIECES: how often, so that NORM_THREADS of them cover a row.

#define NORM_THREADS 128
#define NORM_WARPS (NORM_THREADS / 32)

/// Walks what a thread has of a row: its i-th piece is the PER_LANE elements from `at` on.
#define EACH_PIECE(i, at)                                                                                              \
    _Pragma("unroll") for (int i = 0; i < PIECES; i++)                                                                 \
        if (int at = (i * NORM_THREADS + (int)threadIdx.x % NORM_THREADS) * PER_LANE; at < d)

/// The pieces of a row that a thread has, in registers.
template <typename Element> struct Part {
    Vector<Element, PER_LANE> pieces[PIECES];
    __device__ __forceinline__ Part() {}
    __device__ __forceinline__ Part(const Element* row, int d) {
        EACH_PIECE(i, at) pieces[i] = load_vector<PER_LANE>(row + at);
    }
    __device__ __forceinline__ float sum(int d) const {
        float sum = 0.0f;
        EACH_PIECE(i, at) EACH_OF(j) sum += to_float(pieces[i].at[j]);
        return sum;
    }
    /// The sum of the squares of the distances from `mean`.
    __device__ __forceinline__ float squares(float mean, int d) const {
        float squares = 0.0f;
        EACH_PIECE(i, at) EACH_OF(j) {
            float distance = to_float(pieces[i].at[j]) - mean;
            squares = fmaf(distance, distance, squares);
        }
        return squares;
    }
    /// (x - mean) rstd gamma + beta, the last where there is one.
    __device__ __forceinline__ void normalise(float mean, float rstd, const Part<float>& gamma, const Part<float>* beta, int d) {
        EACH_PIECE(i, at) EACH_OF(j) {
            float x = (to_float(pieces[i].at[j]) - mean) * rstd, g = gamma.pieces[i].at[j];
            pieces[i].at[j] = from_float<Element>(beta ? fmaf(x, g, beta->pieces[i].at[j]) : __fmul_rn(x, g));
        }
    }
    __device__ __forceinline__ void store(Element* row, int d) const {
        EACH_PIECE(i, at) store_vector<PER_LANE>(row + at, pieces[i]);
    }
};

/// 1 / standard deviation, of the sum of the squares of d distances.
__device__ __forceinline__ float rstd_of(float squares, int d, float eps) { return 1.0f / sqrtf(squares / (float)d + eps); }
