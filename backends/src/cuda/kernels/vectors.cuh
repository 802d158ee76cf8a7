// Elements that lie together, moved 16 bytes at a time where they are as many.

/// Walks the elements that a lane has at a time, where a file defines how many.
#define EACH_OF(j) _Pragma("unroll") for (int j = 0; j < PER_LANE; j++)

/// `COUNT` elements in registers.
template <typename Element, int COUNT> union Vector {
    Element at[COUNT];
    uint4 fours[(COUNT * sizeof(Element) + 15) / 16];
    u64 two;
    u32 one;
    u16 half;
    u8 byte;
};

/// The same address, known to be in global memory: one that was itself read from memory could be of any kind, which makes every access
/// through it slower.
template <typename Element> __device__ __forceinline__ Element* in_global(Element* at) {
#ifndef MOEBIUS_EMULATOR
    asm("" : "+l"(at));
    __builtin_assume(__isGlobal(at));
#endif
    return at;
}

/// Reads elements from an address at a multiple of their bytes together, at most 16.
template <int COUNT, typename Element> __device__ __forceinline__ Vector<Element, COUNT> load_vector(const Element* from) {
    const int BYTES = COUNT * sizeof(Element);
    static_assert(BYTES <= 2 || BYTES == 4 || BYTES == 8 || BYTES % 16 == 0, "whole words, or one element");
    Vector<Element, COUNT> v;
    if (BYTES == 1) v.byte = *(const u8*)from;
    else if (BYTES == 2) v.half = *(const u16*)from;
    else if (BYTES == 4) v.one = *(const u32*)from;
    else if (BYTES == 8) v.two = *(const u64*)from;
    else
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) v.fours[i] = ((const uint4*)from)[i];
    return v;
}

/// Reads 16 bytes that the kernel reads once: a multiprocessor's own cache keeps no place for them.
template <int COUNT, typename Element> __device__ __forceinline__ Vector<Element, COUNT> load_once(const Element* from) {
    static_assert(COUNT * sizeof(Element) == 16, "one load");
    Vector<Element, COUNT> v;
#ifdef MOEBIUS_EMULATOR
    v.fours[0] = *(const uint4*)from;
#else
    // Volatile, so that it stays behind the wait for the kernel before.
    uint4& to = v.fours[0];
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from));
#endif
    return v;
}

/// Writes elements, as they are read.
template <int COUNT, typename Element>
__device__ __forceinline__ void store_vector(Element* to, const Vector<Element, COUNT>& v) {
    const int BYTES = COUNT * sizeof(Element);
    if (BYTES == 1) *(u8*)to = v.byte;
    else if (BYTES == 2) *(u16*)to = v.half;
    else if (BYTES == 4) *(u32*)to = v.one;
    else if (BYTES == 8) *(u64*)to = v.two;
    else
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) ((uint4*)to)[i] = v.fours[i];
}
