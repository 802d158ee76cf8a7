// Root-mean-square norm over rows of d elements: a workgroup for each row.

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    var squares = 0.0f;
    for (var i = thread; i < p.d; i += THREADS) { squares += get_x(row + i) * get_x(row + i); }
    let r = 1.0f / sqrt(block_sum(thread, squares) / f32(p.d) + p.eps);
    for (var i = thread; i < p.d; i += THREADS) { set_y(row + i, get_x(row + i) * r * get_gamma(i)); }
    if (thread == 0u) { set_rstd(group, r); }
}
