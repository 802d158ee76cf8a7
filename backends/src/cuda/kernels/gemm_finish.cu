// The end of products whose k was cut into chunks (gemm_added_hopper.cu).

/// The sums of all chunks in order, four elements for each thread; `total` is a multiple of 4.
KERNEL gemm_finish(const float* partial, i64 total, int chunks, T* out CHAIN_PARAMETERS) {
    begin();
    i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at >= total) return;
    float4 sum = *(const float4*)(partial + at);
#pragma unroll 8
    for (int i = 1; i < chunks; i++) {
        float4 v = *(const float4*)(partial + i * total + at);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    Vector<T, 4> v;
    v.two = pack(sum.x, sum.y, T()) | (u64)pack(sum.z, sum.w, T()) << 32;
    const Chain& chain = CHAIN;
    put<4>(out, at, v, chain, chain.load<4>(at));
}
