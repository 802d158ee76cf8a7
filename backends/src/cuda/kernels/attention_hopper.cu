// Attention of 16-bit floats on Hopper, and its gradient, for heads of 64 columns. As attention_mma.cu and
// attention_grad_mma.cu, with wgmma: a block owns OWN rows, 64 for each of two warpgroups, and meets the others in blocks of
// OTHERS, which one more warp loads ahead. Weights and their gradients go from one product to the next in registers.

#define OTHERS 64
#define STAGES 3
#define OWN 128
#define COMPUTING 256
#define THREADS (COMPUTING + 32)
/// Of the gradients: registers are handed over by whole warpgroups.
#define GRAD_THREADS (COMPUTING + 128)

struct Stage { u16 x[OTHERS * HEAD], y[OTHERS * HEAD]; };

struct Room {
    u16 own_x[OWN * HEAD], own_y[OWN * HEAD];
    Stage stages[STAGES];
    /// Of the queries of a stage, where these are the others: lse to the base 2, and delta.
    float exponents[STAGES][OTHERS], drops[STAGES][OTHERS];
    u64 own, full[STAGES], empty[STAGES];
};

static_assert(sizeof(Room) + 1024 <= SHARED, "the memory that is asked for");

typedef Round<STAGES> Turn;

/// sum = own rows times other rows, both along the head.
__device__ __forceinline__ void rows_by_rows(float (&sum)[32], u64 own, u64 other) {
#pragma unroll
    for (int i = 0; i < HEAD / 16; i++) wgmma(sum, own + i * ALONG_K, other + i * ALONG_K, i > 0);
}
/// sum += weights, [64 own rows, OTHERS], times other rows.
__device__ __forceinline__ void weights_by_rows(float (&sum)[32], const u32 (&weights)[16], u64 other, int add) {
#pragma unroll
    for (int i = 0; i < OTHERS / 16; i++)
        wgmma_held(sum, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3], other + i * ACROSS_K,
                   add || i > 0);
}
/// Sums as the left side of a product, rounded.
__device__ __forceinline__ void held(u32 (&to)[16], const float (&sum)[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) to[i] = pack(sum[2 * i], sum[2 * i + 1], T());
}

/// Makes the barriers; `arrivals` give a stage back.
__device__ __forceinline__ void begin(Room& room, int arrivals) {
    if (threadIdx.x == 0) {
        barrier_init(&room.own, 1);
        for (int i = 0; i < STAGES; i++) {
            // Every lane that loads.
            barrier_init(&room.full[i], 32);
            barrier_init(&room.empty[i], arrivals);
        }
        barriers_ready();
    }
    __syncthreads();
}

/// The block's shared memory, which it gets at its launch.
__device__ __forceinline__ Room& room_of_block() {
    extern __shared__ u8 memory[];
    return *(Room*)(((u64)memory + 1023) / 1024 * 1024);
}

/// What a block walks over: others begin.. up to end, of heads first.. up to last.
struct Walk { int begin, end, first, last; };

/// The warp that loads: x and y of every block of others, from the columns that `column` says; `row` loads what else a stage holds.
template <typename Column, typename Row>
__device__ __forceinline__ void load_others(Room& room, const TensorMap& x_map, const TensorMap& y_map, const Walk& walk, int b,
                                            Column column, Row row) {
    Turn turn;
    int lane = threadIdx.x % 32;
    for (int h = walk.first; h <= walk.last; h++) {
        for (int at = walk.begin; at < walk.end; at += OTHERS) {
            barrier_wait(&room.empty[turn.stage], turn.parity ^ 1);
            Stage& stage = room.stages[turn.stage];
            row(turn.stage, h, at, lane);
            if (lane == 0) {
                arrive_with_bytes(&room.full[turn.stage], sizeof(Stage));
                int x, y;
                column(h, x, y);
                load_box(stage.x, &x_map, x, at, b, &room.full[turn.stage]);
                load_box(stage.y, &y_map, y, at, b, &room.full[turn.stage]);
            } else {
                arrive(&room.full[turn.stage]);
            }
            turn.next();
        }
    }
}

/// Loads the own rows; one thread.
__device__ __forceinline__ void load_own(Room& room, const TensorMap& x_map, const TensorMap* y_map, int x, int y, int from,
                                         int b) {
    arrive_with_bytes(&room.own, (y_map ? 2 : 1) * OWN * HEAD * 2);
    for (int i = 0; i < OWN / 64; i++) {
        load_box(room.own_x + i * 64 * HEAD, &x_map, x, from + i * 64, b, &room.own);
        if (y_map) load_box(room.own_y + i * 64 * HEAD, y_map, y, from + i * 64, b, &room.own);
    }
}

/// Writes the 64 rows of a warpgroup, each times its factor; those before `rows` exist.
__device__ __forceinline__ void store(T* to, i64 pitch, int first, int rows, const float (&sums)[32], float low, float high) {
    int lane = threadIdx.x % 32, row = first + threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row + 8 * half >= rows) continue;
        u32* at = (u32*)(to + (row + 8 * half) * pitch);
        float factor = half ? high : low;
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++)
            at[4 * j + lane % 4] = pack(factor * sums[4 * j + 2 * half], factor * sums[4 * j + 2 * half + 1], T());
    }
}

/// Grid: blocks of queries, heads, batch.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_hopper(const __grid_constant__ TensorMap qkv_map, T* out, float* lse, Heads s) {
    begin();
    Room& room = room_of_block();
    int h = blockIdx.y, b = blockIdx.z, g = h / (s.heads / s.kv_heads);
    // The last queries have the most keys to see: they start first.
    int from = (int)(s.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * OWN;
    int end = s.causal ? min(from + OWN, s.tokens) : s.tokens;
    begin(room, COMPUTING / 32);
    if (threadIdx.x >= COMPUTING) {
        if (threadIdx.x == COMPUTING) load_own(room, qkv_map, nullptr, h * HEAD, 0, from, b);
        load_others(room, qkv_map, qkv_map, {0, end, 0, 0}, b,
                    [&](int, int& x, int& y) { x = (s.heads + g) * HEAD, y = (s.heads + s.kv_heads + g) * HEAD; },
                    [](int, int, int, int) {});
        return;
    }
    int lane = threadIdx.x % 32, first = from + threadIdx.x / 128 * 64, row = first + threadIdx.x % 128 / 32 * 16 + lane / 4;
    float factor = s.scale * LOG2_E;
    float acc[32] = {}, greatest[2] = {-INF_F, -INF_F}, sum[2] = {};
    barrier_wait(&room.own, 0);
    u64 own = described(room.own_x + threadIdx.x / 128 * 64 * HEAD);
    Turn turn;
    for (int key0 = 0; key0 < end; key0 += OTHERS) {
        barrier_wait(&room.full[turn.stage], turn.parity);
        Stage& stage = room.stages[turn.stage];
        if (!(s.causal && key0 > first + 63)) {
            float score[32];
            products_begin();
            rows_by_rows(score, own, described(stage.x));
            products_end();
            products_wait<0>();
            bool edge = key0 + OTHERS > s.tokens || (s.causal && key0 + OTHERS - 1 > first);
            float most[2] = {greatest[0], greatest[1]};
#pragma unroll
            for (int i = 0; i < 32; i++) {
                float x = factor * score[i];
                if (edge) {
                    int key = key0 + i / 4 * 8 + 2 * (lane % 4) + i % 2, query = row + i % 4 / 2 * 8;
                    if (key >= s.tokens || (s.causal && key > query)) x = -INF_F;
                }
                score[i] = x;
                most[i % 4 / 2] = fmaxf(most[i % 4 / 2], x);
            }
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                most[half] = quad_max(most[half]);
                // Where nothing is visible yet all weights are 0, not those of a difference of infinities.
                float base = most[half] == -INF_F ? 0.0f : most[half], total = 0.0f;
                shrink[half] = exp2_fast(greatest[half] - base);
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    if (i % 4 / 2 != half) continue;
                    score[i] = exp2_fast(score[i] - base);
                    total += score[i];
                }
                greatest[half] = most[half];
                sum[half] = sum[half] * shrink[half] + total;
            }
#pragma unroll
            for (int i = 0; i < 32; i++) acc[i] *= shrink[i % 4 / 2];
            u32 p[16];
            held(p, score);
            products_begin();
            weights_by_rows(acc, p, described(stage.y), 1);
            products_end();
            products_wait<0>();
        }
        // What every lane read of the stage comes before the arrival of one.
        __syncwarp();
        if (lane == 0) arrive(&room.empty[turn.stage]);
        turn.next();
    }
    float low = quad_sum(sum[0]), high = quad_sum(sum[1]);
    store(out + s.result(b, h), s.result_pitch(), first, s.tokens, acc, 1.0f / low, 1.0f / high);
    if (lane % 4 == 0) {
        if (row < s.tokens) lse[s.row(b, h) + row] = LN_2 * greatest[0] + logf(low);
        if (row + 8 < s.tokens) lse[s.row(b, h) + row + 8] = LN_2 * greatest[1] + logf(high);
    }
}

/// One block of rows `from..from + OWN` of one head. With OF_KEYS these are keys and values of kv head `head` and the others
/// queries, of all heads that share them, with their dout; without, queries and dout of `head`, and the others keys and values.
template <bool OF_KEYS>
__device__ __forceinline__ void grads(const TensorMap& qkv_map, const TensorMap& dout_map, const float* lse, const float* delta,
                                      T* dqkv, const Heads& s, int from, int head, int b) {
    Room& room = room_of_block();
    int sharing = s.heads / s.kv_heads, g = OF_KEYS ? head : head / sharing;
    int key = (s.heads + g) * HEAD, value = key + s.kv_heads * HEAD;
    // Queries before a block see none of its keys, nor do those of a block see keys behind it.
    Walk walk = {OF_KEYS && s.causal ? from : 0, !OF_KEYS && s.causal ? min(from + OWN, s.tokens) : s.tokens,
                 OF_KEYS ? head * sharing : head, OF_KEYS ? head * sharing + sharing - 1 : head};
    begin(room, OF_KEYS ? COMPUTING : COMPUTING / 32);
    if (threadIdx.x >= COMPUTING) {
        fewer_registers<24>();
        if (threadIdx.x >= COMPUTING + 32) return;
        if (threadIdx.x == COMPUTING)
            load_own(room, qkv_map, OF_KEYS ? &qkv_map : &dout_map, OF_KEYS ? key : head * HEAD,
                     OF_KEYS ? value : head * HEAD, from, b);
        load_others(room, qkv_map, OF_KEYS ? dout_map : qkv_map, walk, b,
                    [&](int h, int& x, int& y) { x = OF_KEYS ? h * HEAD : key, y = OF_KEYS ? h * HEAD : value; },
                    [&](int stage, int h, int at, int lane) {
                        for (int i = lane; OF_KEYS && i < OTHERS; i += 32) {
                            i64 row = s.row(b, h) + at + i;
                            bool there = at + i < s.tokens;
                            room.exponents[stage][i] = there ? LOG2_E * lse[row] : 0.0f;
                            room.drops[stage][i] = there ? delta[row] : 0.0f;
                        }
                    });
        return;
    }
    more_registers<240>();
    int lane = threadIdx.x % 32, first = from + threadIdx.x / 128 * 64, row = first + threadIdx.x % 128 / 32 * 16 + lane / 4;
    float factor = s.scale * LOG2_E, exponent[2] = {}, drop[2] = {};
    if (!OF_KEYS) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = row + 8 * half;
            if (query < s.tokens) exponent[half] = LOG2_E * lse[s.row(b, head) + query], drop[half] = delta[s.row(b, head) + query];
        }
    }
    // Both begin with the first product: if they were set to 0, the compiler would have every product wait for the one before.
    float of_x[32], of_y[32];
    int begun = 0;
    barrier_wait(&room.own, 0);
    u64 own_x = described(room.own_x + threadIdx.x / 128 * 64 * HEAD);
    u64 own_y = described(room.own_y + threadIdx.x / 128 * 64 * HEAD);
    // A lane that read of a stage by itself gives it back by itself; what only products read, a warp does.
    auto give_back = [&](int stage) {
        if (OF_KEYS || lane == 0) arrive(&room.empty[stage]);
    };
    Turn turn;
    // The stage that products may still read.
    int reading = -1;
    int blocks = (walk.last - walk.first + 1) * ((walk.end - walk.begin + OTHERS - 1) / OTHERS);
    for (int at = walk.begin; blocks > 0; blocks--) {
        barrier_wait(&room.full[turn.stage], turn.parity);
        // A row that exists sees one block at least.
        if (s.causal && (OF_KEYS ? at + OTHERS - 1 < first : at > first + 63)) {
            give_back(turn.stage);
        } else {
            Stage& stage = room.stages[turn.stage];
            bool edge = at + OTHERS > s.tokens || first + 64 > s.tokens ||
                        (s.causal && (OF_KEYS ? first + 63 > at : at + OTHERS - 1 > first));
            auto other = [&](int i) { return i / 4 * 8 + 2 * (lane % 4) + i % 2; };
            auto seen = [&](int i) {
                int mine = row + i % 4 / 2 * 8, k = OF_KEYS ? mine : at + other(i), q = OF_KEYS ? at + other(i) : mine;
                return (k < s.tokens) & (q < s.tokens) & (!s.causal | (k <= q));
            };
            float weight[32], slope[32];
            u32 p[16], ds[16];
            u64 x = described(stage.x), y = described(stage.y);
            // Each product runs while what the one before gave is worked on, the last one until the next block's first is done.
            products_begin();
            rows_by_rows(weight, own_x, x);
            products_end();
            rows_by_rows(slope, own_y, y);
            products_end();
            products_wait<1>();
            if (begun) give_back(reading);
            reading = turn.stage;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                float exponent_of = OF_KEYS ? room.exponents[turn.stage][other(i)] : exponent[i % 4 / 2];
                weight[i] = exp2_fast(fmaf(factor, weight[i], -exponent_of));
                if (edge) weight[i] = seen(i) ? weight[i] : 0.0f;
            }
            if (OF_KEYS) {
                held(p, weight);
                products_begin();
                weights_by_rows(of_y, p, y, begun);
                products_end();
                products_wait<1>();
            } else {
                products_wait<0>();
            }
#pragma unroll
            for (int i = 0; i < 32; i++) {
                slope[i] = weight[i] * (slope[i] - (OF_KEYS ? room.drops[turn.stage][other(i)] : drop[i % 4 / 2]));
                // What nobody sees may be infinite.
                if (edge) slope[i] = seen(i) ? slope[i] : 0.0f;
            }
            held(ds, slope);
            products_begin();
            weights_by_rows(of_x, ds, x, begun);
            products_end();
            begun = 1;
        }
        at = at + OTHERS < walk.end ? at + OTHERS : walk.begin;
        turn.next();
    }
    products_wait<0>();
    store(dqkv + (OF_KEYS ? s.key(b, g) : s.query(b, head)), s.pitch(), first, s.tokens, of_x, s.scale, s.scale);
    if (OF_KEYS) store(dqkv + s.value(b, g), s.pitch(), first, s.tokens, of_y, 1.0f, 1.0f);
}

/// The gradient of the queries. Grid: blocks of queries, heads, batch.
extern "C" __global__ void __launch_bounds__(GRAD_THREADS, 1)
attention_grad_query_hopper(const __grid_constant__ TensorMap qkv_map, const __grid_constant__ TensorMap dout_map,
                            const float* lse, const float* delta, T* dqkv, Heads s) {
    begin();
    // The last queries have the most keys to see: they start first.
    int block = (int)(s.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    grads<false>(qkv_map, dout_map, lse, delta, dqkv, s, block * OWN, blockIdx.y, blockIdx.z);
}

/// The gradients of keys and values, summed over the query heads that share them. Grid: blocks of keys, kv heads, batch.
extern "C" __global__ void __launch_bounds__(GRAD_THREADS, 1)
attention_grad_key_hopper(const __grid_constant__ TensorMap qkv_map, const __grid_constant__ TensorMap dout_map,
                          const float* lse, const float* delta, T* dqkv, Heads s) {
    begin();
    grads<true>(qkv_map, dout_map, lse, delta, dqkv, s, (int)blockIdx.x * OWN, blockIdx.y, blockIdx.z);
}
