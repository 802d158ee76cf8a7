// out[e] = sum of the rows of its segment: a thread for each expert and column.

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (i >= p.experts * p.width) { return; }
    let column = i % p.width;
    let first = u32(get_offsets(i / p.width));
    let last = u32(get_offsets(i / p.width + 1u));
    var sum = 0.0f;
    for (var s0 = first; s0 < last; s0 += 16u) {
        var part = 0.0f;
        for (var s = s0; s < min(s0 + 16u, last); s++) { part += get_rows(s * p.width + column); }
        sum += part;
    }
    set_y(i, sum);
}
