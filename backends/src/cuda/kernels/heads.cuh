// Where the heads lie in packed queries, keys and values. HEAD is the width of a head.

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
