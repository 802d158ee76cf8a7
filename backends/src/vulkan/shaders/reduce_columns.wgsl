// Sum, mean or maximum over the middle axis of x [outer, n, inner]: a thread for each result and chunk of the axis; neighbouring
// threads read neighbouring elements.

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (i >= p.results * p.chunks) { return; }
    let at = i % p.results;
    let part = i / p.results;
    let column = at / p.inner * p.n * p.inner + at % p.inner;
    let last = min((part + 1u) * p.chunk, p.n);
    var acc = start();
    // Sums of 16 first: a long sum in one go loses digits.
    for (var j0 = part * p.chunk; j0 < last; j0 += 16u) {
        var sixteen = start();
        for (var j = j0; j < min(j0 + 16u, last); j++) { sixteen = join(sixteen, get_x(column + j * p.inner)); }
        acc = join(acc, sixteen);
    }
    if (HAS_PARTS) { set_parts(i, acc); } else { set_y(at, end(acc)); }
}
