// What a kernel's text is compiled against when a processor stands in for a GPU: CUDA's words as plain C++.
//
// The threads of a block are run one after another, each until it waits for the others (cuda.cpp), so that a missing
// barrier shows as a wrong result, every time.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define MOEBIUS_EMULATOR 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

struct Triple { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
#define __align__(n) alignas(n)
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

/// One thread of a block, and what its warp exchanges.
struct Thread {
    Triple thread, block, block_dim, grid_dim;
    int lane, phase;
    /// Two sets of places for each lane, used in turn: whoever writes the second has read the first.
    uint64_t (*slots)[32][8];
};

/// Filled in by the emulator when the module is loaded.
struct Emulator {
    Thread* now;
    void (*block_barrier)();
    void (*warp_barrier)();
};
extern "C" { inline Emulator* moebius_emulator = nullptr; }

#define threadIdx (moebius_emulator->now->thread)
#define blockIdx (moebius_emulator->now->block)
#define blockDim (moebius_emulator->now->block_dim)
#define gridDim (moebius_emulator->now->grid_dim)

inline void __syncthreads() { moebius_emulator->block_barrier(); }
/// Blocks run one after another, so one flag does for all.
inline int __syncthreads_or(int flag) {
    static int any;
    __syncthreads();
    any = 0;
    __syncthreads();
    if (flag) any = 1;
    __syncthreads();
    return any;
}
inline void __syncwarp() { moebius_emulator->warp_barrier(); }

/// Gives `words` 64-bit words to the warp and returns everybody's.
inline uint64_t (*exchange(const void* value, size_t bytes))[8] {
    Thread* me = moebius_emulator->now;
    uint64_t (*slots)[8] = me->slots[me->phase];
    memcpy(slots[me->lane], value, bytes);
    me->phase ^= 1;
    moebius_emulator->warp_barrier();
    return slots;
}
template <typename V> inline V __shfl_xor_sync(unsigned, V value, int mask) {
    uint64_t (*all)[8] = exchange(&value, sizeof value);
    V other;
    memcpy(&other, all[moebius_emulator->now->lane ^ mask], sizeof other);
    return other;
}
template <typename V> inline V __shfl_up_sync(unsigned, V value, int distance) {
    uint64_t (*all)[8] = exchange(&value, sizeof value);
    V other;
    int lane = moebius_emulator->now->lane;
    memcpy(&other, all[lane < distance ? lane : lane - distance], sizeof other);
    return other;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    uint64_t word = value;
    uint64_t (*all)[8] = exchange(&word, sizeof word);
    unsigned most = 0;
    for (int lane = 0; lane < 32; lane++) most = all[lane][0] > most ? (unsigned)all[lane][0] : most;
    return most;
}
inline unsigned __ballot_sync(unsigned, bool flag) {
    uint64_t word = flag;
    uint64_t (*all)[8] = exchange(&word, sizeof word);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= (unsigned)(all[lane][0] & 1) << lane;
    return votes;
}

inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned from) {
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned to = 0;
    for (int byte = 0; byte < 4; byte++) to |= (unsigned)(both >> 8 * (from >> 4 * byte & 7) & 0xff) << 8 * byte;
    return to;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicCAS(int* at, int old, int now) { int was = *at; if (was == old) *at = now; return was; }
inline int atomicAdd(int* at, int n) { int was = *at; *at += n; return was; }
inline unsigned atomicInc(unsigned* at, unsigned last) { unsigned was = *at; *at = was >= last ? 0 : was + 1; return was; }
inline void __threadfence() {}
template <typename V> inline V __ldcg(const V* at) { return *at; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

inline float emulated_half_to_float(uint16_t bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
inline uint16_t emulated_float_to_half(float x) { _Float16 h = (_Float16)x; uint16_t bits; memcpy(&bits, &h, 2); return bits; }

/// The tensor cores' 16 x 8 x 16 product, by the layout that mma.cuh describes.
inline void emulated_mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bf16) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    uint64_t (*all)[8] = exchange(mine, sizeof mine);
    auto number = [&](int lane, int word, int half) {
        unsigned words[6];
        memcpy(words, all[lane], sizeof words);
        uint16_t bits = (uint16_t)(words[word] >> (16 * half));
        return bf16 ? __uint_as_float((unsigned)bits << 16) : emulated_half_to_float(bits);
    };
    int lane = moebius_emulator->now->lane;
    for (int q = 0; q < 4; q++) {
        int row = lane / 4 + q / 2 * 8, column = lane % 4 * 2 + q % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) {
            int pair = k % 8 / 2, upper = k / 8;
            sum += number(row % 8 * 4 + pair, row / 8 + 2 * upper, k % 2) * number(column * 4 + pair, 4 + upper, k % 2);
        }
        c[q] += sum;
    }
}

/// The four 8 x 8 matrices of ldmatrix, whose rows the lanes name.
inline void emulated_ldmatrix(unsigned& a, unsigned& b, unsigned& c, unsigned& d, const void* row, bool transposed) {
    uint64_t address = (uint64_t)row;
    uint64_t (*all)[8] = exchange(&address, sizeof address);
    int lane = moebius_emulator->now->lane, group = lane / 4, pair = lane % 4;
    unsigned* to[4] = {&a, &b, &c, &d};
    for (int m = 0; m < 4; m++) {
        auto element = [&](int r, int c) { return (unsigned)((const uint16_t*)all[8 * m + r][0])[c]; };
        *to[m] = transposed ? element(2 * pair, group) | element(2 * pair + 1, group) << 16
                            : element(group, 2 * pair) | element(group, 2 * pair + 1) << 16;
    }
}

/// Copies that a thread has started, in groups, of which the last is not ended: they happen when it waits for them, so that reading
/// too early shows.
struct Copy { void* to; const void* from; bool real; };
inline std::vector<std::vector<Copy>>& emulated_copies() {
    static std::vector<std::vector<Copy>> all[1024];
    auto& groups = all[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    return groups;
}
inline void emulated_copy_async(void* to, const void* from, bool real) { emulated_copies().back().push_back({to, from, real}); }
inline void emulated_copies_end() { emulated_copies().emplace_back(); }
/// Waits for all but the last so many groups that were ended; for all of them also for what is in none.
inline void emulated_copies_wait(int but) {
    auto& groups = emulated_copies();
    size_t ended = groups.size() - 1, done = but == 0 ? groups.size() : ended > (size_t)but ? ended - but : 0;
    for (size_t g = 0; g < done; g++)
        for (const Copy& copy : groups[g]) {
            if (copy.real) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        }
    groups.erase(groups.begin(), groups.begin() + done);
}

template <typename... A, size_t... I> void emulated_call(void (*kernel)(A...), void** p, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)p[I]...);
}
template <typename... A> void emulated_call(void (*kernel)(A...), void** p) {
    emulated_call(kernel, p, std::index_sequence_for<A...>());
}
template <typename... A> void emulated_sizes(void (*)(A...), size_t* sizes) {
    size_t all[] = {sizeof(A)..., 0};
    for (size_t i = 0; i <= sizeof...(A); i++) sizes[i] = all[i];
}
