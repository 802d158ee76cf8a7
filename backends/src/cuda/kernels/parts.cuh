// An f32 number is the exact sum of three bf16 numbers, each with 8 of its 24 digits. A product of two such sums is made of the
// six products of parts whose digits reach into f32; what is left out is below 2^-24 of the product.

/// The first part of a number, and what is left of it: the digits are cut off, so that the first is never beyond the largest.
__device__ __forceinline__ u16 first_part(float& x) {
    u32 bits = __float_as_uint(x) & 0xffff0000u;
    x -= __uint_as_float(bits);
    return (u16)(bits >> 16);
}

/// The parts of numbers that lie together.
template <int PARTS, int COUNT, typename Element>
__device__ __forceinline__ void parts_of(Vector<u16, COUNT> (&parts)[PARTS], const Vector<Element, COUNT>& numbers) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        float x = to_float(numbers.at[j]);
#pragma unroll
        for (int p = 0; p < PARTS; p++) parts[p].at[j] = first_part(x);
    }
}

/// The sums of the chunks of k together, in order.
KERNEL parts_finish(const float* partial, i64 total, int chunks, float* c) {
    begin();
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < total) c[at] = sum_of_chunks(partial, total, chunks, at);
}
