// Blocks of a cluster (from Hopper on), which run at the same time and read each other's shared memory.

/// All threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
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
