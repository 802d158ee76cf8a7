// Sum, mean or maximum over the last axis of x [results, n]: a workgroup for each row and chunk of it.

fn kernel(group: u32, thread: u32) {
    let row = group / p.chunks;
    let part = group % p.chunks;
    let last = min((part + 1u) * p.chunk, p.n);
    var acc = start();
    for (var i = part * p.chunk + thread; i < last; i += THREADS) { acc = join(acc, get_x(row * p.n + i)); }
    if (FUNCTION == 2u) { acc = block_max(thread, acc); } else { acc = block_sum(thread, acc); }
    if (thread == 0u) {
        if (HAS_PARTS) { set_parts(part * p.results + row, acc); } else { set_y(row, end(acc)); }
    }
}
