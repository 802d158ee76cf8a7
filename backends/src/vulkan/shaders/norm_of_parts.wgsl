// The root of the sum of all parts, each a sum and its factor: one workgroup. What a sum loses is carried along (Kahan).

fn kernel(group: u32, thread: u32) {
    var greatest = 0.0f;
    for (var i = thread; i < p.parts_count; i += THREADS) {
        greatest = max_nan(greatest, select(get_parts(2u * i + 1u), 0.0f, get_parts(2u * i) == 0.0f));
    }
    let scale = power_below(block_max(thread, greatest));
    var sum = 0.0f;
    var lost = 0.0f;
    for (var i = thread; i < p.parts_count; i += THREADS) {
        let factor = get_parts(2u * i + 1u) / scale;
        let x = get_parts(2u * i) * factor * factor - lost;
        let next = sum + x;
        // What an infinity loses is not a number.
        lost = select(0.0f, (next - sum) - x, is_finite(next));
        sum = next;
    }
    sum = block_sum(thread, sum);
    if (thread == 0u) { set_norm(0u, sqrt(sum) * scale); }
}
