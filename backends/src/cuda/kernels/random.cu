// The random numbers of ir/src/philox.rs: the same bits as on the CPU, for which the compiler must not join products and sums.
// DISTRIBUTION: 0 uniform, 1 normal, 2 gumbel, 3 the words themselves. U is float, or u32 for the words.

#define UNIT (1.0f / 16777216.0f)

__device__ float unit(u32 word) { return (float)(int)(word >> 8) * UNIT; }

/// The natural logarithm of a positive normal number.
__device__ float ln(float x) {
    int bits = (int)__float_as_uint(x);
    int e = (int)((u32)bits - 0x3f3504f3u) >> 23;
    float m = __uint_as_float((u32)bits - ((u32)e << 23)) - 1.0f;
    float fe = (float)e, z = m * m;
    float p = 7.0376836e-2f;
    p = p * m - 1.151461e-1f;
    p = p * m + 1.1676999e-1f;
    p = p * m - 1.2420141e-1f;
    p = p * m + 1.4249323e-1f;
    p = p * m - 1.6668058e-1f;
    p = p * m + 2.0000715e-1f;
    p = p * m - 2.4999994e-1f;
    p = p * m + 3.3333331e-1f;
    float y = p * m * z + fe * -2.1219444e-4f - 0.5f * z;
    return (m + y) + fe * 0.6933594f;
}

/// (cos, sin) of u turns, 0 <= u < 1.
__device__ void cos_sin_turns(float u, float& c, float& s) {
    int quarter = (int)(u * 4.0f + 0.5f);
    float x = (u - (float)quarter * 0.25f) * 6.2831853071795864769f;
    float z = x * x;
    float sine = ((-1.9515296e-4f * z + 8.3321609e-3f) * z - 1.6666655e-1f) * z * x + x;
    float cosine = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - 0.5f * z + 1.0f;
    bool turned = quarter & 1;
    float a = turned ? sine : cosine, b = turned ? cosine : sine;
    c = ((quarter + 1) & 2) ? -a : a;
    s = (quarter & 2) ? -b : b;
}

__device__ float gumbel(u32 word) {
    float u = (float)(int)((word >> 8) | 1u) * UNIT;
    return -ln(-ln(u));
}

/// One thread makes one block of four numbers.
KERNEL random_numbers(const u32* key, u32 stream, i64 elements, U* out) {
    begin();
    u64 block = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if ((i64)(block * 4) >= elements) return;
    Words words = philox(key[0], key[1], block, stream, 0);
    U numbers[4];
    for (int pair = 0; pair < 4; pair += 2) {
        u32 a = words.w[pair], b = words.w[pair + 1];
#if DISTRIBUTION == 0
        numbers[pair] = unit(a), numbers[pair + 1] = unit(b);
#elif DISTRIBUTION == 1
        float r = sqrtf(-2.0f * ln(unit(a) + UNIT)), c, s;
        cos_sin_turns(unit(b), c, s);
        numbers[pair] = r * c, numbers[pair + 1] = r * s;
#elif DISTRIBUTION == 2
        numbers[pair] = gumbel(a), numbers[pair + 1] = gumbel(b);
#else
        numbers[pair] = a, numbers[pair + 1] = b;
#endif
    }
    for (int i = 0; i < 4; i++)
        if ((i64)(block * 4) + i < elements) out[block * 4 + i] = numbers[i];
}
