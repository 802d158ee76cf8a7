// parts[first + group] = sum of squares of EACH elements, split into a sum and a factor of a power of 2, so that no square overflows or
// underflows: the exponent of the largest element.

fn kernel(group: u32, thread: u32) {
    let begin = group * EACH;
    let last = min(begin + EACH, p.n);
    var greatest = 0.0f;
    for (var i = begin + thread; i < last; i += THREADS) { greatest = max_nan(greatest, abs(get_x(i))); }
    greatest = block_max(thread, greatest);
    let scale = power_below(greatest);
    var sum = 0.0f;
    for (var i = begin + thread; i < last; i += THREADS) {
        let v = get_x(i) / scale;
        sum += v * v;
    }
    sum = block_sum(thread, sum);
    if (thread == 0u) {
        set_parts(2u * (p.first + group), sum);
        set_parts(2u * (p.first + group) + 1u, scale);
    }
}
