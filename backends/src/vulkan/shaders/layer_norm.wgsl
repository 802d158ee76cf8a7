// Layer norm over rows of d elements: a workgroup for each row.

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    var sum = 0.0f;
    for (var i = thread; i < p.d; i += THREADS) { sum += get_x(row + i); }
    let m = block_sum(thread, sum) / f32(p.d);
    var squares = 0.0f;
    for (var i = thread; i < p.d; i += THREADS) {
        let distance = get_x(row + i) - m;
        squares += distance * distance;
    }
    let r = 1.0f / sqrt(block_sum(thread, squares) / f32(p.d) + p.eps);
    for (var i = thread; i < p.d; i += THREADS) {
        set_y(row + i, (get_x(row + i) - m) * r * get_gamma(i) + get_beta(i));
    }
    if (thread == 0u) {
        set_mean(group, m);
        set_rstd(group, r);
    }
}
