// The statistics of each expert: a workgroup for each. counts: all choices; shares: the part of the load-balancing loss.

fn kernel(expert: u32, thread: u32) {
    var prob = 0.0f;
    var all = 0;
    var counted = 0;
    for (var t = thread; t < p.n; t += THREADS) {
        prob += get_probabilities(t * p.experts + expert);
        for (var j = 0u; j < p.k; j++) {
            if (get_index(t * p.k + j) == i32(expert)) {
                all++;
                if (j < p.counted) { counted++; }
            }
        }
    }
    prob = block_sum(thread, prob);
    all = block_count(thread, all);
    counted = block_count(thread, counted);
    if (thread == 0u) {
        set_counts(expert, all);
        let n = f32(p.n);
        // Without tokens there is no loss.
        set_shares(expert, select(0.0f, (prob / n) * (f32(counted) / (n * f32(p.counted))), p.n > 0u));
    }
}
