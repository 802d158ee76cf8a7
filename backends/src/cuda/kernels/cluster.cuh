// Blocks of a cluster (from Hopper on), which run at the same time and read each other's shared memory.

/// All threads of the cluster arrive, and each goes on; one that has ended has arrived.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
/// Waits until all have arrived.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
/// All threads of the cluster.
__device__ __forceinline__ void cluster_sync() { cluster_arrive(), cluster_wait(); }
__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
/// A number in the shared memory of block `block` of the cluster, at the same place as this block's `own`. It must have been written
/// before the last cluster_sync, and its block must not end before the next.
__device__ __forceinline__ float number_of(const float* own, u32 block) {
    float x;
    asm volatile("{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %1, %2;\n ld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(x)
                 : "r"(shared_address(own)), "r"(block)
                 : "memory");
    return x;
}
/// Writes a number to the shared memory of block `block` of the cluster, at the same place as this block's `own`. The block must have
/// begun, and reads it behind the next cluster_arrive of this one.
__device__ __forceinline__ void give_number(float* own, u32 block, float x) {
    asm volatile("{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n st.shared::cluster.f32 [there], %2;\n}"
                 :
                 : "r"(shared_address(own)), "r"(block), "f"(x)
                 : "memory");
}
