// Products c = a b + bias of few rows, where reading b is the work: dense and batched, or M-grouped by `offsets` if GROUPED. Every
// element of b is read once for each MOST rows, 16 bytes at a time where ALIGNED; plain f32 arithmetic.
//
// T is b's type, TA that of a and TC that of c. b is stored [k, n], or [n, k] if TRANSPOSED. MOST is 1, 2, 4 or 8. k is cut into
// chunks, one for each block along y; a thread has LOADS pieces of a chunk at most, or 8 and more. With more chunks than one their f32 results are
// added up in order: the blocks are a cluster of CLUSTER, of which the first adds up, or, where CLUSTER is 1, they are `partial`, and
// few_rows_finish adds them up. The order of a sum depends on k, the chunk and the layout alone, neither on the row's place nor on the
// number of rows. A block has THREADS threads. What becomes of an element is up to `put` of chain.cuh, what a is to lead.cuh.
//
// TWIN: the last blocks along z of a product of experts do a dense one of as many columns over as long a k, of at most MOST rows.
// CHOOSES: the route of one token with one choice, the assign and the dispatch before a product of experts are done by it. Every block chooses
// the token's expert for itself, so that nothing waits for the rest, which one more block does: the first of those that are last along x.
// COMBINES: the kernel ends with the combine behind a product of experts, as combined.cuh says; the chain is then behind that.
//
// A kernel's time is mostly that of waiting: so all that a thread loads is on its way before it waits for any of it, and what no kernel
// of the run writes (EARLY: b, the bias, a norm's weights) before it waits for the kernel before.

#define WARPS (THREADS / 32)
/// Elements of one load.
#define VECTOR (16 / (int)sizeof(T))
#if CLUSTER > 1
#define FEW_KERNEL extern "C" __global__ void __cluster_dims__(1, CLUSTER, 1)
#else
// Those of experts mostly have a row or two, for which 80 registers are enough: what is spilled for more of them costs less than half
// as many blocks at a time.
#define FEW_KERNEL extern "C" __global__ void __launch_bounds__(THREADS, GROUPED ? 3 : 1)
#endif

#if TRANSPOSED
/// Columns of a warp: where there are more rows, elements of a are used twice.
#define ACROSS (MOST > 2 ? 2 : 1)
#define COLUMNS (WARPS * ACROSS)
/// Threads that have parts of a column's sum in `room`.
#define SHARES 1
#else
#define ACROSS 1
/// Columns of a block: eight loads side by side, 128 bytes.
#define COLUMNS (8 * VECTOR)
#define SHARES WARPS
#endif

/// Sizes, and strides in elements. `b_line` is from one stored row of b to the next.
struct Few {
    i64 a_row, a_column, a_batch;
    i64 b_line, b_batch;
    i64 c_row, c_column, c_batch;
    i64 bias_row, bias_column, bias_batch;
    /// Elements of c.
    i64 total;
    int m, n, k, chunk;
    int experts;
    /// The bias is f32 although c is not.
    int wide_bias;
};

/// Elements that lie together.
template <typename Element> using Elements = Vector<Element, VECTOR>;

/// Whether b streams past the multiprocessor's own cache: with several experts a sixth less time, with one row a twentieth more.
#define STREAMS (GROUPED && MOST > 1)

/// The first `count` elements from here on, the others 0; where ALIGNED all are there, or `count` is not positive. ONCE: no other thread of
/// the multiprocessor reads them.
template <bool ONCE, typename Element> __device__ __forceinline__ Elements<Element> load(const Element* from, int count) {
    Elements<Element> v;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(v) / 16); i++) v.fours[i] = make_uint4(0, 0, 0, 0);
#if ALIGNED
    if constexpr (ONCE) {
        if (count <= 0) return v;
        v = load_once<VECTOR>(from);
    } else if (count > 0) v = load_vector<VECTOR>(from);
#else
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        if (i < count) v.at[i] = from[i];
#endif
    return v;
}

/// How many pieces of b a thread has on their way at a time: fewer where the sums of many rows take the registers.
__device__ constexpr int ahead(int rows) {
    int most = rows > 4 || !ALIGNED ? 2 : rows > 2 ? 4 : 8;
    return (most < LOADS ? most : LOADS) / ACROSS > 0 ? (most < LOADS ? most : LOADS) / ACROSS : 1;
}

/// From one of a thread's pieces to the next along k, and where its first one is.
#define STEP (TRANSPOSED ? 32 * VECTOR : 4 * WARPS)
__device__ __forceinline__ int first_piece() {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return TRANSPOSED ? lane * VECTOR : 4 * warp + lane / 8;
}
/// The first of a thread's columns.
__device__ __forceinline__ int first_column() {
    return blockIdx.x * COLUMNS + (TRANSPOSED ? threadIdx.x / 32 * ACROSS : threadIdx.x % 8 * VECTOR);
}

/// A round of a thread's pieces of b.
template <int ROWS> struct Round {
    static constexpr int COUNT = ahead(ROWS);
    Elements<T> w[COUNT][ACROSS];
    /// Those of the round that begins with the rows, or columns, of k from `from` on; what is behind `k1` is 0.
    __device__ __forceinline__ void load_from(const T* b, const Few& p, int from, int k1) {
        int k = from + first_piece(), column = first_column();
#pragma unroll
        for (int u = 0; u < COUNT; u++)
#pragma unroll
            for (int c = 0; c < ACROSS; c++) {
                int at = k + STEP * u;
#if TRANSPOSED
                // A column behind the last is read as the last, and not given out.
                w[u][c] = load<STREAMS>(b + min(column + c, p.n - 1) * p.b_line + at, k1 - at);
#else
                w[u][c] = load<STREAMS>(b + at * p.b_line + column, at < k1 ? p.n - column : 0);
#endif
            }
    }
};

/// Rows of a: those from `row0` on, of which `count` are there. What is behind the last has what that has: it is not given out.
template <int ROWS> struct Rows {
    const TA* a;
    int row0, count;
#if LEAD == DISPATCH
    /// Of each row the token, -1 where there is none, and its gate.
    int token[ROWS];
    float gate[ROWS];
    bool gated;
    /// `plain`: of rows that lie in memory as they are.
    __device__ __forceinline__ Rows(const TA* a, int row0, int count, const Lead& lead, bool plain)
        : a(a), row0(row0), count(count), gated(!plain && lead.gate) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            token[r] = row0 + min(r, count - 1), gate[r] = 1.0f;
            if (plain) continue;
            int c = lead.slot_choice[row0 + min(r, count - 1)];
            bool used = c >= 0 && c < lead.choices;
            token[r] = used ? c / lead.of_token : -1;
            if (used && gated) gate[r] = lead.gate[c];
        }
    }
    __device__ __forceinline__ const TA* row(int r, const Few& p) const { return a + max(token[r], 0) * p.a_row; }
    __device__ __forceinline__ float made(int r, TA x) const {
        if (token[r] < 0) return 0.0f;
        return gated ? to_float(from_float<TA>(gate[r] * to_float(x))) : to_float(x);
    }
#else
    __device__ __forceinline__ Rows(const TA* a, int row0, int count, const Lead&, bool) : a(a), row0(row0), count(count) {}
    __device__ __forceinline__ const TA* row(int r, const Few& p) const { return a + (row0 + min(r, count - 1)) * p.a_row; }
    __device__ __forceinline__ float made(int, TA x) const { return to_float(x); }
#endif
    __device__ __forceinline__ float element(int r, int k, const Few& p) const { return made(r, row(r, p)[k * p.a_column]); }
    /// The elements from k on, of which `there` are, the others 0.
    __device__ __forceinline__ void load(int r, int k, int there, const Few& p, float (&x)[VECTOR]) const {
#if TOGETHER
        Elements<TA> v = ::load<false>(row(r, p) + k, there);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) x[i] = made(r, v.at[i]);
#else
#pragma unroll
        for (int i = 0; i < VECTOR; i++) x[i] = i < there ? element(r, k + i, p) : 0.0f;
#endif
    }
};

/// How many elements of c a thread ends, of `rows` rows of the block's columns.
__device__ constexpr int of_thread(int rows) { return rows * COLUMNS > THREADS ? rows * COLUMNS / THREADS : 1; }

/// Gives `end(j, i, sum)` the sums over k0..k1 of elements of the block: the thread's j-th, the i-th in rows of COLUMNS. `round` is the
/// first one, loaded. `rows` of ROWS rows are there.
template <int ROWS, typename End>
__device__ __forceinline__ void few(float* room, const Rows<ROWS>& a, const T* b, const Few& p, int rows, int k0, int k1,
                                    Round<ROWS>& round, End end) {
    const int COUNT = Round<ROWS>::COUNT;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#if TRANSPOSED
    float sum[ACROSS][ROWS] = {};
#else
    float sum[ROWS][VECTOR] = {};
#endif
    for (int from = k0;;) {
        int k = from + first_piece();
#pragma unroll
        for (int u = 0; u < COUNT; u++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                int at = k + STEP * u;
#if TRANSPOSED
                float x[VECTOR];
                a.load(r, at, k1 - at, p, x);
#pragma unroll
                for (int c = 0; c < ACROSS; c++)
#pragma unroll
                    for (int i = 0; i < VECTOR; i++) sum[c][r] = fmaf(x[i], to_float(round.w[u][c].at[i]), sum[c][r]);
#else
                float x = at < k1 ? a.element(r, at, p) : 0.0f;
#pragma unroll
                for (int i = 0; i < VECTOR; i++) sum[r][i] = fmaf(x, to_float(round.w[u][0].at[i]), sum[r][i]);
#endif
            }
        from += STEP * COUNT;
        if (from >= k1) break;
        round.load_from(b, p, from, k1);
    }
#if TRANSPOSED
#pragma unroll
    for (int c = 0; c < ACROSS; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float s = warp_sum(sum[c][r]);
            if (lane == 0) room[r * COLUMNS + warp * ACROSS + c] = s;
        }
#else
    int column = lane % 8 * VECTOR;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            float s = sum[r][i];
            s += __shfl_xor_sync(WHOLE_WARP, s, 8);
            s += __shfl_xor_sync(WHOLE_WARP, s, 16);
            if (lane < 8) room[(warp * ROWS + r) * COLUMNS + column + i] = s;
        }
#endif
    __syncthreads();
#pragma unroll
    for (int j = 0; j < of_thread(ROWS); j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= rows * COLUMNS) continue;
        float s = room[i];
#pragma unroll
        for (int w = 1; w < SHARES; w++) s += room[w * ROWS * COLUMNS + i];
        end(j, i, s);
    }
}

/// What a thread's elements of c meet: places, bias and what the chain reads.
template <int ROWS> struct Ends {
    static constexpr int COUNT = of_thread(ROWS);
    bool is[COUNT];
    i64 at[COUNT];
    float bias[COUNT];
    Chain::Loaded<1> loaded[COUNT];
    /// Of the block's rows from `row0` on. Only those blocks end elements that are the first of their chunks.
    __device__ __forceinline__ void find(const void* all, const Few& p, i64 batch, int row0, int rows) {
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            int i = threadIdx.x + j * THREADS, row = row0 + i / COLUMNS, column = blockIdx.x * COLUMNS + i % COLUMNS;
            is[j] = i < rows * COLUMNS && column < p.n;
#if COMBINES && ALONE
            // The one row there is, in the block's own memory.
            at[j] = i;
#else
            at[j] = batch * p.c_batch + row * p.c_row + column * p.c_column;
#endif
            bias[j] = 0.0f;
            if (!is[j] || !all || blockIdx.y > 0) continue;
            i64 k = batch * p.bias_batch + row * p.bias_row + column * p.bias_column;
            bias[j] = p.wide_bias ? ((const float*)all)[k] : to_float(((const TC*)all)[k]);
        }
    }
    /// What the chain reads, which kernels before may have written.
    __device__ __forceinline__ void load(const Chain& chain) {
#if JOINED && !COMBINES
#pragma unroll
        for (int j = 0; j < COUNT; j++)
            if (is[j] && blockIdx.y == 0) loaded[j] = chain.load<1>(at[j]);
#endif
    }
    /// Ends the thread's j-th element, whose sum is `v`. A bias is added even where it is 0: -0 would else stay.
    __device__ __forceinline__ void end(int j, float v, bool biased, float* partial, i64 total, TC* c, const Chain& chain) const {
        if (!is[j]) return;
        if (biased && blockIdx.y == 0) v += bias[j];
        if (partial) {
            partial[blockIdx.y * total + at[j]] = v;
            return;
        }
        Vector<TC, 1> one;
        one.at[0] = from_float<TC>(v);
#if COMBINES
        store_vector<1>(c + at[j], one);
#else
        put<1>(c, at[j], one, chain, loaded[j]);
#endif
    }
};

#if CLUSTER > 1
/// Those of the blocks behind the first.
#define SUMS ((CLUSTER - 1) * MOST * COLUMNS)
#else
#define SUMS 1
#endif

/// The work of a block on rows of ROWS rows, whose first round is loaded. In a cluster the first block is given the sums of the others.
template <int ROWS>
__device__ __forceinline__ void work(float* room, float* sums, const Rows<ROWS>& a, const T* b, const Few& p, int rows, int k0, int k1,
                                     Round<ROWS>& round, const Ends<ROWS>& ends, bool biased, float* partial, TC* c, const Chain& chain) {
#if CLUSTER > 1
    // From here on every block of the cluster is there.
    cluster_wait();
    float own[of_thread(ROWS)];
    few<ROWS>(room, a, b, p, rows, k0, k1, round, [&](int j, int i, float v) {
        own[j] = v;
        if (blockIdx.y > 0) give_number(sums + (blockIdx.y - 1) * MOST * COLUMNS + i, 0, v);
    });
    cluster_arrive();
    if (blockIdx.y > 0) return;
    cluster_wait();
#pragma unroll
    for (int j = 0; j < of_thread(ROWS); j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= rows * COLUMNS) continue;
        float v = own[j];
#pragma unroll
        for (int block = 1; block < CLUSTER; block++) v += sums[(block - 1) * MOST * COLUMNS + i];
        ends.end(j, v, biased, partial, p.total, c, chain);
    }
#else
    few<ROWS>(room, a, b, p, rows, k0, k1, round, [&](int j, int, float v) { ends.end(j, v, biased, partial, p.total, c, chain); });
#endif
}

/// What a block of a dense product needs that no kernel of the run writes where EARLY, and what else does not wait for its rows.
struct Fetched {
    i64 batch;
    int row0, rows, k0, k1;
    const T* b;
    Round<MOST> round;
    Ends<MOST> ends;
    Lead::Early lead;
    __device__ __forceinline__ void load(const T* all, const void* bias, const Few& p, const Lead& leading) {
        int groups = ceil_div(p.m, MOST);
        batch = blockIdx.z / groups, row0 = blockIdx.z % groups * MOST, rows = min(MOST, p.m - row0);
        k0 = blockIdx.y * p.chunk, k1 = min(k0 + p.chunk, p.k);
        b = all + batch * p.b_batch;
        round.load_from(b, p, k0, k1);
        lead.load(leading);
        ends.find(bias, p, batch, row0, rows);
    }
};

#if GROUPED
/// The work of a block on rows of an expert.
template <int ROWS>
__device__ __forceinline__ void of_expert(float* room, float* sums, const TA* a, const T* b, const void* bias, const Few& p, i64 expert,
                                          int row0, int rows, float* partial, TC* c, const Lead& lead, bool plain, const Chain& chain) {
    int k0 = blockIdx.y * p.chunk, k1 = min(k0 + p.chunk, p.k);
    b += expert * p.b_batch;
    Round<ROWS> round;
    round.load_from(b, p, k0, k1);
    Ends<ROWS> ends;
    ends.find(bias, p, expert, row0, rows);
    if (!partial) ends.load(chain);
    Rows<ROWS> of_a(a, row0, rows, lead, plain);
    work<ROWS>(room, sums, of_a, b, p, rows, k0, k1, round, ends, bias != 0, partial, c, chain);
}
#endif

#if CHOOSES
#define CHOICE_PARAMETERS , ROUTING_PARAMETERS
#define CHOOSING ROUTING
#else
#define CHOICE_PARAMETERS
struct Routing {};
#define CHOOSING Routing()
#endif

#if GROUPED
/// The expert of a slot, -1 of an unused one.
__device__ __forceinline__ int expert_of(int slot, const int* offsets, const Few& p, const Routing& routing) {
    __shared__ int of_slot;
#if CHOOSES
    __shared__ Desk desk;
    if (threadIdx.x < 32) {
        int expert = slot == 0 ? expert_of_token(routing, desk) : -1;
        if (threadIdx.x == 0) of_slot = expert;
    }
#else
    if (threadIdx.x == 0) of_slot = -1;
    __syncthreads();
    for (int e = threadIdx.x; e < p.experts; e += THREADS)
        if (offsets[e] <= slot && slot < offsets[e + 1]) of_slot = e;
#endif
    __syncthreads();
    return of_slot;
}

/// The work of a block of a product of experts: on the slot of its number along z, or, if `twin_rows` is not negative, on the twin.
__device__ __forceinline__ void of_block(float* room, float* sums, const TA* a, const T* b, const int* offsets, const void* bias,
                                         float* partial, TC* c, const Few& p, const Lead& lead, const Routing& routing,
                                         int twin_rows, const Chain& chain) {
    bool is_twin = twin_rows >= 0;
    int row0 = is_twin ? 0 : blockIdx.z, expert = 0, rows = twin_rows;
    if (!is_twin) expert = expert_of(row0, offsets, p, routing);
    if (expert < 0) {
        // Of an unused slot one block ends each column, or each chunk's where they are added up later; c_batch is 0.
        Ends<1> ends;
        ends.find(0, p, 0, row0, 1);
        if (!partial) ends.load(chain);
        if (blockIdx.y == 0 || partial) ends.end(0, 0.0f, false, partial, p.total, c, chain);
        return;
    }
#if CHOOSES
    if (!is_twin) rows = 1;
#else
    if (!is_twin) {
        rows = min(MOST, offsets[expert + 1] - row0);
        if ((row0 - offsets[expert]) % MOST != 0) return;
    }
#endif
#if CLUSTER > 1
    cluster_arrive();
#endif
    if (rows == 1) of_expert<1>(room, sums, a, b, bias, p, expert, row0, rows, partial, c, lead, is_twin, chain);
#if MOST > 1
    else if (rows == 2) of_expert<2>(room, sums, a, b, bias, p, expert, row0, rows, partial, c, lead, is_twin, chain);
#endif
#if MOST > 2
    else if (rows <= 4) of_expert<4>(room, sums, a, b, bias, p, expert, row0, rows, partial, c, lead, is_twin, chain);
#endif
#if MOST > 4
    else of_expert<8>(room, sums, a, b, bias, p, expert, row0, rows, partial, c, lead, is_twin, chain);
#endif
}
#endif

#if TWIN
__device__ __forceinline__ bool in_twin() { return blockIdx.z + 1 == gridDim.z; }

/// Brings near what a block of the twin reads of `b`, while the kernel before may still run: in cache it is what is in memory. Only where
/// columns do not lie along k, as those of a model's weights.
__device__ __forceinline__ void bring_near(const T* b, const Few& p) {
#if !TRANSPOSED
    int k0 = blockIdx.y * p.chunk, k1 = min(k0 + p.chunk, p.k), column = first_column();
    if (in_twin() && column < p.n)
        for (int k = k0 + first_piece(); k < k1; k += STEP) prefetch(b + k * p.b_line + column);
#endif
}

#define TWIN_PARAMETERS                                                                                                \
    , const TA* twin_a, const T* twin_b, const void* twin_bias, TC* twin_c, int twin_rows TWIN_CHAIN_PARAMETERS
#else
#define TWIN_PARAMETERS
#endif

/// Blocks along z: for each product of a batch, groups of MOST rows; if GROUPED one for each slot, of which only those at the start of
/// MOST rows of an expert have work, and those of unused slots, which become 0.
FEW_KERNEL few_rows(const TA* a, const T* b, const int* offsets, const void* bias, float* partial, TC* c, Few p LEAD_PARAMETERS
                        CHOICE_PARAMETERS COMBINE_PARAMETERS CHAIN_PARAMETERS TWIN_PARAMETERS) {
    Fetched fetched;
    if (EARLY) fetched.load(b, bias, p, LEADING);
#if TWIN
    bring_near(twin_b, p);
#endif
    begin();
#if CHOOSES
    if (blockIdx.x + 1 == gridDim.x) {
        if (blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x < 32 * ROUTING_WARPS) route_and_assign(ROUTING);
        return;
    }
#endif
    __shared__ float room[SHARES * MOST * COLUMNS], sums[SUMS];
#if GROUPED
    TC* to = c;
#if COMBINES
    Combined<COLUMNS> tail;
    tail.load(COMBINING, p.n, CHAIN);
#if ALONE
    __shared__ TC own[COLUMNS];
    to = own;
#endif
#endif
#if TWIN
    const bool is_twin = in_twin();
    if (is_twin) a = twin_a, b = twin_b, bias = twin_bias, to = twin_c;
    const int of_twin = is_twin ? twin_rows : -1;
#else
    const int of_twin = -1;
#endif
#if TWIN && !COMBINES
    const Chain chain = is_twin ? TWIN_CHAIN : CHAIN;
#else
    const Chain chain = CHAIN;
#endif
    of_block(room, sums, a, b, offsets, bias, partial, to, p, LEADING, CHOOSING, of_twin, chain);
#if COMBINES
    tail.end(COMBINING, ALONE ? to : c, p.m, p.n, chain);
#endif
#else
#if CLUSTER > 1
    cluster_arrive();
#endif
    if (!EARLY) fetched.load(b, bias, p, LEADING);
    if (!partial) fetched.ends.load(CHAIN);
#if LEAD == NOTHING
    const TA* from = a + fetched.batch * p.a_batch;
#else
    __align__(16) __shared__ TA from[MOST * WIDTH];
    make_rows(from, fetched.rows, LEADING, fetched.lead, blockIdx.x == 0 && blockIdx.y == 0);
#endif
    Rows<MOST> rows(from, fetched.row0, fetched.rows, LEADING, true);
    work<MOST>(room, sums, rows, fetched.b, p, fetched.rows, fetched.k0, fetched.k1, fetched.round, fetched.ends, bias != 0, partial, c,
               CHAIN);
#endif
}

/// The results of the chunks together.
KERNEL few_rows_finish(const float* partial, i64 total, int chunks, TC* c CHAIN_PARAMETERS) {
    begin();
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at < total) put(c, at, from_float<TC>(sum_of_chunks(partial, total, chunks, at)), CHAIN);
}
