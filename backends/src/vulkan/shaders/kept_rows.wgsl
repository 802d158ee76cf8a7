// The tiles of a row together: a workgroup for each row.

// p (ln p - ln q), and 0 where p is.
fn divergence(log_p: f32, log_q: f32) -> f32 {
    let prob = e_to(log_p);
    return select(prob * (log_p - log_q), 0.0f, prob == 0.0f);
}

fn kernel(row: u32, thread: u32) {
    let all = p.n * p.tiles;
    var first = row * p.tiles;
    var hard = 0.0f;
    if (SOFT) {
        let found = row_sums(thread, first, all);
        hard = found.x + ln(found.y);
        first += 2u * all;
    }
    let found = row_sums(thread, first, all);
    let tail = select(found.x + ln(found.y), -inf(), found.y == 0.0f);
    let own = row * p.kept;
    var most = tail;
    for (var k = thread; k < p.kept; k += THREADS) { most = max_nan(most, get_kept_logits(own + k)); }
    most = block_max(thread, most);
    var sum = 0.0f;
    for (var k = thread; k < p.kept; k += THREADS) { sum += e_to(get_kept_logits(own + k) - most); }
    let soft = most + ln(block_sum(thread, sum) + e_to(tail - most));
    sum = 0.0f;
    for (var k = thread; k < p.kept; k += THREADS) {
        sum += divergence(get_log_p(own + k), get_kept_logits(own + k) - soft);
    }
    sum = block_sum(thread, sum);
    if (thread > 0u) { return; }
    if (!SOFT) { hard = soft; }
    set_lse(row, hard);
    set_soft_lse(row, soft);
    set_tail_lse(row, tail);
    let counts = row_loss(row, hard);
    sum += divergence(get_log_tail(row), tail - soft);
    set_kd(row, select(counts * p.temperature * p.temperature * sum, 0.0f, counts == 0.0f));
}
