// The sums of the parts of k together, in their order, and what is added to them: a thread for each element.

fn kernel(group: u32, thread: u32) {
    let at = group * THREADS + thread;
    if (at >= p.total) { return; }
    var v = 0.0f;
    for (var part = 0u; part < p.parts; part++) { v += get_sums(part * p.total + at); }
    if (HAS_BIAS) { v += get_bias(at % p.n); }
    set_c(at, v);
}
