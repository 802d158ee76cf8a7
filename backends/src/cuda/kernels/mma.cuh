// The tensor cores' product of a 16 x 16 and a 16 x 8 matrix of 16-bit floats, added to f32 (mma.sync, from sm_80 on).
//
// With group = lane / 4 and pair = lane % 4, a lane holds
// - of A: rows group (a[0], a[2]) and group + 8 (a[1], a[3]), columns 2 pair and 2 pair + 1, plus 8 in a[2] and a[3];
// - of B: column group, rows 2 pair and 2 pair + 1, plus 8 in b[1];
// - of C: rows group (c[0], c[1]) and group + 8 (c[2], c[3]), columns 2 pair and 2 pair + 1.

#ifdef MOEBIUS_EMULATOR
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) { emulated_mma(c, a, b, true); }
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) { emulated_mma(c, a, b, false); }
#else
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
