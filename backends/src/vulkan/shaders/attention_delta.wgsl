// delta [batch, heads, tokens] = dy . y: a thread for each.

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (i >= p.rows) { return; }
    let t = i % p.tokens;
    let h = i / p.tokens % p.heads;
    let at = ((i / p.tokens / p.heads * p.tokens + t) * p.heads + h) * HEAD;
    var sum = 0.0f;
    for (var c = 0u; c < p.head; c++) { sum += get_y(at + c) * get_dy(at + c); }
    set_delta(i, sum);
}
