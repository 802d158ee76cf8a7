// Where the heads lie in packed queries, keys and values, and what the tensor cores' softmaxes share. HEAD is the width of a head.

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

/// Extents of the packed qkv [batch, tokens, (heads + 2 kv_heads) HEAD].
struct Heads {
    int batch, tokens, heads, kv_heads, causal;
    float scale;

    __device__ __forceinline__ i64 pitch() const { return (i64)(heads + 2 * kv_heads) * HEAD; }
    __device__ __forceinline__ i64 query(int b, int h) const { return (i64)b * tokens * pitch() + (i64)h * HEAD; }
    __device__ __forceinline__ i64 key(int b, int g) const { return query(b, heads + g); }
    __device__ __forceinline__ i64 value(int b, int g) const { return query(b, heads + kv_heads + g); }
    __device__ __forceinline__ i64 result(int b, int h) const { return ((i64)b * tokens * heads + h) * HEAD; }
    __device__ __forceinline__ i64 result_pitch() const { return (i64)heads * HEAD; }
    __device__ __forceinline__ i64 row(int b, int h) const { return ((i64)b * heads + h) * tokens; }
};

/// Sum, or maximum, over the four lanes that have the columns of a row.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(WHOLE_WARP, x, 1);
    return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 2));
}
