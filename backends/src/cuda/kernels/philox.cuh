// Philox4x32-10, as ir/src/philox.rs.

struct Words { u32 w[4]; };

/// The product of two words. NVRTC adds a zero to the upper half of one with a constant, unless it is told what is meant.
__device__ __forceinline__ u64 wide_product(u32 a, u32 b) {
#ifdef MOEBIUS_EMULATOR
    return (u64)a * b;
#else
    u64 product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
#endif
}

/// The block of this number; `upper` are the two words above it in the counter.
__device__ __forceinline__ Words philox(u32 key0, u32 key1, u64 block, u32 upper0, u32 upper1) {
    u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = upper0, c3 = upper1;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 p0 = wide_product(c0, 0xd2511f53u), p1 = wide_product(c2, 0xcd9e8d57u);
        u32 next0 = (u32)(p1 >> 32) ^ c1 ^ key0, next2 = (u32)(p0 >> 32) ^ c3 ^ key1;
        c0 = next0, c1 = (u32)p1, c2 = next2, c3 = (u32)p0;
        key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
    Words words;
    words.w[0] = c0, words.w[1] = c1, words.w[2] = c2, words.w[3] = c3;
    return words;
}
