// The gradient of softmax over rows of d elements: a workgroup for each row.

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    var dot = 0.0f;
    for (var i = thread; i < p.d; i += THREADS) { dot += get_y(row + i) * get_dy(row + i); }
    dot = block_sum(thread, dot);
    for (var i = thread; i < p.d; i += THREADS) { set_dx(row + i, get_y(row + i) * (get_dy(row + i) - dot)); }
}
