// Pairs of 16-bit floats in a word, powers of 2, and addresses as the instructions of the tensor cores take them.

#ifdef MOEBIUS_EMULATOR
/// Two numbers rounded to nearest even, `low` in the lower half.
__device__ __forceinline__ u32 pack(float low, float high, bf16) { return bf16_bits(low) | (u32)bf16_bits(high) << 16; }
__device__ __forceinline__ u32 pack(float low, float high, f16) { return half_bits(low) | (u32)half_bits(high) << 16; }
/// 2^x by the chip's own function: within 2 units in the last place, 0 below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) { return exp2f(x); }
#else
__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ u32 pack(float low, float high, bf16) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ u32 pack(float low, float high, f16) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
