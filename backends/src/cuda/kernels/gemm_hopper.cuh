// Matrix products of 16-bit floats on Hopper, whatever becomes of the sums: that is up to the kernel, which gives an `End`.
//
// out = x w is computed as its transpose: columns of `out`, a multiple of 64, lie along wgmma's M, and rows along its N, which
// may be any multiple of 8: segments of any length are cut into tiles with little left over. Two blocks form a cluster: they
// have neighbouring columns and the same rows of x, each of which is loaded once for both. In a block one warp loads and two
// warpgroups compute, each 64 columns.
//
// Defined for each variant: T; SHARED, bytes of shared memory; X_ALONG_K and W_ALONG_K, whether the rows of x (columns of w) lie
// together in memory along k; K_GROUPED, whether segments cut k or the rows;
// K_CHUNKS, whether those of k are chunks, of which all but the last end with a block.

#define COLUMNS 128
#define ROWS 256
#define DEPTH 64
#define STAGES 4
/// Tiles that are found ahead.
#define FOUND 2
#define THREADS 384
#define MOST_EXPERTS 1024
/// Row tiles that are done one after another for the same columns.
#define TOGETHER 8
/// Rows of `out` that a warpgroup stores at a time.
#define PIECE 32
/// Rows of a tile are a multiple of it.
#define STEP (X_ALONG_K ? 16 : 64)
/// Rows of one box of x.
#define X_BOX (X_ALONG_K ? 32 : 64)

struct Stage {
    u16 w[COLUMNS * DEPTH];
    u16 x[ROWS * DEPTH];
};

/// What is to be done: rows row0.. of columns column0.., over blocks of k from k0 on. No more if there are no rows.
struct Tile {
    int expert, row0, rows, column0, k0, k;
};

struct Room {
    Stage stages[STAGES];
    uint4 pieces[2][2][PIECE * 8];
    u64 full[STAGES], empty[STAGES];
    /// The tiles that the warp which loads has found, and those that the others have taken.
    Tile found[FOUND];
    u64 tile_full[FOUND], tile_empty[FOUND];
    /// Tiles of the cluster before those of each segment, and all of them.
    int before[MOST_EXPERTS + 2];
    /// Where each segment begins, and the end of the last.
    int start[MOST_EXPERTS + 2];
};

struct Sizes {
    int rows, columns, k;
    /// 0: one segment, all of it.
    int experts;
    /// The most rows of a tile: a multiple of STEP, at most ROWS.
    int most;
    /// If it is not 0, the segments are no experts' but chunks of k of this length, a multiple of DEPTH.
    int chunk;
};

/// How many segments there are: behind the last expert's the unused slots are one of their own, whose rows become 0.
__device__ __forceinline__ int segments_of(const Sizes& s) { return s.experts == 0 ? 1 : K_GROUPED ? s.experts : s.experts + 1; }

/// Tiles along the rows, and the rows of one.
__device__ __forceinline__ int tiles_of(const Sizes& s, int rows) { return ceil_div(rows, s.most); }
__device__ __forceinline__ int tile_height(int rows, int tiles) { return ceil_div(ceil_div(rows, tiles), STEP) * STEP; }

/// Tile `at` of the cluster.
__device__ __forceinline__ Tile find(const Room& room, const Sizes& s, int at, u32 rank) {
    int pairs = ceil_div(s.columns, 2 * COLUMNS), low = 0, high = segments_of(s);
    if (K_GROUPED) {
        low = at / (tiles_of(s, s.rows) * pairs);
    } else {
        // The last segment that begins at or before it.
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (room.before[middle] <= at) low = middle;
            else high = middle;
        }
    }
    at -= room.before[low];
    int from = room.start[low], to = room.start[low + 1];
    int rows = K_GROUPED ? s.rows : to - from;
    int tiles = tiles_of(s, rows), height = tile_height(rows, tiles);
    int group = at / (TOGETHER * pairs), rest = at - group * TOGETHER * pairs;
    int together = min(TOGETHER, tiles - group * TOGETHER), pair = rest / together;
    int tile = group * TOGETHER + rest - pair * together;
    Tile t;
    t.expert = low;
    t.row0 = tile * height;
    t.rows = min(height, rows - t.row0);
    t.column0 = (2 * pair + rank) * COLUMNS;
    t.k0 = K_GROUPED ? from : 0;
    t.k = K_GROUPED ? to - from : (s.experts > 0 && low == s.experts ? 0 : s.k);
    if (!K_GROUPED) t.row0 += from;
    return t;
}

/// Elements of a piece that a thread stores: eight of a row, so many times.
#define EIGHTS (PIECE / 16)

/// Where the pipeline is.
struct Turn : Round<STAGES> {
    /// Which of its two pieces of memory a warpgroup stores through next.
    int piece = 0;
};

#define X_STEP (X_ALONG_K ? ALONG_K : ACROSS_K)
#define W_STEP (W_ALONG_K ? ALONG_K : ACROSS_K)

/// Who a thread is among those that compute.
struct Place {
    int thread = threadIdx.x % 128, group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    /// The first of its columns in a tile; the other is 8 further. Its rows are 2 (lane % 4) and the next one of every 8: with
    /// `sum` of them, sum[4 i] and sum[4 i + 2] belong to the first of the i-th pair of rows, and its two columns.
    __device__ __forceinline__ int column() const { return group * 64 + warp * 16 + lane / 4; }
};

/// One of the eights of elements of a tile that a thread stores, of the piece that begins at row n0.
struct Eight {
    int row, part, column;
    __device__ __forceinline__ Eight(const Place& place, const Tile& t, int i)
        : row(place.thread / 8 + 16 * i), part(place.thread % 8), column(t.column0 + place.group * 64 + part * 8) {}
    __device__ __forceinline__ bool is_in(const Sizes& s, const Tile& t, int n0) const {
        return n0 + row < t.rows && column < s.columns;
    }
    /// Its place in the whole result.
    __device__ __forceinline__ i64 at(const Sizes& s, const Tile& t, int n0) const {
        return (i64)(t.row0 + n0 + row) * s.columns + column;
    }
};

/// Pieces of a tile whose stores are written out one after another: all, but for a chain, whose text is long, one.
#if JOINED
#define PIECES_AT_ONCE(N) 1
#else
#define PIECES_AT_ONCE(N) ((N) / PIECE + 1)
#endif

/// Rounds `sum` and gives it by eights, those that lie in the result, to `each(at, v)`: elements from `at` on of s.columns columns.
template <int N, typename Each>
__device__ __forceinline__ void give_eights(Room& room, const Sizes& s, const Tile& t, Turn& turn, const float (&sum)[N / 2],
                                            const Each& each) {
    Place place;
    int group = place.group, lane = place.lane;
#pragma unroll PIECES_AT_ONCE(N)
    for (int n0 = 0; n0 < N; n0 += PIECE) {
        // The other piece was read before the barrier that follows.
        uint4* piece = room.pieces[group][turn.piece ^= 1];
        // Registers are known when it is compiled, where the loop around has one text for all pieces too.
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            if (n / PIECE * PIECE != n0) continue;
            const float* v = sum + n / 2;
            int row = n % PIECE + lane / 16 * 8 + lane % 8, part = 2 * place.warp + lane / 8 % 2;
            stmatrix_transposed(&piece[row * 8 + (part ^ row % 8)], pack(v[0], v[1], T()), pack(v[2], v[3], T()),
                                pack(v[4], v[5], T()), pack(v[6], v[7], T()));
        }
        named_barrier(1 + group, 128);
#pragma unroll
        for (int i = 0; i < EIGHTS; i++) {
            Eight e(place, t, i);
            if (!e.is_in(s, t, n0)) continue;
            Vector<T, 8> v;
            v.fours[0] = piece[e.row * 8 + (e.part ^ e.row % 8)];
            each(e.at(s, t, n0), v);
        }
    }
}

/// Stores `sum` as rows of `out`, or does the chain's work on it, which reads nothing else: operands of the size of the product would have
/// to come while nobody multiplies (measured: docs/benchmarks).
template <int N>
__device__ __forceinline__ void store(Room& room, const Sizes& s, const Tile& t, Turn& turn, const float (&sum)[N / 2], T* out,
                                      const Chain& chain = Chain()) {
    give_eights<N>(room, s, t, turn, sum, [&](i64 at, const Vector<T, 8>& v) { put<8>(out, at, v, chain, chain.load<8>(at)); });
}

template <int N, typename End>
__device__ __forceinline__ void compute(Room& room, const Sizes& s, const Tile t, Turn& turn, const End& end) {
    Place place;
    int thread = place.thread, group = place.group, lane = place.lane;
    float sum[N / 2];
    int blocks = ceil_div(t.k, DEPTH);
    if (blocks == 0) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sum[i] = 0.0f;
    }
    // The end of a segment of k is not the end of the tensor: what lies behind it is another expert's.
    int whole = K_GROUPED && !K_CHUNKS && s.experts > 0 ? t.k / DEPTH : blocks;
    for (int b = 0; b < whole; b++) {
        Stage& stage = room.stages[turn.stage];
        barrier_wait(&room.full[turn.stage], turn.parity);
        u64 w = described(stage.w + group * 64 * DEPTH, 8192), x = described(stage.x, 8192);
        products_begin();
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) wgmma(sum, w + i * W_STEP, x + i * X_STEP, b > 0 || i > 0);
        products_end();
        products_wait<1>();
        if (b > 0 && lane < 2) arrive_at(&room.empty[(turn.stage + STAGES - 1) % STAGES], lane);
        turn.next();
    }
    if (whole < blocks) {
        Stage& stage = room.stages[turn.stage];
        int there = t.k - whole * DEPTH, steps = ceil_div(there, 16);
        barrier_wait(&room.full[turn.stage], turn.parity);
        // Rows of 128 bytes from `there` on, up to the end of the last 16, of this group's w and of x: both groups write the
        // same zeros to x.
        int row = there + thread / 8;
        if (row < steps * 16) {
            uint4 zero = make_uint4(0, 0, 0, 0);
            ((uint4*)(stage.w + group * 64 * DEPTH))[row * 8 + thread % 8] = zero;
#pragma unroll
            for (int box = 0; box < N / 64; box++) ((uint4*)(stage.x + box * 64 * DEPTH))[row * 8 + thread % 8] = zero;
        }
        stores_before_products();
        named_barrier(1 + group, 128);
        u64 w = described(stage.w + group * 64 * DEPTH, 8192), x = described(stage.x, 8192);
        int add = whole > 0;
#define STEPS(n)                                                                                                       \
    if (steps == n) {                                                                                                  \
        products_begin();                                                                                              \
        _Pragma("unroll") for (int i = 0; i < n; i++) wgmma(sum, w + i * W_STEP, x + i * X_STEP, add || i > 0);        \
        products_end();                                                                                                \
        products_wait<0>();                                                                                            \
    }
        products_wait<0>();
        STEPS(1) STEPS(2) STEPS(3) STEPS(4)
        if (whole > 0 && lane < 2) arrive_at(&room.empty[(turn.stage + STAGES - 1) % STAGES], lane);
        if (lane < 2) arrive_at(&room.empty[turn.stage], lane);
        turn.next();
    } else {
        products_wait<0>();
        if (whole > 0 && lane < 2) arrive_at(&room.empty[(turn.stage + STAGES - 1) % STAGES], lane);
    }

    end.template finish<N>(room, s, t, turn, sum);
}

static_assert(sizeof(Room) + 1024 <= SHARED, "the memory that is asked for");

/// How a kernel of this file is launched, and its first parameters.
#define HOPPER_KERNEL extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
#define PRODUCT const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const int *offsets, Sizes s

/// All tiles of this block.
template <typename End>
__device__ __forceinline__ void products(const TensorMap& x_map, const TensorMap& w_map, const int* offsets, const Sizes& s,
                                         const End& end) {
    extern __shared__ u8 shared[];
    Room& room = *(Room*)(((u64)shared + 1023) / 1024 * 1024);
    u32 rank = rank_in_cluster();
    int segments = segments_of(s), pairs = ceil_div(s.columns, 2 * COLUMNS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&room.full[i], 1);
            // Every warp that computes, in both blocks.
            barrier_init(&room.empty[i], 16);
        }
        for (int i = 0; i < FOUND; i++) barrier_init(&room.tile_full[i], 1), barrier_init(&room.tile_empty[i], 8);
        barriers_ready();
    }
    if (threadIdx.x < 32) {
        int sum = 0;
        for (int e0 = 0; e0 < segments; e0 += 32) {
            int e = e0 + threadIdx.x, mine = 0;
            if (e < segments) {
                int end = K_GROUPED ? s.k : s.rows, from = s.chunk > 0 ? e * s.chunk : s.experts > 0 ? offsets[e] : 0;
                int to = s.chunk > 0 ? min(from + s.chunk, end) : e < s.experts ? offsets[e + 1] : end;
                room.start[e] = from, room.start[e + 1] = to;
                mine = tiles_of(s, K_GROUPED ? s.rows : to - from) * pairs;
            }
            int up_to = mine;
            for (int d = 1; d < 32; d *= 2) {
                int left = __shfl_up_sync(WHOLE_WARP, up_to, d);
                if (threadIdx.x >= d) up_to += left;
            }
            if (e < segments) room.before[e] = sum + up_to - mine;
            sum += __shfl_sync(WHOLE_WARP, up_to, 31);
        }
        if (threadIdx.x == 0) room.before[segments] = sum;
    }
    __syncthreads();
    cluster_sync();
    int all = room.before[segments], first = blockIdx.x / 2, step = gridDim.x / 2;
    Turn turn;
    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            Round<FOUND> slot;
            for (int at = first;; at += step) {
                Tile t = {};
                if (at < all) t = find(room, s, at, rank);
                barrier_wait(&room.tile_empty[slot.stage], slot.parity ^ 1);
                room.found[slot.stage] = t;
                arrive(&room.tile_full[slot.stage]);
                slot.next();
                if (at >= all) break;
                int boxes = ceil_div(ceil_div(t.rows, STEP) * STEP, X_BOX);
                u32 bytes = COLUMNS * DEPTH * 2 + boxes * X_BOX * DEPTH * 2;
                for (int k = 0; k < t.k; k += DEPTH) {
                    Stage& stage = room.stages[turn.stage];
                    u64* full = &room.full[turn.stage];
                    barrier_wait(&room.empty[turn.stage], turn.parity ^ 1);
                    arrive_with_bytes(full, bytes);
                    int e = K_GROUPED ? 0 : t.expert, k0 = t.k0 + k;
#if W_ALONG_K
                    load_box(stage.w, &w_map, k0, t.column0, e, full);
#else
                    load_box(stage.w, &w_map, t.column0, k0, e, full);
                    load_box(stage.w + 64 * DEPTH, &w_map, t.column0 + 64, k0, e, full);
#endif
                    for (int i = rank; i < boxes; i += 2) {
                        int row = t.row0 + i * X_BOX;
                        load_box_to(3, stage.x + i * X_BOX * DEPTH, &x_map, X_ALONG_K ? k0 : row, X_ALONG_K ? row : k0, 0, full);
                    }
                    turn.next();
                }
            }
        }
    } else {
        more_registers<232>();
        Round<FOUND> slot;
        while (true) {
            barrier_wait(&room.tile_full[slot.stage], slot.parity);
            Tile t = room.found[slot.stage];
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(&room.tile_empty[slot.stage]);
            slot.next();
            if (t.rows == 0) break;
            switch (ceil_div(t.rows, STEP) * STEP) {
#define CASE(N) case N: compute<N>(room, s, t, turn, end); break;
                CASE(64) CASE(128) CASE(192) CASE(256)
#if X_ALONG_K
                CASE(16) CASE(32) CASE(48) CASE(80) CASE(96) CASE(112) CASE(144) CASE(160) CASE(176) CASE(208) CASE(224) CASE(240)
#endif
            }
        }
    }
    __syncwarp();
    // No block ends while the other may still write to its memory.
    cluster_sync();
}
