// Softmax over rows of d elements, and its gradient: a block for each row.

#define THREADS 128

KERNEL softmax(const T* x, int d, T* y) {
    begin();
    __shared__ float room[THREADS / 32];
    x += (i64)blockIdx.x * d, y += (i64)blockIdx.x * d;
    float greatest = -INF_F, sum = 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) greatest = fmaxf(greatest, to_float(x[i]));
    greatest = block_max<THREADS>(greatest, room);
    // A NaN, and a row of -inf, make the sum NaN.
    for (int i = threadIdx.x; i < d; i += THREADS) sum += expf(to_float(x[i]) - greatest);
    sum = block_sum<THREADS>(sum, room);
    for (int i = threadIdx.x; i < d; i += THREADS) y[i] = from_float<T>(expf(to_float(x[i]) - greatest) / sum);
}

KERNEL softmax_grad(const T* y, const T* dy, int d, T* dx) {
    begin();
    __shared__ float room[THREADS / 32];
    i64 row = (i64)blockIdx.x * d;
    float dot = 0.0f;
    for (int i = threadIdx.x; i < d; i += THREADS) dot += to_float(y[row + i]) * to_float(dy[row + i]);
    dot = block_sum<THREADS>(dot, room);
    for (int i = threadIdx.x; i < d; i += THREADS)
        dx[row + i] = from_float<T>(to_float(y[row + i]) * (to_float(dy[row + i]) - dot));
}
