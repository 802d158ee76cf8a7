// What feeds the tensor cores, from sm_80 on, and their product of a 16 x 16 and a 16 x 8 matrix of 16-bit floats, added to
// f32 (mma.sync).
//
// With group = lane / 4 and pair = lane % 4, a lane holds
// - of A: rows group (a[0], a[2]) and group + 8 (a[1], a[3]), columns 2 pair and 2 pair + 1, plus 8 in a[2] and a[3];
// - of B: column group, rows 2 pair and 2 pair + 1, plus 8 in b[1];
// - of C: rows group (c[0], c[1]) and group + 8 (c[2], c[3]), columns 2 pair and 2 pair + 1.

#ifdef MOEBIUS_EMULATOR
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) { emulated_mma(c, a, b, true); }
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) { emulated_mma(c, a, b, false); }
/// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8, a multiple
/// of 16 bytes. The lane gets of each matrix row `group`, columns 2 pair and 2 pair + 1.
__device__ __forceinline__ void ldmatrix(u32& a, u32& b, u32& c, u32& d, const void* row) {
    emulated_ldmatrix(a, b, c, d, row, false);
}
/// The same of the transposed matrices: column `group`, rows 2 pair and 2 pair + 1.
__device__ __forceinline__ void ldmatrix_transposed(u32& a, u32& b, u32& c, u32& d, const void* row) {
    emulated_ldmatrix(a, b, c, d, row, true);
}
/// Starts to copy 16 bytes from global to shared memory, or zeros instead; both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
    emulated_copy_async(shared, global, real);
}
/// Ends a group of this thread's copies.
__device__ __forceinline__ void copies_end() { emulated_copies_end(); }
/// Waits until all of this thread's groups are there; the others' are after a barrier.
__device__ __forceinline__ void copies_wait() { emulated_copies_wait(0); }
/// The same, but for the last so many groups.
template <int GROUPS> __device__ __forceinline__ void copies_wait_but() { emulated_copies_wait(GROUPS); }
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
__device__ __forceinline__ void ldmatrix(u32& a, u32& b, u32& c, u32& d, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_transposed(u32& a, u32& b, u32& c, u32& d, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared_address(row)));
}
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(real ? 16 : 0));
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
template <int GROUPS> __device__ __forceinline__ void copies_wait_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
#endif
