// The statistics of all tokens: one workgroup.

fn kernel(group: u32, thread: u32) {
    var z = 0.0f;
    var entropy = 0.0f;
    var loss = 0.0f;
    for (var t = thread; t < p.n; t += THREADS) {
        z += get_of_tokens(2u * t);
        entropy += get_of_tokens(2u * t + 1u);
    }
    for (var e = thread; e < p.experts; e += THREADS) { loss += get_shares(e); }
    z = block_sum(thread, z);
    entropy = block_sum(thread, entropy);
    loss = block_sum(thread, loss);
    if (thread == 0u) {
        let n = f32(p.n);
        set_balance(0u, f32(p.experts) * loss);
        set_z(0u, select(0.0f, z / n, p.n > 0u));
        set_entropy(0u, select(0.0f, entropy / n, p.n > 0u));
    }
}
