// The results of the chunks of a reduction together, in order.

fn kernel(group: u32, thread: u32) {
    let at = group * THREADS + thread;
    if (at >= p.results) { return; }
    var acc = start();
    for (var part = 0u; part < p.chunks; part++) { acc = join(acc, get_parts(part * p.results + at)); }
    set_y(at, end(acc));
}
