// What Hopper has of its own (sm_90a): tiles that come by the tensor memory accelerator, barriers that count their bytes, and
// products of a whole warpgroup (wgmma) on tiles in shared memory.

/// A tensor in global memory and the box that is copied of it, as the driver encodes it.
struct __align__(64) TensorMap { u64 words[16]; };

/// Makes a barrier of so many arrivals.
__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
/// Makes what was initialised known to the whole cluster and to the copies.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
/// Arrives, and has the barrier wait for so many bytes of copies too.
__device__ __forceinline__ void arrive_with_bytes(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
/// Arrives.
__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Arrives at the same barrier of block `block` of the cluster.
__device__ __forceinline__ void arrive_at(u64* barrier, u32 block) {
    asm volatile("{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
                 " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)), "r"(block)
                 : "memory");
}
/// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    asm volatile("{\n .reg .pred over;\nAGAIN:\n mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 " @over bra DONE;\n bra AGAIN;\nDONE:\n}" ::"r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}
/// Starts to copy the box at (x, y, z); `barrier` counts its bytes.
__device__ __forceinline__ void load_box(void* to, const TensorMap* map, int x, int y, int z, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(shared_address(to)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
                 : "memory");
}
/// The same to the blocks of the cluster whose bits are set in `blocks`, at the same place in each.
__device__ __forceinline__ void load_box_to(u16 blocks, void* to, const TensorMap* map, int x, int y, int z, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "h"(blocks)
                 : "memory");
}

/// Gives registers of this warpgroup back, or takes more: a block's all together stay what they were at its start.
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/// Before a warpgroup's products: its registers are as they were written.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Ends a group of products.
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until all groups but the last `GROUPS` are done.
template <int GROUPS> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
/// What was written to shared memory by ordinary stores is seen by products and copies after the next barrier.
__device__ __forceinline__ void stores_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Waits for `threads` threads at one of the block's 16 barriers.
__device__ __forceinline__ void named_barrier(int which, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(threads) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements to shared memory, transposed: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_transposed(void* row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/// Where a pipeline of STAGES stages is: a stage, and the parity of its round.
template <int STAGES> struct Round {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

/// Describes a tile in shared memory to wgmma: rows of 128 bytes, swizzled; `apart` bytes between blocks of 64 of several that do
/// not lie along k.
__device__ __forceinline__ u64 described(const void* at, u32 apart = 16) {
    return (u64)((shared_address(at) & 0x3ffff) >> 4) | (u64)(apart >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
/// From 16 elements of k to the next, as descriptions count: of rows that lie along k, and of others.
#define ALONG_K 2
#define ACROSS_K 128
