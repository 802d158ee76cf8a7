// What every kernel starts from: types, the three float formats, and sums over a warp and a block in a fixed order.
//
// Kernels compute in f32 whatever is stored. T, where a file uses it, is defined as float, bf16 or f16; U as the type of an
// element that is only moved.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define KERNEL extern "C" __global__ void

/// The first statement of every kernel. From Hopper on a kernel is launched while the one before it on the stream still runs
/// (driver/kernel.rs): only here does it wait for what that one writes. The next one may be launched, to wait here itself, as soon as all
/// blocks of this one are there: it then has nothing left to do but wait.
__device__ __forceinline__ void begin() {
#if !defined(MOEBIUS_EMULATOR) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Has the line of an address brought to the cache that all multiprocessors share.
__device__ __forceinline__ void prefetch(const void* at) {
#ifndef MOEBIUS_EMULATOR
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

/// The upper half of a binary32.
struct bf16 { u16 bits; };
/// IEEE binary16.
struct f16 { u16 bits; };

#define NAN_F __uint_as_float(0x7fc00000u)
#define INF_F __uint_as_float(0x7f800000u)

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
#ifdef MOEBIUS_EMULATOR
__device__ __forceinline__ float to_float(f16 x) { return emulated_half_to_float(x.bits); }
__device__ __forceinline__ u16 half_bits(float x) { return emulated_float_to_half(x); }
#else
__device__ __forceinline__ float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ u16 half_bits(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

/// Rounded to nearest even.
#ifdef MOEBIUS_EMULATOR
__device__ __forceinline__ u16 bf16_bits(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
__device__ __forceinline__ u16 bf16_bits(float x) {
    // The instruction for two is faster than that for one.
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(0.0f), "f"(x));
    return (u16)both;
}
#endif

template <typename Float> __device__ __forceinline__ Float from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { bf16 y; y.bits = bf16_bits(x); return y; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { f16 y; y.bits = half_bits(x); return y; }

/// A value a kernel rejected: the step's number (0: none) and the value.
struct Fault { int step; int found; };

/// Notes a rejected value; the first one stays.
__device__ __forceinline__ void reject(Fault* fault, int step, int found) {
    if (atomicCAS(&fault->step, 0, step) == 0) fault->found = found;
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
#ifdef MOEBIUS_EMULATOR
__device__ __forceinline__ float max_nan(float a, float b) { return (a > b || a != a) ? a : b; }
#else
__device__ __forceinline__ float max_nan(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}
#endif

#define WHOLE_WARP 0xffffffffu

// Every lane gets the result. Halves are exchanged, so that all lanes add the same pairs: the same bits in each.
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(WHOLE_WARP, x, step);
    return x;
}
__device__ __forceinline__ double warp_sum(double x) {
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(WHOLE_WARP, x, step);
    return x;
}
__device__ __forceinline__ int warp_sum(int x) {
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(WHOLE_WARP, x, step);
    return x;
}
/// The sum of what each of `chunks` chunks has for element `at` of `total`, in order.
__device__ __forceinline__ float sum_of_chunks(const float* partial, i64 total, int chunks, i64 at) {
    float sum = partial[at];
#pragma unroll 8
    for (int i = 1; i < chunks; i++) sum += partial[i * total + at];
    return sum;
}
/// The largest; NaN if any is.
__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step >>= 1) x = max_nan(x, __shfl_xor_sync(WHOLE_WARP, x, step));
    return x;
}

// Sums and maxima over a block of COUNT threads, for all threads. `room` is shared memory for one value a warp; it may be
// used again at once.
template <int COUNT, typename Number> __device__ __forceinline__ Number block_sum(Number x, Number* room) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    Number sum = room[0];
    for (int w = 1; w < COUNT / 32; w++) sum += room[w];
    __syncthreads();
    return sum;
}
template <int COUNT> __device__ __forceinline__ float block_max(float x, float* room) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    float greatest = room[0];
    for (int w = 1; w < COUNT / 32; w++) greatest = max_nan(greatest, room[w]);
    __syncthreads();
    return greatest;
}
