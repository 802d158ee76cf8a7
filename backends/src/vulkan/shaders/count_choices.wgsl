// The counted choices of each expert: a workgroup for each.

fn kernel(expert: u32, thread: u32) {
    var count = 0;
    for (var i = thread; i < p.n * p.counted; i += THREADS) {
        if (get_index(i / p.counted * p.k + i % p.counted) == i32(expert)) { count++; }
    }
    count = block_count(thread, count);
    if (thread == 0u) { set_counts(expert, count); }
}
