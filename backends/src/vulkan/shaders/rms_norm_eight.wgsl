// Root-mean-square norm over rows of d elements, a multiple of eight: a workgroup for each row, whose threads keep up to OWN times eight
// elements of it. All that is read is asked for before the first sum.

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    var x: array<Eight, OWN>;
    var scale: array<Eight, OWN>;
    for (var o = 0u; o < OWN; o++) {
        let i = (o * THREADS + thread) * 8u;
        if (i < p.d) {
            x[o] = eight_x(row + i);
            scale[o] = eight_gamma(i);
        }
    }
    var squares = 0.0f;
    for (var o = 0u; o < OWN; o++) {
        if ((o * THREADS + thread) * 8u < p.d) {
            let four = x[o].even * x[o].even + x[o].odd * x[o].odd;
            squares += (four.x + four.y) + (four.z + four.w);
        }
    }
    let r = 1.0f / sqrt(block_sum(thread, squares) / f32(p.d) + p.eps);
    for (var o = 0u; o < OWN; o++) {
        let i = (o * THREADS + thread) * 8u;
        if (i < p.d) { set_eight_y(row + i, Eight(x[o].even * r * scale[o].even, x[o].odd * r * scale[o].odd)); }
    }
    if (thread == 0u) { set_rstd(group, r); }
}
